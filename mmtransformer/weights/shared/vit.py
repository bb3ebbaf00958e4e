"""What the key tables of vision towers share: patches as a convolution, and positions that prefix tokens have too.

In the library positions belong to patches alone; a prefix token's position is added into it, once.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.patches import ViTPatchConfig
from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_blocks import ViTBlockConfig
from mmtransformer.weights.shared.configs import SOURCE_ACTIVATIONS
from mmtransformer.weights.shared.keys import export, fill, key_mappings, part


def fill_vit(
    vit: ViT,
    keys: Mapping[str, str],
    state: Mapping[str, Tensor],
    context: str,
    *,
    positions: str | None,
    prefix: Sequence[str] = (),
    ignored: Iterable[str] = (),
    extra: Mapping[str, Tensor] | None = None,
) -> ViT:
    """The tower with these tensors, in evaluation mode.

    Args:
        vit: the tower.
        keys: the key table.
        state: the other project's tensors.
        context: what they come from, for errors.
        positions: the name of the table of positions, of patches alone or of prefix tokens and patches; None = there
            is none.
        prefix: names of the prefix tokens, in their order.
        ignored: names that may be left over.
        extra: tensors of the tower's that the source does not hold.

    Raises:
        ValueError: naming tensors that are missing, left over or of another shape.
    """
    state = dict(state)
    named = [positions, *prefix] if positions else list(prefix)
    for name in named:
        if name not in state:
            raise ValueError(f"{context} has no tensor {name}")
    parts = [state.pop(name).reshape(1, -1, vit.dim) for name in named]
    target = dict(extra or {})
    table = parts.pop(0) if positions else None
    if parts:
        first = torch.cat(parts, 1)
        placed = 0 if table is None else table.shape[1] - math.prod(vit.table_grid)
        if table is not None and 0 < placed <= first.shape[1]:  # all, or the class token alone
            first = first.float()  # of half precision no digit is lost
            first[:, :placed] += table[:, :placed].float()
            table = table[:, placed:]
        target["prefix_tokens"] = first
    if table is not None:
        target["pos_embed"] = table
    patches = _patches(keys)
    if patches in state:
        state[patches] = state[patches].flatten(1)
    fill(vit, keys, state, context, ignored=ignored, extra=target)
    return vit.eval()


def vit_tensors(
    vit: ViT,
    keys: Mapping[str, str],
    context: str,
    *,
    positions: str | None,
    prefix: Sequence[str] = (),
    placed: int | None = None,
    kept: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The tower's tensors by the other project's names; positions of prefix tokens are 0.

    Args:
        vit: the tower.
        keys: the key table.
        context: what the other project calls such a tower, for errors.
        positions: the name of the table of positions, of prefix tokens and patches; None = there is none.
        prefix: the name of the class token, and of the registers where there are any.
        placed: how many prefix tokens have a position there; None = all.
        kept: beginnings of names that the other project has no place for and does not need.

    Raises:
        ValueError: naming tensors that the other project has no place for.
    """
    source = export(vit, keys, context, kept=("pos_embed", "prefix_tokens", *kept))
    weight = source[_patches(keys)]
    source[_patches(keys)] = weight.unflatten(1, (vit.patches.in_channels, vit.patch_size, vit.patch_size))
    if (vit.pos_embed is None) != (positions is None):
        raise ValueError(f"{context} has {'no' if positions is None else 'a'} table of positions, unlike this tower")
    none = source[_patches(keys)].new_zeros(1, 0, vit.dim)
    tokens = none if vit.prefix_tokens is None else vit.prefix_tokens.detach()
    parts = zip(prefix, tokens.split([int(vit.class_token), vit.num_registers], 1), strict=False)
    source |= {name: part for name, part in parts if part.shape[1]}
    if positions is None or vit.pos_embed is None:
        return source
    return source | {positions: torch.cat((torch.zeros_like(tokens[:, :placed]), vit.pos_embed.detach()), 1)}


def tower_facts(vit: ViT, *, patches: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What `only_these` asks of every tower that transformers is to read: blocks, patches, no rotation, no classes.

    Args:
        vit: the tower.
        patches: what the other's patches have besides, as arguments of `ViTPatchConfig`.
        block: what its blocks have besides, as arguments of `ViTBlockConfig`.
    """
    own, stem = vit.block, vit.patches
    block = {"dropout": own.dropout, "drop_path": own.drop_path, **block}
    return {
        "num_classes": (vit.num_classes, 0),
        "activation": (own.activation in SOURCE_ACTIVATIONS, True),
        "block": (own, ViTBlockConfig(own.activation, own.norm_eps, **block)),
        "patches": (stem, ViTPatchConfig(stem.in_channels, patch_dropout=stem.patch_dropout, **patches)),
        "rope": (vit.rope.kind, "none"),
    }


def tower_config(vit: ViT) -> dict[str, Any]:
    """What the config.json of every such tower says."""
    return {
        "patch_size": vit.patch_size,
        "num_channels": vit.patches.in_channels,
        "hidden_act": SOURCE_ACTIVATIONS.get(vit.block.activation, vit.block.activation),
        "layer_norm_eps": vit.block.norm_eps,
    }


def without_parent(state: Mapping[str, Tensor], parents: Sequence[str]) -> Mapping[str, Tensor]:
    """The tower's own tensors of a model that has it under one of these names; all, where it is no part of one."""
    for parent in parents:
        if any(name.startswith(parent) for name in state):
            return part(state, parent)
    return state


def _patches(keys: Mapping[str, str]) -> str:
    """What the project calls the weight of its patches' convolution."""
    return key_mappings(keys, ["patch_embed.proj.weight"])[0].source
