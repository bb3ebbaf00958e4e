"""Processor: pictures and prompts -> the batch that a public captioner reads, as its makers made it.

Shapes: b samples, one row of text each.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image, new
from torch import Tensor

from mmtransformer.batch import CaptionBatch
from mmtransformer.images import ImageTransform
from mmtransformer.serialization.hub import HubOptions
from mmtransformer.text.tokenizer import Tokenizer


class Processor(ABC):
    """What transformers calls a processor, for one family; a family says how its prompt is made, in `prompt_ids`.

    Args:
        tokenizer: Of the language model.
        transform: How a picture becomes pixels.
        eos_ids: The ids that end a text: those of the folder, which need not be the tokenizer's own.
        prompt: What a picture is captioned after unless told: the family's documented prompt; None = no words.

    Attributes:
        keeps_prompt: Whether a caption goes on from the prompt's own words ("a photo of"), which are then part of it.
        prompt_len: Tokens of a prompt without words, see `settings.read_search`.
    """

    keeps_prompt = False
    prompt_len = 0
    usual_search: ClassVar[Mapping[str, Any]] = {}
    """How the family searches where a folder has no generation_config.json."""
    folder: Path | None = None
    """Where the model came from: what else stands there is written with it again."""
    options = HubOptions()
    """How it was looked up."""
    adapted = False
    """Whether an adapter was merged into the model when it was loaded."""

    def __init__(
        self, tokenizer: Tokenizer, transform: ImageTransform, *, eos_ids: Sequence[int], prompt: str | None = None
    ) -> None:
        self.tokenizer, self.transform, self.prompt = tokenizer.ending_with(eos_ids), transform, prompt

    @abstractmethod
    def prompt_ids(self, text: str | None, batch: CaptionBatch, sample: int) -> list[int]:
        """The ids that a caption is written after.

        Args:
            text: What the user says; None = nothing (`prompt` has taken its place where the family has one).
            batch: The pictures, as `batch_of` made them.
            sample: Which of them.
        """

    def prepare(self, image: Image) -> Any:
        """What a picture is before it is in a batch: its pixels (3 height width), made by threads beside computing."""
        return self.transform(image)

    def batch_of(self, prepared: Sequence[Any]) -> CaptionBatch:
        """Pictures, one a sample, as a batch without texts, of what `prepare` made of them."""
        return CaptionBatch.from_pixels(prepared)

    def with_prompts(self, batch: CaptionBatch, texts: Sequence[str | None]) -> CaptionBatch:
        """The batch with a left-padded prompt a sample.

        Args:
            batch: Pictures, as `batch_of` made them.
            texts: What the user says of each; None = `prompt`.
        """
        said = [self.prompt if text is None else text for text in texts]
        tokens, attention_mask = self.pad([self.prompt_ids(text, batch, i) for i, text in enumerate(said)])
        device = batch.visual.device
        return dataclasses.replace(
            batch,
            tokens=tokens.to(device),
            attention_mask=attention_mask.to(device),
            loss_mask=torch.zeros_like(attention_mask).to(device),
        )

    def opening(self, text: str | None = None) -> tuple[list[int] | None, str]:
        """What a caption stands after in training: the ids of its prompt, and what is between it and the caption.

        The ids are None where they depend on the picture, as where one is cut into tiles.

        Args:
            text: What was asked of the picture; None = nothing (`prompt`).
        """
        text = self.prompt if text is None else text
        square, wide = (self.prompt_ids(text, self._two_shapes, i) for i in range(2))
        space = "" if text is None or text[-1:].isspace() else " "
        return (square if square == wide and self._two_shapes.image_mask is None else None), space

    @cached_property
    def _two_shapes(self) -> CaptionBatch:
        return self.batch_of([self.prepare(new("RGB", shape)) for shape in ((96, 96), (96, 960))])

    def complete(self, batch: CaptionBatch) -> CaptionBatch:
        """A batch of training rows with what else the model reads of it; a family may add to it.

        Raises:
            ValueError: if a question is missing that the family needs.
        """
        return batch

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Prompts as one rectangle, padded on the left: ids and which are real, (b q) each."""
        return self.tokenizer.pad(rows, side="left")


def questions_of(batch: CaptionBatch, rows: int) -> list[str | None]:
    """What is asked in each of a batch's rows of data, as many for each sample; None where nothing is."""
    asked = batch.questions or [None] * len(batch.visual)
    return [question for question in asked for _ in range(rows // len(asked))]


@dataclasses.dataclass(frozen=True)
class ProcessorPromptBuilder:
    """Prompts of what the user says: a `PromptBuilder` of generation.

    Attributes:
        processor: makes them.
        texts: what is said of all pictures, or of each of a batch; None = what the data asks of each, or else the
            family's own prompt.
    """

    processor: Processor
    texts: str | Sequence[str | None] | None = None

    @property
    def keeps_prompt(self) -> bool:
        """See `Processor`."""
        return self.processor.keeps_prompt

    def __call__(self, batch: CaptionBatch, languages: Sequence[str | None]) -> CaptionBatch:
        """The batch with a prompt a sample; public models know no languages by name."""
        texts = self.texts
        if texts is None:
            texts = questions_of(batch, len(batch.visual))
        elif isinstance(texts, str):
            texts = [texts] * len(batch.visual)
        return self.processor.with_prompts(batch, texts)
