"""GIT (arXiv:2205.14100) as transformers names it -> `Git`, and back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.published.git import Git
from mmtransformer.layers.config import AttentionConfig, MLPConfig, NormConfig, PositionConfig
from mmtransformer.serialization.pretrained import CONFIG, read_json
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.processors.generation_config import GENERATION, read_ends
from mmtransformer.weights.processors.pixels import read_pixels
from mmtransformer.weights.processors.processor import Processor
from mmtransformer.weights.processors.tokens import PromptTokenizer
from mmtransformer.weights.shared.configs import (
    SIZES,
    SOURCE_ACTIVATIONS,
    activation_of,
    only_these,
    read_sizes,
    write_sizes,
)
from mmtransformer.weights.shared.folders import model_from_folder, write_folder
from mmtransformer.weights.shared.keys import export, fill, nested, part
from mmtransformer.weights.vision.clip import vision_from_clip, vision_to_clip

_VISION = "git.image_encoder.vision_model."
_KEYS = {
    "git.embeddings.word_embeddings": "decoder.tok_embed",
    "git.embeddings.position_embeddings": "decoder.pos_embed",
    "git.embeddings.LayerNorm": "decoder.embed_norm",
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
_SIZES = SIZES | {"hidden_dropout_prob": "dropout"}
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
    tower = {"patch_size": 16, **(config.get("vision_config") or {}), "model_type": "clip_vision_model"}
    vision = vision_from_clip(tower, part(state, _VISION), f"{context}, vision tower", norm="tokens")
    # A head of its own stays its own, whatever the config says.
    tied = config["tie_word_embeddings"] and (_HEAD not in state or torch.equal(state[_HEAD], state[_WORDS]))
    decoder = TextDecoder(
        **read_sizes(config, _SIZES, context),
        mlp=MLPConfig(activation_of(config, "hidden_act", context)),
        norm=NormConfig("layer", config["layer_norm_eps"], pre=False, embed=True),
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
    decoder = model.decoder
    only_these(
        "transformers' GIT",
        {
            "norm": (decoder.norm, NormConfig("layer", decoder.norm.eps, pre=False, embed=True)),
            "attention": (decoder.attention, AttentionConfig()),
            "mlp": (decoder.mlp, MLPConfig(decoder.mlp.activation)),
            "positions": (decoder.positions, PositionConfig()),
            "mlm_head": (decoder.mlm_head, False),
            "class_token": (model.vision.class_token, True),
            "output": (model.vision.output.norm, "tokens"),
        },
    )
    vision, tower = vision_to_clip(model.vision)
    config = {
        "model_type": "git",
        "architectures": ["GitForCausalLM"],
        **write_sizes(decoder, _SIZES),
        "attention_probs_dropout_prob": decoder.dropout,
        "hidden_act": SOURCE_ACTIVATIONS[decoder.mlp.activation],
        "layer_norm_eps": decoder.norm.eps,
        "tie_word_embeddings": decoder.tied,
        "num_image_with_embedding": model.num_frames,
        "vision_config": vision | {"model_type": "git_vision_model"},
    }
    own = export(model, _KEYS, "transformers' GIT", kept=_kept(model))
    return config, own | {_VISION + name: tensor for name, tensor in tower.items()}


def load_git(source: str | Path) -> Git:
    """A GIT from a folder as hubs have it, or the name of a hub's repository (`microsoft/git-base-coco`).

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    return model_from_folder(source, git_from_state, "git")


def save_git(model: Git, folder: str | Path) -> None:
    """Writes a folder that transformers reads: `config.json` and `model.safetensors`.

    Raises:
        ValueError: if a part has no counterpart there, before anything is written.
    """
    write_folder(folder, *to_git(model))


class GitProcessor(Processor):
    """Prompts of GIT: [CLS], then the words of a question where there is one, without the [SEP] that would end it.

    transformers' processor puts [SEP] there, which its documentation takes away by hand.

    Args:
        folder: the model's folder.
    """

    prompt_len = 1

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / CONFIG)
        tower = config.get("vision_config") or {}
        said = "eos_token_id" in config or (folder / GENERATION).exists()
        super().__init__(
            Tokenizer.from_pretrained(folder),
            read_pixels(folder, "CLIP", size=tower.get("image_size", 224)),
            eos_ids=read_ends(folder) if said else (102,),
        )
        self.encode, self.bos_id = PromptTokenizer(folder), config.get("bos_token_id", 101)

    def prompt_ids(self, text: str | None, batch: CaptionBatch, sample: int) -> list[int]:
        """[CLS] and the words; see `Processor`."""
        return [self.bos_id, *([] if text is None else self.encode(text, special=False))]
