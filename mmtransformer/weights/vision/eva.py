"""BLIP-2's vision tower (EVA-ViT-g, arXiv:2211.07636, in the published ones) by transformers' names -> `ViT`, and back.

One matrix projects queries, keys and values there; its bias has a part for keys, which changes nothing.
"""

from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.vit import ViT
from mmtransformer.serialization.pretrained import load_strictly
from mmtransformer.weights.shared.keys import Row, convert, convert_back, layer

_POSITIONS, _CLASS = "vision_model.embeddings.position_embedding", "vision_model.embeddings.class_embedding"
_PATCHES = "vision_model.embeddings.patch_embedding.weight"


def _vision_table(depth: int) -> list[Row]:
    rows = layer("vision_model.embeddings.patch_embedding", "patch_embed.proj")
    for i in range(depth):
        theirs, ours = f"vision_model.encoder.layers.{i}", f"blocks.{i}"
        rows += layer(f"{theirs}.layer_norm1", f"{ours}.norm1") + layer(
            f"{theirs}.layer_norm2", f"{ours}.norm2"
        )
        rows += layer(f"{theirs}.self_attn.qkv", *(f"{ours}.attn.{name}_proj" for name in "qkv"))
        rows += layer(f"{theirs}.self_attn.projection", f"{ours}.attn.out_proj")
        rows += layer(f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1") + layer(f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2")
    return rows + layer("vision_model.post_layernorm", "norm")


def vision_from_blip2(config: dict[str, Any], state: dict[str, Tensor], context: str) -> ViT:
    """BLIP-2's vision tower (EVA-ViT-g in the published ones) as a `ViT`; equal to 1e-5 in float32.

    Args:
        config: the vision tower's configuration.
        state: its tensors, named "vision_model. ...".
        context: what they come from, for errors.

    Raises:
        ValueError: for a tower that differs in more than its size.
    """
    if config["hidden_act"] != "gelu" or not config.get("qkv_bias", True):
        raise ValueError(
            f"{context}: the vision tower has hidden_act {config['hidden_act']}, qkv_bias {config.get('qkv_bias')}; "
            f"only gelu and qkv_bias are known here"
        )
    vit = ViT(
        _pair(config["image_size"]),
        _pair(config["patch_size"])[0],
        config["hidden_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        norm_eps=config["layer_norm_eps"],
    )
    state = dict(state)
    for name in (_POSITIONS, _CLASS, _PATCHES):
        if name not in state:
            raise ValueError(f"{context} has no tensor {name}")
    positions, token = state.pop(_POSITIONS), state.pop(_CLASS)
    state[_PATCHES] = state[_PATCHES].flatten(1)
    ours = convert(_vision_table(vit.depth), state, context)
    # Our class token has its position added in.
    load_strictly(
        vit, ours | {"prefix_tokens": token + positions[:, :1], "pos_embed": positions[:, 1:]}, context
    )
    return vit.eval()


def vision_to_blip2(vit: ViT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of BLIP-2's vision tower; the class token's position is 0.

    Raises:
        ValueError: if this tower has parts that BLIP-2's has not.
    """
    ours = dict(vit.state_dict())
    positions, token = ours.pop("pos_embed"), ours.pop("prefix_tokens", torch.empty(0))
    table = _vision_table(vit.depth)
    extra = sorted(set(ours) - {name for row in table for name in row.target})
    plain = vit.class_token and vit.num_registers == 0 and vit.activation == "gelu" and vit.in_channels == 3
    if extra or not plain or vit.image_size[0] != vit.image_size[1]:
        raise ValueError(
            f"BLIP-2's vision tower has a class token, no registers, gelu, 3 channels and square pictures; this has "
            f"{vit.num_registers} registers, {vit.activation}, {vit.in_channels} channels, pictures of {vit.image_size}"
            + (f", and {', '.join(extra[:3])} besides" if extra else "")
        )
    theirs = convert_back(table, ours)
    theirs[_PATCHES] = theirs[_PATCHES].unflatten(1, (3, vit.patch_size, vit.patch_size))
    theirs |= {_CLASS: token, _POSITIONS: torch.cat((torch.zeros_like(token), positions), dim=1)}
    config = {
        "hidden_size": vit.dim,
        "intermediate_size": vit.mlp_dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "image_size": vit.image_size[0],
        "patch_size": vit.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": vit.norm_eps,
    }
    return config, theirs


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
