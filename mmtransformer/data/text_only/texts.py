"""Texts as a LightningDataModule for a language model, in packed rows."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmtransformer.batch import Batch
from mmtransformer.data.files.read_options import TextReadOptions
from mmtransformer.data.loading.fingerprints import Parts
from mmtransformer.data.loading.module import DataModule, LoaderConfig, Splits
from mmtransformer.data.loading.sampler import SampleIndex
from mmtransformer.data.loading.source import Caption
from mmtransformer.data.loading.split_cache import once_a_split
from mmtransformer.data.text_only.text_rows import TextRow, TextRows
from mmtransformer.data.text_only.text_source import TextFiles, TextSource, open_texts
from mmtransformer.serialization.printable import counted
from mmtransformer.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


@dataclass
class TextBatch(Batch):
    """Packed rows of texts.

    Attributes:
        tokens: (b q) long: prompt, text and end-of-sequence, again and again.
        document_ids: (b q) long: which text (or part of a long one) of the split a token belongs to; below 0 = padding.
        loss_mask: (b q) bool, True = a token that the model must predict: text and end, not prompt, not padding.
        names: the names of the texts, "train 17".
    """

    tokens: Tensor
    document_ids: Tensor
    loss_mask: Tensor
    names: tuple[str, ...] = ()


class TextDataset(Dataset[tuple[TextRow, bool]]):
    """One split's rows; what it returns depends on the `SampleIndex` only.

    Args:
        rows: The rows.
        training: Another arrangement every epoch; else always that of epoch 0.
    """

    def __init__(self, rows: TextRows, *, training: bool = True) -> None:
        self.rows, self.training = rows, training

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __getitem__(self, pick: SampleIndex) -> tuple[TextRow, bool]:
        """A row of an epoch, and whether it counts."""
        return self.rows.row(pick.epoch if self.training else 0, pick.index), pick.is_real


class TextCollate:
    """Makes one `TextBatch` of rows.

    Args:
        pad_id: The id that fills up the few rows that are not full.
        text_of: Of every part the text that it is of.
        name: The split's name.
    """

    def __init__(self, pad_id: int, text_of: np.ndarray, name: str) -> None:
        self.pad_id, self.text_of, self.name = pad_id, text_of, name

    def __call__(self, samples: list[tuple[TextRow, bool]]) -> TextBatch:
        """Stack the rows."""
        shape = (len(samples), max(len(row.tokens) for row, _ in samples))
        tokens = np.full(shape, self.pad_id, np.int64)
        document_ids = np.tile(-1 - np.arange(shape[1]), (shape[0], 1))  # padding sees nothing but itself
        loss_mask, parts = np.zeros(shape, bool), list[int]()
        for i, (row, is_real) in enumerate(samples):
            end = len(row.tokens)
            tokens[i, :end], loss_mask[i, :end] = row.tokens, row.loss_mask & is_real
            document_ids[i, :end] = row.parts[row.document_ids]
            parts += row.parts.tolist() if is_real else []
        return TextBatch(
            tokens=torch.from_numpy(tokens),
            document_ids=torch.from_numpy(document_ids),
            loss_mask=torch.from_numpy(loss_mask),
            names=tuple(f"{self.name} {text}" for text in self.text_of[parts].tolist()),
        )


class TextData(DataModule):
    """Texts for a language model, packed into full rows; no text sees its neighbours.

    Args:
        source: Where the texts come from, such as `TextFiles` or `CaptionTexts`; or files, folders or archives of
            texts.
        read: How files are read, such as the names of their columns, where that is not to be detected.
        tokenizer: A tokenizer, or a folder or hub name to load one from; None trains one on the training texts.
        vocab_size: The most tokens of a tokenizer that is trained here.
        max_len: The most tokens that see each other, prompt and end included; a longer text is divided.
        row_len: Tokens of a row, in which several texts stand; `max_len` unless told.
        batch_size: Rows in a batch of one process.
        loader: How samples are loaded and ordered, and how many may be unusable.
        splits: Which splits are for training, validation and test.
    """

    def __init__(
        self,
        source: TextSource | str | list[str],
        *,
        read: TextReadOptions = TextReadOptions(),
        tokenizer: Tokenizer | str | None = None,
        vocab_size: int = 4096,
        max_len: int = 64,
        row_len: int | None = None,
        batch_size: int = 32,
        loader: LoaderConfig = LoaderConfig(),
        splits: Splits = Splits(),
    ) -> None:
        super().__init__(
            batch_size=batch_size, loader=loader, splits=splits, tokenizer=tokenizer, vocab_size=vocab_size
        )
        self.source = open_texts(source, read, max_bad_fraction=loader.max_bad_fraction)
        self.max_len, self.row_len = max_len, max_len if row_len is None else row_len

    def train_tokenizer(self) -> Tokenizer:
        """Train a tokenizer on the training texts."""
        texts = (text.text for text in self.texts(self.train_split))
        return Tokenizer.train(texts, self.vocab_size, self.source.languages)

    def texts(self, split: str) -> list[Caption]:
        """Return the texts of a split."""
        return self.source.split(split)

    @once_a_split
    def rows(self, split: str) -> TextRows:
        """Return the rows of a split, tokenised and packed at the first call; what was divided is reported."""
        rows = TextRows(self.texts(split), self.tokenizer, max_len=self.max_len, row_len=self.row_len, seed=self.seed)
        if rows.divided:
            _log.warning(
                "%s: %d of %d texts are longer than max_len (%d tokens; the longest has %d) and were divided",
                *(split, rows.divided, len(rows.prompt), self.max_len, rows.longest),
            )
        return rows

    def prepare(self, split: str) -> None:
        """Tokenise and pack a split."""
        self.rows(split)

    def dataset(self, split: str, *, training: bool = False) -> TextDataset:
        """Return a split's rows; arranged anew every epoch in training."""
        return TextDataset(self.rows(split), training=training)

    def collate(self, split: str, *, training: bool = False) -> TextCollate:
        """What makes a `TextBatch` of rows."""
        return TextCollate(self.tokenizer.pad_id, self.rows(split).text_of, split)

    def describe(self) -> str:
        """What was found, and how the texts of the splits became rows, a line each."""
        lines = [self.source.describe()] if isinstance(self.source, TextFiles) else []
        for split in (self.train_split, *self.val_splits):
            rows = self.rows(split)
            texts, tokens = counted(len(rows.prompt), "text"), counted(int(rows.lengths.sum()), "token")
            line = f"{split}: {texts} of {tokens} in {counted(len(rows), 'row')} of {rows.row_len}"
            line += f", {rows.padding:.2%} padding"
            if rows.divided:
                line += f"; divided, as they are longer than {self.max_len} tokens: {counted(rows.divided, 'text')}"
            lines.append(line)
        return "\n".join(lines)

    def parts(self, split: str) -> Parts:
        """Texts, named as in a batch."""
        return Parts(lambda i: f"{split} {i}", self.texts(split), called=("texts", ""))

    def identity(self) -> dict[str, Any]:
        """The tokenizer, and the size of texts and rows."""
        return {"tokenizer": self.tokenizer_hash, "rows": [self.max_len, self.row_len]}

    def mismatch_message(self, name: str, was: Any, now: Any) -> str:
        """What to say when the tokenizer or the rows are not what they were."""
        if name == "rows":
            return "the run had max_len {} and row_len {}, now they are {} and {}".format(*was, *now)
        return super().mismatch_message(name, was, now)
