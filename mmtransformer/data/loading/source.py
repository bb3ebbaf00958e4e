"""What every kind of image-text data looks like from above: splits of pictures with captions."""

import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, overload, runtime_checkable

from PIL import Image

Item = TypeVar("Item")


class Caption(NamedTuple):
    """One caption of a picture.

    Attributes:
        text: the caption itself.
        language: its language code ("en", "ko", ...), or None where the data does not say.
        question: what was asked of the picture, if it is an answer; all captions of one picture answer the same.
    """

    text: str
    language: str | None = None
    question: str | None = None


class Contents(NamedTuple):
    """What tells the pairs of a split from others without reading them; a split that knows has it as `contents`.

    Attributes:
        name: What files that are made of them are called.
        checksum: Another one for other pairs.
    """

    name: str
    checksum: str


class Lazy(Sequence[Item]):
    """A sequence whose items are made when they are asked for, each time anew.

    Args:
        count: How many there are.
        make: Makes one from its number.
    """

    def __init__(self, count: int, make: Callable[[int], Item]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, i: int) -> Item: ...

    @overload
    def __getitem__(self, i: slice) -> Sequence[Item]: ...

    def __getitem__(self, i: int | slice) -> Item | Sequence[Item]:
        some = range(self._count)[i]
        return self._make(some) if isinstance(some, int) else [self._make(k) for k in some]


@runtime_checkable
class Pairs(Protocol):
    """One split: pictures, each with its captions, by index."""

    def __len__(self) -> int:
        """The number of pictures."""
        ...

    def name(self, i: int) -> str:
        """The name of picture i, unique in the split and the same in every run."""
        ...

    def image(self, i: int) -> Image.Image:
        """Picture i as RGB.

        Raises:
            ImageError: the picture cannot be used; the message names the file, the fault and the remedy.
        """
        ...

    def captions(self, i: int) -> list[Caption]:
        """All captions of picture i."""
        ...


def scaled_image(images: Any, *index: int, at_least: tuple[float, float] | None) -> Image.Image:
    """A picture as RGB, which may be decoded smaller than it is; see `at_least` of `mmtransformer.images.load`.

    Args:
        images: A split: pairs, documents, classified pictures. If it has a method `scaled_image` of the arguments of
            its `image` and `at_least`, that is called; `image` if not.
        index: Of the picture: the arguments of `image`.
        at_least: Height and width that suffice, px; None = all of it.

    Raises:
        ImageError: The picture cannot be used.
    """
    if at_least is None or not hasattr(images, "scaled_image"):
        return images.image(*index)
    return images.scaled_image(*index, at_least=at_least)


def size_of(pairs: Pairs, i: int) -> tuple[int, int]:
    """Height and width of picture i, px, as it lies in its file.

    Args:
        pairs: A split. If it has a method `stored_size` of the picture's number, that is called: it decodes nothing.
        i: Which picture.

    Raises:
        ImageError: The picture cannot be used.
    """
    size: Callable[[int], tuple[int, int]] | None = getattr(pairs, "stored_size", None)
    if size is not None:
        return size(i)
    image = pairs.image(i)
    return image.height, image.width


def image_readers(images: Any, names: Collection[str]) -> dict[str, Callable[[], Image.Image]]:
    """Of a split (pairs, classified pictures) the pictures of some names, each as what loads it."""
    return {name: partial(images.image, i) for i in range(len(images)) if (name := images.name(i)) in names}


Split = TypeVar("Split", bound=Pairs, covariant=True)


@runtime_checkable
class PairSource(Protocol[Split]):
    """Image-text data: named splits of pairs, and the languages of its captions.

    It is generic in the kind of its splits, so that a source may give more than `Pairs` and be named in a recipe:
    jsonargparse compares the types that methods return, and takes a type variable for any.
    """

    languages: tuple[str, ...]

    def splits(self) -> tuple[str, ...]:
        """The names of the splits there are."""
        ...

    def split(self, name: str) -> Split:
        """One split.

        Raises:
            ValueError: there is no such split; the message lists those there are.
        """
        ...


def splits_there(source: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Of several splits those that a source has: a recipe's "compositional" is of its own scenes, not of one's data.

    The others are told in a warning. Where the source has none of them, or does not say, they stay for it to refuse.

    Args:
        source: Where the data come from.
        names: The splits that are asked for.
    """
    listed = source.splits() if hasattr(source, "splits") else names
    missing = [name for name in names if name not in listed and not _has(source, name)]
    if not missing or len(missing) == len(names):
        return tuple(names)
    there = tuple(name for name in names if name not in missing)
    warnings.warn(
        f"the data have no split {', '.join(map(repr, missing))}, which data.splits names: left out; they have: "
        f"{', '.join(listed)}",
        stacklevel=3,
    )
    return there


def _has(source: Any, name: str) -> bool:
    """Whether a source has a split that it does not list: it may know another name of one, as "dev" of "val"."""
    try:
        source.split(name)
    except ValueError:
        return False
    return True
