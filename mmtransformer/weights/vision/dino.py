"""DINOv2 (arXiv:2304.07193), with registers too (2309.16588), and DINOv3 (2508.10104) by transformers' names -> `ViT`.

And back. The token that stands for masked patches is left out, and written as zeros: only their training reads it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.grid_rope import ViTRopeConfig
from mmtransformer.backbones.patches import ViTPatchConfig
from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_blocks import ViTBlockConfig, ViTOutputConfig
from mmtransformer.layers.positions import ViTPosEmbedConfig
from mmtransformer.weights.processors.transforms import write_transform
from mmtransformer.weights.shared.configs import SOURCE_ACTIVATIONS, activation_of, only, only_these
from mmtransformer.weights.shared.folders import write_folder
from mmtransformer.weights.shared.vit import fill_vit, tower_config, tower_facts, vit_tensors, without_parent
from mmtransformer.weights.vision.clip import pair, patch_side

DINO_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")
"""Their `model_type`s."""

_V2 = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "encoder.layer.*.norm[1,2]": "blocks.*.norm[1,2]",
    "encoder.layer.*.layer_scale[1,2].lambda1": "blocks.*.branch[1,2].0.gamma",
    "encoder.layer.*.mlp.[fc1,fc2]": "blocks.*.mlp.[fc1,fc2]",
}
_V2_FILE = _V2 | {
    "encoder.layer.*.attention.attention.[query,key,value]": "blocks.*.attn.[q,k,v]_proj",
    "encoder.layer.*.attention.output.dense": "blocks.*.attn.out_proj",
    "encoder.layer.*.mlp.weights_in": "blocks.*.mlp.[gate,up]_proj",
    "encoder.layer.*.mlp.weights_out": "blocks.*.mlp.down_proj",
}
_V2_MEMORY = _V2 | {  # transformers writes one set of names to files and has another in memory
    "encoder.layer.*.attention.[q_proj,k_proj,v_proj,o_proj]": "blocks.*.attn.[q_proj,k_proj,v_proj,out_proj]",
    "encoder.layer.*.mlp.[gate,up,down]_proj": "blocks.*.mlp.[gate,up,down]_proj",
}
_V3 = {
    "embeddings.patch_embeddings": "patch_embed.proj",
    "norm": "norm",
    "layer.*.norm[1,2]": "blocks.*.norm[1,2]",
    "layer.*.layer_scale[1,2].lambda1": "blocks.*.branch[1,2].0.gamma",
    "layer.*.attention.[q_proj,k_proj,v_proj,o_proj]": "blocks.*.attn.[q_proj,k_proj,v_proj,out_proj]",
}
_V3_PLAIN = {"layer.*.mlp.[up,down]_proj": "blocks.*.mlp.[fc1,fc2]"}
_V3_GATED = {"layer.*.mlp.[gate,up,down]_proj": "blocks.*.mlp.[gate,up,down]_proj"}
_POSITIONS, _PREFIX = "embeddings.position_embeddings", ["embeddings.cls_token", "embeddings.register_tokens"]
_MASK = "embeddings.mask_token"

_SAME: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3, "image_size": 224,
    "hidden_act": "gelu", "layer_norm_eps": 1e-6, "hidden_dropout_prob": 0.0,
}  # fmt: skip
_USUAL: dict[str, dict[str, Any]] = {  # What transformers takes for granted where a config.json does not say it.
    "dinov2": _SAME | {"patch_size": 14, "mlp_ratio": 4, "qkv_bias": True, "num_register_tokens": 0},
    "dinov2_with_registers": _SAME | {"patch_size": 16, "mlp_ratio": 4, "qkv_bias": True, "num_register_tokens": 4},
    "dinov3_vit": _SAME
    | {
        "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "patch_size": 16, "rope_theta": 100.0,
        "layer_norm_eps": 1e-5, "num_register_tokens": 0, "query_bias": True, "value_bias": True,
    },
}  # fmt: skip


def vision_from_dino(config: Mapping[str, Any], state: Mapping[str, Tensor], context: str) -> ViT:
    """A DINOv2 or DINOv3 of transformers as a `ViT`; equal to 1e-5 in float32, at images of every size.

    `forward_features` is the `last_hidden_state` there and `forward` the `pooler_output`. What shifts and stretches
    DINOv3's coordinates in training does not come along.

    Args:
        config: its configuration.
        state: its tensors, as in `Dinov2Model`, `Dinov2WithRegistersModel` or `DINOv3ViTModel`.
        context: what they come from, for errors.

    Raises:
        ValueError: for one that differs in more than its size, and tensors that do not fit.
    """
    if (kind := config.get("model_type")) not in DINO_TYPES:
        raise ValueError(f'{context}: the vision encoder is a "{kind}", not one of {", ".join(DINO_TYPES)}')
    config = {**_USUAL[kind], **config}
    patch, dim, third = patch_side(config, context), config["hidden_size"], kind == "dinov3_vit"
    image_size, registers = pair(config["image_size"]), config["num_register_tokens"]
    if third:
        gated, mlp_dim = bool(config.get("use_gated_mlp")), config["intermediate_size"]
        only(config, context, {"proj_bias": True, "mlp_bias": True}, "ViT")
    else:
        gated, mlp_dim = bool(config.get("use_swiglu_ffn")), dim * config["mlp_ratio"]
        mlp_dim = _swiglu_dim(mlp_dim) if gated else mlp_dim
        if image_size[0] != image_size[1]:
            raise ValueError(f"{context}: image_size {image_size} is not square, as transformers reads its positions")
    activation = activation_of(config, "hidden_act", context)
    if third and gated and activation != "silu":
        raise ValueError(f"{context}: a gated MLP with {config['hidden_act']}, and ViT has only silu in one")
    if third:
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}  # layers have it in memory
    else:
        state = without_parent(state, ("dinov2.", "dinov2_with_registers."))
    vit = ViT(
        image_size,
        patch,
        dim,
        config["num_hidden_layers"],
        config["num_attention_heads"],
        mlp_dim=mlp_dim,
        num_registers=registers,
        patches=ViTPatchConfig(
            config["num_channels"],
            positions="none" if third else "learned",
            pos_embed=ViTPosEmbedConfig() if third else _table(kind, (image_size[0] // patch, image_size[1] // patch)),
        ),
        block=ViTBlockConfig(
            "swiglu" if gated else activation,
            config["layer_norm_eps"],
            layer_scale=1.0,
            dropout=config["hidden_dropout_prob"],
            qkv_bias=any(name.endswith(("query.bias", "q_proj.bias", "v_proj.bias")) for name in state),
        ),
        rope=ViTRopeConfig("centered", config["rope_theta"]) if third else ViTRopeConfig(),
    )
    absent: dict[str, Tensor] = {}
    if third:  # Any of the three biases may be missing: it is 0.
        keys = _V3 | (_V3_GATED if gated else _V3_PLAIN)
        own = [f"blocks.{i}.attn.{name}_proj.bias" for i in range(vit.depth * vit.block.qkv_bias) for name in "qkv"]
        named = {name: name.replace("blocks.", "layer.").replace(".attn.", ".attention.") for name in own}
        absent = {name: torch.zeros(dim) for name, theirs in named.items() if theirs not in state}
    else:
        keys = _V2_FILE if any(".attention.attention." in name for name in state) else _V2_MEMORY
    prefix = _PREFIX[: 1 + bool(registers)]
    ignored = [_MASK, *_PREFIX[1 + bool(registers) :]]
    positions = None if third else _POSITIONS
    return fill_vit(vit, keys, state, context, positions=positions, prefix=prefix, ignored=ignored, extra=absent)


def _table(kind: str, grid: tuple[int, int] | None) -> ViTPosEmbedConfig:
    """How a DINOv2's positions are resized; they stay as they are in the file, whatever size is read."""
    return ViTPosEmbedConfig(grid, antialias=kind != "dinov2")


