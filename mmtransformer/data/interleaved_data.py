"""Interleaved documents, and mixtures of them with pairs, as a LightningDataModule for a captioner."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch

from mmtransformer.captioner import CaptionBatch
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.document_dataset import CollateDocuments, DocumentDataset
from mmtransformer.data.documents import DocumentPairs, Documents, DocumentSource, texts_of
from mmtransformer.data.faults import BadPictures
from mmtransformer.data.mixture import MixedDocuments, Mixing
from mmtransformer.data.packing import DocumentRows
from mmtransformer.data.sampler import PictureSampler, ResumableLoader
from mmtransformer.data.source import PairSource
from mmtransformer.images import Augment, ImageTransform
from mmtransformer.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class InterleavedData(lightning.LightningDataModule):
    """Documents with pictures anywhere in their text, in batches that are the same for any workers and processes.

    The run also validates on pairs, and is scored by captioning their pictures, each behind an image token as it stands
    in documents.

    Args:
        documents: Where the documents come from, such as `InterleavedFiles`, `SceneDocuments`, `PairDocuments`, or a
            `DocumentMixture` of some.
        image: How a picture becomes pixels; saved with the model.
        augment: Random changes to training pictures, seeded by (seed, epoch, document, picture).
        tokenizer: A tokenizer with an image token, or a folder to load one from; None trains one on the documents.
        vocab_size: The most words of a tokenizer that is trained here.
        batch_size: Rows in a batch of one process.
        max_len: The most tokens of a row.
        max_pictures: The most pictures of a row.
        pack: Whether short documents share a row; they never see each other.
        num_workers: Processes that load pictures. The batches are the same for any number.
        seed: Seed of order, packing and augmentation.
        train_split: The split to train on.
        val_splits: The splits of the documents to validate on; they are logged as documents_SPLIT.
        captions: Pairs to caption and score; None = the pictures of the documents, with the texts that follow them.
        caption_splits: The splits of these pairs.
        languages: Language codes that the tokenizer which is trained here gets; those of the documents unless told.
        drop_last: Leave out the last training batch of an epoch if it is not full.
        max_bad: Share of the pictures that may be unreadable before the run stops.
        report_dir: Folder of the report on unreadable pictures; the run's folder unless told.
    """

    def __init__(
        self,
        documents: DocumentSource,
        *,
        image: ImageTransform,
        augment: Augment | None = None,
        tokenizer: Tokenizer | str | None = None,
        vocab_size: int = 4096,
        batch_size: int = 16,
        max_len: int = 256,
        max_pictures: int = 6,
        pack: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        train_split: str = "train",
        val_splits: Sequence[str] = ("val",),
        captions: PairSource | None = None,
        caption_splits: Sequence[str] = ("val",),
        languages: Sequence[str] | None = None,
        drop_last: bool = False,
        max_bad: float = 0.01,
        report_dir: str | None = None,
    ):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1")
        for name, value in (("val_splits", val_splits), ("caption_splits", caption_splits)):
            if isinstance(value, str):
                raise ValueError(f"{name} must be a list of splits: [{value}]")
        self.source, self.transform, self.augment, self.vocab_size = documents, image, augment, vocab_size
        self.batch_size, self.max_len, self.max_pictures, self.pack = batch_size, max_len, max_pictures, pack
        self.num_workers, self.seed, self.drop_last = num_workers, seed, drop_last
        self.train_split, self.document_splits = train_split, tuple(val_splits)
        self.languages, self.max_bad, self.report_dir = languages, max_bad, report_dir
        self._given, self._tokenizer = tokenizer, None if isinstance(tokenizer, str) else tokenizer
        self._pairs = DocumentPairs(documents) if captions is None else captions
        self._caption_splits = tuple(caption_splits)
        self._captions: CaptionData | None = None
        self._documents: dict[str, Documents] = {}
        self._rows: dict[str, DocumentRows] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: the one given, loaded, or trained on the training documents at the first call."""
        if self._tokenizer is None:
            if isinstance(self._given, str):
                self._tokenizer = Tokenizer.from_folder(self._given)
            else:
                languages = self.source.languages if self.languages is None else self.languages
                texts = texts_of(self.documents(self.train_split))
                self._tokenizer = Tokenizer.train(texts, self.vocab_size, languages)
        return self._tokenizer

    @property
    def captions(self) -> CaptionData:
        """The pairs that the run is scored on, with this data's tokenizer and transform."""
        if self._captions is None:
            self._captions = CaptionData(
                self._pairs,
                image=self.transform,
                tokenizer=self.tokenizer,
                batch_size=self.batch_size,
                max_len=self.max_len,
                num_workers=self.num_workers,
                seed=self.seed,
                val_splits=self._caption_splits,
                test_splits=(),
                mark_pictures=True,
                max_bad=self.max_bad,
                report_dir=self.report_dir,
            )
        self._captions.trainer = self.trainer
        return self._captions

    @property
    def val_splits(self) -> tuple[str, ...]:
        """The names of the validation loaders, as they stand in the log: documents first, then pairs."""
        return (*(f"documents_{split}" for split in self.document_splits), *self._caption_splits)

    def continue_from(self, tokenizer: Tokenizer, image: ImageTransform) -> None:
        """Use the tokenizer and transform of a saved model in place of one's own, before anything was tokenised."""
        self._tokenizer, self.transform = tokenizer, image
        self._rows, self._captions = {}, None

    def documents(self, split: str) -> Documents:
        """Return the documents of a split."""
        if split not in self._documents:
            self._documents[split] = self.source.split(split)
        return self._documents[split]

    def rows(self, split: str) -> DocumentRows:
        """Return a split as rows, tokenised at the first call; what had to be divided, cut or left out is reported."""
        if split not in self._rows:
            documents = self.documents(split)
            parts = documents.parts if isinstance(documents, MixedDocuments) else None
            rows = self._rows[split] = DocumentRows(
                documents,
                self.tokenizer,
                max_len=self.max_len,
                max_pictures=self.max_pictures,
                pack=self.pack,
                seed=self.seed,
                parts=parts,
            )
            all_ = f"of {len(documents)} documents"
            for count, what in (
                (
                    rows.divided,
                    f"{all_} are longer than a row ({self.max_len} tokens, {self.max_pictures} pictures): divided",
                ),
                (rows.cut, "texts are longer than a row: cut"),
                (rows.silent, f"{all_} have no text after a picture: left out"),
            ):
                if count:
                    _log.warning("%s: %d %s", split, count, what)
        return self._rows[split]

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the splits of a stage: "fit" or "validate"."""
        trainer = self.trainer
        for split in {"fit": (self.train_split, *self.document_splits)}.get(
            stage or "fit", self.document_splits
        ):
            self.rows(split)
            if trainer is not None and trainer.is_global_zero and not trainer.ckpt_path:
                self._bad(split).reset()
        self.captions.setup("validate")

    def _bad(self, split: str) -> BadPictures:
        folder = self.report_dir or (self.trainer.default_root_dir if self.trainer else ".")
        total = int(self.rows(split).pictures.sum())
        return BadPictures(Path(folder) / f"bad_pictures_documents_{split}.jsonl", total, self.max_bad)

    def dataset(self, split: str, *, training: bool = False) -> DocumentDataset:
        """Return a split as a dataset of `Pick`s."""
        return DocumentDataset(
            self.documents(split),
            self.rows(split),
            self.transform,
            training=training,
            seed=self.seed,
            augment=self.augment if training else None,
            bad=self._bad(split),
        )

    def mixing(self, split: str) -> Mixing | None:
        """How a training epoch of a split is mixed; None if it is no mixture."""
        documents = self.documents(split)
        return (
            documents.mixing(self.seed, self.rows(split).parts)
            if isinstance(documents, MixedDocuments)
            else None
        )

    def loader(self, split: str, *, training: bool = False) -> ResumableLoader:
        """Return the loader of a split: shuffled, mixed, grouped by length and augmented for training, else plain.

        Raises:
            ValueError: If Lightning would replace the sampler.
        """
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.trainer and world > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                f"set use_distributed_sampler to false: InterleavedData shares the rows among the {world} processes "
                f"itself, and Lightning's sampler would change their order"
            )
        rows, pool = self.rows(split), self.mixing(split) if training else None

        def lengths(epoch: int) -> np.ndarray:
            return rows.lengths if pool is None else rows.lengths[pool.pictures(epoch)[0]]

        sampler = PictureSampler(
            len(rows) if pool is None else pool.size,
            self.batch_size,
            seed=self.seed,
            shuffle=training,
            lengths=lengths if training else None,
            pool=pool,
            block=self.batch_size * world * getattr(self.trainer, "accumulate_grad_batches", 1),
            rank=rank,
            world=world,
            drop_last=training and self.drop_last,
        )
        return ResumableLoader(
            self.dataset(split, training=training),
            sampler,
            CollateDocuments(self.tokenizer.pad_id),
            num_workers=self.num_workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches."""
        return self.loader(self.train_split, training=True)

    def val_dataloader(self) -> list[ResumableLoader]:
        """Return one loader for each of `val_splits`, in this order."""
        documents = [self.loader(split) for split in self.document_splits]
        return documents + self.captions.val_dataloader()

    def transfer_batch_to_device(
        self, batch: CaptionBatch, device: torch.device, dataloader_idx: int
    ) -> CaptionBatch:
        """Copy a batch to the device beside its computation."""
        return batch.to(device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """Which tokenizer and which rows the run uses."""
        return self._identity()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a resumed run has the tokenizer, the rows and the mixture it had.

        Raises:
            ValueError: If it has others.
        """
        for key, value in self._identity().items():
            if state_dict[key] != value:
                raise ValueError(
                    f"cannot resume: the {key} of the run was {state_dict[key]} and is now {value}, so its batches "
                    f"differ; use the data and settings of the run, or start a new one"
                )

    def _identity(self) -> dict[str, Any]:
        rows, mixing = self.rows(self.train_split), self.mixing(self.train_split)
        return {
            "tokenizer": hashlib.sha256(self.tokenizer.backend.to_str().encode()).hexdigest()[:16],
            "number of rows": len(rows),
            "number of tokens": int(rows.lengths.sum()),
            "mixture": [] if mixing is None else list(mixing.quotas),
        }
