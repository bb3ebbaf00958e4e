"""transformers' BLIP-2 and InstructBLIP -> `Blip2` and `Blip2QFormer`, and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.base import Decoder
from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.backbones.hf.decoder import HFDecoder
from mmtransformer.backbones.hf.seq2seq import HFSeq2Seq
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.blip2 import Blip2, InstructBatch
from mmtransformer.captioners.blip2_qformer import Blip2QFormer
from mmtransformer.connectors.qformer import QFormer
from mmtransformer.layers.lora import refuse_lora
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.captioners.parts.qformer import BLIP2, INSTRUCTBLIP, qformer_keys
from mmtransformer.weights.processors.generation_config import read_ends
from mmtransformer.weights.processors.pixels import read_pixels
from mmtransformer.weights.processors.processor import Processor, questions_of
from mmtransformer.weights.processors.tokens import PromptTokenizer
from mmtransformer.weights.shared.configs import SIZES, UnsupportedModel, read_sizes, write_sizes
from mmtransformer.weights.shared.folders import model_from_folder, read_config, write_folder
from mmtransformer.weights.shared.keys import export, fill, nested, part
from mmtransformer.weights.text.lm import decoder_from_state, lm_to_transformers
from mmtransformer.weights.vision.eva import vision_from_blip2, vision_to_blip2

_TYPES = ("blip-2", "instructblip")
# What transformers takes for granted where a config.json does not say it.
_USUAL = {"num_query_tokens": 32, "image_text_hidden_size": 256}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vision_config": {
        "hidden_size": 1408,
        "intermediate_size": 6144,
        "num_hidden_layers": 39,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
    "qformer_config": {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "cross_attention_frequency": 2,
    },
}
_LANGUAGE_DEFAULTS: dict[Any, dict[str, Any]] = {
    "opt": {
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
    "llama": {
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "t5": {"eos_token_id": 1, "decoder_start_token_id": 0},
}
_SEQ2SEQ = ("t5", "mt5", "umt5")
INSTRUCTION_PROMPT = "A short image description:"
"""What InstructBLIP captions after (arXiv:2305.06500, appendix E)."""

_QFORMER = {source: target for source, target in SIZES.items() if target != "vocab_size"} | {
    "hidden_dropout_prob": "dropout",
    "layer_norm_eps": "norm_eps",
    "cross_attention_frequency": "cross_attention_frequency",
}


def _qformer(config: dict[str, Any], *, text: bool, context: str) -> QFormer:
    """An unfilled Q-Former of the configuration of a whole model."""
    own = config["qformer_config"]
    if own["hidden_act"] != "gelu":
        raise ValueError(f"{context}: the Q-Former has hidden_act {own['hidden_act']}; only gelu is known here")
    return QFormer(
        config["num_query_tokens"],
        visual_dim=config["vision_config"]["hidden_size"],
        vocab_size=own["vocab_size"] if text else None,
        **read_sizes(own, _QFORMER, context),
    )


def _qformer_config(qformer: QFormer) -> dict[str, Any]:
    text = {} if qformer.vocab_size is None else {"vocab_size": qformer.vocab_size, "use_qformer_text_input": True}
    return text | {
        **write_sizes(qformer, _QFORMER),
        "hidden_act": "gelu",
        "attention_probs_dropout_prob": qformer.dropout,
        "encoder_hidden_size": qformer.visual_dim,
    }


def blip2_from_state(config: dict[str, Any], state: dict[str, Tensor], context: str) -> Blip2 | Blip2QFormer:
    """A BLIP-2 or InstructBLIP as a `Blip2`, a Blip2ForImageTextRetrieval as a `Blip2QFormer`.

    Equal to 1e-5 in float32. Transformers keeps neither stage 1's head for generation nor its temperature: those of the
    `Blip2QFormer` are new.

    Args:
        config: the config.json of a hub folder.
        state: all of its tensors.
        context: what they come from, for errors.

    Raises:
        ValueError: if it is none of them, or differs in more than its size.
    """
    config = _whole(config, context)
    towers = ("vision_model.", "language_model.")
    tower = {name: tensor for name, tensor in state.items() if name.startswith(towers[0])}
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(towers)}
    vision = vision_from_blip2(config["vision_config"], tower, context)
    if "itm_head.weight" in rest:
        qformer = _qformer(config, text=True, context=context)
        model = Blip2QFormer(vision, qformer, embed_dim=config["image_text_hidden_size"], freeze_vision=True)
    else:
        instruct = config["model_type"] == "instructblip"
        qformer = _qformer(config, text=instruct, context=context)
        language = part(state, "language_model.")
        decoder = _language_model(config["text_config"], language, f"{context}, language model")
        model = Blip2(vision, qformer, decoder, instruct=instruct)
    fill(model, _keys(model), rest, context, kept=_ELSEWHERE)
    return model.eval()


def _language_model(config: dict[str, Any], state: dict[str, Tensor], context: str) -> Decoder | HFSeq2Seq:
    kind: type[HFDecoder | HFSeq2Seq] = HFSeq2Seq
    if config["model_type"] not in ("t5", "mt5", "umt5"):
        try:
            return decoder_from_state(config, state, context)
        except UnsupportedModel:
            kind = HFDecoder
    built = kind(config).model
    # By transformers' own reader: what a tensor is called in files is not always its name in memory.
    model, report = type(built).from_pretrained(
        None, config=built.config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    if faults := [f"{name}: {', '.join(sorted(map(str, found))[:5])}" for name, found in report.items() if found]:
        raise ValueError(f"{context} does not fit transformers' {type(built).__name__}; {'; '.join(faults)}")
    return kind.from_model(model.eval())


_ELSEWHERE = ("vision.", "decoder.", "head_", "log_temperature")
"""The towers, which have tables of their own, and what transformers has no place for."""


def _keys(model: Blip2 | Blip2QFormer) -> dict[str, str]:
    style = INSTRUCTBLIP if isinstance(model, Blip2) and model.instruct else BLIP2
    return nested(qformer_keys(style), target="qformer.") | {
        "language_projection": "proj",
        "[vision,text]_projection": "[vision,text]_proj",
        "itm_head": "itm_head",
    }


def to_blip2(model: Blip2 | Blip2QFormer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What transformers needs to hold this model: its config.json, and its tensors by their names there.

    A `Blip2` becomes a Blip2ForConditionalGeneration, an instructed one an InstructBlipForConditionalGeneration, and an
    `Blip2QFormer` a Blip2ForImageTextRetrieval, which has no place for the head of generation and the temperature.

    Raises:
        ValueError: if a part has no counterpart there.
    """
    refuse_lora(model)
    vision, tensors = vision_to_blip2(model.vision)
    config: dict[str, Any] = {
        "model_type": "blip-2",
        "vision_config": vision,
        "qformer_config": _qformer_config(model.qformer),
        "num_query_tokens": model.qformer.num_queries,
    }
    tensors |= export(model, _keys(model), "BLIP-2", kept=_ELSEWHERE)
    if isinstance(model, Blip2QFormer):
        config |= {"architectures": ["Blip2ForImageTextRetrieval"], "image_text_hidden_size": model.embed_dim}
        return config, tensors
    kind = "InstructBlip" if model.instruct else "Blip2"
    config |= {"model_type": "instructblip"} if model.instruct else {}
    if isinstance(model.decoder, HFDecoder | HFSeq2Seq):
        text, language = model.decoder.config, dict(model.decoder.model.state_dict())
    elif isinstance(model.decoder, TextDecoder):
        text, language = lm_to_transformers(model.decoder)
    else:
        raise ValueError(f"transformers has no language model like {type(model.decoder).__name__}")
    config |= {"architectures": [f"{kind}ForConditionalGeneration"], "text_config": text}
    return config, tensors | {f"language_model.{name}": tensor for name, tensor in language.items()}


