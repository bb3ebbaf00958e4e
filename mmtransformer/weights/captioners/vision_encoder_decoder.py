"""transformers' vision-encoder-decoder -> `VisionEncoderDecoder`, and back: GPT-2 or BERT reads ViT or DeiT."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.vision_encoder_decoder import VisionEncoderDecoder
from mmtransformer.connectors.linear import LinearConnector
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.processors.generation_config import read_ends, read_start
from mmtransformer.weights.processors.pixels import read_pixels
from mmtransformer.weights.processors.processor import Processor
from mmtransformer.weights.processors.tokens import PromptTokenizer
from mmtransformer.weights.shared.configs import only
from mmtransformer.weights.shared.folders import model_from_folder, read_config, write_folder
from mmtransformer.weights.shared.keys import export, fill, part
from mmtransformer.weights.text.bert import decoder_from_bert, decoder_to_bert
from mmtransformer.weights.text.gpt2 import decoder_from_gpt2, decoder_to_gpt2, gpt2_config, is_gpt2
from mmtransformer.weights.vision.vit import vision_from_vit, vision_to_vit

_TYPE, _NAME = "vision-encoder-decoder", "transformers' vision-encoder-decoder"
_PROJ = {"enc_to_dec_proj": "proj"}
_HEAD, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"
_USUAL: dict[str, dict[str, Any]] = {  # What transformers takes for granted where a config.json does not say it.
    "gpt2": {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
    "bert": {
        "vocab_size": 30522,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
    },
}


def vision_encoder_decoder_from_state(
    config: dict[str, Any], state: Mapping[str, Tensor], context: str
) -> VisionEncoderDecoder:
    """A vision-encoder-decoder from what a hub folder holds; equal to 1e-5 in float32.

    Positions of class and distillation token are added into them, as are a BERT's of token type 0 into its positions.

    Args:
        config: its config.json.
        state: all of its tensors.
        context: what they come from, for errors.

    Raises:
        ValueError: if it is of other parts than ViT or DeiT and GPT-2 or BERT.
    """
    encoder, text = _parts(config, context)
    vision = vision_from_vit(encoder, part(state, "encoder."), f"{context}, encoder")
    words = part(state, "decoder.")
    kind = text.get("model_type")
    if kind not in _USUAL:
        raise ValueError(f'{context}: the decoder is a "{kind}", not one of {", ".join(_USUAL)}')
    text = {**_USUAL[kind], **text}
    only(text, context, {"add_cross_attention": True, "cross_attention_hidden_size": None})
    dim = text["n_embd" if kind == "gpt2" else "hidden_size"]
    if kind == "gpt2":
        # transformers leaves a head untied that is in the file and is another.
        own = _HEAD in words and not torch.equal(words[_HEAD], words.get(_EMBEDDING, words[_HEAD]))
        text["tie_word_embeddings"] = text.get("tie_word_embeddings", True) and not own
        decoder = decoder_from_gpt2(text | {"add_cross_attention": True}, words, f"{context}, decoder")
    else:
        decoder = decoder_from_bert(text, words, f"{context}, decoder", context_dim=dim)
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(("encoder.", "decoder."))}
    connector = None if vision.dim == dim else LinearConnector(vision.dim, dim)
    fill(nn.Identity() if connector is None else connector, _PROJ, rest, context)
    return VisionEncoderDecoder(vision, decoder, connector=connector).eval()


def to_vision_encoder_decoder(model: VisionEncoderDecoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What transformers needs to hold this model: its config.json, and its tensors by their names there.

    Raises:
        ValueError: if a part has no counterpart there.
    """
    decoder, connector = model.decoder, model.connector
    if decoder.context_dim != decoder.dim:
        raise ValueError(f"{_NAME} has context_dim equal to dim ({decoder.dim}), not {decoder.context_dim}")
    vision, tensors = vision_to_vit(model.vision)
    state = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    if connector is not None:
        if not isinstance(connector, LinearConnector) or model.vision.dim == decoder.dim:
            raise ValueError(
                f"{_NAME} has a LinearConnector where widths differ, not a {type(connector).__name__} from "
                f"{model.vision.dim} to {decoder.dim}"
            )
        state |= export(connector, _PROJ, _NAME)
    if is_gpt2(decoder):
        text, words = gpt2_config(decoder), decoder_to_gpt2(decoder)
        if decoder.tied:
            del words[_HEAD]
    else:
        text, words = decoder_to_bert(decoder, f"{_NAME} with a BERT")
        words["bert.embeddings.token_type_embeddings.weight"] = words[
            "bert.embeddings.position_embeddings.weight"
        ].new_zeros(2, decoder.dim)
        text |= {"model_type": "bert", "architectures": ["BertLMHeadModel"], "type_vocab_size": 2}
    config = {
        "model_type": _TYPE,
        "architectures": ["VisionEncoderDecoderModel"],
        "is_encoder_decoder": True,
        "encoder": vision,
        "decoder": {**text, "is_decoder": True, "add_cross_attention": True},
        "tie_word_embeddings": False,
    }
    return config, state | {f"decoder.{name}": tensor for name, tensor in words.items()}


