"""Mixtures of data sets by weight; which members an epoch takes, `EpochMixture` says."""

from collections.abc import Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from PIL import Image

from mmtransformer.data.documents.documents import Document, Documents, DocumentSource
from mmtransformer.data.loading.epoch_mixture import EpochMixture
from mmtransformer.data.loading.source import Caption, Pairs, PairSource, scaled_image


class _Members(Protocol):
    """What pairs and documents have alike."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str: ...


Split = TypeVar("Split", bound=_Members, covariant=True)


class _Source(Protocol[Split]):
    """What sources of pairs and of documents have alike."""

    languages: tuple[str, ...]

    def splits(self) -> tuple[str, ...]: ...

    def split(self, name: str) -> Split: ...


class _Parts(Generic[Split]):
    """Members of several splits, numbered through."""

    def __init__(self, splits: Mapping[str, Split], weights: Sequence[float] | None, epoch_size: int | None = None):
        self.splits = dict(splits)
        self.names = tuple(splits)
        self.parts = tuple(len(split) for split in splits.values())
        self.weights = None if weights is None else tuple(weights)
        self.epoch_size = epoch_size
        self._offsets = np.concatenate([[0], np.cumsum(self.parts)])

    def __len__(self) -> int:
        """The members of all parts."""
        return int(self._offsets[-1])

    def find(self, i: int) -> tuple[str, int]:
        """The part that holds member i, and the member's place in it."""
        if not 0 <= i < len(self):
            raise IndexError(f"member {i} of a mixture that has {len(self)}")
        part = int(np.searchsorted(self._offsets, i, side="right")) - 1
        return self.names[part], i - int(self._offsets[part])

    def name(self, i: int) -> str:
        """The part's name and the member's."""
        part, at = self.find(i)
        return f"{part}/{self.splits[part].name(at)}"

    def mixture(self, seed: int, sizes: Sequence[int] | None = None) -> EpochMixture:
        """How a training epoch is mixed; `sizes` in place of the parts' own where their members were packed."""
        return EpochMixture(sizes or self.parts, self.weights, epoch_size=self.epoch_size, seed=seed)

    def fingerprint(self, i: int) -> str:
        """The part's own fingerprint of the member, if it takes any; else its name."""
        part, at = self.find(i)
        own = getattr(self.splits[part], "fingerprint", None)
        return self.name(i) if own is None else own(at)


class MixedPairs(_Parts[Pairs]):
    """The pairs of several splits, numbered through: a `Pairs`."""

    def image(self, i: int) -> Image.Image:
        """The picture as RGB."""
        return self.scaled_image(i)

    def scaled_image(self, i: int, *, at_least: tuple[float, float] | None = None) -> Image.Image:
        """The picture, which may be decoded smaller; see `at_least` of `mmtransformer.images.load`."""
        part, at = self.find(i)
        return scaled_image(self.splits[part], at, at_least=at_least)

    def captions(self, i: int) -> list[Caption]:
        """All captions of the picture."""
        part, at = self.find(i)
        return self.splits[part].captions(at)


class MixedDocuments(_Parts[Documents]):
    """The documents of several splits, numbered through: a `Documents`."""

    def document(self, i: int) -> Document:
        """The document's text."""
        part, at = self.find(i)
        return self.splits[part].document(at)

    def image_name(self, i: int, k: int) -> str:
        """The part's name and the picture's."""
        part, at = self.find(i)
        return f"{part}/{self.splits[part].image_name(at, k)}"

    def image(self, i: int, k: int) -> Image.Image:
        """The picture as RGB."""
        return self.scaled_image(i, k)

    def scaled_image(self, i: int, k: int, *, at_least: tuple[float, float] | None = None) -> Image.Image:
        """The picture, which may be decoded smaller; see `at_least` of `mmtransformer.images.load`."""
        part, at = self.find(i)
        return scaled_image(self.splits[part], at, k, at_least=at_least)