def load_blip2(source: str | Path) -> Blip2 | Blip2QFormer:
    """A BLIP-2 from a folder as hubs have it, or the name of a hub's repository; see `blip2_from_state`.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    return model_from_folder(source, blip2_from_state, *_TYPES)


def _whole(config: dict[str, Any], context: str) -> dict[str, Any]:
    """A config.json, with what published ones leave out as it is usual.

    Raises:
        ValueError: if a part's config is none.
    """
    for name in (*_DEFAULTS, "text_config"):
        if not isinstance(config.get(name, {}), dict):
            raise ValueError(f"{context}: config.json: {name} is {config[name]!r}, not a model's config")
    parts = {name: defaults | config.get(name, {}) for name, defaults in _DEFAULTS.items()}
    text = {"model_type": "opt", **config.get("text_config", {})}
    return _USUAL | config | parts | {"text_config": _LANGUAGE_DEFAULTS.get(text["model_type"], {}) | text}


class Blip2Processor(Processor):
    """Prompts of BLIP-2 and InstructBLIP: the text with what its tokenizer adds; the queries stand before it anyway.

    The Q-Former of an InstructBLIP reads the text too, in its own vocabulary. T5's begin token is the first of a row.

    Args:
        folder: the model's folder.
    """

    def __init__(self, folder: Path) -> None:
        config = _whole(read_config(folder, *_TYPES), str(folder))
        text = config["text_config"]
        self.instruct = config["model_type"] == "instructblip"
        super().__init__(
            Tokenizer.from_pretrained(folder),
            read_pixels(folder, "Blip", size=config["vision_config"]["image_size"]),
            eos_ids=read_ends(folder, "text_config"),
            prompt=INSTRUCTION_PROMPT if self.instruct else None,
        )
        self.encode = PromptTokenizer(folder)
        self.encode_instruction = PromptTokenizer(folder / "qformer_tokenizer") if self.instruct else None
        self.bos_id = text.get("bos_token_id")
        self.prompt_len = 1 if text.get("model_type") in _SEQ2SEQ else config["num_query_tokens"] + 1
        self.begin = [text.get("decoder_start_token_id", 0)] if text.get("model_type") in _SEQ2SEQ else []

    def prompt_ids(self, text: str | None, batch: CaptionBatch, sample: int) -> list[int]:
        """Begin token of a T5, then bos and text; see `Processor`."""
        if text is None and self.bos_id is None:
            raise ValueError("config.json says no bos_token_id for text without a prompt: give a prompt")
        return [*self.begin, *([self.bos_id] if text is None else self.encode(text))]

    def with_prompts(self, batch: CaptionBatch, texts: Sequence[str | None]) -> CaptionBatch:
        """The batch with prompts, and with what the Q-Former reads of them; see `Processor`."""
        return self._instructed(super().with_prompts(batch, texts), texts)

    def complete(self, batch: CaptionBatch) -> CaptionBatch:
        """Rows of training with what the Q-Former reads; see `Processor`."""
        return self._instructed(batch, questions_of(batch, len(batch.tokens)))

    def _instructed(self, batch: CaptionBatch, texts: Sequence[str | None]) -> CaptionBatch:
        if self.encode_instruction is None:
            return batch
        said = [self.encode_instruction((self.prompt or "") if text is None else text) for text in texts]
        instruction, real = (x.to(batch.tokens.device) for x in self.tokenizer.pad(said))
        values: dict[str, Any] = vars(batch) | {"instruction": instruction, "instruction_attention_mask": real}
        return InstructBatch(**values)


def save_blip2(model: Blip2 | Blip2QFormer, folder: str | Path, *, image_token_id: int | None = None) -> None:
    """Writes a folder that transformers reads: `config.json` and `model.safetensors`.

    Args:
        model: the model.
        folder: where to.
        image_token_id: the id that stands for a query in transformers' `input_ids`, one of the decoder's vocabulary and
            used for nothing else; needed for a `Blip2`.

    Raises:
        ValueError: if a part has no counterpart there, or the id is missing, before anything is written.
    """
    config, tensors = to_blip2(model)
    if isinstance(model, Blip2):
        if image_token_id is None or not 0 <= image_token_id < model.vocab_size:
            raise ValueError(
                f"transformers marks queries in the text: image_token_id ({image_token_id}) must be one of the "
                f"decoder's {model.vocab_size} ids that no text has"
            )
        config["image_token_index"] = image_token_id
    write_folder(folder, config, tensors)
