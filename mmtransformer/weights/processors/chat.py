"""ChatProcessor: prompts with placeholders of images in them, written by the folder's chat template.

Shapes: b samples, i images of a sample (tiles are images).
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmtransformer.batch import CaptionBatch
from mmtransformer.images import ImageTransform
from mmtransformer.serialization.pretrained import read_json
from mmtransformer.text.conversation import messages_of, turns_of
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.processors.generation_config import read_ends
from mmtransformer.weights.processors.processor import Processor
from mmtransformer.weights.processors.templates import ChatTemplate
from mmtransformer.weights.processors.tokens import PromptTokenizer


class ChatProcessor(Processor):
    """What a user says of a picture becomes a conversation, in which the picture's placeholders stand before the words.

    Words that have "<image>" in them are taken as the whole prompt, in the model's own form.

    Args:
        folder: the model's folder.
        transform: how a picture, or a tile of it, becomes pixels.
        image_token_id: the id of placeholders.
        prompt: what is said unless told.
        plain: the whole prompt where the folder has no chat template: "{}" stands for the words; None = it needs one.

    Raises:
        ValueError: if the tokenizer has another id for placeholders.
    """

    def __init__(
        self, folder: Path, transform: ImageTransform, image_token_id: int, *, prompt: str, plain: str | None = None
    ) -> None:
        tokenizer = Tokenizer.from_pretrained(folder)
        super().__init__(tokenizer, transform, eos_ids=read_ends(folder, "text_config"), prompt=prompt)
        self.encode, self.template, self.plain, self.folder = (
            PromptTokenizer(folder),
            ChatTemplate.of(folder),
            plain,
            folder,
        )
        path = folder / "processor_config.json"
        self.image_token = str((read_json(path) if path.exists() else {}).get("image_token") or "<image>")
        found = self.encode(self.image_token, special=False)
        if found != [image_token_id]:
            raise ValueError(
                f"{folder}: config.json says that placeholders have the id {image_token_id}, but the tokenizer makes "
                f"{found} of {self.image_token}"
            )

    @abstractmethod
    def placeholders(self, batch: CaptionBatch, sample: int) -> str:
        """What stands in the prompt for a sample's picture."""

    def prompt_ids(self, text: str | None, batch: CaptionBatch, sample: int) -> list[int]:
        """The conversation's ids, with as many placeholders as the picture has tokens; see `Processor`."""
        whole = self.conversation(text or "")
        if (count := whole.count(self.image_token)) != 1:
            raise ValueError(
                f"a prompt has one {self.image_token} for its picture, this one has {count}: {whole!r:.200}"
            )
        whole = whole.replace(self.image_token, self.placeholders(batch, sample))
        bos = self.template.specials.get("bos_token") if self.template else None
        return self.encode(whole, special=not (bos and whole.startswith(bos)))

    def conversation(self, text: str) -> str:
        """What the model reads for words of a user's, with one mark for the picture.

        Raises:
            ValueError: if there is no chat template, and none that is usual.
        """
        if self.image_token in text:
            return text
        if self.template is not None:
            return self.template.render(messages_of(text))
        if self.plain is None:
            raise ValueError(
                f"{self.folder} has no chat template, and its models read prompts of several forms: give the whole "
                f"prompt, with {self.image_token} where the picture stands"
            )
        first, *others = turns_of(text)
        whole, again = self.plain.format(first), self.plain.replace(f"{self.image_token}\n", "")
        for answer, question in zip(others[::2], others[1::2], strict=True):
            whole += f" {answer}{self.tokenizer.eos_token}{again.format(question)}"
        return whole


@dataclass
class GridBatch(CaptionBatch):
    """Images that are tiles of pictures.

    Attributes:
        grids: rows and columns of tiles of each sample's picture; (0, 0) = it is one tile.
    """

    grids: tuple[tuple[int, int], ...] = ()


def tiles_together(tiles: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The samples' tiles, each (t 3 h w), as a batch: no tokens (b 0), pixels (b i 3 h w), which are real (b i)."""
    most = max(map(len, tiles))
    pixels = torch.stack([torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:]))) for x in tiles])
    real = torch.arange(most) < torch.tensor([len(x) for x in tiles])[:, None]
    return torch.zeros(len(tiles), 0, dtype=torch.long), pixels, real
