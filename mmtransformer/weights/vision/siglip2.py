"""SigLIP 2's NaFlex tower by transformers' names -> `ViT`, and back (arXiv:2502.14786, section 2.4.2).

One table of positions for images of every size and shape. SigLIP 2 of one size is a SigLIP: see `clip`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor

from mmtransformer.backbones.patches import ViTPatchConfig
from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_blocks import ViTBlockConfig, ViTOutputConfig
from mmtransformer.layers.positions import ViTPosEmbedConfig
from mmtransformer.weights.processors.transforms import write_transform
from mmtransformer.weights.shared.configs import activation_of, only_these, read_sizes, write_sizes
from mmtransformer.weights.shared.folders import write_folder
from mmtransformer.weights.shared.vit import fill_vit, tower_config, tower_facts, vit_tensors, without_parent
from mmtransformer.weights.vision.clip import POSITIONS, SIGLIP, TOWER_SIZES, USUAL, patch_side

SIGLIP2_TYPES = ("siglip2", "siglip2_vision_model")
"""`model_type` of the dual encoder, and of its tower alone."""

_PATCHES = "embeddings.patch_embedding.weight"


def vision_from_siglip2(config: Mapping[str, Any], state: Mapping[str, Tensor], context: str) -> ViT:
    """A NaFlex tower of SigLIP 2 as a `ViT`, for images of the size that its table has; equal to 1e-5 in float32.

    `forward_features` is the `last_hidden_state` there and `forward` the `pooler_output`, for images of any size and
    shape; transformers reads them cut into patches, with padding, here they are whole, or packed (`packed_forward`).

    Args:
        config: the configuration of the tower or of the dual encoder.
        state: its tensors, with "vision_model." before their names or without.
        context: what they come from, for errors.

    Raises:
        ValueError: for a tower that `ViT` cannot be, and tensors that do not fit.
    """
    if (kind := config.get("model_type")) not in SIGLIP2_TYPES:
        raise ValueError(f'{context}: the vision tower is a "{kind}", not one of {", ".join(SIGLIP2_TYPES)}')
    if kind == "siglip2":
        config = config.get("vision_config") or {}
    state = without_parent(state, ("vision_model.",))
    config = {"num_patches": 256, **USUAL[False], **config}
    patch, side = patch_side(config, context), math.isqrt(config["num_patches"])
    vit = ViT(
        side * patch,
        patch,
        **read_sizes(config, TOWER_SIZES, context),
        class_token=False,
        pool="attention" if config.get("vision_use_head", True) else "mean",
        patches=ViTPatchConfig(config["num_channels"], pos_embed=_table(side)),
        block=ViTBlockConfig(activation_of(config, "hidden_act", context), config["layer_norm_eps"]),
    )
    state = dict(state)
    if _PATCHES in state:
        state[_PATCHES] = rearrange(state[_PATCHES], "d (y x c) -> d c y x", y=patch, x=patch)
    return fill_vit(vit, SIGLIP, state, context, positions=POSITIONS)


def _table(side: int) -> ViTPosEmbedConfig:
    return ViTPosEmbedConfig((side, side), "bilinear")


def vision_to_siglip2(vit: ViT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a NaFlex tower of SigLIP 2.

    Raises:
        ValueError: if this tower has parts that it has not.
    """
    name, side = "SigLIP 2's NaFlex tower", vit.table_grid[0]
    only_these(
        name,
        {
            "class_token": (vit.class_token, False),
            "num_registers": (vit.num_registers, 0),
            "output": (vit.output, ViTOutputConfig()),
            "pool": (vit.pool, "mean" if vit.attn_pool is None else "attention"),
        }
        | tower_facts(vit, patches={"pos_embed": _table(side)}, block={}),
    )
    tensors = vit_tensors(vit, SIGLIP, name, positions=POSITIONS)
    tensors[POSITIONS] = tensors[POSITIONS][0]
    tensors[_PATCHES] = rearrange(tensors[_PATCHES], "d c y x -> d (y x c)").contiguous()
    config = {
        "model_type": "siglip2_vision_model",
        **write_sizes(vit, TOWER_SIZES),
        "num_patches": side * side,
        **tower_config(vit),
        "vision_use_head": vit.attn_pool is not None,
    }
    return config, tensors


def save_siglip2(vit: ViT, folder: str | Path) -> None:
    """Writes a folder that transformers reads as a Siglip2VisionModel, whose images have any size and shape.

    Raises:
        ValueError: if the tower is none, before anything is written.
    """
    config, tensors = vision_to_siglip2(vit)
    write_folder(folder, config | {"architectures": ["Siglip2VisionModel"]}, tensors)
    write_transform(vit, folder, native=True)