class _Sources(Generic[Split]):
    """Several sources, and the weights of those that have a split."""

    def __init__(self, sources: Mapping[str, _Source[Split]], weights: dict[str, float] | None, epoch_size: int | None):
        if not sources:
            raise ValueError("a mixture needs at least 1 source, there are 0")
        if slashed := [name for name in sources if "/" in name or not name]:
            raise ValueError(f"a source of a mixture cannot be named {slashed[0]!r}: no empty name, no slash")
        if weights is not None and set(weights) != set(sources):
            raise ValueError(f"weights are given for {', '.join(weights)}; the sources are {', '.join(sources)}")
        for name, weight in (weights or {}).items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of {name} ({weight}) must be above 0; leave the source out instead")
        if epoch_size is not None and epoch_size < 1:
            raise ValueError(f"epoch_size ({epoch_size}) must be at least 1")
        self.sources, self.weights, self.epoch_size = sources, weights, epoch_size
        languages = {code for source in sources.values() for code in source.languages}
        self.languages: tuple[str, ...] = tuple(sorted(languages))

    def splits(self) -> tuple[str, ...]:
        """The names of all splits, those of the sources and those of each source alone."""
        shared = dict.fromkeys(split for source in self.sources.values() for split in source.splits())
        own = [f"{name}/{split}" for name, source in self.sources.items() for split in source.splits()]
        return (*shared, *own)

    def _find(self, name: str) -> tuple[Split | dict[str, Split], list[float] | None]:
        """A source's own split of that name; or that split of every source which has it, and their weights."""
        part, slash, split = name.partition("/")
        if slash and part in self.sources and split in self.sources[part].splits():
            return self.sources[part].split(split), None
        parts = [key for key, source in self.sources.items() if name in source.splits()]
        if not parts:
            raise ValueError(f"the mixture has no split {name!r}; it has: {', '.join(self.splits())}")
        weights = None if self.weights is None else [self.weights[key] for key in parts]
        return {key: self.sources[key].split(name) for key in parts}, weights


class Mixture(_Sources[Pairs]):
    """Several sources of pairs as one, mixed by weight in training: a `PairSource`.

    A split holds that split of every source that has it, and each source's own split is there as well, as "name/val".
    Training takes the weights into account; validation sees every picture once.

    Args:
        sources: The sources by name.
        weights: How much of a training epoch comes from each source, in any unit; null = in proportion to their sizes.
        epoch_size: Pictures of a training epoch; null = as many as all sources have together.

    Raises:
        ValueError: If there are no sources, the weights name others, or one isn't above 0.
    """

    def __init__(
        self, sources: dict[str, PairSource], weights: dict[str, float] | None = None, epoch_size: int | None = None
    ):
        super().__init__(sources, weights, epoch_size)

    def split(self, name: str) -> Pairs:
        """One split, mixed; or "name/val", a source's own.

        Raises:
            ValueError: If there is no such split; the message lists those there are.
        """
        found, weights = self._find(name)
        return MixedPairs(found, weights, self.epoch_size) if isinstance(found, dict) else found


class DocumentMixture(_Sources[Documents]):
    """Several sources of interleaved documents as one, mixed by weight in training: a `DocumentSource`.

    Weights are of rows: where documents are packed, those of a source share rows with each other only. Pairs take part
    as `PairsAsDocuments`. Splits are those of `Mixture`.

    Args:
        sources: The sources by name.
        weights: How much of a training epoch comes from each source, in any unit; null = in proportion to their sizes.
        epoch_size: Rows of a training epoch; null = as many as all sources have together.

    Raises:
        ValueError: If there are no sources, the weights name others, or one isn't above 0.
    """

    def __init__(
        self, sources: dict[str, DocumentSource], weights: dict[str, float] | None = None, epoch_size: int | None = None
    ):
        super().__init__(sources, weights, epoch_size)

    def split(self, name: str) -> Documents:
        """One split, mixed; or "name/val", a source's own.

        Raises:
            ValueError: If there is no such split; the message lists those there are.
        """
        found, weights = self._find(name)
        return MixedDocuments(found, weights, self.epoch_size) if isinstance(found, dict) else found
