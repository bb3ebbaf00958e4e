"""Large pictures cut into tiles, as LLaVA-NeXT and Idefics3 do: whole pictures would be too coarse for a small tower.

Shapes: t tiles of h x w px, the size that a transform gives.
"""

import math
from collections.abc import Iterable

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from mmtransformer.images.pinpoints import best_pinpoint
from mmtransformer.images.transforms import ImageTransform

_LONGEST = 4096  # px, of a side, in Idefics3


def fitted_tiles(image: Image.Image, transform: ImageTransform, pinpoints: Iterable[tuple[int, int]]) -> Tensor:
    """A picture squashed to a tile, then its tiles row by row: it is fitted into the best of some sizes (LLaVA-NeXT).

    Args:
        image: a picture of mode RGB.
        transform: gives a tile, and squashes.
        pinpoints: the (height, width) to choose from, px, each of whole tiles; see `best_pinpoint`.

    Returns:
        Pixels (t 3 h w). What the picture does not fill is black.
    """
    (h, w), (height, width) = transform.size, best_pinpoint((image.height, image.width), pinpoints)
    if width / image.width < height / image.height:
        size = min(math.ceil(image.height * (width / image.width)), height), width
    else:
        size = height, min(math.ceil(image.width * (height / image.height)), width)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    canvas = torch.zeros(3, height, width, dtype=torch.uint8)
    canvas[:, top : top + size[0], left : left + size[1]] = transform.resized(image, size)
    tiles = rearrange(canvas, "c (r h) (s w) -> (r s) c h w", h=h, w=w)
    return transform.normalized(torch.cat((transform.resized(image, (h, w))[None], tiles)))


def split_tiles(
    image: Image.Image, transform: ImageTransform, longest_edge: int, *, split: bool = True
) -> tuple[Tensor, tuple[int, int]]:
    """A picture's tiles row by row, then all of it squashed to a tile; small pictures are enlarged first (Idefics3).

    Every resizing rounds to bytes, as there.

    Args:
        image: a picture of mode RGB.
        transform: gives a tile, a square, and squashes.
        longest_edge: what the picture's longer side is brought to, px, before both grow to whole tiles.
        split: whether there are tiles; without, there is the whole view alone.

    Returns:
        Pixels (t 3 h w), and rows and columns of tiles: (0, 0) where the whole view is alone.
    """
    side, (height, width) = transform.size[0], (image.height, image.width)
    ratio = width / height
    if width >= height:
        height = int(longest_edge / ratio)
        height, width = height + height % 2, longest_edge
    else:
        width = int(longest_edge * ratio)
        height, width = longest_edge, width + width % 2
    height, width = max(height, 1), max(width, 1)
    if max(height, width) > _LONGEST:
        ratio = width / height
        height, width = (
            (max(int(_LONGEST / ratio), 1), _LONGEST) if width >= height else (_LONGEST, max(int(_LONGEST * ratio), 1))
        )
    image = _resized(image, transform, (height, width))
    if split:
        ratio = width / height
        if width >= height:
            width = math.ceil(width / side) * side
            height = math.ceil(int(width / ratio) / side) * side
        else:
            height = math.ceil(height / side) * side
            width = math.ceil(int(height * ratio) / side) * side
        image = _resized(image, transform, (height, width))
    whole = transform.resized(image, (side, side))[None]
    if not split or max(height, width) <= side:
        return transform.normalized(whole), (0, 0)
    tiles = rearrange(transform.resized(image, (height, width)), "c (r h) (s w) -> (r s) c h w", h=side, w=side)
    return transform.normalized(torch.cat((tiles, whole))), (height // side, width // side)


def _resized(image: Image.Image, transform: ImageTransform, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(transform.resized(image, size).permute(1, 2, 0).contiguous().numpy())
