"""What every kind of image-text data looks like from above: splits of pictures with captions."""

from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from PIL import Image


class Caption(NamedTuple):
    """One caption of a picture.

    Attributes:
        text: the caption itself.
        language: its language code ("en", "ko", ...), or None where the data does not say.
    """

    text: str
    language: str | None = None


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
