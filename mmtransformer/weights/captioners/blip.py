"""transformers' BLIP (Li et al., arXiv:2201.12086) -> `EncoderDecoder`, and back.

Its text decoder is a BERT that looks back only, and reads the image in every block.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmtransformer.captioners.encoder_decoder import EncoderDecoder
from mmtransformer.serialization.pretrained import CONFIG, find_folder, read_json
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.weights.shared.folders import read_tensors, write_folder
from mmtransformer.weights.shared.keys import part
from mmtransformer.weights.text.bert import decoder_from_bert, decoder_to_bert
from mmtransformer.weights.vision.eva import vision_from_blip2, vision_to_blip2

_DEFAULTS: dict[str, dict[str, Any]] = {
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 384,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    },
    "text_config": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 512,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.0,
        "bos_token_id": 30522,
        "sep_token_id": 102,
        "pad_token_id": 0,
    },
}
"""What transformers takes for granted where a config.json does not say it."""

_CAPTIONING = "BlipForConditionalGeneration"


def from_blip(model: nn.Module) -> EncoderDecoder:
    """A BLIP of transformers as a captioner; equal to 1e-5 in float32.

    Raises:
        ValueError: if it is none, or differs in more than its size.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "blip":
        raise ValueError(f"{type(model).__name__} is not a BLIP of transformers")
    return blip_from_state(config.to_dict(), model.state_dict(), f"transformers' {type(model).__name__}")


def blip_from_state(config: dict[str, Any], state: Mapping[str, Tensor], context: str) -> EncoderDecoder:
    """The same from what a hub folder holds.

    The class token's position is added into it, which is what the tower does with it anyway.

    Args:
        config: its config.json.
        state: all of its tensors.
        context: what they come from, for errors.

    Raises:
        ValueError: as `from_blip`.
    """
    config = config | {name: usual | config.get(name, {}) for name, usual in _DEFAULTS.items()}
    if not config.get("tie_word_embeddings", True):
        raise ValueError(f"{context}: tie_word_embeddings is false, and BLIP's head is tied to its embedding here")
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".position_ids")}  # old files' buffers
    tower = {name: state.pop(name) for name in list(state) if name.startswith("vision_model.")}
    vision = vision_from_blip2(config["vision_config"], tower, context)
    text = part(state, "text_decoder.")
    decoder = decoder_from_bert(config["text_config"], text, f"{context}, text decoder", cross_dim=vision.dim)
    if unknown := [name for name in state if not name.startswith("text_decoder.")]:
        raise ValueError(f"{context}: a {_CAPTIONING} has no {', '.join(unknown[:5])} ({len(unknown)} in all)")
    return EncoderDecoder(vision, decoder).eval()


def to_blip(model: EncoderDecoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What transformers needs to hold this model: its config.json, and its tensors by their names there.

    Raises:
        ValueError: if a part has no counterpart there.
    """
    if model.adapter is not None:
        raise ValueError(f"transformers' BLIP has nothing like the adapter, a {type(model.adapter).__name__}")
    text, words = decoder_to_bert(model.decoder, "transformers' BLIP")
    vision, tensors = vision_to_blip2(model.vision)
    config = {
        "model_type": "blip",
        "architectures": [_CAPTIONING],
        "vision_config": vision,
        "text_config": {**text, "encoder_hidden_size": model.vision.dim},
    }
    return config, tensors | {f"text_decoder.{name}": tensor for name, tensor in words.items()}


def load_blip(source: str | Path) -> EncoderDecoder:
    """A BLIP from a folder as hubs have it, or the name of a hub's repository; see `from_blip`.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    folder = find_folder(source)
    config = read_json(folder / CONFIG)
    if (kind := config.get("model_type")) != "blip":
        raise ValueError(f'{folder / CONFIG}: model_type is "{kind}", not "blip"')
    state = read_tensors(folder)
    with built_from(state, str(folder)):
        return blip_from_state(config, state, str(folder))


def save_blip(
    model: EncoderDecoder,
    folder: str | Path,
    *,
    bos_token_id: int = 30522,
    sep_token_id: int = 102,
    pad_token_id: int = 0,
) -> None:
    """Writes a folder that transformers reads: `config.json` and `model.safetensors`.

    Args:
        model: the model.
        folder: where to.
        bos_token_id: the id that a caption begins with; by default [DEC] of the published ones.
        sep_token_id: the id that ends it; BERT's [SEP].
        pad_token_id: the id of padding; BERT's [PAD].

    Raises:
        ValueError: if a part has no counterpart there, or an id is none of the model's, before anything is written.
    """
    config, tensors = to_blip(model)
    ids = {"bos_token_id": bos_token_id, "sep_token_id": sep_token_id, "pad_token_id": pad_token_id}
    for name, token in ids.items():
        if not 0 <= token < model.vocab_size:
            raise ValueError(f"{name} ({token}) must be one of the model's {model.vocab_size} ids")
    config["text_config"] |= ids | {"eos_token_id": sep_token_id}
    write_folder(folder, config, tensors)
