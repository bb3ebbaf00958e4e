"""Excel workbooks: the first sheet that names pictures and captions (extra: excel)."""

import io
import zipfile
from collections.abc import Iterator
from typing import Any

from mmtransformer.data.files.archives import MAX_BYTES, Files
from mmtransformer.data.files.endings import MOST_RATIO, SMALL_BYTES
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.read_options import Wanted
from mmtransformer.data.files.tables import Columns, ManifestRow, find_columns, make_row


def read_excel(files: Files, entry: Entry, wanted: Wanted) -> tuple[Columns, Iterator[ManifestRow]]:
    """Reads the first sheet whose first row names a column of pictures and one of captions.

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
    for title, rows in sheets:
        first = next((i for i, row in enumerate(rows) if any(cell is not None for cell in row)), None)
        if first is None:
            continue
        header = ["" if cell is None else str(cell).strip() for cell in rows[first]]
        try:
            some = [dict(zip(header, row, strict=False)) for row in rows[first + 1 : first + 21] if any(row)]
            columns = find_columns(header, wanted, f"{name} ({title})", some)
        except ValueError as error:
            faults.append(error)
            continue
        return columns, _rows(rows, first + 1, header, columns, f"{name} ({title})")
    raise faults[0] if faults else ValueError(f"{name} is empty")


def _rows(rows: list[list[Any]], start: int, header: list[str], columns: Columns, name: str) -> Iterator[ManifestRow]:
    for number in range(start, len(rows)):
        cells = rows[number]
        if any(cell is not None for cell in cells):
            record = {key: _text(cell) for key, cell in zip(header, cells, strict=False)}
            yield make_row(record, columns, f"{name}:{number + 1}")


def _text(cell: Any) -> Any:
    """Numbers as people see them: an id of 12 is "12"."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return cell if cell is None or isinstance(cell, str) else str(cell)
