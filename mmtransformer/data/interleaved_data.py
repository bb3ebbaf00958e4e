"""Interleaved documents, and mixtures of them with pairs, as a LightningDataModule for a captioner."""

import logging
from collections.abc import Sequence
from typing import Any

import lightning

from mmtransformer.data.captions import CaptionData
from mmtransformer.data.documents.document_dataset import CollateDocuments, DocumentDataset
from mmtransformer.data.documents.documents import DocumentPairs, Documents, DocumentSource, texts_of
from mmtransformer.data.documents.packing import DocumentRows
from mmtransformer.data.loading.epoch_mixture import EpochMixture
from mmtransformer.data.loading.errors import BadImages
from mmtransformer.data.loading.module import Data, Lengths, list_of_splits
from mmtransformer.data.loading.sampler import ResumableLoader
from mmtransformer.data.loading.source import PairSource
from mmtransformer.data.mixture import MixedDocuments
from mmtransformer.images import Augment, ImageTransform
from mmtransformer.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class InterleavedData(Data):
    """Documents with pictures anywhere in their text, in batches that are the same for any workers and processes.

    The run also validates on pairs, and is scored by captioning their pictures, each behind an image token as it stands
    in documents.

    Args:
        documents: Where the documents come from, such as `InterleavedFiles`, `SceneDocuments`, `PairDocuments`, or a
            `DocumentMixture` of some.
        image: How a picture becomes pixels; saved with the model.
        augment: Random changes to training pictures, seeded by (seed, epoch, document, picture).
        tokenizer: A tokenizer with an image token, or where to load one from (a folder or hub name); None trains one.
        vocab_size: The most words of a tokenizer that is trained here.
        batch_size: Rows in a batch of one process.
        max_len: The most tokens of a row.
        max_images: The most pictures of a row.
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
        max_images: int = 6,
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
        self.document_splits = list_of_splits("val_splits", val_splits)
        self._caption_splits = list_of_splits("caption_splits", caption_splits)
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            train_split=train_split,
            val_splits=[f"documents_{split}" for split in val_splits] + list(caption_splits),  # as logged
            test_splits=(),
            drop_last=drop_last,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
        )
        self.source, self.transform, self.augment = documents, image, augment
        self.max_len, self.max_images, self.pack = max_len, max_images, pack
        self.languages, self.max_bad, self.report_dir = languages, max_bad, report_dir
        self._pairs = DocumentPairs(documents) if captions is None else captions
        self._captions: CaptionData | None = None
        self._documents: dict[str, Documents] = {}
        self._rows: dict[str, DocumentRows] = {}

    def train_tokenizer(self) -> Tokenizer:
        """Train a tokenizer on the training documents."""
        languages = self.source.languages if self.languages is None else self.languages
        return Tokenizer.train(texts_of(self.documents(self.train_split)), self.vocab_size, languages)

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
                mark_images=True,
                max_bad=self.max_bad,
                report_dir=self.report_dir,
            )
        self._captions.trainer = self.trainer
        return self._captions

    def continue_from(self, tokenizer: Tokenizer, image: ImageTransform) -> None:
        """Use the tokenizer and transform of a saved model in place of one's own, before anything was tokenised."""
        self.tokenizer, self.transform = tokenizer, image
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
                max_images=self.max_images,
                pack=self.pack,
                seed=self.seed,
                parts=parts,
            )
            all_ = f"of {len(documents)} documents"
            for count, what in (
                (
                    rows.divided,
                    f"{all_} are longer than a row ({self.max_len} tokens, {self.max_images} pictures): divided",
                ),
                (rows.cut, "texts are longer than a row: cut"),
                (rows.silent, f"{all_} have no text after a picture: left out"),
            ):
                if count:
                    _log.warning("%s: %d %s", split, count, what)
        return self._rows[split]

    def splits_of(self, stage: str | None) -> tuple[str, ...]:
        """The splits of the documents for a stage."""
        return (self.train_split, *self.document_splits) if stage in (None, "fit") else self.document_splits

    def prepare(self, split: str) -> None:
        """Read and tokenise a split; its report on unreadable pictures is emptied, unless a run goes on."""
        self.rows(split)
        if self.begins:
            self._bad(split).reset()

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the splits of a stage: "fit" or "validate"."""
        super().setup(stage)
        self.captions.setup("validate")

    def _bad(self, split: str) -> BadImages:
        path = self.report_folder(self.report_dir) / f"bad_images_documents_{split}.jsonl"
        return BadImages(path, int(self.rows(split).images.sum()), self.max_bad)

    def dataset(self, split: str, *, training: bool = False) -> DocumentDataset:
        """Return a split as a dataset of `SampleIndex`s."""
        return DocumentDataset(
            self.documents(split),
            self.rows(split),
            self.transform,
            training=training,
            seed=self.seed,
            augment=self.augment if training else None,
            bad=self._bad(split),
        )

    def mixture(self, split: str) -> EpochMixture | None:
        """How a training epoch of a split is mixed; None if it is no mixture."""
        documents = self.documents(split)
        return (
            documents.mixture(self.seed, self.rows(split).parts)
            if isinstance(documents, MixedDocuments)
            else None
        )

    def collate(self, split: str, *, training: bool = False) -> CollateDocuments:
        """What makes a `CaptionBatch` of rows."""
        return CollateDocuments(self.tokenizer.pad_id)

    def lengths(self, split: str) -> Lengths:
        """How long rows are."""
        rows = self.rows(split)
        return lambda epoch, index: rows.lengths[index]

    def val_dataloader(self) -> list[ResumableLoader]:
        """Return one loader for each of `val_splits`, in this order."""
        documents = [self.loader(split) for split in self.document_splits]
        return documents + self.captions.val_dataloader()

    test_dataloader = lightning.LightningDataModule.test_dataloader  # none: Lightning says what is missing

    def identity(self) -> dict[str, Any]:
        """The tokenizer, the training rows, and how they are mixed."""
        rows, mixture = self.rows(self.train_split), self.mixture(self.train_split)
        return {
            "tokenizer": self.tokenizer_hash,
            "number of rows": len(rows),
            "number of tokens": int(rows.lengths.sum()),
            "mixture": [] if mixture is None else list(mixture.quotas),
        }
