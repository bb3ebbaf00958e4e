"""Every other image-text-to-text model of transformers -> `HFCaptioner`, with its own processor, and back."""

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.published.hf_captioner import HFBatch, HFCaptioner
from mmtransformer.images import ImageTransform
from mmtransformer.layers.lora import refuse_lora
from mmtransformer.serialization.pretrained import CONFIG, find_folder, read_json
from mmtransformer.serialization.printable import say
from mmtransformer.serialization.untrusted import built_from, said
from mmtransformer.serialization.weight_files import shapes_in
from mmtransformer.text.conversation import messages_of
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.processors.generation_config import read_ends, read_start
from mmtransformer.weights.processors.pixels import read_preprocessor
from mmtransformer.weights.processors.processor import Processor, questions_of
from mmtransformer.weights.shared.folders import check_safetensors

PROMPT = "Describe the image concisely."
"""What a picture is captioned after, in a conversation."""
_PLAIN = {
    "florence2": "<CAPTION>", "kosmos-2": "<grounding>An image of", "kosmos-2.5": "<md>",
    "fuyu": "Generate a coco-style caption.\n",
}  # fmt: skip
"""The documented captioning prompts of families without conversations, whose processors put the picture in front."""
_MORE = {
    "udop": "the boxes of a page's words", "evolla": "a protein", "pi0": "a robot's state",
    "instructblipvideo": "a video",
}  # fmt: skip
"""What families of the list read that is not there when a picture is captioned."""
_UNEQUAL = {"emu3": "pads the smaller ones and sees the padding"}
"""Families that write otherwise beside other pictures than alone."""
_ONE = "give it one picture at a time (a batch size of 1), or pictures of one size"
_THUMB = ImageTransform(8, "squash")
_PLACES = ("text_config", "language_config", "thinker_config", "decoder")


