"""The formats of files that name pictures and captions: a line each, with its title, endings and reader."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.columns import Columns
from mmtransformer.data.files.endings import PACKED_TEXTS, TEXTS
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.read_options import ColumnNames
from mmtransformer.data.files.tables import ManifestRow, read_table
from mmtransformer.data.formats.columnar import read_columnar
from mmtransformer.data.formats.excel import read_excel
from mmtransformer.data.formats.json.files import read_coco, read_karpathy, read_records
from mmtransformer.data.formats.json.shapes import json_shape
from mmtransformer.data.formats.json.text import json_lines, load_json
from mmtransformer.data.formats.line_by_line import read_line_by_line
from mmtransformer.data.formats.lists import read_list
from mmtransformer.data.formats.parquet import ARROW

Rows = tuple[Columns | None, Iterator[ManifestRow]]
"""The columns that a file is read by (None where the format fixes them), and its rows."""


class FileFormat(NamedTuple):
    """A format of a file that names pictures and captions.

    Attributes:
        title: What people call it.
        read: Opens a file, with the columns that the user named; a `ValueError` names the file, the fault and the
            remedy.
        suffixes: Endings of its files, in lower case, where no other format has them.
    """

    title: str
    read: Callable[[Files, Entry, ColumnNames], Rows]
    suffixes: tuple[str, ...] = ()


def _csv(files: Files, entry: Entry, wanted: ColumnNames) -> Rows:
    return read_table(files.read_text(entry), entry.path, wanted)


def _jsonl(files: Files, entry: Entry, wanted: ColumnNames) -> Rows:
    return read_records(json_lines(files.read_text(entry), entry.path), entry.path, wanted)


def _list(files: Files, entry: Entry, wanted: ColumnNames) -> Rows:
    return None, read_list(files, entry)


def _lines(files: Files, entry: Entry, wanted: ColumnNames) -> Rows:
    return None, read_line_by_line(files, entry)


def _json(files: Files, entry: Entry, wanted: ColumnNames, *, format: str) -> Rows:
    name = entry.path
    shape = json_shape(load_json(files, entry), wanted, files.image_ids)
    if shape is None or shape.format != format:
        raise ValueError(f"{name} is not {format}" + (f"; it looks like {shape.format}" if shape else ""))
    if format == "coco":
        return None, read_coco(shape.data, name, wanted)
    if format == "karpathy":
        return None, read_karpathy(shape.data, name)
    place = f"{name}: {shape.key}" if shape.key else name
    return read_records(((f"{place}[{i}]", item, "") for i, item in enumerate(shape.data)), place, wanted)


FORMATS: dict[str, FileFormat] = {
    "csv": FileFormat("CSV", _csv),
    "jsonl": FileFormat("JSONL", _jsonl),
    "json": FileFormat("JSON", partial(_json, format="json")),
    "coco": FileFormat("COCO captions", partial(_json, format="coco")),
    "karpathy": FileFormat("Karpathy JSON", partial(_json, format="karpathy")),
    "flickr": FileFormat("Flickr token file", _list),
    "list": FileFormat("list of pictures", _list),
    "lines": FileFormat("captions line by line", _lines),
    "parquet": FileFormat("Parquet", read_columnar, (".parquet",)),
    "arrow": FileFormat("Arrow", read_columnar, ARROW),
    "excel": FileFormat("Excel", read_excel, (".xlsx",)),
}
"""By the names of `Format`, but for "auto" and "folder"; `find_manifests` tells those without endings of their own."""

BY_SUFFIX = {suffix: name for name, format in FORMATS.items() for suffix in format.suffixes}
SUFFIXES = (*TEXTS, *PACKED_TEXTS, *BY_SUFFIX)
"""How the names of files that may hold captions end."""
