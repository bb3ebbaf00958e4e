"""Recall at k between pictures and captions from a similarity matrix."""

from collections.abc import Sequence

import numpy as np

from mmtransformer.serialization.printable import counted


def recall_at_k(
    similarity: np.ndarray, image_of_caption: Sequence[int], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Measure retrieval both ways; a picture may have several captions.

    A picture is found by any of its captions; the rank of a picture is the rank of its best caption
    (as for COCO and Flickr30k). Ties count against the model: what scores the same stands before the right
    one, so a model that gives every pair one score finds nothing.

    Args:
        similarity: (pictures captions), larger means nearer.
        image_of_caption: For each caption, the row of its picture.
        ks: The ranks to look at.

    Returns:
        ``text_recall@k`` (image to captions), ``image_recall@k`` (caption to pictures) as fractions of 1,
        and ``text_median_rank``, ``image_median_rank`` (1 is best).

    Raises:
        ValueError: If the sizes do not fit, a picture has no caption, or a number is not finite.
    """
    similarity = np.asarray(similarity, dtype=np.float64)
    owner = np.asarray(image_of_caption, dtype=np.int64)
    if similarity.ndim != 2 or similarity.shape[1] != len(owner):
        raise ValueError(
            f"similarity has shape {similarity.shape}, but image_of_caption names {counted(len(owner), 'caption')}; "
            "give one row a picture and one column a caption"
        )
    images = similarity.shape[0]
    if len(owner) and (owner.min() < 0 or owner.max() >= images):
        raise ValueError(
            f"image_of_caption holds {owner.min()} to {owner.max()}, but the pictures are 0 to {images - 1}"
        )
    alone = np.setdiff1d(np.arange(images), owner)
    if len(alone):
        raise ValueError(f"no caption belongs to {counted(len(alone), 'picture')}, the first is row {alone[0]}")
    if not np.isfinite(similarity).all():
        raise ValueError(f"similarity holds {int((~np.isfinite(similarity)).sum())} numbers that are not finite")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks {tuple(ks)} must be ranks from 1")

    mine = owner[None, :] == np.arange(images)[:, None]
    best = np.where(mine, similarity, -np.inf).max(1)
    text_rank = 1 + ((similarity >= best[:, None]) & ~mine).sum(1)
    right = similarity[owner, np.arange(len(owner))]
    image_rank = (similarity >= right[None, :]).sum(0)  # the right picture counts itself
    out: dict[str, float] = {}
    for way, rank in (("text", text_rank), ("image", image_rank)):
        out |= {f"{way}_recall@{k}": float((rank <= k).mean()) for k in ks}
        out[f"{way}_median_rank"] = float(np.median(rank))
    return out
