"""Excel workbooks: the sheets that name pictures and captions (extra: excel)."""

import io
import zipfile
from collections.abc import Iterator
from itertools import chain
from typing import Any

from mmtransformer.data.files.archives import MAX_BYTES, Files
from mmtransformer.data.files.columns import Columns, find_columns
from mmtransformer.data.files.endings import MOST_RATIO, SMALL_BYTES
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.read_options import ColumnNames
from mmtransformer.data.files.tables import TITLES, ManifestRow, make_row
from mmtransformer.data.files.text import split_word


def read_excel(files: Files, entry: Entry, wanted: ColumnNames) -> tuple[Columns, Iterator[ManifestRow]]:
    """Reads all sheets with a row at the top that names a column of pictures and one of captions.

    A sheet that is called like a split is that split. The columns that are given are those of the first such sheet.

    Raises:
        ValueError: If openpyxl is not installed, the file is damaged or far larger than it says, or no sheet fits.
    """
    name = entry.path
    try:
        import openpyxl
    except ImportError:
        raise ValueError(
            f'{name}: Excel needs openpyxl, which is not installed (the extra "excel"; docs/install.md), or save the '
            f"sheet as CSV"
        ) from None
    data = files.read(entry)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            size = sum(info.file_size for info in packed.infolist())
        if size > min(MAX_BYTES, max(SMALL_BYTES, MOST_RATIO * len(data))):
            raise ValueError(f"{size:,} bytes out of {len(data):,}, too many for a table")
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
        sheets = [(sheet.title, [list(row) for row in sheet.iter_rows(values_only=True)]) for sheet in book.worksheets]
    except Exception as error:  # what is damaged raises BadZipFile, KeyError, XML's errors, ...
        raise ValueError(f"{name}: not a whole Excel workbook ({error}); save it anew, or as CSV") from None
    faults: list[ValueError] = []
    found: list[tuple[Columns, Iterator[ManifestRow]]] = []
    for title, rows in sheets:
        where = f"{name} ({title})"
        if not any(cell is not None for row in rows for cell in row):
            continue
        try:
            start, header, columns = _header(rows, wanted, where)
        except ValueError as error:
            faults.append(error)
            note = ("a sheet that was not read", "no columns of pictures and captions")
            found.append((Columns("", ()), iter([ManifestRow(None, (), None, where, notes=(note,))])))
            continue
        found.append((columns, _rows(rows, start, header, columns, where, split_word(title))))
    first = next((columns for columns, _ in found if columns.captions), None)
    if first is None:
        raise faults[0] if faults else ValueError(f"{name} is empty")
    return first, chain.from_iterable(rows for _, rows in found)


def _header(rows: list[list[Any]], wanted: ColumnNames, where: str) -> tuple[int, list[str], Columns]:
    """Where the rows behind the header begin, and its columns; titles of the sheet may stand above.

    Raises:
        ValueError: If no row at the top names columns of pictures and captions.
    """
    fault: ValueError | None = None
    for at in [i for i, row in enumerate(rows) if any(cell is not None for cell in row)][:TITLES]:
        header = ["" if cell is None else str(cell).strip() for cell in rows[at]]
        some = [dict(zip(header, row, strict=False)) for row in rows[at + 1 : at + 21] if any(row)]
        try:
            return at + 1, header, find_columns(header, wanted, where, some)
        except ValueError as error:
            fault = fault or error
    assert fault is not None
    raise fault


def _rows(
    rows: list[list[Any]], start: int, header: list[str], columns: Columns, name: str, split: str | None
) -> Iterator[ManifestRow]:
    for number in range(start, len(rows)):
        cells = rows[number]
        if any(cell is not None for cell in cells):
            record = {key: _text(cell) for key, cell in zip(header, cells, strict=False)}
            row = make_row(record, columns, f"{name}:{number + 1}")
            yield row if row.split else row._replace(split=split)


def _text(cell: Any) -> Any:
    """Numbers as people see them: an id of 12 is "12"."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return cell if cell is None or isinstance(cell, str) else str(cell)