def hf_types() -> frozenset[str]:
    """The model types of transformers that read pictures and texts, and write text; none where it is not installed."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    except ImportError:
        return frozenset()
    return frozenset(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def load_hf(source: str | Path) -> HFCaptioner:
    """A model that transformers holds, from a folder: safetensors only, none missing, no code from outside.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    folder = find_folder(source)
    kind = read_json(folder / CONFIG).get("model_type")
    check_safetensors(folder)
    transformers = _transformers(kind, folder)
    held = f"such a {kind} is" if kind in ("llava", "llava_next", "llava_onevision") else f"{kind} is"
    say(f"{folder}: {held} no family of this library's own, so it runs in transformers", file=sys.stderr)
    try:
        with built_from(shapes_in(folder), str(folder)):
            model, report = transformers.AutoModelForImageTextToText.from_pretrained(
                str(folder), trust_remote_code=False, use_safetensors=True, local_files_only=True, dtype=torch.float32,
                output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # almost any comes out of a folder that makes no sense
        raise ValueError(f"{folder}: transformers cannot load it: {said(error)}") from error
    if faults := {name: sorted(map(str, found)) for name, found in report.items() if found}:
        told = "; ".join(f"{name}: {', '.join(found[:3])} ({len(found)} in all)" for name, found in faults.items())
        raise ValueError(f"{folder} does not fit transformers' {type(model).__name__}; {told}")
    return HFCaptioner(model.eval())


def save_hf(model: HFCaptioner, folder: str | Path) -> None:
    """Writes a folder that transformers reads."""
    refuse_lora(model)
    model.model.save_pretrained(str(folder))


class HFProcessor(Processor):
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
        transformers, own = _transformers(self.kind, folder), {"trust_remote_code": False, "local_files_only": True}
        try:
            self.hub: Any = transformers.AutoProcessor.from_pretrained(str(folder), **own)
            seq2seq = transformers.AutoConfig.from_pretrained(str(folder), **own).is_encoder_decoder
        except Exception as error:
            raise ValueError(f"{folder}: transformers cannot build its processor: {said(error)}") from error
        self.name = f"{folder}: transformers' {type(self.hub).__name__}"
        for part in ("tokenizer", "image_processor"):
            if getattr(self.hub, part, None) is None:
                raise ValueError(f"{self.name} has no {part}, and captions need both")
        self.hub.tokenizer.padding_side = "left"
        self.talks = getattr(self.hub, "chat_template", None) is not None
        prompt = PROMPT if self.talks else _PLAIN.get(self.kind)
        super().__init__(tokenizer, _THUMB, eos_ids=read_ends(folder, *_PLACES), prompt=prompt)
        self.start = read_start(folder, *_PLACES) if seq2seq else None
        mark = getattr(self.hub, "image_token", None)
        if self.talks:
            self._check_template()
        elif mark is not None and self.kind not in _PLAIN:
            say(f'{folder} has no chat_template.jinja, so prompts are "{mark}" and words', file=sys.stderr)

    def prepare(self, image: Image) -> Image:
        """The picture itself: its processor reads it with its prompt."""
        return image

    def batch_of(self, prepared: Sequence[Image]) -> HFBatch:
        """Pictures as a batch without texts; see `Processor`."""
        none = torch.zeros(len(prepared), 0, dtype=torch.long)
        thumbs = torch.stack([_THUMB(image) for image in prepared])
        return HFBatch(none, none.bool(), none.bool(), pixels=thumbs, images=tuple(prepared))

    def with_prompts(self, batch: CaptionBatch, texts: Sequence[str | None]) -> CaptionBatch:
        """The batch with what the model reads; see `Processor`."""
        assert isinstance(batch, HFBatch)
        given, asked = self._given(batch.images, texts)
        device = batch.tokens.device
        if self.start is None:
            tokens, real = given["input_ids"], given["attention_mask"].bool()
        else:
            tokens, real = self.pad([[self.start, *ids] for ids in asked])
            if any(asked):
                given |= {"decoder_input_ids": tokens, "decoder_attention_mask": real.long()}
        return dataclasses.replace(
            batch,
            tokens=tokens.to(device),
            attention_mask=real.to(device),
            loss_mask=torch.zeros_like(real).to(device),
            given={name: x.to(device) for name, x in given.items()},
        )

    def prompt_ids(self, text: str | None, batch: CaptionBatch, sample: int) -> list[int]:
        """The ids of a picture's prompt; see `Processor`."""
        assert isinstance(batch, HFBatch)
        given, (asked,) = self._given(batch.images[sample : sample + 1], [text])
        return given["input_ids"][0].tolist() if self.start is None else [self.start, *asked]

    def opening(self, text: str | None = None) -> tuple[list[int] | None, str]:
        """Prompts depend on the picture; see `Processor`."""
        ends = self._text(text)[-1:]
        return None, "" if self.start is not None or not ends or ends.isspace() else " "

    def complete(self, batch: CaptionBatch) -> CaptionBatch:
        """Rows of training with what else the model reads; see `Processor`."""
        assert isinstance(batch, HFBatch)
        q = batch.tokens.shape[1]
        given, _ = self._given(batch.images, questions_of(batch, len(batch.images)))
        beside: tuple[str, ...] = ()
        if self.start is None:
            shape, real = given.pop("input_ids").shape, given.pop("attention_mask").bool()
            beside = tuple(name for name, x in given.items() if x.shape[:2] == shape and not x.is_floating_point())
            for name in beside:  # what stands beside the prompt's ids goes to the left
                rows = [row[mask] for row, mask in zip(given[name], real, strict=True)]
                given[name] = torch.stack([_stretched(row, q) for row in rows])
        return dataclasses.replace(batch, given=given, beside=beside)

    def _check_template(self) -> None:
        """Makes sure that a picture has its place in what the chat template writes.

        Raises:
            ValueError: if it has none.
        """
        text, bare = self._text("a"), [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
        if "'type'" in text or text == self._templated(bare):
            raise ValueError(
                f"{self.name} has a chat template without a place for pictures: put the chat_template.jinja of the "
                "model's own repository into the folder"
            )

    def _templated(self, messages: list[dict[str, Any]]) -> str:
        try:
            return self.hub.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs, and raise what they like
            raise ValueError(f"{self.name}: its chat template: {said(error)}") from error

    def _text(self, text: str | None) -> str:
        text = self.prompt if text is None else text
        if self.talks:
            return self._templated(messages_of(text or ""))
        mark = getattr(self.hub, "image_token", None)
        alone = self.kind in _PLAIN or mark is None or mark in (text or "")
        return (text or "") if alone else f"{mark}{text or ''}"

    def _given(self, images: Sequence[Image], texts: Sequence[str | None]) -> tuple[dict[str, Tensor], list[list[int]]]:
        """What the model reads of pictures and texts, and the ids that its decoder begins with besides the first.

        Raises:
            ValueError: for what the processor does not take, or makes no tensors of.
        """
        found = self._made(images, texts)
        loose = [name for name, x in found.items() if isinstance(x, list) and x and isinstance(x[0], Tensor)]
        if loose or (self.kind in _UNEQUAL and len({image.size for image in images}) > 1):
            how = _UNEQUAL.get(self.kind, f"keeps {', '.join(loose)} of each by itself")
            raise ValueError(f"{self.name} {how}: {_ONE}")
        given = {name: x for name, x in found.items() if isinstance(x, Tensor) and name != "labels"}
        given = {name: x.float() if x.is_floating_point() else x for name, x in given.items()}
        if not any(x.is_floating_point() for x in given.values()):
            raise ValueError(f"{self.name} makes no pixels of a picture: {', '.join(given)} alone")
        ids, real = (given.pop(f"decoder_{name}", None) for name in ("input_ids", "attention_mask"))
        if ids is None or real is None:
            return given, [[] for _ in texts]
        return given, [row[mask].tolist() for row, mask in zip(ids.long(), real.bool(), strict=True)]

    def _made(self, images: Sequence[Image], texts: Sequence[str | None]) -> Any:
        pictures: Any = [[image] for image in images] if self.talks else [*images]
        try:
            if self.prompt is None and not any(texts):  # some have words of their own, or need none
                with suppress(ValueError, TypeError):
                    found = self._called(images=pictures)
                    if self.start is not None or "input_ids" in found:
                        return found
            whole = [self._text(text) for text in texts]
            bos = getattr(self.hub.tokenizer, "bos_token", None)
            again = {"add_special_tokens": False} if bos and whole[0].startswith(bos) else {}
            return self._called(images=pictures, text=whole, **again)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            remedy = f"; {_ONE}" if len(images) > 1 else ""
            raise ValueError(f"{self.name}: {said(error)}{remedy}") from error

    def _called(self, **given: Any) -> Any:
        return self.hub(**given, padding=True, return_tensors="pt")


def _stretched(row: Tensor, q: int) -> Tensor:
    """What stands beside a prompt's ids, q long: a caption is of no kind (0), and looks where the prompt's end does."""
    after = row[-1:] if row.ndim > 1 else row.new_zeros(1)
    return torch.cat((row, after.expand(q, *row.shape[1:])))[:q]


def _transformers(kind: Any, folder: Path) -> Any:
    if kind in _MORE:
        raise ValueError(f"{folder}: a model of the type {kind} reads {_MORE[kind]}, so it does not caption pictures")
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f'models of the type "{kind}" run in transformers: pip install transformers') from error
    return transformers
