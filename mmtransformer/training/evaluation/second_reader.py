"""A captioner as a second reader of drawings: what it says of them, and how far they are from true pictures to it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmtransformer.data.scenes.facts import score
from mmtransformer.data.scenes.scenes import SceneSplit
from mmtransformer.pipelines.image_captioner import ImageCaptioner


def read_by_captioner(
    captioner: ImageCaptioner, split: SceneSplit, language: str, drawings: Sequence[Image.Image]
) -> dict[str, float]:
    """What a captioner of scenes sees in drawings of a split's first texts.

    It errs by itself, so that what it says of the true pictures stands beside.

    Args:
        captioner: knows the language, and was trained on such scenes.
        split: known scenes.
        language: that it captions in.
        drawings: of the first scenes, in their order.

    Returns:
        "facts", the share of right ones that it says of the drawings; "true_facts", the same of the true pictures; and
        "distance", `frechet` between what its vision encoder makes of both.
    """
    true = [split.image(i) for i in range(len(drawings))]
    scenes = [split.scene(i) for i in range(len(drawings))]
    said = {
        name: score([row[0].text for row in captioner(images, language=language)], scenes, language).facts
        for name, images in (("facts", [*drawings]), ("true_facts", true))
    }
    return said | {"distance": frechet(_features(captioner, drawings), _features(captioner, true))}


@torch.inference_mode()
def _features(captioner: ImageCaptioner, images: Sequence[Image.Image]) -> NDArray[np.float64]:
    """What the vision encoder makes of each picture, averaged over its tokens: (n d)."""
    model: Any = captioner.inference_model()
    found = []
    for first in range(0, len(images), 16):
        batch = captioner.batch(images[first : first + 16])
        found.append(model.forward_features(batch.pixels)[:, 0].mean(1).double().cpu())
    return torch.cat(found).numpy()


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The Frechet distance of two clouds of points (n d) and (m d) as normal distributions ("FID", arXiv:1706.08500).

    |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)). Of fewer points than dimensions it is too large, so only distances
    of equally many points can be compared.

    Raises:
        ValueError: if there are fewer than two points.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a distance of clouds needs at least two points in each, not {len(a)} and {len(b)}")
    x, y = ((cloud - cloud.mean(0)) / (len(cloud) - 1) ** 0.5 for cloud in (a, b))
    # C = X'X and C' = Y'Y, and the singular values of XY' are the roots of C C''s eigenvalues.
    shared = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * shared)
