"""Pairs of texts with hidden words as a LightningDataModule, for a `TextEncoder`."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import lightning
import torch

from mmtransformer.data.masked_rows import MaskedBatch, MaskedCollate, MaskedDataset, MaskedRows
from mmtransformer.data.masking import Masking, with_mask
from mmtransformer.data.sampler import PictureSampler, ResumableLoader
from mmtransformer.data.text_source import GroupedTexts, TextFiles, Unit
from mmtransformer.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class MaskedData(lightning.LightningDataModule):
    """Texts with hidden words, alone or in pairs.

    Validation hides all of the words that are asked for, always the same ones.

    Args:
        source: Where the texts come from, such as `TextFiles` or `CaptionTexts`.
        tokenizer: A tokenizer, or a folder to load one from, which gets a mask token if it has none; None trains one.
        vocab_size: The most words of a tokenizer that is trained here, the mask token included.
        pairs: Whether rows are pairs of texts, half of the time of one group.
        share: Share of the tokens that are to be filled in.
        whole_words: Hide words with all of their tokens; else single tokens.
        max_len: The most tokens of a row.
        batch_size: Rows in a batch of one process.
        num_workers: Processes that make batches. The batches are the same for any number.
        seed: Seed of order, pairs and masks.
        train_split: The split to train on.
        val_splits: The splits to validate on.
        test_splits: The splits to test on.
    """

    def __init__(
        self,
        source: GroupedTexts,
        *,
        tokenizer: Tokenizer | str | None = None,
        vocab_size: int = 4096,
        pairs: bool = True,
        share: float = 0.15,
        whole_words: bool = True,
        max_len: int = 64,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        train_split: str = "train",
        val_splits: Sequence[str] = ("val",),
        test_splits: Sequence[str] = ("test",),
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1 row")
        for name, value in (("val_splits", val_splits), ("test_splits", test_splits)):
            if isinstance(value, str):
                raise ValueError(f"{name} must be a list of splits: [{value}]")
        self.source, self.vocab_size, self.pairs = source, vocab_size, pairs
        self.share, self.whole_words, self.max_len = share, whole_words, max_len
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.train_split = train_split
        self.val_splits, self.test_splits = tuple(val_splits), tuple(test_splits)
        self._given = tokenizer
        self._tokenizer: Tokenizer | None = None
        self._rows: dict[str, MaskedRows] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with a mask token: the one given, loaded, or trained on the training texts."""
        if self._tokenizer is None:
            if isinstance(self._given, Tokenizer):
                found = self._given
            elif self._given is not None:
                found = Tokenizer.from_folder(self._given)
            else:
                texts = (text.text for text in self.source.split(self.train_split))
                found = Tokenizer.train(texts, self.vocab_size - 1, self.source.languages)
            self._tokenizer = with_mask(found)
        return self._tokenizer

    def masking(self, *, training: bool) -> Masking:
        """How words are hidden: 80 % masked, 10 % changed, 10 % left in training, all masked in validation."""
        hidden, changed = (0.8, 0.1) if training else (1.0, 0.0)
        return Masking(
            self.tokenizer, share=self.share, whole_words=self.whole_words, hidden=hidden, changed=changed
        )

    def rows(self, split: str) -> MaskedRows:
        """Return the rows of a split, tokenised at the first call; texts that are cut are reported."""
        if split not in self._rows:
            rows = self._rows[split] = MaskedRows(
                self.source.groups(split),
                self.tokenizer,
                self.masking(training=False),
                max_len=self.max_len,
                pairs=self.pairs,
                seed=self.seed,
            )
            if rows.cut:
                _log.warning(
                    "%s: %d of %d texts are longer than max_len (%d tokens; the longest has %d) and are cut",
                    *(split, rows.cut, len(rows), self.max_len, int(rows.sizes.max()) + 2),
                )
        return self._rows[split]

    def setup(self, stage: str | None = None) -> None:
        """Tokenise the splits of a stage: "fit", "validate" or "test"."""
        validate, test = self.val_splits, self.test_splits
        splits = {"fit": (self.train_split, *validate), "validate": validate, "test": test}
        for split in splits.get(stage or "fit", ()):
            self.rows(split)

    def loader(self, split: str, *, training: bool = False) -> ResumableLoader:
        """Return the loader of a split: shuffled and grouped by length for training, as it is otherwise.

        Raises:
            ValueError: If Lightning would replace the sampler.
        """
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.trainer and world > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                f"set use_distributed_sampler to false: MaskedData shares the rows among the {world} processes "
                f"itself, and Lightning's sampler would change their order"
            )
        rows, tokenizer = self.rows(split), self.tokenizer
        sampler = PictureSampler(
            len(rows),
            self.batch_size,
            seed=self.seed,
            shuffle=training,
            lengths=rows.lengths if training else None,
            rank=rank,
            world=world,
        )
        return ResumableLoader(
            MaskedDataset(rows, tokenizer.bos_id, tokenizer.eos_id, training=training),
            sampler,
            MaskedCollate(self.masking(training=training), tokenizer.pad_id, split),
            num_workers=self.num_workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches."""
        return self.loader(self.train_split, training=True)

    def val_dataloader(self) -> list[ResumableLoader]:
        """Return one loader for each of `val_splits`, in this order."""
        return [self.loader(split) for split in self.val_splits]

    def test_dataloader(self) -> list[ResumableLoader]:
        """Return one loader for each of `test_splits`, in this order."""
        return [self.loader(split) for split in self.test_splits]

    def transfer_batch_to_device(
        self, batch: MaskedBatch, device: torch.device, dataloader_idx: int
    ) -> MaskedBatch:
        """Copy a batch to the device beside its computation."""
        return batch.to(device, non_blocking=True)

    def describe(self) -> str:
        """What was found, and how the texts of the splits became rows, a line each."""
        lines = [self.source.describe()] if isinstance(self.source, TextFiles) else []
        for split in (self.train_split, *self.val_splits):
            rows = self.rows(split)
            _, other = rows.seconds(0)
            kinds = f"{int((other == 0).sum()):,} of one group, {int((other == 1).sum()):,} not"
            line = f"{split}: {len(rows):,} rows of at most {self.max_len} tokens"
            lines.append(f"{line}, pairs of texts: {kinds}" if self.pairs else line)
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """Which tokenizer the run uses."""
        return {"tokenizer": self._tokenizer_hash()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a resumed run has the tokenizer it had.

        Raises:
            ValueError: If it has another one.
        """
        if state_dict["tokenizer"] != self._tokenizer_hash():
            raise ValueError(
                f"cannot resume: the tokenizer is not that of the run ({self._tokenizer_hash()}, was "
                f"{state_dict['tokenizer']}); the training texts or vocab_size ({self.vocab_size}) have changed"
            )

    def _tokenizer_hash(self) -> str:
        return hashlib.sha256(self.tokenizer.backend.to_str().encode()).hexdigest()[:16]


def own_masked(
    paths: list[str],
    *,
    unit: Unit = "line",
    text_column: str | list[str] | None = None,
    split_column: str | None = None,
    val_fraction: float = 0.05,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    pairs: bool = True,
    share: float = 0.15,
    whole_words: bool = True,
    max_len: int = 64,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    max_bad: float = 0.01,
) -> MaskedData:
    """Texts of one's own with hidden words: plain text, JSONL, CSV, COCO and Karpathy JSON, Parquet, zip, tar.

    Args:
        paths: Files, folders or archives.
        unit: What a document is in a plain text file: a line, a paragraph or the file.
        text_column: Column, or columns, with the texts of tables; those of one row belong together.
        split_column: Column with the split.
        val_fraction: Share of the texts for validation where the data names none.
        tokenizer: Folder of a tokenizer; else one is trained.
        vocab_size: The most words of a tokenizer that is trained.
        pairs: Whether rows are pairs of texts, half of the time of one picture or row of a table.
        share: Share of the tokens that are to be filled in.
        whole_words: Hide words with all of their tokens; else single tokens.
        max_len: The most tokens of a row.
        batch_size: Rows in a batch of one process.
        num_workers: Processes that make batches.
        seed: Seed of order, pairs and masks.
        max_bad: Share of a table's rows that may be unusable before the run stops.
    """
    source = TextFiles(
        paths,
        unit=unit,
        text_column=text_column,
        split_column=split_column,
        val_fraction=val_fraction,
        max_bad=max_bad,
    )
    return MaskedData(
        source,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        pairs=pairs,
        share=share,
        whole_words=whole_words,
        max_len=max_len,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
    )
