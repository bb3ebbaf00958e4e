"""Pairs of texts with hidden words as a LightningDataModule, for a `TextEncoder`."""

import logging
from functools import cached_property
from typing import Any

from mmtransformer.data.files.read_options import TextReadOptions
from mmtransformer.data.loading.fingerprints import Parts
from mmtransformer.data.loading.module import DataModule, Lengths, LoaderConfig, Splits
from mmtransformer.data.loading.split_cache import once_a_split
from mmtransformer.data.text_only.masked_rows import MaskedCollate, MaskedDataset, MaskedRows
from mmtransformer.data.text_only.masking import Masking, with_mask
from mmtransformer.data.text_only.text_source import GroupedTexts, TextFiles, open_texts
from mmtransformer.serialization.printable import counted
from mmtransformer.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class MaskedTextData(DataModule):
    """Texts with hidden words, alone or in pairs.

    Validation hides all of the words that are asked for, always the same ones.

    Args:
        source: Where the texts come from, such as `TextFiles` or `CaptionTexts`; or files, folders or archives of
            texts.
        read: How files are read, such as the names of their columns, where that is not to be detected.
        tokenizer: A tokenizer, or a folder or hub name to load one from; None trains one. A mask token is added.
        vocab_size: The most tokens of a tokenizer that is trained here, the mask token included.
        nsp: Whether rows are pairs of texts, half of the time of one group: BERT's next sentence prediction.
        mlm_probability: Share of the tokens that are to be filled in.
        whole_word_mask: Hide words with all of their tokens; else single tokens.
        max_len: The most tokens of a row.
        batch_size: Rows in a batch of one process.
        loader: How samples are loaded and ordered, and how many may be unusable.
        splits: Which splits are for training, validation and test.
    """

    def __init__(
        self,
        source: GroupedTexts | str | list[str],
        *,
        read: TextReadOptions = TextReadOptions(),
        tokenizer: Tokenizer | str | None = None,
        vocab_size: int = 4096,
        nsp: bool = True,
        mlm_probability: float = 0.15,
        whole_word_mask: bool = True,
        max_len: int = 64,
        batch_size: int = 64,
        loader: LoaderConfig = LoaderConfig(),
        splits: Splits = Splits(),
    ) -> None:
        super().__init__(
            batch_size=batch_size, loader=loader, splits=splits, tokenizer=tokenizer, vocab_size=vocab_size
        )
        self.source, self.nsp = open_texts(source, read, max_bad_fraction=loader.max_bad_fraction), nsp
        self.mlm_probability, self.whole_word_mask, self.max_len = mlm_probability, whole_word_mask, max_len

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with a mask token: the one given, loaded, or trained on the training texts."""
        return with_mask(super().tokenizer)

    def train_tokenizer(self) -> Tokenizer:
        """Train a tokenizer on the training texts, with room for the mask token."""
        texts = (text.text for text in self.source.split(self.train_split))
        return Tokenizer.train(texts, self.vocab_size - 1, self.source.languages)

    def masking(self, *, training: bool) -> Masking:
        """How words are hidden: 80 % masked, 10 % changed, 10 % left in training, all masked in validation."""
        hidden, changed = (0.8, 0.1) if training else (1.0, 0.0)
        return Masking(
            self.tokenizer,
            mlm_probability=self.mlm_probability,
            whole_word_mask=self.whole_word_mask,
            mask_replace_prob=hidden,
            random_replace_prob=changed,
        )

    @once_a_split
    def rows(self, split: str) -> MaskedRows:
        """Return the rows of a split, tokenised at the first call; texts that are cut are reported."""
        rows = MaskedRows(
            self.source.groups(split),
            self.tokenizer,
            self.masking(training=False),
            max_len=self.max_len,
            nsp=self.nsp,
            seed=self.seed,
        )
        if rows.cut:
            _log.warning(
                "%s: %d of %d texts are longer than max_len (%d tokens; the longest has %d) and are cut",
                *(split, rows.cut, len(rows), self.max_len, int(rows.sizes.max()) + 2),
            )
        return rows

    def prepare(self, split: str) -> None:
        """Tokenise a split."""
        self.rows(split)

    def dataset(self, split: str, *, training: bool = False) -> MaskedDataset:
        """Return a split's rows; in training with other second texts and masks every epoch."""
        return MaskedDataset(self.rows(split), self.tokenizer.bos_id, self.tokenizer.eos_id, training=training)

    def collate(self, split: str, *, training: bool = False) -> MaskedCollate:
        """What makes a `MaskedBatch` of rows."""
        return MaskedCollate(self.masking(training=training), self.tokenizer.pad_id, split)

    def lengths(self, split: str) -> Lengths:
        """How long rows are, with the second texts of an epoch."""
        rows = self.rows(split)
        return lambda epoch, index: rows.lengths(int(epoch))[index]

    def describe(self) -> str:
        """What was found, and how the texts of the splits became rows, a line each."""
        lines = [self.source.describe()] if isinstance(self.source, TextFiles) else []
        for split in (self.train_split, *self.val_splits):
            rows = self.rows(split)
            _, other = rows.seconds(0)
            kinds = f"{int((other == 0).sum()):,} of one group, {int((other == 1).sum()):,} not"
            line = f"{split}: {counted(len(rows), 'row')} of at most {self.max_len} tokens"
            lines.append(f"{line}, pairs of texts: {kinds}" if self.nsp else line)
        return "\n".join(lines)

    def parts(self, split: str) -> Parts:
        """Texts, by their place in the split."""
        return Parts(lambda i: f"{split} {i}", self.source.split(split), called=("texts", ""))

    def identity(self) -> dict[str, Any]:
        """The tokenizer."""
        return {"tokenizer": self.tokenizer_hash}
