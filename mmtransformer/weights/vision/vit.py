"""ViT and DeiT by transformers' names -> `ViT`, and back. A DeiT has a distillation token, here the first register.

transformers writes one set of names to files and has another in memory; both are read, the files' are written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.patches import ViTPatchConfig
from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_blocks import ViTBlockConfig, ViTOutputConfig
from mmtransformer.weights.processors.transforms import write_transform
from mmtransformer.weights.shared.configs import activation_of, only_these, read_sizes, write_sizes
from mmtransformer.weights.shared.folders import write_folder
from mmtransformer.weights.shared.vit import fill_vit, tower_config, tower_facts, vit_tensors, without_parent
from mmtransformer.weights.vision.clip import TOWER_SIZES, pair, patch_side

VIT_TYPES = ("vit", "deit")
"""Their `model_type`s."""

_FILE = {
    "encoder.layer.*.attention.attention.[query,key,value]": "blocks.*.attn.[q,k,v]_proj",
    "encoder.layer.*.attention.output.dense": "blocks.*.attn.out_proj",
    "encoder.layer.*.layernorm_[before,after]": "blocks.*.[norm1,norm2]",
    "encoder.layer.*.[intermediate,output].dense": "blocks.*.mlp.[fc1,fc2]",
}
_MEMORY = {
    "layers.*.attention.[q,k,v]_proj": "blocks.*.attn.[q,k,v]_proj",
    "layers.*.attention.o_proj": "blocks.*.attn.out_proj",
    "layers.*.layernorm_[before,after]": "blocks.*.[norm1,norm2]",
    "layers.*.mlp.[fc1,fc2]": "blocks.*.mlp.[fc1,fc2]",
}
_BOTH = {"embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm": "norm"}
_POSITIONS, _PREFIX = "embeddings.position_embeddings", ["embeddings.cls_token", "embeddings.distillation_token"]
_POOLER = ("pooler.dense.weight", "pooler.dense.bias")
_USUAL: dict[str, Any] = {  # What transformers takes for granted where a config.json does not say it.
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-12, "qkv_bias": True,
}  # fmt: skip


def vision_from_vit(config: Mapping[str, Any], state: Mapping[str, Tensor], context: str) -> ViT:
    """A ViT or DeiT of transformers as a `ViT`; equal to 1e-5 in float32.

    `forward_features` is the `last_hidden_state` there; a pooling layer, which no captioner reads, is left out.

    Args:
        config: its configuration.
        state: its tensors, named as in `ViTModel` or `DeiTModel`.
        context: what they come from, for errors.

    Raises:
        ValueError: for one that differs in more than its size, and tensors that do not fit.
    """
    if (kind := config.get("model_type")) not in VIT_TYPES:
        raise ValueError(f'{context}: the vision encoder is a "{kind}", not one of {", ".join(VIT_TYPES)}')
    distilled, config = kind == "deit", {**_USUAL, **config}
    vit = ViT(
        pair(config["image_size"]),
        patch_side(config, context),
        **read_sizes(config, TOWER_SIZES, context),
        num_registers=int(distilled),
        patches=ViTPatchConfig(config["num_channels"]),
        block=ViTBlockConfig(
            activation_of(config, "hidden_act", context),
            config["layer_norm_eps"],
            dropout=config.get("hidden_dropout_prob", 0.0),
            qkv_bias=config["qkv_bias"],
        ),
    )
    state = without_parent(state, ("vit.", "deit."))
    names = _FILE if any(name.startswith("encoder.layer.") for name in state) else _MEMORY
    prefix = _PREFIX[: 1 + distilled]
    return fill_vit(vit, _BOTH | names, state, context, positions=_POSITIONS, prefix=prefix, ignored=_POOLER)


def vision_to_vit(vit: ViT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a ViT, or of a DeiT where there is a register; prefix tokens' positions are 0.

    The pooling layer, which transformers builds and no captioner reads, is written as zeros.

    Raises:
        ValueError: if this tower has parts that neither has.
    """
    distilled = vit.num_registers == 1
    name = "transformers' DeiT" if distilled else "transformers' ViT"
    only_these(
        name,
        {
            "class_token": (vit.class_token, True),
            "num_registers": (vit.num_registers, int(distilled)),
            "output": (vit.output, ViTOutputConfig()),
        }
        | tower_facts(vit, patches={}, block={"qkv_bias": vit.block.qkv_bias}),
    )
    tensors = vit_tensors(vit, _BOTH | _FILE, name, positions=_POSITIONS, prefix=_PREFIX[: 1 + distilled])
    pooler = (torch.zeros(vit.dim, vit.dim, dtype=vit.dtype), torch.zeros(vit.dim, dtype=vit.dtype))
    tensors |= dict(zip(_POOLER, pooler, strict=True))
    config = {
        "model_type": "deit" if distilled else "vit",
        **write_sizes(vit, TOWER_SIZES),
        "image_size": vit.image_size[0] if vit.image_size[0] == vit.image_size[1] else list(vit.image_size),
        **tower_config(vit),
        "hidden_dropout_prob": vit.block.dropout,
        "qkv_bias": vit.block.qkv_bias,
    }
    return config, tensors


def save_vit(vit: ViT, folder: str | Path) -> None:
    """Writes a folder that transformers reads as a ViTModel, or a DeiTModel where there is a register.

    Raises:
        ValueError: if the tower is neither, before anything is written.
    """
    config, tensors = vision_to_vit(vit)
    write_folder(folder, config | {"architectures": ["DeiTModel" if vit.num_registers else "ViTModel"]}, tensors)
    write_transform(vit, folder)
