"""One split of captioned pictures as a dataset whose samples depend on what is picked, and on nothing else.

Shapes: b pictures; r captions of a picture, which make n = b * r rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from mmtransformer.batch import CaptionBatch
from mmtransformer.batch.images import pad_images
from mmtransformer.data.loading.errors import BadImages, TooManyErrors
from mmtransformer.data.loading.features import FeatureCache
from mmtransformer.data.loading.hashing import generator, hash64
from mmtransformer.data.loading.rows import CaptionRow, CaptionRows
from mmtransformer.data.loading.sampler import SampleIndex
from mmtransformer.data.loading.source import Caption, Pairs, scaled_image
from mmtransformer.images import Augment, ImageError, ImageTransform
from mmtransformer.serialization.printable import counted
from mmtransformer.weights.processors.processor import Processor


class Sample(NamedTuple):
    """One picture with its rows.

    Attributes:
        pixels: (1 3 height width), or None; of pictures of native size each has its own height and width.
        visual_tokens: (1 p d) in their place, or None.
        rows: Its r captions.
        name: The picture's name.
        references: All captions of the picture.
        prepared: What a public model that cuts pictures into tiles makes of it, in place of pixels.
    """

    pixels: Tensor | None
    visual_tokens: Tensor | None
    rows: list[CaptionRow]
    name: str
    references: tuple[Caption, ...]
    prepared: Any = None

    @property
    def question(self) -> str | None:
        """What is asked of the picture."""
        return self.references[0].question


class CaptionDataset(Dataset[Sample]):
    """One split; what it returns depends on the `SampleIndex` only, not on the process or on what was read before.

    A picture that cannot be read is recorded and the next one that can be read takes its place.

    Args:
        pairs: The pictures.
        rows: Their captions.
        transform: From picture to pixels.
        captions_per_image: Rows of each picture, r.
        training: Choose captions by (seed, epoch, index), augment, and train on replacement samples. Otherwise the
            captions are always the same ones, nothing is random, and replacement samples do not count.
        seed: Seed of the run.
        augment: Changes pictures at random before the transform. A picture whose captions speak of left or right is
            never mirrored.
        features: The visual tokens, to be used in place of pixels.
        mirror: Use the mirrored visual tokens half of the time in training.
        bad: Where pictures that cannot be read are recorded; None raises the first error.
        tiled: A public model's processor, if it cuts pictures into tiles, in place of the transform.
    """

    def __init__(
        self,
        pairs: Pairs,
        rows: CaptionRows,
        transform: ImageTransform,
        *,
        captions_per_image: int = 1,
        training: bool = True,
        seed: int = 0,
        augment: Augment | None = None,
        features: FeatureCache | None = None,
        mirror: bool = False,
        bad: BadImages | None = None,
        tiled: Processor | None = None,
    ):
        self.tiled = tiled
        self.pairs, self.rows, self.transform = pairs, rows, transform
        self.captions_per_image, self.training, self.seed = captions_per_image, training, seed
        self.augment, self.features, self.mirror, self.bad = augment, features, mirror, bad

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.rows)

    def name(self, index: int) -> str:
        """The picture's name."""
        return self.pairs.name(index)

    def __getitem__(self, pick: SampleIndex | int) -> Sample:
        """Return a picture with its captions for an epoch; a number alone, as one looks at data by hand, means epoch 0.

        Raises:
            IndexError: Of a number that is none of a picture's.
        """
        if isinstance(pick, int) and not 0 <= pick < len(self):
            raise IndexError(f"picture {pick} of {len(self)}")
        epoch, index, is_real = SampleIndex(0, pick, True) if isinstance(pick, int) else pick
        at, visual = self._readable(epoch, index)
        if self.training:
            chosen = self.rows.choose(self.seed, epoch, np.array([at]), self.captions_per_image)[0]
            rows = [self.rows.row(int(caption)) for caption in chosen]
        else:
            rows = self.rows.fixed(at, self.captions_per_image)
            is_real = is_real and at == index
        if not is_real:
            rows = [row._replace(is_real=False) for row in rows]
        if self.tiled is not None:
            return Sample(None, None, rows, self.pairs.name(at), self.rows.captions[at], visual)
        pixels, tokens = (visual[None], None) if self.features is None else (None, visual[None])
        return Sample(pixels, tokens, rows, self.pairs.name(at), self.rows.captions[at])

    def _readable(self, epoch: int, index: int) -> tuple[int, Any]:
        """Return the first picture from `index` on that can be read, and its place."""
        for step in range(len(self)):
            at = (index + step) % len(self)
            try:
                return at, self._visual(epoch, at)
            except ImageError as error:
                if self.bad is None:
                    raise
                self.bad.record(self.pairs.name(at), error)
        raise TooManyErrors(f"none of the {counted(len(self), 'picture')} can be read")

    def _visual(self, epoch: int, i: int) -> Any:
        if self.features is not None:
            mirror = (
                self.training and self.mirror and self.rows.mirrors[i] and int(hash64(self.seed, epoch, i, 3)) >> 63
            )
            return self.features[i, bool(mirror)]
        if self.tiled is not None:
            return self.tiled.prepare(self._augmented(epoch, i))
        if not self.training:
            return self.transform(self.pairs.image(i))
        augment, places = self.augment, (self.seed, epoch, i, 4)
        if augment is None:
            return self.transform(scaled_image(self.pairs, i, at_least=self.transform.decode_size()))
        augment = augment if self.rows.mirrors[i] else dataclasses.replace(augment, flip=False)
        at_least = self.transform.decode_size(augment, generator(*places))
        return self.transform(augment(scaled_image(self.pairs, i, at_least=at_least), generator(*places)))

    def _augmented(self, epoch: int, i: int) -> Image:
        """A picture at its full size, changed at random in training."""
        image = self.pairs.image(i)
        if not self.training or self.augment is None:
            return image
        augment = self.augment if self.rows.mirrors[i] else dataclasses.replace(self.augment, flip=False)
        return augment(image, generator(self.seed, epoch, i, 4))


