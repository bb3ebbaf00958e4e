"""CLIPScore and RefCLIPScore of captions, from the vectors of any dual encoder (Hessel et al., arXiv:2104.08718).

Shapes: n pictures with a caption each, d width of the vectors, r references of a picture.
"""

from collections.abc import Sequence

import numpy as np

from mmtransformer.serialization.printable import counted

WEIGHT = 2.5
"""What the paper multiplies a cosine by, so that scores of CLIP ViT-B/32 lie between 0 and 1 (section 3)."""


def clip_score(images: np.ndarray, captions: np.ndarray, *, weight: float = WEIGHT) -> np.ndarray:
    """How well captions fit their pictures: w max(cos(c, v), 0), a caption each.

    Args:
        images: The pictures' vectors (n d), of any length.
        captions: The captions' vectors (n d).
        weight: w; the paper's 2.5. torchmetrics' CLIPScore has 100.

    Returns:
        (n,) float64; their mean is the score of a set.

    Raises:
        ValueError: If the shapes differ, or a vector is 0 or not finite.
    """
    v, c = _unit(images, "images"), _unit(captions, "captions")
    if v.shape != c.shape:
        raise ValueError(f"images are {v.shape} and captions {c.shape}: give a vector each, of one width")
    return weight * np.maximum((v * c).sum(1), 0.0)


def ref_clip_score(
    images: np.ndarray, captions: np.ndarray, references: Sequence[np.ndarray], *, weight: float = WEIGHT
) -> np.ndarray:
    """The harmonic mean of CLIPScore and of the largest cosine of a caption and one of its references, at least 0.

    Args:
        images: The pictures' vectors (n d).
        captions: The captions' vectors (n d).
        references: For each picture the vectors of its references (r d), one at least.
        weight: As of `clip_score`; the cosine of texts is not weighted.

    Returns:
        (n,) float64; 0 where either of both is.

    Raises:
        ValueError: As `clip_score`, or if a picture has no reference.
    """
    seen, c = clip_score(images, captions, weight=weight), _unit(captions, "captions")
    if len(references) != len(c):
        raise ValueError(
            f"there are references of {counted(len(references), 'picture')}, and {counted(len(c), 'caption')}"
        )
    said = np.zeros(len(c))
    for i, some in enumerate(references):
        if len(some) == 0:
            raise ValueError(f"picture {i} has no reference; give one at least, or take clip_score")
        said[i] = max(float((_unit(some, f"references of picture {i}") @ c[i]).max()), 0.0)
    total = seen + said
    return np.divide(2 * seen * said, total, out=np.zeros_like(total), where=total > 0)


def _unit(vectors: np.ndarray, name: str) -> np.ndarray:
    x = np.asarray(vectors, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"{name} are vectors (n d), not an array of shape {x.shape}")
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    if not (np.isfinite(norm).all() and (norm > 0).all()):
        bad = int(np.flatnonzero(~np.isfinite(norm[:, 0]) | (norm[:, 0] <= 0))[0])
        raise ValueError(f"{name}: vector {bad} is 0 or not finite")
    return x / norm
