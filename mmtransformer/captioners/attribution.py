"""Attention maps of captions: from recorded attention weights to where in an image each word comes from.

Functions on tensors, for any model: `record_attention` records, these average, follow and arrange.

Shapes: n rows of text, r of each of the b samples, side by side; gh gw rows and columns of patches.
"""

from collections.abc import Iterable, Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate


def mean_weights(layers: Iterable[Tensor]) -> Tensor:
    """The mean of layers and heads, each layer (n h q k): (n q k); such as of `record.values()`."""
    return torch.stack([weights.mean(1) for weights in layers]).mean(0)


def through_latents(to_latents: Tensor, to_patches: Tensor) -> Tensor:
    """What tokens have of the patches through latents: (n ... q l) of rows, (b ... l p) of samples -> (n ... q p)."""
    return to_latents @ to_patches.repeat_interleave(len(to_latents) // len(to_patches), 0)


def latents_rollout(layers: Iterable[Tensor], patches: int) -> Tensor:
    """What each latent of a resampler holds of each patch, at most 1 in sum: (n l p).

    It is followed from layer to layer as in attention rollout (arXiv:2005.00928): half of a latent is what it was
    before, half is what it takes in.

    Args:
        layers: the latents' attention to patches and latents, first layer first, each (n h l p+l).
        patches: p.

    Raises:
        ValueError: if there is no layer.
    """
    held: Tensor | None = None
    for weights in layers:
        on_patches, on_latents = weights.mean(1).split((patches, weights.shape[-1] - patches), dim=-1)
        held = (on_patches if held is None else held + on_patches + on_latents @ held) / 2
    if held is None:
        raise ValueError("rollout needs the weights of 1 layer at least, not of 0")
    return held


def on_patches(
    weights: Tensor, grid: tuple[int, int], num_prefix_tokens: int = 0, grids: Tensor | None = None
) -> Tensor:
    """Weights on the visual tokens of images (n q i p), on their grid of patches: (n q i gh gw).

    Args:
        weights: (n q i p).
        grid: gh and gw.
        num_prefix_tokens: how many of the p come before the patches (class token, registers); they are left out.
        grids: (b i 2) long, where images have grids of their own: each is stretched over the one grid, and keeps its
            sum.

    Raises:
        ValueError: if they are not as many as the patches.
    """
    weights = weights[..., num_prefix_tokens:]
    if grids is None:
        if weights.shape[-1] != grid[0] * grid[1]:
            raise ValueError(f"{weights.shape[-1]} weights of an image are not on its {grid[0]} x {grid[1]} patches")
        return rearrange(weights, "n q i (gh gw) -> n q i gh gw", gh=grid[0])
    found, each = weights.new_zeros(*weights.shape[:3], *grid), len(weights) // len(grids)
    for row, sizes in enumerate(grids.tolist()):
        rows = slice(row * each, (row + 1) * each)
        for i, (gh, gw) in enumerate(sizes):
            if not gh * gw:
                continue
            own = rearrange(weights[rows, :, i, : gh * gw], "n q (gh gw) -> n q gh gw", gh=gh)
            map = interpolate(own.float(), grid, mode="bilinear", antialias=True)
            total = map.sum((2, 3), keepdim=True).clamp(min=1e-12)
            found[rows, :, i] = (map * own.sum((2, 3), keepdim=True) / total).to(found.dtype)
    return found


def word_heatmaps(maps: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """Where each word came from, the mean of its tokens: (words gh gw).

    Args:
        maps: of one text and one image, one map a token (q gh gw).
        words: for each word, the places of its tokens in q.
    """
    found = [maps[list(places)].mean(0) for places in words]
    return torch.stack(found) if found else maps.new_zeros(0, *maps.shape[1:])
