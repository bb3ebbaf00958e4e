"""Rows of manifests: which column is what, and reading CSV and TSV so that no odd line loses the file."""

import csv
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mmtransformer.data.files.cells import read_captions
from mmtransformer.data.files.columns import (
    IDS,
    Columns,
    find_columns,
    image_columns,
    is_place,
    key_of,
    looks_like_image,
)
from mmtransformer.data.files.read_options import ColumnNames
from mmtransformer.data.files.text import Line, is_missing, language_code, lines, normalize_text, split_word
from mmtransformer.data.loading.source import Caption
from mmtransformer.serialization.printable import counted
from mmtransformer.text.conversation import Conversation

TITLES = 10  # lines at the top of a table, one of which is its header
_SOME = 20  # rows that tell which column has the pictures
_JOINED = 100  # lines that one quoted CSV field may span
_SEP = re.compile(r"sep=.\s*", re.IGNORECASE)  # Excel's first line


class ManifestRow(NamedTuple):
    """One row of a manifest, as written there.

    Attributes:
        image: The picture's name or path; None where its bytes lie in the manifest itself.
        captions: Its captions, normalised; missing ones are already gone.
        split: The split's name, if the row says one.
        where: "captions.csv:7".
        errors: What was wrong in the row: (cause, what).
        key: Where the bytes lie (Parquet), else None.
    """

    image: str | None
    captions: tuple[Caption, ...]
    split: str | None
    where: str
    errors: tuple[tuple[str, str], ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    key: Any = None


def bad_row(where: str, cause: str, what: str) -> ManifestRow:
    """A row of which nothing can be used, and why."""
    return ManifestRow(None, (), None, where, ((cause, what),))


def make_row(
    record: Mapping[str, Any], columns: Columns, where: str, notes: tuple[tuple[str, str], ...] = ()
) -> ManifestRow:
    """A row of any table-like manifest, its cells checked and its captions normalised."""
    errors: list[tuple[str, str]] = []
    image = record.get(columns.image)
    if isinstance(image, int) and not isinstance(image, bool) and key_of(columns.image) in IDS:
        image = str(image)
    elif isinstance(image, list):
        if len(image) > 1:
            errors.append(("several pictures", f"{len(image)} in {columns.image}"))
        image = image[0] if len(image) == 1 else None
    if isinstance(image, Mapping):  # an object that describes it
        keys = (*image_columns([*image]), "bytes")  # whose text can only be base64, which the finder names
        image = next((image[key] for key in keys if isinstance(image.get(key), str)), image)
    if not columns.image or errors:
        image = None
    elif not isinstance(image, str) or is_missing(image.strip()):
        errors.append(("no picture named", "" if image is None else repr(image)[:60]))
        image = None
    folder = record.get(columns.folder) if columns.folder and image else None
    if image and isinstance(folder, str) and not is_missing(folder.strip()) and not re.search(r"[/\\]", image):
        image = f"{folder.strip()}/{image}"
    language = None
    try:
        language = language_code(str(record.get(columns.language) or "")) if columns.language else None
    except ValueError as error:
        errors.append(("not a language", str(error)))
    captions: list[Caption] = []
    found = [*notes]
    for name, said in columns.captions:
        value = record.get(name)
        # one of several caption columns may stay empty, an only one may not
        empty = value is None or value != value or (isinstance(value, str) and is_missing(normalize_text(value)))
        if len(columns.captions) == 1 or not empty:
            captions += read_captions(value, said or language, image or name, errors, found)
    if not captions and not errors:
        errors.append(("empty caption", image or ""))
    asked = record.get(columns.question) if columns.question else None
    if isinstance(asked, tuple):  # the turns of a conversation
        captions = [caption._replace(question=Conversation([*map(normalize_text, asked)])) for caption in captions]
    elif isinstance(asked, str) and not is_missing(asked := normalize_text(asked.replace("<image>", " "))):
        captions = [caption._replace(question=asked) for caption in captions]
    split = record.get(columns.split) if columns.split else None
    return ManifestRow(image, tuple(captions), _split(split), where, tuple(errors), tuple(found))


def _split(value: Any) -> str | None:
    value = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    word = normalize_text(value).casefold() if isinstance(value, str) else ""
    return None if is_missing(word) else split_word(word) or word


def sniff(header: str) -> str:
    """The delimiter of a table: the one of tab, comma, semicolon and bar that cuts its header into most columns."""
    return max("\t,;|", key=lambda mark: (len(split_cells(header, mark) or ()), mark == "\t"))


def read_table(data: bytes, name: str, wanted: ColumnNames) -> tuple[Columns, Iterator[ManifestRow]]:
    """Reads CSV, TSV and the like, with or without a header.

    Line by line, so that a bad byte or a stray quote costs no other line. A quoted field may span lines, unless
    the lines inside it are rows of their own: then the quote is taken for a letter, and noted.

    Args:
        data: The file.
        name: Its name, for file:line.
        wanted: The columns that the user named.

    Returns:
        The columns, and the rows, read as they are asked for.
    """
    text = list(lines(data))
    while text and text[0].text is not None and (not text[0].text.strip() or _SEP.fullmatch(text[0].text)):
        text.pop(0)
    if not text or text[0].text is None:
        raise ValueError(f"{name}:1 is not UTF-8: {text[0].hint}" if text else f"{name} is empty")
    header, mark, columns, start = _header(text, name, wanted)
    return columns, _rows(text, start, name, mark, header, columns)


def _header(text: list[Line], name: str, wanted: ColumnNames) -> tuple[list[str], str, Columns, int]:
    """The names of a table's columns, what divides them, what they hold, and the first line behind; titles may stand
    above.

    Raises:
        ValueError: If no line at the top names columns of pictures and captions, nor are there two without names.
    """
    fault: ValueError | None = None
    for at in range(min(TITLES, len(text))):
        if not (line := text[at].text or "").strip():
            continue
        mark = sniff(line)
        header = [cell.strip() for cell in split_cells(line, mark) or line.split(mark)]
        start = at + 1
        if at == 0 and (len(header) == 2 or wanted.image is None) and any(map(is_place, header)):
            if len(header) != 2:
                raise ValueError(
                    f"{name} has no header line and {counted(len(header), 'column')}; write one, such as "
                    f"image{mark}caption"
                )
            header = ["image", "caption"] if is_place(header[0]) else ["caption", "image"]
            start = 0
        first = (split_cells(line.text, mark) for line in text[start : start + _SOME] if line.text)
        some = [dict(zip(header, cells, strict=True)) for cells in first if cells and len(cells) == len(header)]
        try:
            return header, mark, find_columns(header, wanted, name, some), start
        except ValueError as error:
            fault = fault or error
    assert fault is not None
    raise fault


def _rows(
    text: list[Line], start: int, name: str, mark: str, header: list[str], columns: Columns
) -> Iterator[ManifestRow]:
    at, width = start, len(header)
    for line in text[: max(0, start - 1)]:
        if line.text and line.text.strip(f'{mark} "'):
            note = ("lines above the header, left out", line.text)
            yield ManifestRow(None, (), None, f"{name}:{line.number}", notes=(note,))
    image = header.index(columns.image) if columns.image else None
    last = columns.captions[-1][0] == header[-1]

    def is_row(line: Any) -> bool:
        cells = line.text.split(mark) if line.text is not None else []
        return image is not None and len(cells) >= width and looks_like_image(cells[image])

    while at < len(text):
        line, notes = text[at], ()
        where = f"{name}:{line.number}"
        at += 1
        if line.text is None:
            yield bad_row(where, "not UTF-8", line.hint)
            continue
        if not line.text.strip(f'{mark} "'):  # spreadsheets write rows that nobody has filled in
            continue
        whole, more = line.text, at
        cells = split_cells(whole, mark)
        while cells is None and more < len(text) and more - at < _JOINED:
            if text[more].text is None or is_row(text[more]):
                break
            whole += "\n" + (text[more].text or "")
            more += 1
            cells = split_cells(whole, mark)
        if cells is None:
            cells = line.text.split(mark)
            notes = (("stray quote, kept as text", line.text[:80]),)
        else:
            at = more
        if len(cells) > width and last:  # an unquoted caption with commas, at the end of its row
            cells = [*cells[: width - 1], mark.join(cells[width - 1 :])]
        if len(cells) != width:
            what = f"{len(cells)} cells where the header has {width}: {line.text[:80]}"
            yield bad_row(where, "wrong number of cells", what)
            continue
        record = {key: cell.strip() for key, cell in zip(header, cells, strict=True)}
        yield make_row(record, columns, where, notes)


def split_cells(line: str, mark: str) -> list[str] | None:
    """The cells of a line; None while a quote is open or closed in the middle of a cell."""
    if '"' not in line:
        return line.split(mark)
    try:
        rows = list(csv.reader([line.rstrip(" ")], delimiter=mark, strict=True, skipinitialspace=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None
