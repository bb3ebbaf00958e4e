"""Pictures with classes as a LightningDataModule for a classifier."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmtransformer.batch import Batch
from mmtransformer.data.class_sources import Classified, ClassSource, ImageFolder
from mmtransformer.data.loading.errors import BadImages, TooManyErrors
from mmtransformer.data.loading.fingerprints import Parts
from mmtransformer.data.loading.hashing import generator
from mmtransformer.data.loading.module import DataModule, LoaderConfig, Splits
from mmtransformer.data.loading.pixels import of_one_size
from mmtransformer.data.loading.sampler import SampleIndex
from mmtransformer.data.loading.source import image_readers, scaled_image
from mmtransformer.images import Augment, ImageError, ImageTransform
from mmtransformer.serialization.printable import counted


@dataclass
class ClassBatch(Batch):
    """Pictures with their classes.

    Attributes:
        pixels: (b 3 height width).
        labels: (b) long, numbers of classes.
        is_real: (b) bool; False = a padding sample, which is not learned from and not scored.
        names: the b pictures' names.
    """

    pixels: Tensor
    labels: Tensor
    is_real: Tensor
    names: tuple[str, ...] = ()


class ClassSample(NamedTuple):
    """One picture."""

    pixels: Tensor
    label: int
    is_real: bool
    name: str


class ClassDataset(Dataset[ClassSample]):
    """One split; what it returns depends on the `SampleIndex` only.

    A picture that cannot be read is recorded and the next one that can be read takes its place; in evaluation that
    one does not count.

    Args:
        images: The pictures.
        transform: From picture to pixels.
        augment: Changes training pictures at random, by (seed, epoch, index); None for evaluation.
        training: Whether replacement samples count.
        seed: Seed of the run.
        bad: Where pictures that cannot be read are recorded; None raises the first error.
    """

    def __init__(
        self,
        images: Classified,
        transform: ImageTransform,
        *,
        augment: Augment | None = None,
        training: bool = False,
        seed: int = 0,
        bad: BadImages | None = None,
    ) -> None:
        self.images, self.transform, self.augment = images, transform, augment
        self.training, self.seed, self.bad = training, seed, bad

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.images)

    def __getitem__(self, pick: SampleIndex) -> ClassSample:
        """The picture that is picked."""
        at, pixels = self._readable(pick)
        is_real = pick.is_real and (self.training or at == pick.index)
        return ClassSample(pixels, self.images.label(at), is_real, self.images.name(at))

    def _readable(self, pick: SampleIndex) -> tuple[int, Tensor]:
        for step in range(len(self)):
            at = (pick.index + step) % len(self)
            try:
                image = scaled_image(self.images, at, at_least=self._enough(pick.epoch, at))
            except ImageError as error:
                if self.bad is None:
                    raise
                self.bad.record(self.images.name(at), error)
                continue
            if self.augment is not None:
                image = self.augment(image, generator(self.seed, pick.epoch, at, 4))
            return at, self.transform(image)
        raise TooManyErrors(f"none of the {counted(len(self), 'picture')} can be read")

    def _enough(self, epoch: int, at: int) -> tuple[float, float] | None:
        """Height and width that a picture may be decoded at: in training only, less than all of it."""
        if not self.training:
            return None
        return self.transform.decode_size(self.augment, generator(self.seed, epoch, at, 4))


def collate(samples: list[ClassSample]) -> ClassBatch:
    """Stack pictures."""
    return ClassBatch(
        torch.stack([sample.pixels for sample in samples]),
        torch.tensor([sample.label for sample in samples]),
        torch.tensor([sample.is_real for sample in samples]),
        tuple(sample.name for sample in samples),
    )


class ClassData(DataModule):
    """Pictures with a class each, in batches that are the same for any number of workers and processes.

    Args:
        source: Where the pictures come from, such as `ImageFolder` or `SceneShapes`; or a folder with a folder for each
            class.
        transform: How a picture becomes pixels, `ImageTransform()` unless told; saved with the model.
        augment: Random changes to training pictures, seeded by (seed, epoch, index).
        batch_size: Pictures in a batch of one process.
        loader: How samples are loaded and ordered, and how many may be unusable.
        splits: Which splits are for training, validation and test.
    """

    unit = "picture"

    def __init__(
        self,
        source: ClassSource | str,
        *,
        transform: ImageTransform | None = None,
        augment: Augment | None = None,
        batch_size: int = 64,
        loader: LoaderConfig = LoaderConfig(),
        splits: Splits = Splits(),
    ) -> None:
        super().__init__(batch_size=batch_size, loader=loader, splits=splits)
        self.transform, self.augment = of_one_size(transform or ImageTransform(), "classes are learnt from"), augment
        self.source: ClassSource = ImageFolder(source) if isinstance(source, str) else source

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers."""
        return self.source.classes

    def images(self, split: str) -> Classified:
        """Return the pictures of a split."""
        return self.source.split(split)

    def dataset(self, split: str, *, training: bool = False) -> ClassDataset:
        """Return a split as a dataset; augmented in training."""
        images = self.images(split)
        augment = self.augment if training else None
        return ClassDataset(
            images, self.transform, augment=augment, training=training, seed=self.seed, bad=self.bad_samples(split)
        )

    def collate(self, split: str, *, training: bool = False) -> Callable[[list[ClassSample]], ClassBatch]:
        """What makes a `ClassBatch` of pictures."""
        return collate

    def bad_samples(self, split: str) -> BadImages:
        """Where pictures that cannot be read are recorded."""
        return BadImages.of_split(self.report_folder(), split, len(self.images(split)), self.max_bad_fraction)

    def bad_sample_readers(self, split: str, names: Collection[str]) -> dict[str, Callable[[], Any]]:
        """Of pictures that could not be read, those that are still in a split."""
        return image_readers(self.images(split), names)

    def describe(self) -> str:
        """What there is: "8 classes (circle, square ...); train 20,000, val 500"."""
        names = ", ".join(self.classes[:8]) + (" ..." if len(self.classes) > 8 else "")
        splits = (self.train_split, *self.val_splits)
        counts = ", ".join(f"{split} {len(self.images(split)):,}" for split in splits)
        kinds = f"{counted(len(self.classes), 'class', 'classes')} ({names})"
        return "; ".join(filter(None, (kinds, counts, getattr(self.source, "left_out", ""))))

    def parts(self, split: str) -> Parts:
        """Pictures and classes."""
        images = self.images(split)
        texts = [[self.classes[images.label(i)]] for i in range(len(images))]
        return Parts(images.name, texts, getattr(images, "fingerprint", None), ("pictures", "classes"))

    def identity(self) -> dict[str, Any]:
        """The classes."""
        return {"classes": list(self.classes)}

    def mismatch_message(self, name: str, was: Any, now: Any) -> str:
        """What to say when the classes are not what they were."""
        return f"the classes were {', '.join(was)} and are now {', '.join(now)}"
