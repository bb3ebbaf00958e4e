"""Rows of documents with their pictures, as samples that depend on what is picked, and on nothing else."""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmtransformer.batch import CaptionBatch
from mmtransformer.data.documents.documents import Documents
from mmtransformer.data.documents.packing import DocumentRows, Piece
from mmtransformer.data.loading.errors import BadImages, TooManyErrors
from mmtransformer.data.loading.hashing import generator
from mmtransformer.data.loading.sampler import SampleIndex
from mmtransformer.data.loading.source import scaled_image
from mmtransformer.images import Augment, ImageError, ImageTransform
from mmtransformer.serialization.printable import counted


class Layout(NamedTuple):
    """What a row says of each of its tokens; see `CaptionBatch`.

    Attributes:
        tokens: (q,) ids.
        loss_mask: (q,) bool.
        image_index: (q,) number of the last picture of the token's document so far, from 1; 0 = none yet.
        first_image_index: (q,) number of the first picture of its document.
        document_ids: (q,) number of its document, from 0.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    image_index: np.ndarray
    first_image_index: np.ndarray
    document_ids: np.ndarray


def lay_out(pieces: list[Piece], image_token_id: int) -> Layout:
    """Lays documents side by side. The loss is where Flamingo puts it: on text that follows a picture of its own
    document, its end included; not on image tokens, nor on what comes before the first picture.
    """
    tokens = np.concatenate([piece.tokens for piece in pieces]).astype(np.int64)
    sizes = [len(piece.tokens) for piece in pieces]
    before = np.repeat(np.cumsum([0] + [piece.images for piece in pieces[:-1]]), sizes)
    image_index = np.cumsum(tokens == image_token_id)
    image_index[image_index == before] = 0
    return Layout(
        tokens=tokens,
        loss_mask=(image_index > 0) & (tokens != image_token_id),
        image_index=image_index,
        first_image_index=before + 1,
        document_ids=np.repeat(np.arange(len(pieces)), sizes),
    )


class DocumentSample(NamedTuple):
    """One row.

    Attributes:
        layout: Its tokens.
        pixels: (i 3 height width); zeros where a picture could not be read.
        image_mask: (i,) bool, which could be read.
        name: The first document's name, and how many more there are.
    """

    layout: Layout
    pixels: Tensor
    image_mask: np.ndarray
    name: str


class DocumentDataset(Dataset[DocumentSample]):
    """The rows of one split; what it returns depends on the `SampleIndex` only, not on the process.

    A picture that cannot be read is recorded. Its mark stays in the text, so that all others keep their numbers; it is
    blank and hidden, and the text that follows it is not a target. A row that has no target left is replaced by the
    next one.

    Args:
        documents: The documents.
        rows: Their rows.
        transform: From picture to pixels.
        training: Augment, and train on replacement samples; otherwise nothing is random, and they do not count.
        seed: Seed of the run.
        augment: Changes pictures at random before the transform. The pictures of a document that speaks of left or
            right are never mirrored.
        bad: Where pictures that cannot be read are recorded; None raises the first error.
    """

    def __init__(
        self,
        documents: Documents,
        rows: DocumentRows,
        transform: ImageTransform,
        *,
        training: bool = True,
        seed: int = 0,
        augment: Augment | None = None,
        bad: BadImages | None = None,
    ):
        self.documents, self.rows, self.transform = documents, rows, transform
        self.training, self.seed, self.augment, self.bad = training, seed, augment, bad

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __getitem__(self, pick: SampleIndex) -> DocumentSample:
        """Return a row with its pictures for an epoch."""
        epoch, index, is_real = pick
        for step in range(len(self)):
            at = (index + step) % len(self)
            sample = self._sample(epoch, at)
            if sample.layout.loss_mask.any():
                if not is_real or (step and not self.training):
                    sample.layout.loss_mask[:] = False
                return sample
        raise TooManyErrors(f"none of the {counted(len(self), 'row')} has a text whose picture can be read")

    def _sample(self, epoch: int, at: int) -> DocumentSample:
        pieces = self.rows.row(at)
        layout = lay_out(pieces, self.rows.image_token_id)
        places = [(piece.document, piece.first + k) for piece in pieces for k in range(piece.images)]
        pixels = [self._pixels(epoch, document, k) for document, k in places]
        image_mask = np.array([one is not None for one in pixels])
        for number in (np.flatnonzero(~image_mask) + 1).tolist():
            blind = layout.image_index == number
            layout.loss_mask[blind], layout.image_index[blind] = False, 0
        blank = torch.zeros(3, *self.transform.size)
        more = f" and {len(pieces) - 1} more" if len(pieces) > 1 else ""
        name = self.documents.name(pieces[0].document) + more
        return DocumentSample(layout, torch.stack([blank if p is None else p for p in pixels]), image_mask, name)

    def _pixels(self, epoch: int, document: int, k: int) -> Tensor | None:
        places = (self.seed, epoch, document, k, 7)
        at_least = self.transform.decode_size(self.augment, generator(*places)) if self.training else None
        try:
            image = scaled_image(self.documents, document, k, at_least=at_least)
        except ImageError as error:
            if self.bad is None:
                raise
            self.bad.record(self.documents.image_name(document, k), error)
            return None
        if self.training and self.augment is not None:
            flip = self.augment.flip and bool(self.rows.mirrors[document])
            augment = dataclasses.replace(self.augment, flip=flip)
            image = augment(image, generator(*places))
        return self.transform(image)


class CollateDocuments:
    """Makes one `CaptionBatch` of rows.

    Args:
        pad_id: The id that fills the rows up.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, samples: list[DocumentSample]) -> CaptionBatch:
        """Pad tokens on the right to the longest row, and pictures with blank ones to the most of a row."""
        lengths = np.array([len(sample.layout.tokens) for sample in samples])
        attention_mask = np.arange(lengths.max()) < lengths[:, None]

        def spread(rows: list[np.ndarray], fill: int | np.ndarray) -> Tensor:
            out = np.full(attention_mask.shape, fill, rows[0].dtype)
            out[attention_mask] = np.concatenate(rows)
            return torch.from_numpy(out)

        layouts = [sample.layout for sample in samples]
        documents = np.array([layout.document_ids[-1] + 1 for layout in layouts])[:, None]  # padding is one of its own
        most = max(len(sample.pixels) for sample in samples)
        pixels = samples[0].pixels.new_zeros(len(samples), most, *samples[0].pixels.shape[1:])
        image_mask = torch.zeros(len(samples), most, dtype=torch.bool)
        for i, sample in enumerate(samples):
            pixels[i, : len(sample.pixels)] = sample.pixels
            image_mask[i, : len(sample.pixels)] = torch.from_numpy(sample.image_mask)
        return CaptionBatch(
            tokens=spread([layout.tokens for layout in layouts], self.pad_id),
            attention_mask=torch.from_numpy(attention_mask),
            loss_mask=spread([layout.loss_mask for layout in layouts], False),
            pixels=pixels,
            names=tuple(sample.name for sample in samples),
            image_mask=image_mask,
            image_index=spread([layout.image_index for layout in layouts], 0),
            first_image_index=spread([layout.first_image_index for layout in layouts], 1),
            document_ids=spread([layout.document_ids for layout in layouts], documents),
        )