def load_vision_encoder_decoder(source: str | Path) -> VisionEncoderDecoder:
    """A vision-encoder-decoder from a folder as hubs have it, or the name of a hub's repository.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    return model_from_folder(source, vision_encoder_decoder_from_state, _TYPE)


def _parts(config: dict[str, Any], context: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The encoder's and the decoder's configuration."""
    for name in ("encoder", "decoder"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f"{context}: config.json has no {name}")
    return config["encoder"], config["decoder"]


class VisionEncoderDecoderProcessor(Processor):
    """Prompts of a vision-encoder-decoder: the decoder's start, then the words that a caption goes on from.

    Args:
        folder: the model's folder.

    Raises:
        ValueError: if a file is missing or damaged.
    """

    keeps_prompt = True
    prompt_len = 1

    def __init__(self, folder: Path) -> None:
        encoder, _ = _parts(read_config(folder, _TYPE), str(folder))
        size = encoder.get("image_size", 224)
        kind = {"deit": "DeiT"}.get(encoder.get("model_type", ""), "ViT")
        super().__init__(
            Tokenizer.from_pretrained(folder),
            read_pixels(folder, kind, size=size if isinstance(size, int) else size[0]),
            eos_ids=read_ends(folder, "decoder"),
        )
        self.encode, self.start_id = PromptTokenizer(folder), read_start(folder, "decoder")

    def prompt_ids(self, text: str | None, batch: CaptionBatch, sample: int) -> list[int]:
        """The start and the words; see `Processor`."""
        return [self.start_id, *([] if text is None else self.encode(text, special=False))]


def save_vision_encoder_decoder(
    model: VisionEncoderDecoder,
    folder: str | Path,
    *,
    decoder_start_token_id: int,
    eos_token_id: int,
    pad_token_id: int,
) -> None:
    """Writes a folder that transformers reads: `config.json` and `model.safetensors`.

    Args:
        model: the model.
        folder: where to.
        decoder_start_token_id: the id that a caption begins with; of the published GPT-2s 50256, the end itself.
        eos_token_id: the id that ends it.
        pad_token_id: the id of padding.

    Raises:
        ValueError: if a part has no counterpart there, or an id is none of the model's, before anything is written.
    """
    config, tensors = to_vision_encoder_decoder(model)
    ids = {"decoder_start_token_id": decoder_start_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    for name, token in ids.items():
        if not 0 <= token < model.vocab_size:
            raise ValueError(f"{name} ({token}) must be one of the model's {model.vocab_size} ids")
    ends = {"bos_token_id": decoder_start_token_id, "eos_token_id": eos_token_id}
    config["decoder"] |= ends | {"pad_token_id": pad_token_id}
    write_folder(folder, config | ids, tensors)
