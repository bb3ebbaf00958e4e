"""Pictures at a size of their own: as many patches as allowed, in the picture's shape (NaFlex, arXiv:2502.14786)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmtransformer.layers.config import known_fields


@known_fields
@dataclass(frozen=True)
class NativeSize:
    """How large a picture becomes that keeps its own shape: both sides are whole patches.

    Args:
        patch_size: Side of a patch, px; that of the vision encoder.
        max_num_patches: The most patches of a picture, by the name that SigLIP 2's image processor has for it.
        enlarge: Whether smaller pictures are enlarged to about as many, as SigLIP 2 does; else they keep about their
            size (NaViT, arXiv:2307.06304).

    Raises:
        ValueError: If a number is not positive.
    """

    patch_size: int = 16
    max_num_patches: int = 256
    enlarge: bool = True

    def __post_init__(self) -> None:
        for name in ("patch_size", "max_num_patches"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"native.{name} ({value!r:.40}) must be a whole number, at least 1")

    @property
    def square(self) -> int:
        """Side of a square picture, px."""
        return math.isqrt(self.max_num_patches) * self.patch_size

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that a picture of height x width px gets: the scale is found by halving, as there."""
        low, high = 1e-6, 100.0
        if not self.enlarge and self._patches(height, width, 1.0) <= self.max_num_patches:
            low = high = 1.0
        while high - low >= 1e-5:
            scale = (low + high) / 2
            if self._patches(height, width, scale) <= self.max_num_patches:
                low = scale
            else:
                high = scale
        return self._side(height, low) * self.patch_size, self._side(width, low) * self.patch_size

    def num_patches(self, height: int, width: int) -> int:
        """How many patches a picture of height x width px becomes."""
        new_height, new_width = self.size_for(height, width)
        return new_height * new_width // self.patch_size**2

    def most_patches(self, height: int, width: int) -> int:
        """How many patches a picture of height x width px becomes at most, however it is cropped before."""
        return self.max_num_patches if self.enlarge else min(self.max_num_patches, self._patches(height, width, 1.0))

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
            f"fewer patches (NativeSize.max_num_patches)"
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
