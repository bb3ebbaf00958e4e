"""Pictures at a size of their own: as many patches as allowed, in the picture's shape (NaFlex, arXiv:2502.14786)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from mmtransformer.images.files import load
from mmtransformer.images.transforms import ImageTransform
from mmtransformer.layers.config import known_fields


@known_fields
@dataclass(frozen=True)
class NativeTransform:
    """Turns a picture into pixels of about its own shape, both sides whole patches; for packed rows.

    Args:
        patch_size: Side of a patch, px.
        max_patches: The most patches of a picture; smaller pictures are enlarged to about as many.
        base: How they become pixels: mean, std, interpolation and backend count, its size and `resize` do not.
        enlarge: Whether small pictures are enlarged, as SigLIP 2 does; else they keep about their size (NaViT).

    Raises:
        ValueError: If a number is not positive.
    """

    patch_size: int = 16
    max_patches: int = 256
    base: ImageTransform = ImageTransform(interpolation="bilinear")  # noqa: RUF009 (frozen)
    enlarge: bool = True

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.max_patches < 1:
            raise ValueError(f"patch_size ({self.patch_size}) and max_patches ({self.max_patches}) must be at least 1")

    def __call__(self, image: Image.Image) -> Tensor:
        """Returns the pixels of a picture, (3 h w) float32, whose sides are multiples of patch_size."""
        if image.mode != "RGB":
            image = load(image)
        return self.base.normalized(self.base.resized(image, self.size_for(image.height, image.width)))

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that a picture of height x width px gets: the scale is found by halving, as there."""
        low, high = 1e-6, 100.0
        if not self.enlarge and self._patches(height, width, 1.0) <= self.max_patches:
            low = high = 1.0
        while high - low >= 1e-5:
            scale = (low + high) / 2
            if self._patches(height, width, scale) <= self.max_patches:
                low = scale
            else:
                high = scale
        return self._side(height, low) * self.patch_size, self._side(width, low) * self.patch_size

    def _side(self, length: int, scale: float) -> int:
        return max(1, math.ceil(length * scale / self.patch_size))

    def _patches(self, height: int, width: int, scale: float) -> int:
        return self._side(height, scale) * self._side(width, scale)


def packed_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Which pictures share a row: the longest first, each into the first row that has room (first fit).

    Args:
        lengths: Tokens of each picture.
        max_tokens: The most tokens of a row.

    Returns:
        The numbers of each row's pictures, in order; every picture once.

    Raises:
        ValueError: If a picture alone is longer than a row.
    """
    if too_long := [i for i, length in enumerate(lengths) if length > max_tokens]:
        raise ValueError(
            f"picture {too_long[0]} has {lengths[too_long[0]]} tokens, and a row {max_tokens}: allow longer rows, or "
            f"fewer patches (NativeTransform.max_patches)"
        )
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[place].append(i)
        room[place] -= lengths[i]
    return [sorted(row) for row in rows]
