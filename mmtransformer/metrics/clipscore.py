"""CLIPScore and RefCLIPScore of captions, from the vectors of any dual encoder (Hessel et al., arXiv:2104.08718).

Shapes: n pictures with a caption each, d width of the vectors, r references of a picture.
"""

from collections.abc import Sequence

import numpy as np

from mmtransformer.serialization.printable import counted

WEIGHT = 2.5
"""What the paper multiplies a cosine by, so that scores of CLIP ViT-B/32 lie between 0 and 1 (section 3)."""


def clip_score(image_features: np.ndarray, text_features: np.ndarray, *, weight: float = WEIGHT) -> np.ndarray:
    """How well captions fit their pictures: w max(cos(c, v), 0), a caption each.

    Args:
        image_features: The pictures' vectors (n d), of any length.
        text_features: The captions' vectors (n d).
        weight: w; the paper's 2.5. torchmetrics' CLIPScore has 100.

    Returns:
        (n,) float64; their mean is the score of a set.

    Raises:
        ValueError: If the shapes differ, or a vector is 0 or not finite.
    """
    v, c = _unit(image_features, "image_features"), _unit(text_features, "text_features")
    if v.shape != c.shape:
        raise ValueError(f"image_features are {v.shape} and text_features {c.shape}: give a vector each, of one width")
    return weight * np.maximum((v * c).sum(1), 0.0)


def ref_clip_score(
    image_features: np.ndarray,
    text_features: np.ndarray,
    reference_features: Sequence[np.ndarray],
    *,
    weight: float = WEIGHT,
) -> np.ndarray:
    """The harmonic mean of CLIPScore and of the largest cosine of a caption and one of its references, at least 0.

    Args:
        image_features: The pictures' vectors (n d).
        text_features: The captions' vectors (n d).
        reference_features: For each picture the vectors of its references (r d), one at least.
        weight: As of `clip_score`; the cosine of texts is not weighted.

    Returns:
        (n,) float64; 0 where either of both is.

    Raises:
        ValueError: As `clip_score`, or if a picture has no reference.
    """
    seen, c = clip_score(image_features, text_features, weight=weight), _unit(text_features, "text_features")
    if len(reference_features) != len(c):
        raise ValueError(
            f"there are references of {counted(len(reference_features), 'picture')}, and {counted(len(c), 'caption')}"
        )
    said = np.zeros(len(c))
    for i, some in enumerate(reference_features):
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