def _swiglu_dim(mlp_dim: int) -> int:
    """Hidden width of DINOv2's gated MLP: two thirds, rounded up to a multiple of 8."""
    return (int(mlp_dim * 2 / 3) + 7) // 8 * 8


def vision_to_dino(vit: ViT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a DINOv3 where patches are turned, else of a DINOv2; the class's position is 0.

    Raises:
        ValueError: if this tower has parts that neither has.
    """
    block, third, gated = vit.block, vit.rope.kind != "none", vit.block.activation == "swiglu"
    kind = "dinov3_vit" if third else "dinov2_with_registers" if vit.num_registers else "dinov2"
    name = f"transformers' {kind}"
    same = {"layer_scale": block.layer_scale, "qkv_bias": block.qkv_bias} | ({"dropout": 0.0} if third else {})
    patches = {
        "positions": "none" if third else "learned",
        "pos_embed": ViTPosEmbedConfig() if third else _table(kind, vit.patches.pos_embed.grid),
    }
    wanted = _swiglu_dim if gated else int
    ratio = next((r for r in range(1, 33) if wanted(r * vit.dim) == vit.mlp_dim), None)
    rows, columns = vit.table_grid
    size = vit.image_size if third else (vit.patch_size * rows, vit.patch_size * columns)
    square = size[0] == size[1]
    only_these(
        name,
        {
            "class_token": (vit.class_token, True),
            "pool": (vit.pool, "class"),
            "layer_scale": (block.layer_scale is None, False),
            "output": (vit.output, ViTOutputConfig()),
            "image_size": (third or square, True),
            "mlp_dim": (third or ratio is not None, True),
        }
        | tower_facts(vit, patches=patches, block=same)
        | {
            "activation": (gated or block.activation in SOURCE_ACTIVATIONS, True),
            "rope": (vit.rope, ViTRopeConfig("centered", vit.rope.theta) if third else ViTRopeConfig()),
        },
    )
    keys = (_V3 | (_V3_GATED if gated else _V3_PLAIN)) if third else _V2_FILE
    positions = None if third else _POSITIONS
    tensors = vit_tensors(vit, keys, name, positions=positions, prefix=_PREFIX, placed=1)
    tensors[_MASK] = torch.zeros(1, *[1] * third, vit.dim, dtype=vit.dtype)
    activation = "silu" if third and gated else "gelu" if gated else block.activation
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": vit.dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "image_size": size[0] if square else list(size),
        **tower_config(vit),
        "hidden_act": SOURCE_ACTIVATIONS.get(activation, activation),
    }
    if kind != "dinov2":
        config["num_register_tokens"] = vit.num_registers
    if not third:
        first = {"mlp_ratio": ratio, "use_swiglu_ffn": gated, "qkv_bias": block.qkv_bias}
        return config | first | {"hidden_dropout_prob": block.dropout}, tensors
    if not vit.num_registers:
        tensors[_PREFIX[1]] = torch.zeros(1, 0, vit.dim, dtype=vit.dtype)
    biases = {"query": "q", "key": "k", "value": "v"}
    named = {long: [n for n in tensors if n.endswith(f".{short}_proj.bias")] for long, short in biases.items()}
    has = {long: any(bool(tensors[n].any()) for n in names) for long, names in named.items()}
    for long, names in named.items():
        for n in names if not has[long] else ():
            del tensors[n]
    more = {"intermediate_size": vit.mlp_dim, "use_gated_mlp": gated, "rope_theta": vit.rope.theta}
    return config | more | {f"{long}_bias": found for long, found in has.items()}, tensors


_CLASSES = dict(zip(DINO_TYPES, ("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"), strict=True))


def save_dino(vit: ViT, folder: str | Path) -> None:
    """Writes a folder that transformers reads as a DINOv3ViTModel, Dinov2WithRegistersModel or Dinov2Model.

    Raises:
        ValueError: if the tower is none of them, before anything is written.
    """
    config, tensors = vision_to_dino(vit)
    write_folder(folder, config | {"architectures": [_CLASSES[config["model_type"]]]}, tensors)
    write_transform(vit, folder)
