"""Every other image-text-to-text model of transformers -> `HubCaptioner`, with its own processor, and back."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from mmtransformer.captioners.base import CaptionBatch
from mmtransformer.captioners.public.hub_captioner import HubBatch, HubCaptioner
from mmtransformer.images import ImageTransform
from mmtransformer.serialization.pretrained import CONFIG, find_folder, read_json, shapes_in
from mmtransformer.serialization.printable import say
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.text.conversation import messages_of
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.processors.pixels import read_preprocessor
from mmtransformer.weights.processors.processor import Processor, questions_of
from mmtransformer.weights.processors.settings import read_ends, read_start
from mmtransformer.weights.shared.folders import check_safetensors

PROMPT = "Describe the image concisely."
"""What a picture is captioned after, in a conversation."""
_PLAIN = {"florence2": "<CAPTION>", "kosmos-2": "<grounding>An image of", "kosmos-2.5": "<md>"}
"""The documented captioning prompts of families without conversations, whose processors put the picture in front."""
_THUMB = ImageTransform(8, "squash")
_PLACES = ("text_config", "language_config", "thinker_config", "decoder")


def hub_types() -> frozenset[str]:
    """The model types of transformers that read pictures and texts, and write text; none where it is not installed."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    except ImportError:
        return frozenset()
    return frozenset(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def load_hub(source: str | Path) -> HubCaptioner:
    """A model that transformers holds, from a folder: safetensors only, none missing, no code from outside.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    folder = find_folder(source)
    kind = read_json(folder / CONFIG).get("model_type")
    check_safetensors(folder)
    transformers = _transformers(kind)
    say(f"{folder}: {kind} is no family of this library's own, so it runs in transformers", file=sys.stderr)
    try:
        with built_from(shapes_in(folder), str(folder)):
            model, report = transformers.AutoModelForImageTextToText.from_pretrained(
                str(folder), trust_remote_code=False, use_safetensors=True, local_files_only=True, dtype=torch.float32,
                output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # almost any comes out of a folder that makes no sense
        raise ValueError(f"{folder}: transformers cannot load it: {_first_line(error)}") from error
    if faults := {name: sorted(map(str, found)) for name, found in report.items() if found}:
        told = "; ".join(f"{name}: {', '.join(found[:3])} ({len(found)} in all)" for name, found in faults.items())
        raise ValueError(f"{folder} does not fit transformers' {type(model).__name__}; {told}")
    return HubCaptioner(model.eval())


def save_hub(model: HubCaptioner, folder: str | Path) -> None:
    """Writes a folder that transformers reads."""
    model.model.save_pretrained(str(folder))


class HubProcessor(Processor):
    """Pictures and prompts as transformers' own processor makes them, from the folder's files.

    What a user says becomes a conversation by the folder's chat template; without one it is the text itself, with the
    mark of a picture in front where the processor does not put it there.

    Args:
        folder: the model's folder.

    Raises:
        ValueError: if transformers cannot build the processor, or the tokenizer has no file that can be read.
    """

    def __init__(self, folder: Path) -> None:
        self.kind = str(read_json(folder / CONFIG).get("model_type"))
        tokenizer, _ = Tokenizer.from_pretrained(folder), read_preprocessor(folder)  # both say what is missing
        transformers = _transformers(self.kind)
        try:
            self.hub: Any = transformers.AutoProcessor.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            raise ValueError(f"{folder}: transformers cannot build its processor: {_first_line(error)}") from error
        if not hasattr(self.hub, "tokenizer"):
            raise ValueError(f"{folder}: its processor is a {type(self.hub).__name__}, without a tokenizer")
        self.hub.tokenizer.padding_side = "left"
        self.talks = getattr(self.hub, "chat_template", None) is not None
        prompt = PROMPT if self.talks else _PLAIN.get(self.kind)
        super().__init__(tokenizer, _THUMB, eos_ids=read_ends(folder, *_PLACES), prompt=prompt)
        seq2seq = read_json(folder / CONFIG).get("is_encoder_decoder") or self.kind == "florence2"
        self.start = read_start(folder, *_PLACES) if seq2seq else None

    def prepare(self, image: Image) -> Image:
        """The picture itself: its processor reads it with its prompt."""
        return image

    def batch_of(self, prepared: Sequence[Image]) -> HubBatch:
        """Pictures as a batch without texts; see `Processor`."""
        none = torch.zeros(len(prepared), 0, dtype=torch.long)
        thumbs = torch.stack([_THUMB(image) for image in prepared])
        return HubBatch(none, none.bool(), none.bool(), pixels=thumbs, images=tuple(prepared))

    def with_prompts(self, batch: CaptionBatch, texts: Sequence[str | None]) -> CaptionBatch:
        """The batch with what the model reads; see `Processor`."""
        assert isinstance(batch, HubBatch)
        given = self._given(batch.images, texts)
        device = batch.tokens.device
        tokens, real = given["input_ids"], given["attention_mask"].bool()
        if self.start is not None:
            tokens = torch.full((len(texts), 1), self.start)
            real = torch.ones_like(tokens, dtype=torch.bool)
        return dataclasses.replace(
            batch,
            tokens=tokens.to(device),
            attention_mask=real.to(device),
            loss_mask=torch.zeros_like(real).to(device),
            given={name: x.to(device) for name, x in given.items()},
        )

    def prompt_ids(self, text: str | None, batch: CaptionBatch, sample: int) -> list[int]:
        """The ids of a picture's prompt; see `Processor`."""
        assert isinstance(batch, HubBatch)
        if self.start is not None:
            return [self.start]
        return self._given(batch.images[sample : sample + 1], [text])["input_ids"][0].tolist()

    def opening(self, text: str | None = None) -> tuple[list[int] | None, str]:
        """Prompts depend on the picture; see `Processor`."""
        ends = self._text(text)[-1:]
        return None, "" if self.start is not None or not ends or ends.isspace() else " "

    def complete(self, batch: CaptionBatch) -> CaptionBatch:
        """Rows of training with what else the model reads; see `Processor`."""
        assert isinstance(batch, HubBatch)
        asked, q = questions_of(batch, len(batch.images)), batch.tokens.shape[1]
        given = self._given(batch.images, asked)
        if self.start is None:
            shape, real = given.pop("input_ids").shape, given.pop("attention_mask").bool()
            for name, x in given.items():
                if x.shape == shape:  # what stands beside the prompt's ids goes to the left, with nothing of captions
                    rows = [row[mask] for row, mask in zip(x, real, strict=True)]
                    given[name] = torch.stack([torch.cat((row, row.new_zeros(q)))[:q] for row in rows])
        return dataclasses.replace(batch, given=given)

    def _text(self, said: str | None) -> str:
        said = self.prompt if said is None else said
        if self.talks:
            return self.hub.apply_chat_template(messages_of(said or ""), add_generation_prompt=True, tokenize=False)
        mark = getattr(self.hub, "image_token", None)
        alone = self.kind in _PLAIN or mark is None or mark in (said or "")
        return (said or "") if alone else f"{mark}{said or ''}"

    def _given(self, images: Sequence[Image], texts: Sequence[str | None]) -> dict[str, Tensor]:
        """What the processor makes of pictures and texts.

        Raises:
            ValueError: for what it does not take.
        """
        whole = [self._text(text) for text in texts]
        bos = getattr(self.hub.tokenizer, "bos_token", None)
        again = {"add_special_tokens": False} if bos and whole[0].startswith(bos) else {}
        pictures: Any = [[image] for image in images] if self.talks else [*images]
        try:
            found = self.hub(images=pictures, text=whole, padding=True, return_tensors="pt", **again)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"transformers' {type(self.hub).__name__}: {_first_line(error)}") from error
        return {name: x for name, x in found.items() if isinstance(x, Tensor) and name != "labels"}


def _transformers(kind: Any) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f'models of the type "{kind}" run in transformers: pip install transformers') from error
    return transformers


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
