"""Translations as a LightningDataModule for an encoder-decoder."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from mmtransformer.batch import Seq2SeqBatch
from mmtransformer.data.loading.fingerprints import Parts
from mmtransformer.data.loading.module import DataModule, Lengths, LoaderConfig, Splits
from mmtransformer.data.loading.sampler import SampleIndex
from mmtransformer.data.loading.split_cache import once_a_split
from mmtransformer.data.parallel_texts import Parallel, ParallelSource, ParallelTable
from mmtransformer.serialization.printable import counted
from mmtransformer.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class TranslationRow(NamedTuple):
    """One pair as ids: the source with its end, and the target with prompt and end."""

    source: list[int]
    tokens: list[int]
    prompt: int
    name: str
    is_real: bool = True


class TranslationRows(Dataset[TranslationRow]):
    """The pairs of a split, tokenised; those that are longer than `max_len` are left out.

    Args:
        pairs: The pairs.
        tokenizer: The tokenizer.
        max_len: The most tokens of a source or a target, with prompt and end.

    Attributes:
        pairs: Those that were kept.
        too_long: How many were left out.
        longest: Tokens of the longest text of all.
    """

    def __init__(self, pairs: Sequence[Parallel], tokenizer: Tokenizer, max_len: int) -> None:
        self.pairs: list[Parallel] = []
        self.longest = self.too_long = 0
        self._rows: list[tuple[np.ndarray, np.ndarray, int]] = []
        for pair in pairs:
            prompt = tokenizer.prompt(pair.language)
            source = tokenizer.encode_source(pair.source)
            tokens = [*prompt, *tokenizer.encode(pair.text), tokenizer.eos_id]
            self.longest = max(self.longest, len(source), len(tokens))
            if max(len(source), len(tokens)) > max_len:
                self.too_long += 1
                continue
            self.pairs.append(pair)
            self._rows.append((np.array(source, np.int32), np.array(tokens, np.int32), len(prompt)))
        if not self._rows:
            raise ValueError(
                f"none of {counted(len(pairs), 'pair')} fits max_len ({max_len} tokens): the longest has {self.longest}"
            )
        self.lengths = np.array([len(source) + len(tokens) for source, tokens, _ in self._rows])

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self._rows)

    def __getitem__(self, pick: SampleIndex) -> TranslationRow:
        """The pair that is picked."""
        source, tokens, prompt = self._rows[pick.index]
        pair = self.pairs[pick.index]
        name = f"{pair.name} {pair.direction}"
        return TranslationRow(source.tolist(), tokens.tolist(), prompt, name, pick.is_real)


class TranslationCollate:
    """Makes one `Seq2SeqBatch` of rows.

    Args:
        tokenizer: Whose padding is used.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: list[TranslationRow]) -> Seq2SeqBatch:
        """Stack the rows."""
        source, source_attention_mask = self.tokenizer.pad([row.source for row in rows])
        tokens, attention_mask = self.tokenizer.pad([row.tokens for row in rows])
        is_real = torch.tensor([row.is_real for row in rows])[:, None]
        first = torch.tensor([row.prompt for row in rows])[:, None]
        loss_mask = attention_mask & is_real & (torch.arange(tokens.shape[1]) >= first)
        return Seq2SeqBatch(
            source, source_attention_mask, tokens, attention_mask, loss_mask, tuple(row.name for row in rows)
        )


class TranslationData(DataModule):
    """Texts with translations, in batches grouped by length, the same for any number of workers and processes.

    Args:
        source: Where the pairs come from, such as `SceneTranslations` or `ParallelTable`; or the path of a table.
        tokenizer: A tokenizer, or a folder or hub name to load one from; None trains one on both sides' texts.
        vocab_size: The most tokens of a tokenizer that is trained here.
        batch_size: Pairs in a batch of one process.
        max_len: The most tokens of a source or a target, with prompt and end; longer pairs are left out, and counted.
        loader: How samples are loaded and ordered, and how many may be unusable.
        splits: Which splits are for training, validation and test.
    """

    unit = "pair"

    def __init__(
        self,
        source: ParallelSource | str,
        *,
        tokenizer: Tokenizer | str | None = None,
        vocab_size: int = 8192,
        batch_size: int = 64,
        max_len: int = 128,
        loader: LoaderConfig = LoaderConfig(),
        splits: Splits = Splits(),
    ) -> None:
        super().__init__(
            batch_size=batch_size, loader=loader, splits=splits, tokenizer=tokenizer, vocab_size=vocab_size
        )
        self.source = ParallelTable(source) if isinstance(source, str) else source
        self.max_len = max_len

    def train_tokenizer(self) -> Tokenizer:
        """Train a tokenizer on the training texts of both sides."""
        texts = (text for pair in self.pairs(self.train_split) for text in (pair.source, pair.text))
        return Tokenizer.train(texts, self.vocab_size, self.source.languages)

    @once_a_split
    def pairs(self, split: str) -> list[Parallel]:
        """Return the pairs of a split, the longest too."""
        return self.source.split(split)

    @once_a_split
    def rows(self, split: str) -> TranslationRows:
        """Return the pairs of a split, tokenised at the first call; how many are left out is reported."""
        rows = TranslationRows(self.pairs(split), self.tokenizer, self.max_len)
        if rows.too_long:
            _log.warning(
                "%s: %d of %d pairs are longer than max_len (%d tokens; the longest has %d) and were left out",
                *(split, rows.too_long, len(rows) + rows.too_long, self.max_len, rows.longest),
            )
        return rows

    def prepare(self, split: str) -> None:
        """Read and tokenise a split."""
        self.rows(split)

    def dataset(self, split: str, *, training: bool = False) -> TranslationRows:
        """Return a split's pairs."""
        return self.rows(split)

    def collate(self, split: str, *, training: bool = False) -> TranslationCollate:
        """What makes a `Seq2SeqBatch` of pairs."""
        return TranslationCollate(self.tokenizer)

    def lengths(self, split: str) -> Lengths:
        """How long the two texts of a pair are together."""
        rows = self.rows(split)
        return lambda epoch, index: rows.lengths[index]

    def describe(self) -> str:
        """What there is, a line a split."""
        return "\n".join(
            f"{split}: {counted(len(self.rows(split)), 'pair')}, {self.rows(split).lengths.mean():.1f} tokens each"
            for split in (self.train_split, *self.val_splits)
        )

    def parts(self, split: str) -> Parts:
        """Texts and their translations."""
        pairs = self.pairs(split)
        texts = [(pair.source, pair.source_language, pair.text, pair.language) for pair in pairs]
        return Parts(lambda i: pairs[i].name, texts, called=("pairs", ""))

    def identity(self) -> dict[str, Any]:
        """The tokenizer."""
        return {"tokenizer": self.tokenizer_hash}
