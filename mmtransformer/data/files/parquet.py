"""Parquet and Arrow: captions and pictures in one table, as hubs and `datasets` hand them out (extra: parquet)."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from mmtransformer.data.files.archives import MOST_RATIO, SMALL_BYTES, Entry, Files
from mmtransformer.data.files.read_options import Wanted
from mmtransformer.data.files.tables import Columns, ManifestRow, find_columns, make_row

_SMALL_ROWS = 1_000_000  # that a file of any size may have
ARROW = (".arrow", ".feather")
CACHE_BYTES = 1 << 28  # row groups kept in memory by each process


class TableBytes:
    """The pictures in one Parquet or Arrow file, read by row group, the latest groups kept in memory.

    Can be pickled and forked: the file is opened on first use in each process.

    Args:
        path: The file.
        column: Its column of pictures: bytes, or a struct with a field `bytes`.
    """

    def __init__(self, path: str, column: str):
        self.path = path
        self.column = column
        self._prepare()

    def _prepare(self) -> None:
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._file: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "column": self.column}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def read(self, group: int, row: int) -> bytes | None:
        """The bytes of the picture in one row of a row group.

        Raises:
            OSError: If the file can't be read any more.
        """
        with self._lock:
            if self._file is None:
                self._file = _open(self.path)
            if group not in self._groups:
                self._groups[group] = self._file.read_row_group(group, columns=[self.column]).column(self.column)
                while len(self._groups) > 1 and sum(g.nbytes for g in self._groups.values()) > CACHE_BYTES:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            value = self._groups[group][row].as_py()
        value = value["bytes"] if isinstance(value, dict) else value
        if value is not None and not isinstance(value, bytes):  # a text would be taken for a path
            raise OSError(f"a {type(value).__name__} where the picture's bytes should be")
        return value


def _open(path: str) -> Any:
    """A file by its ending; an Arrow file shows its record batches as row groups."""
    if not path.lower().endswith(ARROW):
        import pyarrow.parquet as pq

        return pq.ParquetFile(path)
    from mmtransformer.data.files.arrow import ArrowFile

    return ArrowFile(path)


def _refuse_bombs(metadata: Any, entry: Entry) -> None:
    """A few kilobytes can stand for billions of equal rows, or for gigabytes of one byte."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size for group in groups), default=0)
    if metadata.num_rows > max(_SMALL_ROWS, entry.size):
        raise ValueError(f"{entry.path}: {metadata.num_rows:,} rows out of {entry.size:,} bytes: a bomb")
    if largest > max(SMALL_BYTES, MOST_RATIO * entry.size):
        raise ValueError(f"{entry.path}: a row group of {largest:,} bytes out of {entry.size:,}: a bomb")


def _with_words(path: str, read: list[str]) -> Any:
    """The Parquet file, which keeps each text once (`dictionary`), so that they can be counted before they are held."""
    import pyarrow.parquet as pq

    schema = pq.ParquetFile(path).schema
    leaves = [schema.column(i) for i in range(len(schema))]
    words = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and _is_read(leaf.path, read)]
    return pq.ParquetFile(path, read_dictionary=words)


def _is_read(path: str, read: list[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in read)


def _texts(table: Any, group: int, read: list[str], entry: Entry) -> Any:
    """Some columns of a row group.

    Raises:
        ValueError: If they are far more than the file.
    """
    from mmtransformer.data.files.arrow import unpacked

    most = max(_SMALL_ROWS, entry.size)
    if metadata := getattr(table, "metadata", None):
        leaves = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
        count = max((leaf.num_values for leaf in leaves if _is_read(leaf.path_in_schema, read)), default=0)
        if count > most:
            raise ValueError(f"{count:,} values of a column out of {entry.size:,} bytes: a bomb")
    found = table.read_row_group(group, columns=read)
    size = unpacked(found)
    if size > max(SMALL_BYTES, MOST_RATIO * entry.size):
        raise ValueError(f"{size:,} bytes of texts out of {entry.size:,}: a bomb")
    return found


def read_columnar(files: Files, entry: Entry, wanted: Wanted) -> tuple[Columns, Iterator[ManifestRow]]:
    """Reads captions and paths; of pictures kept as bytes only the places, as `ManifestRow.key`.

    Raises:
        ValueError: If pyarrow is missing, the file lies in an archive or is damaged, or no column fits.
    """
    path = str(files.root / entry.path)
    kind = "Arrow" if path.lower().endswith(ARROW) else "Parquet"
    try:
        import pyarrow as pa
    except ImportError:
        raise ValueError(f"{entry.path}: {kind} needs pyarrow: pip install pyarrow") from None
    if entry.archive >= 0:
        raise ValueError(f"{entry.path}: {kind} inside an archive can't be read in place: unpack it")
    try:
        table = _open(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{entry.path} is not {kind}: {error}") from None
    if kind == "Parquet":  # an ArrowFile has looked itself
        _refuse_bombs(table.metadata, entry)
    schema = table.schema_arrow
    columns = find_columns(schema.names, wanted, entry.path)
    held = schema.field(columns.image).type if columns.image else pa.null()
    inside = pa.types.is_struct(held) and held.get_field_index("bytes") >= 0
    as_bytes = inside or pa.types.is_binary(held) or pa.types.is_large_binary(held)
    texts = [name for name, _ in columns.captions] + [
        c for c in (columns.language, columns.split, columns.question) if c
    ]
    image_paths = f"{columns.image}.path" if inside and held.get_field_index("path") >= 0 else None
    read = texts + ([image_paths] if image_paths else []) + ([] if as_bytes or not columns.image else [columns.image])
    holder = TableBytes(path, columns.image)
    if kind == "Parquet":
        table = _with_words(path, read)

    def rows() -> Iterator[ManifestRow]:
        number = 0
        for group in range(table.num_row_groups):
            try:
                records = _texts(table, group, read, entry).to_pylist()
            except (pa.ArrowException, OSError, ValueError) as error:
                said = " ".join(str(error).split())
                raise ValueError(f"{entry.path} is damaged in row group {group}: {said}") from None
            for at, record in enumerate(records):
                number += 1
                where = f"{entry.path}:{number}"
                if not as_bytes:
                    yield make_row(record, columns, where)
                    continue
                named = (record.get(columns.image) or {}).get("path") if image_paths else None
                row = make_row({**record, columns.image: named or where}, columns, where)
                yield row._replace(image=row.image or where, key=(holder, group, at))

    return columns, rows()
