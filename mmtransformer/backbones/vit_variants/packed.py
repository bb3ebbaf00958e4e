"""Pictures of native size and shape through a ViT in one row, without padding (NaViT, arXiv:2307.06304; NaFlex).

Each picture has its own prefix tokens, sees itself alone, and gets what it would get alone: only what is wasted on
padding is gone.

Shapes: n pictures, c channels, s tokens of all of them, p tokens of one, d width of a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtransformer.backbones.vit import ViT
from mmtransformer.batch import PackedImages
from mmtransformer.layers.masks import Mask, Segments, block, documents
from mmtransformer.layers.positions import RotaryAngles, resize_positions


def packed_features(vit: ViT, images: PackedImages, indices: Sequence[int] | None = None) -> list[Tensor]:
    """Each picture's visual tokens, prefix tokens first: n of (p d).

    Args:
        vit: the vision encoder.
        images: the pictures.
        indices: the blocks whose tokens are wanted, side by side and before the last norm, as `tokens_after`
            counts them; None = the tokens after the last norm.

    Raises:
        ValueError: if there is no such block, or the ViT cannot read a packed row: its patches are convolved, or in
            training it leaves out tokens or skips branches at random, which is drawn for a row.
    """
    _check(vit)
    wanted = [i + vit.depth if i < 0 else i for i in indices or ()]
    if any(not 0 <= i < vit.depth for i in wanted):
        raise ValueError(f"blocks {list(indices or ())} were asked for, but there are {vit.depth}")
    x, ropes = _embed(vit, images)
    lengths = tuple(vit.num_prefix_tokens + length for length in images.lengths)
    mask, found = _mask(lengths, x.device), {}
    for i, layer in enumerate(vit.blocks[: max(wanted) + 1] if wanted else vit.blocks):
        x = vit.forward_block(layer, x, ropes[i], mask)
        if i in wanted:
            found[i] = x
    x = torch.cat([found[i] for i in wanted], dim=-1) if wanted else vit.forward_norm(x)
    return list(x[0].split(lengths))


def packed_forward(vit: ViT, images: PackedImages) -> Tensor:
    """What `vit(pixels)` gives of each picture: class logits, or the pooled feature; (n classes | d).

    Raises:
        ValueError: as `packed_features`.
    """
    return torch.cat([vit.forward_head(tokens[None]) for tokens in packed_features(vit, images)])


def _check(vit: ViT) -> None:
    if vit.patches.stem != "patch":
        raise ValueError(
            f'patches of a row are cut out before, and this ViT convolves them (stem="{vit.patches.stem}")'
        )
    if vit.training and (vit.patches.patch_dropout or vit.block.drop_path):
        raise ValueError(
            f"patches.patch_dropout ({vit.patches.patch_dropout}) and block.drop_path ({vit.block.drop_path}) are "
            f"drawn for a row, which holds many pictures here: train packed rows with 0"
        )


def _embed(vit: ViT, images: PackedImages) -> tuple[Tensor, list[RotaryAngles | None]]:
    """What the first block reads, (1 s d), and each block's angles."""
    patches, prefix = images.patches.to(vit.dtype), vit.num_prefix_tokens
    wide = vit.patches.in_channels * vit.patch_size**2
    if patches.ndim != 2 or patches.shape[1] != wide:
        raise ValueError(f"patches are (s {wide}) for this ViT, not {tuple(patches.shape)}")
    x = vit.embed_norm(vit.patch_embed.proj(patches))  # pyright: ignore[reportCallIssue]
    if vit.pos_embed is not None:
        tables = {
            grid: resize_positions(vit.pos_embed, vit.table_grid, grid, vit.patches.pos_embed)[0]
            for grid in dict.fromkeys(images.grids)
        }
        x = x + torch.cat([tables[grid] for grid in images.grids]).to(x.dtype)
    if vit.prefix_tokens is not None:
        first = vit.prefix_tokens[0].to(x.dtype)
        parts = x.split(images.lengths)
        x = torch.cat([tokens for part in parts for tokens in (first, part)])
    ropes: list[RotaryAngles | None] = [None] * vit.depth
    if vit.rotary is not None:
        angles = {grid: vit.rotary(grid, prefix, x.device) for grid in dict.fromkeys(images.grids)}
        each = zip(*(angles[grid] for grid in images.grids), strict=True)  # of every block, each picture's
        ropes = [_joined(found) for found in each] if vit.rope.kind == "mixed" else [_joined(next(each))] * vit.depth
    return vit.first_norm(x[None]), ropes


def _joined(ropes: Sequence[RotaryAngles]) -> RotaryAngles:
    return RotaryAngles(*(torch.cat(x, dim=-2) for x in zip(*ropes, strict=True)))


def _mask(lengths: tuple[int, ...], device: torch.device) -> Mask:
    """Who sees whom: each picture itself alone. By FlexAttention on CUDA, elsewhere one length after the other."""
    if device.type != "cuda":
        return Segments(lengths)
    total = sum(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
    return block(documents(ids[None]), 1, total, total, device)
