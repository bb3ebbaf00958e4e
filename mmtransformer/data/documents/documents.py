"""What interleaved data looks like from above: documents with pictures anywhere in their text.

A document's text is kept in the pieces that its pictures cut it into, so a mark can neither be lost nor miscounted:
`texts[0]` stands before the first picture, `texts[k]` after the k-th, and there is one text more than pictures.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from PIL import Image

from mmtransformer.data.loading.source import Caption, Pairs, PairSource, scaled_image


class Document(NamedTuple):
    """The text of one document, cut where its pictures stand.

    Attributes:
        texts: the text before the first picture, between the first and the second, ..., after the last; any may be "".
        language: its language code, or None where the data does not say.
    """

    texts: tuple[str, ...]
    language: str | None = None

    @property
    def images(self) -> int:
        """The number of pictures in it."""
        return len(self.texts) - 1


@runtime_checkable
class Documents(Protocol):
    """One split: documents by index, each with its pictures."""

    def __len__(self) -> int:
        """The number of documents."""
        ...

    def name(self, i: int) -> str:
        """The name of document i, unique in the split and the same in every run."""
        ...

    def document(self, i: int) -> Document:
        """The text of document i."""
        ...

    def image_name(self, i: int, k: int) -> str:
        """The name of picture k (from 0) of document i."""
        ...

    def image(self, i: int, k: int) -> Image.Image:
        """Picture k (from 0) of document i as RGB.

        Raises:
            ImageError: the picture cannot be used; the message names the file, the fault and the remedy.
        """
        ...


Split = TypeVar("Split", bound=Documents, covariant=True)


@runtime_checkable
class DocumentSource(Protocol[Split]):
    """Interleaved data: named splits of documents, and the languages of their texts."""

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


class PairDocumentSplit:
    """A split of pairs as documents: each caption is a document of one picture and the text after it.

    Args:
        pairs: the pairs.
        max_captions: most captions of a picture that become documents; None = all.
    """

    def __init__(self, pairs: Pairs, max_captions: int | None = None):
        self.pairs = pairs
        self._captions = [
            (i, k, caption)
            for i in range(len(pairs))
            for k, caption in enumerate(pairs.captions(i)[: max_captions or None])
        ]

    def __len__(self) -> int:
        """The number of captions."""
        return len(self._captions)

    def name(self, i: int) -> str:
        """The picture's name, and which of its captions this is."""
        image, k, _ = self._captions[i]
        return f"{self.pairs.name(image)}#{k}"

    def document(self, i: int) -> Document:
        """The picture, and then the caption."""
        _, _, caption = self._captions[i]
        return Document(("", caption.text), caption.language)

    def image_name(self, i: int, k: int) -> str:
        """The picture's name."""
        return self.pairs.name(self._captions[i][0])

    def fingerprint(self, i: int) -> str:
        """The picture's own fingerprint, if it takes any; else its name."""
        own, picture = getattr(self.pairs, "fingerprint", self.pairs.name), self._captions[i][0]
        return own(picture)

    def image(self, i: int, k: int) -> Image.Image:
        """The picture."""
        return self.scaled_image(i, k)

    def scaled_image(self, i: int, k: int, *, at_least: tuple[float, float] | None = None) -> Image.Image:
        """The picture, which may be decoded smaller; see `at_least` of `mmtransformer.images.load`."""
        return scaled_image(self.pairs, self._captions[i][0], at_least=at_least)


class PairsAsDocuments:
    """Pairs of any kind as interleaved data, so that they can be mixed with documents: a `DocumentSource`.

    Args:
        source: the pairs.
        max_captions: most captions of a picture that become documents; null = all.

    Raises:
        ValueError: `max_captions` is below 1.
    """

    def __init__(self, source: PairSource, max_captions: int | None = None):
        if max_captions is not None and max_captions < 1:
            raise ValueError(f"max_captions must be at least 1, got {max_captions}")
        self.source, self.max_captions = source, max_captions
        self.languages: tuple[str, ...] = source.languages

    def splits(self) -> tuple[str, ...]:
        """The names of the splits of the pairs."""
        return self.source.splits()

    def split(self, name: str) -> PairDocumentSplit:
        """One split as documents."""
        return PairDocumentSplit(self.source.split(name), self.max_captions)


class ImagePairs:
    """A split of documents as pairs: every picture with the text that follows it, where there is any.

    So whatever looks at pairs (`check`, a training of plain captioning, examples for few-shot prompts) can look at
    documents as well.
    """

    def __init__(self, documents: Documents):
        self.documents = documents
        self._places: list[tuple[int, int]] = []
        self._captions: list[Caption] = []
        for i in range(len(documents)):
            document = documents.document(i)
            for k, text in enumerate(document.texts[1:]):
                if text:
                    self._places.append((i, k))
                    self._captions.append(Caption(text, document.language))

    def __len__(self) -> int:
        """The number of pictures that a text follows."""
        return len(self._places)

    def name(self, i: int) -> str:
        """The document's name, and which of its pictures this is (from 1)."""
        document, k = self._places[i]
        return f"{self.documents.name(document)}[{k + 1}]"

    def image(self, i: int) -> Image.Image:
        """The picture."""
        return self.scaled_image(i)

    def scaled_image(self, i: int, *, at_least: tuple[float, float] | None = None) -> Image.Image:
        """The picture, which may be decoded smaller; see `at_least` of `mmtransformer.images.load`."""
        return scaled_image(self.documents, *self._places[i], at_least=at_least)

    def captions(self, i: int) -> list[Caption]:
        """The text after the picture."""
        return [self._captions[i]]


class DocumentsAsPairs:
    """Interleaved data as pairs: every picture with the text that follows it. A `PairSource`.

    Args:
        source: the documents.
    """

    def __init__(self, source: DocumentSource):
        self.source = source
        self.languages: tuple[str, ...] = source.languages

    def splits(self) -> tuple[str, ...]:
        """The names of the splits of the documents."""
        return self.source.splits()

    def split(self, name: str) -> ImagePairs:
        """One split as pairs."""
        return ImagePairs(self.source.split(name))


def texts_of(documents: Documents) -> Iterator[str]:
    """Every text of a split that is not empty, for a tokenizer to be trained on."""
    for i in range(len(documents)):
        yield from (text for text in documents.document(i).texts if text)


def cut_at_marks(text: str, mark: str) -> tuple[str, ...]:
    """The pieces of a text that its marks cut it into, without the white space around the marks."""
    return tuple(piece.strip() for piece in text.split(mark))


def join_pieces(pieces: Sequence[str | None]) -> tuple[str, ...]:
    """Texts and pictures in their order, a picture being None, as the texts of a `Document`."""
    texts: list[list[str]] = [[]]
    for piece in pieces:
        if piece is None:
            texts.append([])
        elif piece:
            texts[-1].append(piece)
    return tuple("\n".join(some) for some in texts)
