"""timm's `Eva` towers (EVA-01 and 02, DINOv3, Perception Encoder, rotary ViTs) -> `ViT`.

Their queries and keys turn pairs of neighbouring channels in most families, ours the two halves of a head, so the rows
of these projections change places when they come in; scores are the same.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mmtransformer.backbones.grid_rope import ViTRopeConfig
from mmtransformer.backbones.patches import ViTPatchConfig
from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_blocks import ViTBlockConfig, ViTOutputConfig
from mmtransformer.weights.shared.configs import only_these
from mmtransformer.weights.shared.vit import fill_vit
from mmtransformer.weights.vision.timm_keys import POOLS, norm_eps_of, tower_keys


def from_eva(model: Any) -> ViT:
    """Our ViT with the weights of a timm `Eva`; equal to 1e-5 in float32.

    What shifts and stretches coordinates in training (DINOv3's augmentation) does not come along.

    Raises:
        ValueError: naming what it has and `ViT` has not.
    """
    context, block = "timm's Eva", model.blocks[0]
    attn, mlp = block.attn, block.mlp
    heads, dim, gated = attn.num_heads, model.embed_dim, type(mlp).__name__ != "Mlp"
    only_these(
        "ViT",
        {
            "blocks": (type(block).__name__ in ("EvaBlock", "EvaBlockPostNorm"), True),
            "attention": (type(attn).__name__ in ("EvaAttention", "AttentionRope"), True),
            "gated attention": (attn.gate is not None, False),
            "num_kv_heads": (getattr(attn, "num_kv_heads", heads), heads),
            "head_dim": (attn.head_dim, dim // heads),
            "mlp": (type(mlp).__name__ in ("Mlp", "GluMlp", "SwiGLU"), True),
            "activation": (type(mlp.act).__name__, "SiLU" if gated else "GELU"),
            "gate_last": (getattr(mlp, "gate_last", False), False),
            "layer scale of both branches": (block.gamma_1 is None, block.gamma_2 is None)
            if hasattr(block, "gamma_1")
            else (True, True),
            "global_pool": (model.global_pool in (*POOLS, ""), True),
            "square patches": (len(set(model.patch_embed.patch_size)), 1),
        },
    )
    state = model.state_dict()
    norm = "tokens" if "norm.weight" in state else "none"
    if "fc_norm.weight" in state:
        if norm == "tokens":
            raise ValueError(f"{context} norms tokens, and what they are pooled to again: ViT does one of them")
        norm = "pooled"
    pool, patch = model.attn_pool, model.patch_embed.patch_size[0]
    config = ViTBlockConfig(
        "swiglu" if gated else "gelu",
        norm_eps_of(model, context),
        layer_scale=None if getattr(block, "gamma_1", None) is None else 1.0,
        norm="layer" if block.norm1.bias is not None else "rms",  # pyright: ignore[reportArgumentType]
        order="res_post" if type(block).__name__ == "EvaBlockPostNorm" else "pre",
        qkv_bias=any(f"blocks.0.attn.{n}" in state for n in ("qkv.bias", "q_bias", "q_proj.bias")),
        qk_norm="blocks.0.attn.q_norm.weight" in state,
        attn_norm="blocks.0.attn.norm.weight" in state,
        mlp_norm="blocks.0.mlp.norm.weight" in state,
    )
    vit = ViT(
        tuple(patch * count for count in model.patch_embed.grid_size),
        patch,
        dim,
        len(model.blocks),
        heads,
        mlp_dim=mlp.fc2.in_features,
        class_token=model.cls_token is not None,
        num_registers=0 if model.reg_token is None else model.reg_token.shape[1],
        pool=POOLS.get(model.global_pool, "class" if model.cls_token is not None else "mean"),
        num_classes=model.num_classes if isinstance(model.head, nn.Linear) else 0,
        patches=ViTPatchConfig(
            model.patch_embed.proj.in_channels,
            bias="patch_embed.proj.bias" in state,
            positions="none" if model.pos_embed is None else "learned",
            pre_norm="norm_pre.weight" in state,
        ),
        block=config,
        rope=_rope_of(model.rope, context),
        output=ViTOutputConfig(
            norm,
            pool_heads=pool and pool.num_heads,
            pool_mlp_dim=pool and pool.mlp.fc1.out_features,
            pool_prefix=pool is not None,
        ),
    )
    keyless: dict[str, Tensor] = {}
    if config.qkv_bias and not {"blocks.0.attn.qkv.bias", "blocks.0.attn.k_proj.bias"} & state.keys():
        # A bias of keys would shift all scores of a query alike.
        keyless = {f"blocks.{i}.attn.k_proj.bias": torch.zeros(dim) for i in range(vit.depth)}
    keys = tower_keys(config, packed="blocks.0.mlp.fc1.weight" in state) | _KEYS
    del keys["blocks.*.ls[1,2].gamma"]
    if "blocks.0.attn.q_bias" in state:
        keys["blocks.*.attn.[q,v]_bias"] = "blocks.*.attn.[q,v]_proj.bias"
    if "blocks.0.attn.qkv.weight" not in state:
        del keys["blocks.*.attn.qkv"]
        keys["blocks.*.attn.[q,k,v]_proj"] = "blocks.*.attn.[q,k,v]_proj"
    prefix = [name for name in ("cls_token", "reg_token") if name in state]
    positions = None if model.pos_embed is None else "pos_embed"
    fill_vit(vit, keys, state, context, positions=positions, prefix=prefix, extra=keyless)
    if vit.rotary is not None and not getattr(attn, "rotate_half", False):
        _halve(vit)
    return vit


_KEYS = {"rope.freqs": "rotary.freqs", "blocks.*.gamma_[1,2]": "blocks.*.branch[1,2].0.gamma"}


def _rope_of(rope: Any, context: str) -> ViTRopeConfig:
    """How that module turns patches."""
    if rope is None:
        return ViTRopeConfig()
    kind = type(rope).__name__
    order = "xy" if rope.grid_indexing == "xy" else "yx"
    if kind == "RotaryEmbeddingMixed":
        return ViTRopeConfig("mixed", float(rope.temperature), order=order)
    plain = {
        "RotaryEmbeddingCat": getattr(rope, "grid_type", None) == "index" and not getattr(rope, "in_pixels", True),
        "RotaryEmbeddingDinoV3": getattr(rope, "normalize_coords", None) == "separate"
        and getattr(rope, "min_period", None) is None,
    }
    if not plain.get(kind):
        raise ValueError(f"{context} turns patches by {kind} in a way that ViT does not know")
    if kind == "RotaryEmbeddingDinoV3":
        return ViTRopeConfig("centered", rope.temperature, rope.grid_offset, order)
    shape = rope.ref_feat_shape
    return ViTRopeConfig(
        "axial", float(rope.temperature), rope.grid_offset, order, None if shape is None else tuple(shape)
    )


@torch.no_grad()
def _halve(vit: ViT) -> None:
    """Channels 0, 1, 2, 3 ... of a head become 0, 2, ... 1, 3, ...: pairs of neighbours become pairs of halves."""
    width = vit.dim // vit.num_heads
    order = torch.arange(width).view(-1, 2).T.flatten()
    rows = torch.arange(vit.dim).view(-1, width)[:, order].flatten()
    for block in vit.blocks:
        attn: Any = block.attn
        for layer, norm in ((attn.q_proj, attn.q_norm), (attn.k_proj, attn.k_norm)):
            for parameter in layer.parameters():
                parameter.copy_(parameter[rows])
            for parameter in norm.parameters():
                parameter.copy_(parameter[order])
