"""What a user says of files of their own, where it is not to be detected: columns, formats, languages."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from mmtransformer.layers.config import known_fields

Format = Literal[
    "auto", "folder", "csv", "jsonl", "json", "coco", "karpathy", "flickr", "list", "lines", "parquet", "arrow", "excel"
]
Unit = Literal["line", "paragraph", "file"]
Plain = Literal["detokenize", "html"]


class ColumnNames(NamedTuple):
    """The columns that the user named; None where they are to be found. `images` = False: texts alone will do."""

    image: str | None = None
    captions: Sequence[str] | None = None
    language: str | None = None
    split: str | None = None
    images: bool = True


@known_fields
@dataclass(frozen=True)
class ReadOptions:
    """How pairs of pictures and captions are read from a path; what is not told is detected.

    Args:
        format: The format, if it cannot be told.
        subset: Of a data set on the hub, or laid out as one, the subset (config) that its card names, or a folder.
        image_folder: Folder or archive with the pictures, if not at or below the root.
        image_column: Column (or key) with the picture's path; found by its name unless told.
        caption_column: Column, or columns, with captions.
        language_column: Column with the language of the row's captions.
        split_column: Column with the split.
        default_language: The language of captions that neither the data nor their script tells.
        languages: The languages whose captions are read, as for a model that writes only one; None reads all.
        normalize: Makes captions as people write them: "detokenize" takes the spaces of a tokenizer of words out
            ("a dog ," -> "a dog,"), "html" puts characters for HTML's entities and takes its tags out
            ("a dog<br>" -> "a dog"). A list does both; None leaves captions as they are.
        encoding: Of tables and texts that are not UTF-8, such as cp949 or latin-1.
        val_fraction: Share of the pictures for val where the data names none; 0 for no val.

    Raises:
        ValueError: If `val_fraction` is no share that leaves something to train on, an encoding or a way to
            normalize is unknown, or `languages` is empty.
    """

    format: Format = "auto"
    subset: str | None = None
    image_folder: str | None = None
    image_column: str | None = None
    caption_column: str | list[str] | None = None
    language_column: str | None = None
    split_column: str | None = None
    default_language: str | None = None
    languages: str | list[str] | None = None
    normalize: Plain | list[Plain] | None = None
    encoding: str | None = None
    val_fraction: float = 0.1

    def __post_init__(self) -> None:
        if self.encoding is not None:
            try:
                if codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig"):  # what is read unless told
                    object.__setattr__(self, "encoding", None)
            except LookupError:
                raise ValueError(
                    f"encoding ({self.encoding}) is unknown; known are utf-16, cp949, latin-1, ..."
                ) from None
        if unknown := [word for word in self.plain if word not in get_args(Plain)]:
            raise ValueError(f'normalize: unknown value "{unknown[0]}"; choose one of {", ".join(get_args(Plain))}')
        if self.languages is not None and not self.languages:
            raise ValueError("languages is empty: name some, or leave it out to read all")
        check_share("val_fraction", self.val_fraction)

    @property
    def wanted(self) -> ColumnNames:
        """The columns that are named."""
        captions = _listed(self.caption_column)
        return ColumnNames(self.image_column, captions, self.language_column, self.split_column)

    @property
    def plain(self) -> list[Plain]:
        """What is done to captions, as a list."""
        return [self.normalize] if isinstance(self.normalize, str) else self.normalize or []


@known_fields
@dataclass(frozen=True)
class TextReadOptions:
    """How texts are read from files; what is not told is detected.

    Args:
        unit: What a document is in a plain text file: a line, a paragraph (between empty lines) or the file.
        text_column: Column, or columns, with the texts of tables; else those whose name says so. Texts of one row
            belong together.
        language_column: Column with the language of a row's texts.
        split_column: Column with the split.
        default_language: The language of texts that neither the data nor their script tells; None names none, unless
            some of the texts are Korean or have a language named: the others then are English.
        val_fraction: Share of the groups (rows, pictures, pieces of plain text) for validation where the data names
            none.

    Raises:
        ValueError: If `unit` is none of these, or `val_fraction` no share that leaves something to train on.
    """

    unit: Unit = "line"
    text_column: str | list[str] | None = None
    language_column: str | None = None
    split_column: str | None = None
    default_language: str | None = None
    val_fraction: float = 0.05

    def __post_init__(self) -> None:
        if self.unit not in ("line", "paragraph", "file"):
            raise ValueError(f'unit must be "line", "paragraph" or "file", not "{self.unit}"')
        check_share("val_fraction", self.val_fraction)

    @property
    def wanted(self) -> ColumnNames:
        """The columns that are named."""
        texts = _listed(self.text_column)
        return ColumnNames(None, texts, self.language_column, self.split_column, images=False)


def _listed(columns: str | list[str] | None) -> list[str] | None:
    return [columns] if isinstance(columns, str) else columns


def check_share(name: str, share: float, *, whole: bool = False) -> None:
    """Refuses what is no share.

    Args:
        name: What errors call it.
        share: From 0 up to 1.
        whole: Whether it may be 1.

    Raises:
        ValueError: If it is out of range.
    """
    if not (0 <= share < 1 or (whole and share == 1)):
        raise ValueError(f"{name} ({share}) must be a share: from 0 up to 1" + ", which leaves nothing" * (not whole))
