"""Interleaved documents, and mixtures of them with pairs, as a LightningDataModule for a captioner."""

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning

from mmtransformer.data.captions import CaptionData
from mmtransformer.data.documents.document_dataset import CollateDocuments, DocumentDataset
from mmtransformer.data.documents.documents import Documents, DocumentsAsPairs, DocumentSource, texts_of
from mmtransformer.data.documents.interleaved import InterleavedFiles
from mmtransformer.data.documents.packing import DocumentRows
from mmtransformer.data.loading.epoch_mixture import EpochMixture
from mmtransformer.data.loading.errors import BadImages
from mmtransformer.data.loading.fingerprints import Parts
from mmtransformer.data.loading.module import DataModule, Lengths, LoaderConfig, Splits
from mmtransformer.data.loading.pixels import of_one_size, of_tower
from mmtransformer.data.loading.sampler import ResumableLoader
from mmtransformer.data.loading.source import PairSource, splits_there
from mmtransformer.data.loading.split_cache import once_a_split
from mmtransformer.data.mixture import MixedDocuments
from mmtransformer.images import Augment, ImageTransform
from mmtransformer.serialization.printable import counted
from mmtransformer.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class _MarkedCaptions(CaptionData):
    add_image_tokens = True


class InterleavedData(DataModule):
    """Documents with pictures anywhere in their text, in batches that are the same for any workers and processes.

    The run also validates on pairs, and is scored by captioning their pictures, each behind an image token as it stands
    in documents.

    Args:
        source: Where the documents come from, such as `InterleavedFiles`, `SceneDocuments`, `PairsAsDocuments`, or a
            `DocumentMixture` of some; or a folder, an archive or a file of documents.
        transform: How a picture becomes pixels; saved with the model. None = as the vision encoder reads them, where
            it is a public one, else `ImageTransform()` at its size.
        augment: Random changes to training pictures, seeded by (seed, epoch, document, picture).
        tokenizer: A tokenizer with an image token, or where to load one from (a folder or hub name); None trains one.
        vocab_size: The most tokens of a tokenizer that is trained here.
        row_len: The most tokens of a row, in which several documents stand if `pack`; a longer document is divided.
        max_images: The most pictures of a row.
        pack: Whether short documents share a row; they never see each other.
        batch_size: Rows in a batch of one process.
        loader: How samples are loaded and ordered, and how many may be unusable.
        splits: Which splits of the documents are for training and validation; these are logged as documents_SPLIT.
        captions: Pairs to caption and score; None = the pictures of the documents, with the texts that follow them.
        caption_splits: The splits of these pairs.
    """

    def __init__(
        self,
        source: DocumentSource | str,
        *,
        transform: ImageTransform | None = None,
        augment: Augment | None = None,
        tokenizer: Tokenizer | str | None = None,
        vocab_size: int = 4096,
        row_len: int = 256,
        max_images: int = 6,
        pack: bool = True,
        batch_size: int = 16,
        loader: LoaderConfig = LoaderConfig(),
        splits: Splits = Splits(),
        captions: PairSource | str | None = None,
        caption_splits: Sequence[str] = ("val",),
    ):
        self.document_splits, self.caption_splits = tuple(splits.val), Splits(val=caption_splits).val
        logged = [f"documents_{split}" for split in self.document_splits]
        super().__init__(
            batch_size=batch_size,
            loader=loader,
            splits=Splits(splits.train, (), ()),
            tokenizer=tokenizer,
            vocab_size=vocab_size,
        )
        self.transform = of_one_size(transform or ImageTransform(), "interleaved documents have")
        self.source: DocumentSource = (
            InterleavedFiles(source, max_bad_fraction=loader.max_bad_fraction)
            if isinstance(source, str | Path)
            else source
        )
        self.augment, self._own_transform = augment, transform
        self.row_len, self.max_images, self.pack = row_len, max_images, pack
        self._pairs = DocumentsAsPairs(self.source) if captions is None else captions
        self.caption_splits = splits_there(self._pairs, self.caption_splits)
        self.val_splits = (*logged, *self.caption_splits)  # names in the log, not of the source
        self._captions: CaptionData | None = None

    def train_tokenizer(self) -> Tokenizer:
        """Train a tokenizer on the training documents."""
        texts = texts_of(self.documents(self.train_split))
        return Tokenizer.train(texts, self.vocab_size, self.source.languages)

    @property
    def captions(self) -> CaptionData:
        """The pairs that the run is scored on, with this data's tokenizer and transform."""
        if self._captions is None:
            self._captions = _MarkedCaptions(
                self._pairs,
                transform=self.transform,
                tokenizer=self.tokenizer,
                max_len=self.row_len,
                batch_size=self.batch_size,
                loader=self.loader_config,
                splits=Splits(val=self.caption_splits, test=()),
            )
        self._captions.trainer, self._captions.report_dir = self.trainer, self.report_dir
        return self._captions

    def use_vision_transform(self, own: ImageTransform, patch_size: int = 16, known: bool = True) -> str:
        """Read pictures as a vision encoder does, unless `transform` says otherwise; return a line that says how.

        Pictures of documents have one size: those of a tower that reads native sizes are stretched to a square.
        """
        resize = "squash" if own.resize == "native" else None
        self.transform, line = of_tower(self._own_transform, resize, own, patch_size, known)
        return line

    def continue_from(
        self, tokenizer: Tokenizer, transform: ImageTransform, processor: object = None, max_len: int | None = None
    ) -> None:
        """Use the tokenizer and transform of a saved model in place of one's own, before anything was tokenised.

        Raises:
            ValueError: For a public model, whose prompts these documents do not have, or one that reads shorter rows.
        """
        if max_len is not None and self.row_len > max_len:
            raise ValueError(
                f"data.row_len ({self.row_len}) is more than the {max_len} tokens that the model of model.init reads: "
                f"set it to {max_len} or less"
            )
        if processor is not None:
            raise ValueError("a public captioner is fine-tuned on pairs (CaptionData), not on interleaved documents")
        self.tokenizer, self.transform = tokenizer, of_one_size(transform, "interleaved documents have")
        self.clear_cache()
        self._captions = None

    @once_a_split
    def documents(self, split: str) -> Documents:
        """Return the documents of a split."""
        return self.source.split(split)

    @once_a_split
    def rows(self, split: str) -> DocumentRows:
        """Return a split as rows, tokenised at the first call; what had to be divided, cut or left out is reported."""
        documents = self.documents(split)
        rows = DocumentRows(
            documents,
            self.tokenizer,
            row_len=self.row_len,
            max_images=self.max_images,
            pack=self.pack,
            seed=self.seed,
            parts=documents.parts if isinstance(documents, MixedDocuments) else None,
        )
        of, row = f"of {counted(len(documents), 'document')}", f"({self.row_len} tokens, {self.max_images} pictures)"
        for count, what in (
            (rows.divided, f"{of} are longer than a row {row}: divided"),
            (rows.cut, "texts are longer than a row: cut"),
            (rows.silent, f"{of} have no text after a picture: left out"),
        ):
            if count:
                _log.warning("%s: %d %s", split, count, what)
        return rows

    def splits_of(self, stage: str | None) -> tuple[str, ...]:
        """The splits of the documents for a stage."""
        return (self.train_split, *self.document_splits) if stage in (None, "fit") else self.document_splits

    def prepare(self, split: str) -> None:
        """Read and tokenise a split."""
        self.rows(split)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the splits of a stage: "fit" or "validate"."""
        super().setup(stage)
        self.captions.setup("validate")

    def clear_reports(self, stage: str | None = "fit") -> None:
        """Forget an earlier run's reports, of the pairs that the run is scored on too."""
        super().clear_reports(stage)
        self.captions.clear_reports("validate")

    def bad_samples(self, split: str) -> BadImages:
        """Where pictures that cannot be read are recorded."""
        total = int(self.rows(split).images.sum())
        return BadImages.of_split(self.report_folder(), f"documents_{split}", total, self.max_bad_fraction)

    def bad_sample_readers(self, split: str, names: Collection[str]) -> dict[str, Callable[[], Any]]:
        """Of pictures that could not be read, those that are still in a split."""
        documents = self.documents(split)
        places = ((i, k) for i in range(len(documents)) for k in range(len(documents.document(i).texts) - 1))
        return {
            name: partial(documents.image, i, k) for i, k in places if (name := documents.image_name(i, k)) in names
        }

    def dataset(self, split: str, *, training: bool = False) -> DocumentDataset:
        """Return a split as a dataset of `SampleIndex`s."""
        return DocumentDataset(
            self.documents(split),
            self.rows(split),
            self.transform,
            training=training,
            seed=self.seed,
            augment=self.augment if training else None,
            bad=self.bad_samples(split),
        )

    def mixture(self, split: str) -> EpochMixture | None:
        """How a training epoch of a split is mixed; None if it is no mixture."""
        documents = self.documents(split)
        if not isinstance(documents, MixedDocuments):
            return None
        return documents.mixture(self.seed, self.rows(split).parts)

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

    def parts(self, split: str) -> Parts:
        """Documents: their texts, and the files of their pictures."""
        documents = self.documents(split)
        found = map(documents.document, range(len(documents)))
        texts = [[*document.texts, document.language] for document in found]
        return Parts(documents.name, texts, getattr(documents, "fingerprint", None), ("documents", "texts"))

    def identity(self) -> dict[str, Any]:
        """The tokenizer, the training rows, and how they are mixed."""
        rows, mixture = self.rows(self.train_split), self.mixture(self.train_split)
        return {
            "tokenizer": self.tokenizer_hash,
            "number of rows": len(rows),
            "number of tokens": int(rows.lengths.sum()),
            "mixture": [] if mixture is None else list(mixture.quotas),
        }
