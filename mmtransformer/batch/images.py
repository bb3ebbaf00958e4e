"""Pictures of sizes of their own, as patches: in one row, or filled up to the most that one has.

Shapes: b samples of i pictures each, p patches of the picture that has most, c channels or numbers of a patch, s
patches of all pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmtransformer.batch.base import Batch


@dataclass
class PackedImages(Batch):
    """Pictures of any sizes, as patches in one row.

    Attributes:
        patches: (s (c y x)), the pictures' patches one after the other, row by row, of c channels and y x x px.
        grids: rows and columns of patches of each picture.
    """

    patches: Tensor
    grids: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, images: Sequence[Tensor], patch_size: int) -> Self:
        """Packs pictures.

        Args:
            images: n of (c height width), of any sizes that the patches cover exactly.
            patch_size: side of a patch, px.

        Raises:
            ValueError: if there is no picture, or naming one that the patches do not cover.
        """
        if not images:
            raise ValueError("a row needs at least one picture")
        grids = []
        for i, image in enumerate(images):
            height, width = image.shape[-2:]
            if image.ndim != 3 or height % patch_size or width % patch_size or not height or not width:
                raise ValueError(
                    f"picture {i} of {tuple(image.shape)} is not (channels, height, width) with sides divisible by "
                    f'{patch_size}: an ImageTransform with resize "native" makes such'
                )
            grids.append((height // patch_size, width // patch_size))
        pattern = "c (gh y) (gw x) -> (gh gw) (c y x)"
        patches = [rearrange(image, pattern, y=patch_size, x=patch_size) for image in images]
        return cls(torch.cat(patches), tuple(grids))

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.grids)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many patches each picture has."""
        return tuple(rows * columns for rows, columns in self.grids)


def pad_images(images: Sequence[Sequence[Tensor]], patch_size: int) -> tuple[Tensor, Tensor]:
    """Cuts pictures into patches and fills them up.

    Args:
        images: b samples, as many pictures each, (3 height width) with sides that patches divide.
        patch_size: side of a patch, px.

    Returns:
        The patches (b i p c), and the rows and columns of them that each picture has (b i 2) long.

    Raises:
        ValueError: as `PackedImages.of`, and for samples with different numbers of pictures.
    """
    counts = {len(sample) for sample in images}
    if len(counts) != 1:
        raise ValueError(f"samples have {sorted(counts)} pictures: all must have the same number")
    packed = PackedImages.of([image for sample in images for image in sample], patch_size)
    rows = pad_sequence(list(packed.patches.split(packed.lengths)), batch_first=True)
    shape = (len(images), counts.pop())
    return rows.unflatten(0, shape), torch.tensor(packed.grids).unflatten(0, shape)


def token_mask(grids: Tensor, count: int, num_prefix_tokens: int = 0) -> Tensor:
    """Which of `count` tokens of each picture are there: (... 2) -> (... count) bool."""
    patches = grids.prod(-1, keepdim=True)
    lengths = patches + num_prefix_tokens * (patches > 0)
    return torch.arange(count, device=grids.device) < lengths
