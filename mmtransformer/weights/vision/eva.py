"""BLIP-2's vision tower (EVA-ViT-g, arXiv:2211.07636, in the published ones) by transformers' names -> `ViT`, and back.

One matrix projects queries, keys and values there; its bias has a part for keys, which changes nothing.
"""

from typing import Any

from torch import Tensor

from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_blocks import ViTBlockConfig
from mmtransformer.weights.shared.configs import read_sizes, write_sizes
from mmtransformer.weights.shared.vit import fill_vit, vit_tensors
from mmtransformer.weights.vision.clip import TOWER_SIZES, pair, patch_side

_KEYS = {
    "vision_model.embeddings.patch_embedding": "patch_embed.proj",
    "vision_model.encoder.layers.*.layer_norm[1,2]": "blocks.*.norm[1,2]",
    "vision_model.encoder.layers.*.self_attn.qkv": "blocks.*.attn.[q,k,v]_proj",
    "vision_model.encoder.layers.*.self_attn.projection": "blocks.*.attn.out_proj",
    "vision_model.encoder.layers.*.mlp.fc[1,2]": "blocks.*.mlp.fc[1,2]",
    "vision_model.post_layernorm": "norm",
}
_POSITIONS, _CLASS = "vision_model.embeddings.position_embedding", "vision_model.embeddings.class_embedding"


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
        pair(config["image_size"]),
        patch_side(config, context),
        **read_sizes(config, TOWER_SIZES, context),
        block=ViTBlockConfig(norm_eps=config["layer_norm_eps"]),
    )
    return fill_vit(vit, _KEYS, state, context, positions=_POSITIONS, prefix=[_CLASS])


def vision_to_blip2(vit: ViT, family: str = "BLIP-2") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of BLIP-2's vision tower; the class token's position is 0.

    Args:
        vit: the tower.
        family: whose it is to be, for errors: BLIP has the same.

    Raises:
        ValueError: if this tower has parts that BLIP-2's has not, naming them.
    """
    facts = {
        "a class token": (vit.class_token, "none"),
        "no registers": (vit.num_registers == 0, vit.num_registers),
        "patches alone as its stem": (vit.patches.stem == "patch", f'a "{vit.patches.stem}" stem'),
        "gelu": (vit.block.activation == "gelu", vit.block.activation),
        "3 channels": (vit.patches.in_channels == 3, vit.patches.in_channels),
        "square pictures": (vit.image_size[0] == vit.image_size[1], "{} x {} px".format(*vit.image_size)),
    }
    if differs := [f"{wanted} (this: {found})" for wanted, (same, found) in facts.items() if not same]:
        raise ValueError(f"{family}'s vision tower has {', '.join(differs)}")
    tensors = vit_tensors(vit, _KEYS, f"{family}'s vision tower", positions=_POSITIONS, prefix=[_CLASS])
    config = {
        **write_sizes(vit, TOWER_SIZES),
        "image_size": vit.image_size[0],
        "patch_size": vit.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": vit.block.norm_eps,
    }
    return config, tensors
