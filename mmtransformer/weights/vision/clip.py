"""CLIP's and SigLIP's vision towers by transformers' names -> `ViT`, and back.

CLIP (arXiv:2103.00020) norms tokens before the blocks and its class token behind them, SigLIP (arXiv:2303.15343) all
tokens behind the blocks, and gathers them by attention. SigLIP 2 of one size is a SigLIP.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mmtransformer.backbones.patches import ViTPatchConfig
from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_blocks import ViTBlockConfig, ViTOutputConfig
from mmtransformer.weights.processors.transforms import write_transform
from mmtransformer.weights.shared.configs import SIZES, activation_of, only_these, read_sizes, write_sizes
from mmtransformer.weights.shared.folders import write_folder
from mmtransformer.weights.shared.vit import fill_vit, tower_config, tower_facts, vit_tensors

CLIP_TYPES, SIGLIP_TYPES = ("clip", "clip_vision_model"), ("siglip", "siglip_vision_model")
"""`model_type` of the dual encoders, and of their towers alone."""

TOWER = {
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers.*.layer_norm[1,2]": "blocks.*.norm[1,2]",
    "encoder.layers.*.self_attn.[q_proj,k_proj,v_proj,out_proj]": "blocks.*.attn.[q_proj,k_proj,v_proj,out_proj]",
    "encoder.layers.*.mlp.fc[1,2]": "blocks.*.mlp.fc[1,2]",
}
"""What the key tables of both have in common, and of the towers made after them."""

_CLIP = TOWER | {"pre_layrnorm": "first_norm"}
SIGLIP = TOWER | {
    "post_layernorm": "norm",
    "head.probe": "attn_pool.queries",
    "head.attention.in_proj_weight": "attn_pool.attn.[q,k,v]_proj.weight",
    "head.attention.in_proj_bias": "attn_pool.attn.[q,k,v]_proj.bias",
    "head.attention.out_proj": "attn_pool.attn.out_proj",
    "head.layernorm": "attn_pool.norm",
    "head.mlp.fc[1,2]": "attn_pool.mlp.fc[1,2]",
}
POSITIONS, CLASS = "embeddings.position_embedding.weight", "embeddings.class_embedding"

TOWER_SIZES = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                              "num_attention_heads")}  # fmt: skip
_USUAL: dict[str, Any] = {  # What transformers takes for granted where a config.json does not say it.
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224,
}  # fmt: skip
USUAL: dict[bool, dict[str, Any]] = {
    True: _USUAL | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    False: _USUAL | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
"""The same of CLIP (True) and SigLIP (False)."""


def pair(size: Any) -> tuple[int, int]:
    """A size of a config as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def patch_side(config: Mapping[str, Any], context: str) -> int:
    """The side of a config's patches, which are square in `ViT`."""
    height, width = pair(config["patch_size"])
    if height != width:
        raise ValueError(f"{context} has patches of {height} x {width} px, and ViT square ones")
    return height


def vision_from_clip(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    context: str,
    *,
    norm: Literal["tokens", "pooled"] = "pooled",
) -> ViT:
    """A vision tower of CLIP or SigLIP as a `ViT`; equal to 1e-5 in float32.

    `forward_features` is the `last_hidden_state` there and `forward` the `pooler_output`, of CLIP before the projection
    into the space that it shares with text.

    Args:
        config: the configuration of the tower or of the dual encoder.
        state: its tensors, with "vision_model." before their names or without.
        context: what they come from, for errors.
        norm: of a CLIP, whether its last norm is of the class token alone, or also of all "tokens" (GIT).

    Raises:
        ValueError: for a tower that `ViT` cannot be, and tensors that do not fit.
    """
    kind = config.get("model_type")
    if kind not in CLIP_TYPES + SIGLIP_TYPES:
        raise ValueError(f'{context}: the vision tower is a "{kind}", not one of CLIP or SigLIP')
    if kind in ("clip", "siglip"):
        config = config.get("vision_config") or {}
    if any(name.startswith("vision_model.") for name in state):
        state = {n.removeprefix("vision_model."): t for n, t in state.items() if n.startswith("vision_model.")}
    clip = kind in CLIP_TYPES
    config = {**USUAL[clip], **config}
    pooled = not clip and bool(config.get("vision_use_head", True))
    vit = ViT(
        pair(config["image_size"]),
        patch_side(config, context),
        **read_sizes(config, TOWER_SIZES, context),
        class_token=clip,
        pool="class" if clip else "attention" if pooled else "mean",
        patches=ViTPatchConfig(config["num_channels"], bias=not clip, pre_norm=clip),
        block=ViTBlockConfig(activation_of(config, "hidden_act", context), config["layer_norm_eps"]),
        output=ViTOutputConfig(norm if clip else "tokens"),
    )
    keys, prefix = _keys(vit), [CLASS] * clip
    return fill_vit(vit, keys, state, context, positions=POSITIONS, prefix=prefix)


def _keys(vit: ViT) -> dict[str, str]:
    if not vit.class_token:
        return SIGLIP
    return _CLIP | {"post_layernorm": "pool_norm" if vit.output.norm == "pooled" else "norm"}


def vision_to_clip(vit: ViT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a CLIP or SigLIP vision tower; the class token's position is 0.

    Raises:
        ValueError: if this tower has parts that neither has.
    """
    clip = vit.class_token
    name = "CLIP's vision tower" if clip else "SigLIP's vision tower"
    norm = "tokens" if vit.output.norm == "tokens" or not clip else "pooled"
    only_these(
        name,
        {
            "num_registers": (vit.num_registers, 0),
            "output": (vit.output, ViTOutputConfig(norm)),
            "pool": (vit.pool, "class" if clip else "mean" if vit.attn_pool is None else "attention"),
            "image_size": (vit.image_size, (vit.image_size[0],) * 2),
        }
        | tower_facts(vit, patches={"bias": not clip, "pre_norm": clip}, block={}),
    )
    tensors = vit_tensors(vit, _keys(vit), name, positions=POSITIONS, prefix=[CLASS] * clip)
    tensors[POSITIONS] = tensors[POSITIONS][0]
    if clip:
        tensors[CLASS] = tensors[CLASS][0, 0]
    config = {
        "model_type": "clip_vision_model" if clip else "siglip_vision_model",
        **write_sizes(vit, TOWER_SIZES),
        "image_size": vit.image_size[0],
        **tower_config(vit),
    }
    return config if clip else config | {"vision_use_head": vit.attn_pool is not None}, tensors


def save_clip_vision(vit: ViT, folder: str | Path) -> None:
    """Writes a folder that transformers reads as a CLIPVisionModel or, without a class token, a SiglipVisionModel.

    Raises:
        ValueError: if the tower is neither, before anything is written.
    """
    config, tensors = vision_to_clip(vit)
    config["architectures"] = ["CLIPVisionModel" if vit.class_token else "SiglipVisionModel"]
    write_folder(folder, config, {f"vision_model.{name}": tensor for name, tensor in tensors.items()})
    write_transform(vit, folder)
