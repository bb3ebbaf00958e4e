"""transformers' BLIP (Li et al., arXiv:2201.12086) -> `VisionEncoderDecoder`, `BlipVQA` and `BlipITM`, and back.

Its text decoder is a BERT that looks back only, and reads the image (or the question) in every block.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.blip2 import InstructBatch
from mmtransformer.captioners.published.blip import BlipITM, BlipVQA
from mmtransformer.captioners.vision_encoder_decoder import VisionEncoderDecoder
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.processors.pixels import read_pixels
from mmtransformer.weights.processors.processor import Processor, questions_of
from mmtransformer.weights.processors.tokens import PromptTokenizer
from mmtransformer.weights.shared.configs import only_these
from mmtransformer.weights.shared.folders import model_from_folder, read_config, write_folder
from mmtransformer.weights.shared.keys import export, fill, part
from mmtransformer.weights.text.bert import (
    cross_encoder_from_bert,
    cross_encoder_to_bert,
    decoder_from_bert,
    decoder_to_bert,
)
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

_NAME = "transformers' BLIP"
_HEADS = {"itm_head": "itm_head", "vision_proj": "vision_proj", "text_proj": "text_proj"}
Blip = VisionEncoderDecoder | BlipVQA | BlipITM


def blip_from_state(config: dict[str, Any], state: Mapping[str, Tensor], context: str) -> Blip:
    """A BLIP from what a hub folder holds; equal to 1e-5 in float32.

    BlipForConditionalGeneration becomes a `VisionEncoderDecoder`, BlipForQuestionAnswering a `BlipVQA`, and
    BlipForImageTextRetrieval a `BlipITM`. The class token's position is added into it, which is what the tower does
    with it anyway.

    Args:
        config: its config.json.
        state: all of its tensors.
        context: what they come from, for errors.

    Raises:
        ValueError: if it is none of them, or differs in more than its size.
    """
    config = _with_usual(config)
    if not config.get("tie_word_embeddings", True):
        raise ValueError(f"{context}: tie_word_embeddings is false, and BLIP's head is tied to its embedding here")
    state = dict(state)
    vision = vision_from_blip2(config["vision_config"], _take(state, "vision_model.", keep=True), context)
    text, encoder, decoder = config["text_config"], None, None
    if words := _take(state, "text_encoder."):
        encoder = cross_encoder_from_bert(text, words, f"{context}, text encoder", context_dim=vision.dim)
    if (words := _take(state, "text_decoder.")) or encoder is None:
        reads = vision.dim if encoder is None else encoder.dim
        decoder = decoder_from_bert(text, words, f"{context}, text decoder", context_dim=reads)
    model: Blip
    if decoder is None:
        assert encoder is not None
        model = BlipITM(vision, encoder, embed_dim=config.get("image_text_hidden_size", 256))
    else:
        model = VisionEncoderDecoder(vision, decoder) if encoder is None else BlipVQA(vision, encoder, decoder)
    fill(model, _HEADS, state, context, kept=("vision.", "text.", "question.", "decoder."))
    return model.eval()


def _take(state: dict[str, Tensor], prefix: str, *, keep: bool = False) -> dict[str, Tensor]:
    """The tensors whose names begin so, out of the state; without the prefix unless it is kept."""
    taken = {name: state.pop(name) for name in list(state) if name.startswith(prefix)}
    return taken if keep else part(taken, prefix)


def to_blip(model: Blip) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What transformers needs to hold this model: its config.json, and its tensors by their names there.

    Raises:
        ValueError: if a part has no counterpart there.
    """
    vision, tensors = vision_to_blip2(model.vision, "BLIP")
    config: dict[str, Any] = {"model_type": "blip", "vision_config": vision}
    parts: dict[str, dict[str, Tensor]] = {}
    if isinstance(model, VisionEncoderDecoder):
        only_these(_NAME, {"connector": (model.connector, None)})
        kind = "BlipForConditionalGeneration"
        text, parts["text_decoder"] = decoder_to_bert(model.decoder, _NAME)
    elif isinstance(model, BlipVQA):
        kind = "BlipForQuestionAnswering"
        words, parts["text_encoder"] = cross_encoder_to_bert(model.question, _NAME)
        text, parts["text_decoder"] = decoder_to_bert(model.decoder, _NAME)
        # One configuration serves both there, and one width of what is read.
        facts = {f"the question's {key}": (value, text[key]) for key, value in words.items()}
        only_these(_NAME, facts | {"the question encoder's dim": (model.question.dim, model.vision.dim)})
    else:
        kind = "BlipForImageTextRetrieval"
        text, parts["text_encoder"] = cross_encoder_to_bert(model.text, _NAME)
        config["image_text_hidden_size"] = model.embed_dim
        tensors |= export(model, _HEADS, _NAME, kept=("vision.", "text."))
    tensors |= {f"{where}.{name}": tensor for where, words in parts.items() for name, tensor in words.items()}
    return config | {"architectures": [kind], "text_config": {**text, "encoder_hidden_size": model.vision.dim}}, tensors


