"""transformers' Idefics (the first one, after Flamingo) -> `Flamingo`, and back: towers, resampler, gated layers."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.base import Decoder
from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.backbones.extended_vocabulary import ExtendedDecoder
from mmtransformer.backbones.patches import ViTPatchConfig
from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_blocks import ViTBlockConfig, ViTOutputConfig
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.flamingo import Flamingo, GatedBlockConfig
from mmtransformer.captioners.image_attention_mask import VisibleImages
from mmtransformer.connectors.resampler import PerceiverResampler
from mmtransformer.serialization.pretrained import CONFIG, read_json
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.processors.generation_config import read_ends
from mmtransformer.weights.processors.pixels import read_pixels
from mmtransformer.weights.processors.processor import Processor
from mmtransformer.weights.processors.tokens import PromptTokenizer
from mmtransformer.weights.shared.configs import SOURCE_ACTIVATIONS, activation_of, only_these, read_sizes, write_sizes
from mmtransformer.weights.shared.folders import model_from_folder, write_folder
from mmtransformer.weights.shared.keys import export, fill, nested, part
from mmtransformer.weights.shared.vit import fill_vit, vit_tensors
from mmtransformer.weights.text.llama import decoder_from_llama, decoder_to_llama, llama_config

_FAKE, _IMAGE = "<fake_token_around_image>", "<image>"
_ROWS, _HEAD = "model.embed_tokens.additional_embedding.weight", "lm_head.additional_fc.weight"
RESAMPLER = {
    "latents": "latents",
    "blocks.*.0.[context,latents]_layer_norm": "blocks.*.[norm_context,norm1]",
    "blocks.*.0.[q_proj,k_proj,v_proj,output_proj]": "blocks.*.attn.[q_proj,k_proj,v_proj,out_proj]",
    "blocks.*.0.[q,k]_layer_norm": "blocks.*.attn.[q,k]_norm",
    "blocks.*.1.[ln,fc,c_proj]": "blocks.*.[norm2,mlp.fc1,mlp.fc2]",
    "layer_norm": "last_norm",
}
"""The key table of `IdeficsPerceiverResampler`."""

GATED = {
    "alpha_[cross_attn,dense]": "[attn,mlp]_gate",
    "[input,post_attention]_layernorm": "norm[1,2]",
    "cross_attn.[q_proj,k_proj,v_proj,o_proj]": "attn.[q_proj,k_proj,v_proj,out_proj]",
    "cross_attn.[q,k]_layer_norm": "attn.[q,k]_norm",
    "mlp.[gate,up,down]_proj": "mlp.[gate,up,down]_proj",
}
"""The key table of `IdeficsGatedCrossAttentionLayer`."""

_BLOCKS = nested(GATED, source="*.", target="*.")
_TOWER = {
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "pre_layrnorm": "first_norm",
    "encoder.layers.*.layer_norm[1,2]": "blocks.*.norm[1,2]",
    "encoder.layers.*.self_attn.[q_proj,k_proj,v_proj,out_proj]": "blocks.*.attn.[q_proj,k_proj,v_proj,out_proj]",
    "encoder.layers.*.mlp.fc[1,2]": "blocks.*.mlp.fc[1,2]",
}
_POSITIONS, _CLASS = "embeddings.position_embedding.weight", "embeddings.class_embedding"

_VISION_SIZES = {
    "patch_size": "patch_size", "embed_dim": "dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
}  # fmt: skip
_RESAMPLER_SIZES = {
    "resampler_depth": "depth", "resampler_n_heads": "num_heads", "resampler_head_dim": "head_dim",
    "resampler_n_latents": "num_latents",
}  # fmt: skip
_USUAL: dict[str, Any] = {  # What transformers takes for granted where a config.json does not say it.
    "vocab_size": 32000, "additional_vocab_size": 0, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu", "alpha_type": "float",
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "cross_layer_interval": 1, "qk_layer_norms": False,
    "use_resampler": False, "max_position_embeddings": 2048,
}  # fmt: skip
_USUAL_VISION: dict[str, Any] = {
    "embed_dim": 768, "image_size": 224, "intermediate_size": 5120, "patch_size": 14, "num_hidden_layers": 32,
    "num_attention_heads": 16, "num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_USUAL_RESAMPLER: dict[str, Any] = {
    "resampler_n_latents": 64, "resampler_depth": 6, "resampler_n_heads": 16, "resampler_head_dim": 96,
    "qk_layer_norms_perceiver": False,
}  # fmt: skip


def idefics_from_state(
    config: dict[str, Any], state: dict[str, Tensor], context: str, visible_images: VisibleImages = "last"
) -> Flamingo:
    """A `Flamingo` with all weights of a transformers `IdeficsForVisionText2Text`; equal to 1e-4 in float32.

    Args:
        config: the config.json of a hub folder.
        state: all of its tensors.
        context: what they come from, for errors.
        visible_images: which pictures a token sees; there, the caller's mask says.

    Raises:
        ValueError: if a part is of another kind than ours.
    """
    config = _USUAL | config
    others = ("model.vision_model.", "model.perceiver_resampler.", "model.gated_cross_attn_layers.", _ROWS, _HEAD)
    words = {name: tensor for name, tensor in state.items() if not name.startswith(others)}
    decoder = decoder_from_llama(config | {"model_type": "llama"}, words, context)
    vision = _vision(_USUAL_VISION | config.get("vision_config", {}), part(state, others[0]), context)
    resampler = None
    if config["use_resampler"]:
        own = _USUAL_RESAMPLER | config.get("perceiver_config", {})
        resampler = PerceiverResampler(
            vision.dim,
            **read_sizes(own, _RESAMPLER_SIZES, context),
            activation="relu",
            qk_norm="layer" if own["qk_layer_norms_perceiver"] else None,
        )
        fill(resampler, RESAMPLER, part(state, others[1]), context)
    flamingo = Flamingo(
        vision,
        _with_more_words(decoder, state),
        connector=resampler,
        cross_layers=list(range(0, decoder.depth, config["cross_layer_interval"])),
        gated=GatedBlockConfig(
            num_heads=config["num_attention_heads"],
            head_dim=config["hidden_size"] // config["num_attention_heads"],
            activation="swiglu",
            mlp_dim=config["intermediate_size"],
            norm="rms",
            norm_eps=config["rms_norm_eps"],
            qk_norm="rms" if config["qk_layer_norms"] else None,
            per_channel=config["alpha_type"] == "vector",
            mlp_without_image=True,
        ),
        visible_images=visible_images,
    )
    gated = {n: t.flatten() if "alpha" in n else t for n, t in part(state, others[2]).items()}
    fill(flamingo.gated_blocks, _BLOCKS, gated, context)
    return flamingo.eval()


def to_idefics(model: Flamingo) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What transformers needs to hold this model: its config.json, and its tensors by their names there.

    An `ExtendedDecoder`'s new tokens are the additional ones there.

    Raises:
        ValueError: if the captioner is of another kind.
    """
    resampler, vision = model.connector, model.vision
    longer = model.decoder if isinstance(model.decoder, ExtendedDecoder) else None
    decoder = model.decoder if longer is None else longer.decoder
    if not isinstance(decoder, TextDecoder):
        raise ValueError(f"Idefics has a Llama, not {type(decoder).__name__}")
    if not isinstance(resampler, PerceiverResampler | None):
        raise ValueError(f"Idefics has a PerceiverResampler or none, not {type(resampler).__name__}")
    every = model.cross_layers[1] if len(model.cross_layers) > 1 else decoder.depth
    text = llama_config(decoder, "llama")
    only_these(
        "Idefics",
        {
            "gated.activation": (model.gated.activation, "swiglu"),
            "gated.mlp_dim": (model.gated.mlp_dim or 4 * decoder.dim, decoder.mlp_dim),
            "gated.norm": (model.gated.norm, "rms"),
            "gated.norm_eps": (model.gated.norm_eps, decoder.norm.eps),
            "gated.qk_norm": (model.gated.qk_norm, "rms" if model.gated.qk_norm else None),
            "gated.num_heads": (model.gated.num_heads, decoder.num_heads),
            "gated.head_dim": (model.gated.head_dim, decoder.dim // decoder.num_heads),
            "cross_layers": (model.cross_layers, list(range(0, decoder.depth, every))),
            "gated.mlp_without_image": (model.gated.mlp_without_image, True),
            "keep_prefix_tokens": (model.keep_prefix_tokens, True),
            "decoder.num_kv_heads": (text["num_key_value_heads"], decoder.num_heads),
            "decoder.bias": (text["attention_bias"], False),
            "vision.output.norm": (vision.output.norm, "none"),
            "vision.patches.pre_norm": (vision.patches.pre_norm, True),
            "vision.num_prefix_tokens": (vision.num_prefix_tokens, 1),
            "vision.image_size": (vision.image_size, (vision.image_size[0],) * 2),
            "first new token": (decoder.vocab_size if longer is None else longer.first, decoder.vocab_size),
        }
        | (
            {
                "connector.activation": (resampler.activation, "relu"),
                "connector.mlp_dim": (resampler.mlp_dim, 4 * vision.dim),
                "connector.norm_eps": (resampler.norm_eps, 1e-5),
            }
            if resampler
            else {}
        ),
    )
    config = {
        **text,
        "model_type": "idefics",
        "architectures": ["IdeficsForVisionText2Text"],
        "additional_vocab_size": 0 if longer is None else longer.vocab_size - longer.first,
        "alpha_type": "vector" if model.gated.per_channel else "float",
        "cross_layer_interval": every,
        "qk_layer_norms": model.gated.qk_norm is not None,
        "use_resampler": resampler is not None,
        "vision_config": {
            **write_sizes(vision, _VISION_SIZES),
            "image_size": vision.image_size[0],
            "num_channels": vision.patches.in_channels,
            "hidden_act": SOURCE_ACTIVATIONS[vision.block.activation],
            "layer_norm_eps": vision.block.norm_eps,
        },
    }
    source = decoder_to_llama(decoder)
    if longer is not None:
        source[_ROWS] = longer.new_embed.weight.detach()
        source[_HEAD] = source[_ROWS] if longer.new_head is None else longer.new_head.weight.detach()
    tower = vit_tensors(vision, _TOWER, "Idefics", positions=_POSITIONS, prefix=[_CLASS])
    tower |= {_POSITIONS: tower[_POSITIONS][0], _CLASS: tower[_CLASS][0, 0]}
    tower |= {"post_layernorm.weight": torch.ones(vision.dim), "post_layernorm.bias": torch.zeros(vision.dim)}
    gated = {
        name: tensor[None, None] if "alpha" in name and model.gated.per_channel else tensor
        for name, tensor in export(model.gated_blocks, _BLOCKS, "Idefics").items()
    }
    parts = {"vision_model": tower, "gated_cross_attn_layers": gated}
    if resampler is not None:
        parts["perceiver_resampler"] = export(resampler, RESAMPLER, "Idefics")
        config["perceiver_config"] = {
            "use_resampler": True,
            **write_sizes(resampler, _RESAMPLER_SIZES),
            "qk_layer_norms_perceiver": resampler.qk_norm is not None,
        }
    for place, tensors in parts.items():
        source |= {f"model.{place}.{name}": tensor for name, tensor in tensors.items()}
    return config, source


def load_idefics(source: str | Path, *, visible_images: VisibleImages = "last") -> Flamingo:
    """An Idefics (the first one) from a folder as hubs have it, or the name of a hub's repository.

    Args:
        source: the folder or the name.
        visible_images: see `idefics_from_state`.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    return model_from_folder(source, partial(idefics_from_state, visible_images=visible_images), "idefics")


class IdeficsProcessor(Processor):
    """Prompts of Idefics: bos, the picture between its marks, then the words, if there are any.

    Its captions are asked for by the picture alone. Text before the picture sees none.

    Args:
        folder: the model's folder.
    """

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / CONFIG)
        side = (config.get("vision_config") or {}).get("image_size", 224)
        super().__init__(
            Tokenizer.from_pretrained(folder), read_pixels(folder, "Idefics", size=side), eos_ids=read_ends(folder)
        )
        self.encode = PromptTokenizer(folder)
        bos, *_ = self.encode("<s>", special=False)
        marks = [self.encode(mark, special=False) for mark in (_FAKE, _IMAGE)]
        if [len(ids) for ids in marks] != [1, 1] or bos != config.get("bos_token_id", 1):
            raise ValueError(f"{folder}: the tokenizer has no {_FAKE} and {_IMAGE} as tokens, or another bos than <s>")
        self.image_token_id, self.end_id = marks[1][0], self.encode(self.tokenizer.eos_token, special=False)[0]

    def prompt_ids(self, text: str | None, batch: CaptionBatch, sample: int) -> list[int]:
        """Bos, picture, words; see `Processor`."""
        return self.encode(f"<s>{_FAKE}{_IMAGE}{_FAKE}{(text or '').strip(' ')}", special=False)

    def with_prompts(self, batch: CaptionBatch, texts: Sequence[str | None]) -> CaptionBatch:
        """The batch with prompts, and with which text comes after the picture; see `Processor`."""
        return self.complete(super().with_prompts(batch, texts))

    def complete(self, batch: CaptionBatch) -> CaptionBatch:
        """Rows with which text comes after the picture, and sees it until another text begins; see `Processor`."""
        ends = (batch.tokens == self.end_id) & batch.attention_mask
        shown = (ends.cumsum(1) - ends.long()) == 0
        return replace(batch, image_index=(batch.tokens == self.image_token_id).long().cumsum(1) * shown)


def save_idefics(model: Flamingo, folder: str | Path) -> None:
    """Writes a folder that transformers reads: `config.json` and `model.safetensors`.

    Raises:
        ValueError: if the captioner is of another kind, before anything is written.
    """
    write_folder(folder, *to_idefics(model))


def _with_more_words(decoder: TextDecoder, state: dict[str, Tensor]) -> Decoder:
    """The decoder with the additional vocabulary, if there is one: its rows learn, as they do there."""
    if _ROWS not in state:
        return decoder
    longer = ExtendedDecoder(decoder, len(state[_ROWS]))
    with torch.no_grad():
        longer.new_embed.weight.copy_(state[_ROWS])
        if longer.new_head is not None:
            longer.new_head.weight.copy_(state[_HEAD])
    return longer


def _vision(config: dict[str, Any], state: dict[str, Tensor], context: str) -> ViT:
    """The tower, whose last norm nobody reads there."""
    vision = ViT(
        config["image_size"],
        **read_sizes(config, _VISION_SIZES, context),
        patches=ViTPatchConfig(config["num_channels"], bias=False, pre_norm=True),
        block=ViTBlockConfig(activation_of(config, "hidden_act", context), config["layer_norm_eps"]),
        output=ViTOutputConfig("none"),
    )
    unread = ["post_layernorm.weight", "post_layernorm.bias"]
    return fill_vit(vision, _TOWER, state, context, positions=_POSITIONS, prefix=[_CLASS], ignored=unread)
