"""GIT (arXiv:2205.14100) as transformers names it -> `Git`, and back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.backbones.patches import PatchConfig
from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_blocks import BlockConfig
from mmtransformer.captioners.git import Git
from mmtransformer.layers.config import AttentionConfig, MLPConfig, NormConfig, PositionConfig
from mmtransformer.serialization.pretrained import CONFIG, find_folder, read_json
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.weights.shared.configs import (
    SIZES,
    SOURCE_ACTIVATIONS,
    activation_of,
    only,
    only_these,
    read_sizes,
    write_sizes,
)
from mmtransformer.weights.shared.folders import read_tensors, write_folder
from mmtransformer.weights.shared.keys import export, fill, nested, part
from mmtransformer.weights.vision.common import fill_vit, vit_tensors

_VISION = "git.image_encoder."
_TOWER = {
    "vision_model.embeddings.patch_embedding": "patch_embed.proj",
    "vision_model.pre_layrnorm": "first_norm",
    "vision_model.encoder.layers.*.layer_norm[1,2]": "blocks.*.norm[1,2]",
    "vision_model.encoder.layers.*.self_attn.[q,k,v,out]_proj": "blocks.*.attn.[q,k,v,out]_proj",
    "vision_model.encoder.layers.*.mlp.fc[1,2]": "blocks.*.mlp.fc[1,2]",
    "vision_model.post_layernorm": "norm",
}
_POSITIONS, _CLASS = "vision_model.embeddings.position_embedding.weight", "vision_model.embeddings.class_embedding"
_KEYS = {
    "git.embeddings.word_embeddings": "decoder.tok_embed",
    "git.embeddings.position_embeddings": "decoder.pos_embed",
    "git.embeddings.LayerNorm": "embed_norm",
    **nested(
        {
            "attention.self.[query,key,value]": "attn.[q_proj,k_proj,v_proj]",
            "attention.output.dense": "attn.out_proj",
            "attention.output.LayerNorm": "norm1",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
            "output.LayerNorm": "norm2",
        },
        source="git.encoder.layer.*.",
        target="decoder.blocks.*.",
    ),
    "git.visual_projection.visual_projection.0": "proj",
    "git.visual_projection.visual_projection.1": "proj_norm",
    "git.img_temporal_embedding.*": "frame_embeds.*",
    "output.bias": "head_bias",
    "output": "decoder.lm_head",
}
# What transformers takes for granted where a config.json does not say it.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 1024,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "num_image_with_embedding": None,
    "tie_word_embeddings": False,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIZES = SIZES | {"hidden_dropout_prob": "dropout"}
_VISION_SIZES = {
    name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
}
_HEAD, _WORDS = "output.weight", "git.embeddings.word_embeddings.weight"


def git_from_state(config: dict[str, Any], state: dict[str, Tensor], context: str) -> Git:
    """A `Git` from what a hub folder holds, its config.json and all of its tensors; equal to 1e-5 in float32.

    Args:
        config: its configuration.
        state: tensors named as in `GitForCausalLM`.
        context: what they come from, for errors.

    Raises:
        ValueError: for a variant that differs in more than its sizes, or tensors that do not fit.
    """
    config = _DEFAULTS | config
    own = _VISION_DEFAULTS | (config.get("vision_config") or {})
    only(own, f"{context}, vision_config", {"num_channels": 3}, "GIT")
    state = {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}
    vision = ViT(
        own["image_size"],
        own["patch_size"],
        **read_sizes(own, _VISION_SIZES, context),
        patches=PatchConfig(bias=False, norm=True),
        block=BlockConfig(activation_of(own, "hidden_act", context), own["layer_norm_eps"]),
    )
    fill_vit(vision, _TOWER, part(state, _VISION), context, positions=_POSITIONS, prefix=[_CLASS])
    # A head of its own stays its own, whatever the config says.
    tied = config["tie_word_embeddings"] and (_HEAD not in state or torch.equal(state[_HEAD], state[_WORDS]))
    decoder = TextDecoder(
        **read_sizes(config, _SIZES, context),
        mlp=MLPConfig(activation_of(config, "hidden_act", context)),
        norm=NormConfig("layer", config["layer_norm_eps"], pre=False),
        tied=tied,
    )
    model = Git(vision, decoder, num_frames=config["num_image_with_embedding"])
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(_VISION)}
    fill(model, _KEYS, rest, context, ignored=[_HEAD] * tied, kept=_kept(model))
    return model.eval()


def _kept(model: Git) -> tuple[str, ...]:
    """The vision encoder, which has a table of its own, and a head that is the embedding."""
    return ("vision.", *["decoder.lm_head"] * model.decoder.tied)


def to_git(model: Git) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What transformers needs to hold this model: its config.json, and its tensors by their names there.

    Raises:
        ValueError: if a part has no counterpart there.
    """
    vision, decoder = model.vision, model.decoder
    height, width = vision.image_size
    only_these(
        "transformers' GIT",
        {
            "norm": (decoder.norm, NormConfig("layer", decoder.norm.eps, pre=False)),
            "attention": (decoder.attention, AttentionConfig()),
            "mlp": (decoder.mlp.bias, True),
            "positions": (decoder.positions, PositionConfig()),
            "class_token": (vision.class_token, True),
            "num_registers": (vision.num_registers, 0),
            "image_size": ((height, width), (height, height)),
            "patches": (vision.patches, PatchConfig(bias=False, norm=True, positions=vision.patches.positions)),
            "block": (vision.block, BlockConfig(vision.block.activation, vision.block.norm_eps)),
            "output": (vision.output.norm, "tokens"),
        },
    )
    tower = vit_tensors(vision, _TOWER, "transformers' GIT", positions=_POSITIONS, prefix=[_CLASS])
    tower = {name: tensor.reshape(-1) if name == _CLASS else tensor for name, tensor in tower.items()}
    tower[_POSITIONS] = tower[_POSITIONS][0]
    config = {
        "model_type": "git",
        "architectures": ["GitForCausalLM"],
        **write_sizes(decoder, _SIZES),
        "attention_probs_dropout_prob": decoder.dropout,
        "hidden_act": SOURCE_ACTIVATIONS[decoder.mlp.activation],
        "layer_norm_eps": decoder.norm.eps,
        "tie_word_embeddings": decoder.tied,
        "num_image_with_embedding": model.num_frames,
        "vision_config": {
            "model_type": "git_vision_model",
            **write_sizes(vision, _VISION_SIZES),
            "image_size": height,
            "patch_size": vision.patch_size,
            "hidden_act": SOURCE_ACTIVATIONS[vision.block.activation],
            "layer_norm_eps": vision.block.norm_eps,
        },
    }
    own = export(model, _KEYS, "transformers' GIT", kept=_kept(model))
    return config, own | {_VISION + name: tensor for name, tensor in tower.items()}


def load_git(source: str | Path) -> Git:
    """A GIT from a folder as hubs have it, or the name of a hub's repository (`microsoft/git-base-coco`).

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    folder = find_folder(source)
    config = read_json(folder / CONFIG)
    if (kind := config.get("model_type")) != "git":
        raise ValueError(f'{folder / CONFIG}: model_type is "{kind}", not "git"')
    state = read_tensors(folder)
    with built_from(state, str(folder)):
        return git_from_state(config, state, str(folder))


def save_git(model: Git, folder: str | Path) -> None:
    """Writes a folder that transformers reads: `config.json` and `model.safetensors`.

    Raises:
        ValueError: if a part has no counterpart there, before anything is written.
    """
    write_folder(folder, *to_git(model))