def _with_usual(config: dict[str, Any]) -> dict[str, Any]:
    return config | {name: usual | config.get(name, {}) for name, usual in _DEFAULTS.items()}


def load_blip(source: str | Path) -> Blip:
    """A BLIP from a folder as hubs have it, or the name of a hub's repository; see `blip_from_state`.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    return model_from_folder(source, blip_from_state, "blip")


class BlipProcessor(Processor):
    """Prompts of BLIP: [DEC], then the words that a caption goes on from; or [DEC] beside a question, which is read.

    A text ends with [SEP], whatever a folder says of its eos_token_id: so transformers has it too.

    Args:
        folder: the model's folder.

    Raises:
        ValueError: if a file is missing or damaged, or the model neither captions nor answers.
    """

    prompt_len = 1

    def __init__(self, folder: Path) -> None:
        config = _with_usual(read_config(folder, "blip"))
        text, kinds = config["text_config"], config.get("architectures") or ()
        if "BlipForImageTextRetrieval" in kinds:
            raise ValueError(f"{folder} holds a BLIP that matches images and texts (BlipITM), and does not caption")
        self.answers = "BlipForQuestionAnswering" in kinds
        self.keeps_prompt = not self.answers
        super().__init__(
            Tokenizer.from_pretrained(folder),
            read_pixels(folder, "Blip", size=config["vision_config"]["image_size"]),
            eos_ids=[text["sep_token_id"]],
        )
        self.encode, self.start_id = PromptTokenizer(folder), text["bos_token_id"]

    def prompt_ids(self, text: str | None, batch: CaptionBatch, sample: int) -> list[int]:
        """[DEC] and the words; a question's words stand elsewhere. See `Processor`."""
        words = [] if text is None or self.answers else self.encode(text, special=False)
        return [self.start_id, *words]

    def with_prompts(self, batch: CaptionBatch, texts: Sequence[str | None]) -> CaptionBatch:
        """The batch with prompts, or with questions between [CLS] and [SEP]; see `Processor`.

        Raises:
            ValueError: if there is no question for a model that answers.
        """
        return self._asked(super().with_prompts(batch, texts), texts)

    def complete(self, batch: CaptionBatch) -> CaptionBatch:
        """Rows of training with their questions, for a model that answers; see `Processor`."""
        return self._asked(batch, questions_of(batch, len(batch.tokens)))

    def _asked(self, batch: CaptionBatch, texts: Sequence[str | None]) -> CaptionBatch:
        if not self.answers:
            return batch
        if None in texts:
            raise ValueError("this model answers questions: give one as the prompt, or data that hold them")
        questions, real = self.tokenizer.pad([self.encode(text) for text in texts if text is not None])
        questions, real = (x.to(batch.tokens.device) for x in (questions, real))
        values: dict[str, Any] = vars(batch) | {"instruction": questions, "instruction_attention_mask": real}
        return InstructBatch(**values)


def save_blip(
    model: Blip, folder: str | Path, *, bos_token_id: int = 30522, sep_token_id: int = 102, pad_token_id: int = 0
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
        if not 0 <= token < (count := config["text_config"]["vocab_size"]):
            raise ValueError(f"{name} ({token}) must be one of the model's {count} ids")
    config["text_config"] |= ids | {"eos_token_id": sep_token_id}
    write_folder(folder, config, tensors)