class Collate:
    """Makes one `CaptionBatch` of samples.

    Args:
        pad_id: The id that fills the rows up.
        image_token_id: The image token, where prompts show with it where the picture stands.
        patch_size: Side of the patches, px, that pictures of native size are cut into here.
        complete: Adds what else a public model reads of a batch.
        tiled: A public model's processor, if it cuts pictures into tiles: the prompt before a caption then depends on
            the picture, and is made here.
    """

    def __init__(
        self,
        pad_id: int,
        image_token_id: int | None = None,
        *,
        patch_size: int | None = None,
        complete: Callable[[CaptionBatch], CaptionBatch] | None = None,
        tiled: Processor | None = None,
    ):
        self.pad_id, self.image_token_id, self.complete, self.tiled = pad_id, image_token_id, complete, tiled
        self.patch_size = patch_size

    def __call__(self, samples: list[Sample]) -> CaptionBatch:
        """Pad the rows to the longest one and stack the pictures."""
        images = None if self.tiled is None else self.tiled.batch_of([sample.prepared for sample in samples])
        rows = [row for i, sample in enumerate(samples) for row in self._prompted(sample, images, i)]
        lengths = np.array([len(row.tokens) for row in rows])
        place = np.arange(lengths.max())
        attention_mask = place < lengths[:, None]
        tokens = np.full(attention_mask.shape, self.pad_id, np.int64)
        tokens[attention_mask] = np.concatenate([row.tokens for row in rows])
        loss_mask = attention_mask & (place >= np.array([row.prompt for row in rows])[:, None])
        loss_mask &= np.array([row.is_real for row in rows])[:, None]
        texts: dict[str, Any] = {
            "tokens": torch.from_numpy(tokens),
            "attention_mask": torch.from_numpy(attention_mask),
            "loss_mask": torch.from_numpy(loss_mask),
            "names": tuple(sample.name for sample in samples),
            "references": tuple(tuple((c.text, c.language) for c in sample.references) for sample in samples),
            "questions": tuple(sample.question for sample in samples),
        }
        if images is None:
            pixels, grids = self._pixels([sample.pixels for sample in samples])
            batch = CaptionBatch(
                **texts,
                pixels=pixels,
                patch_grids=grids,
                visual_tokens=_stack([sample.visual_tokens for sample in samples]),
                image_index=None
                if self.image_token_id is None
                else torch.from_numpy(np.cumsum(tokens == self.image_token_id, axis=1) * attention_mask),
            )
        else:
            batch = dataclasses.replace(images, **texts)
        return batch if self.complete is None else self.complete(batch)

    def _pixels(self, images: list[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        """The samples' pixels (b 1 3 height width); of native size their patches (b 1 p c), and their grids (b 1 2)."""
        there = [image for image in images if image is not None]
        if self.patch_size is None or not there:
            return _stack(images), None
        return pad_images([[*image] for image in there], self.patch_size)

    def _prompted(self, sample: Sample, images: CaptionBatch | None, i: int) -> list[CaptionRow]:
        """A sample's rows behind the prompt of its picture, where that depends on its tiles."""
        if self.tiled is None or images is None:
            return sample.rows
        text = self.tiled.prompt if sample.question is None else sample.question
        prompt = np.asarray(self.tiled.prompt_ids(text, images, i), np.int32)
        return [row._replace(tokens=np.concatenate((prompt, row.tokens)), prompt=len(prompt)) for row in sample.rows]


def _stack(tensors: list[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(there) if there else None
