"""Pictures of native size in a batch: their patches, filled up to the most that one has; a ViT reads them packed.

What fills up is never computed: the patches that are there go through the ViT in one row (`packed_features`).

Shapes: b samples of i pictures each, p patches of the picture that has most, t tokens of it, c numbers of a patch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_variants.packed import packed_features
from mmtransformer.batch import PackedImages


def image_features_of(
    vit: ViT, patches: Tensor, grids: Tensor, indices: Sequence[int] | None = None
) -> list[Tensor | None]:
    """Each picture's visual tokens, prefix tokens first, (t d); None where there is no picture.

    Args:
        vit: the vision encoder.
        patches: (... p c).
        grids: (... 2) long, rows and columns of each picture's patches; 0 = no picture.
        indices: see `packed_features`.

    Returns:
        One entry a picture, in the order of the flattened leading axes.

    Raises:
        ValueError: as `packed_features`, and for a vision encoder that is no plain ViT.
    """
    if type(vit) is not ViT:
        raise ValueError(f"pictures of native size go through a ViT, not through a {type(vit).__name__}")
    flat = patches.flatten(0, -3)
    sizes = [(int(rows), int(columns)) for rows, columns in grids.reshape(-1, 2).tolist()]
    there = [i for i, (rows, columns) in enumerate(sizes) if rows * columns]
    found: list[Tensor | None] = [None] * len(sizes)
    if there:
        real = torch.cat([flat[i, : sizes[i][0] * sizes[i][1]] for i in there])
        images = PackedImages(real, tuple(sizes[i] for i in there))
        for i, tokens in zip(there, packed_features(vit, images, indices), strict=True):
            found[i] = tokens
    return found


def padded_features(vit: ViT, patches: Tensor, grids: Tensor, indices: Sequence[int] | None = None) -> Tensor:
    """The visual tokens of all pictures, filled up with zeros: (... p c), (... 2) -> (... t d); see `token_mask`.

    Raises:
        ValueError: as `image_features_of`, and if there is no picture at all.
    """
    found = image_features_of(vit, patches, grids, indices)
    like = next((tokens for tokens in found if tokens is not None), None)
    if like is None:
        raise ValueError("a batch of pictures of native size needs at least one picture")
    rows = pad_sequence([like[:0] if tokens is None else tokens for tokens in found], batch_first=True)
    return rows.unflatten(0, grids.shape[:-1])
