"""Parquet and Arrow: captions and pictures in one table, as hubs and `datasets` hand them out (extra: parquet)."""

import threading
from collections import OrderedDict
from typing import Any

from mmtransformer.data.files.endings import MOST_RATIO, SMALL_BYTES
from mmtransformer.data.files.members import Entry

_SMALL_ROWS = 1_000_000  # that a file of any size may have
ARROW = (".arrow", ".feather")
COLUMNAR = (".parquet", *ARROW)
CACHE_BYTES = 1 << 28  # row groups kept in memory by each process


class TableBytes:
    """The pictures in one Parquet or Arrow file, read by row group, the latest groups kept in memory.

    Can be pickled and forked: the file is opened on first use in each process.

    Args:
        path: The file.
        column: Its column of pictures: bytes, or a struct with a field `bytes`, or lists of one of these.
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
                self._file = open_table(self.path)
            if group not in self._groups:
                self._groups[group] = self._file.read_row_group(group, columns=[self.column]).column(self.column)
                while len(self._groups) > 1 and sum(g.nbytes for g in self._groups.values()) > CACHE_BYTES:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            value = self._groups[group][row].as_py()
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        value = value["bytes"] if isinstance(value, dict) else value
        if value is not None and not isinstance(value, bytes):  # a text would be taken for a path
            raise OSError(f"a {type(value).__name__} where the picture's bytes should be")
        return value


def require_pyarrow(name: str, kind: str = "Parquet") -> Any:
    """The library that reads Parquet and Arrow.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        import pyarrow
    except ImportError:
        raise ValueError(
            f'{name}: {kind} needs pyarrow, which is not installed (the extra "parquet"; docs/install.md)'
        ) from None
    return pyarrow


def open_table(path: str) -> Any:
    """A file by its ending; an Arrow file shows its record batches as row groups."""
    if not path.lower().endswith(ARROW):
        import pyarrow.parquet as pq

        return pq.ParquetFile(path)
    from mmtransformer.data.formats.arrow import ArrowFile

    return ArrowFile(path)


def refuse_bombs(metadata: Any, entry: Entry) -> None:
    """A few kilobytes can stand for billions of equal rows, or for gigabytes of one byte."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size for group in groups), default=0)
    if metadata.num_rows > max(_SMALL_ROWS, entry.size):
        raise ValueError(f"{entry.path}: {metadata.num_rows:,} rows out of {entry.size:,} bytes: a bomb")
    if largest > max(SMALL_BYTES, MOST_RATIO * entry.size):
        raise ValueError(f"{entry.path}: a row group of {largest:,} bytes out of {entry.size:,}: a bomb")


def with_words(path: str, read: list[str]) -> Any:
    """The Parquet file, which keeps each text once (`dictionary`), so that they can be counted before they are held."""
    import pyarrow.parquet as pq

    schema = pq.ParquetFile(path).schema
    leaves = [schema.column(i) for i in range(len(schema))]
    words = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and _is_read(leaf.path, read)]
    return pq.ParquetFile(path, read_dictionary=words)


def _is_read(path: str, read: list[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in read)


def read_texts(table: Any, group: int, read: list[str], entry: Entry) -> Any:
    """Some columns of a row group, `read` naming them or what lies in them ("image.path").

    Raises:
        ValueError: If they are far more than the file.
    """
    from mmtransformer.data.formats.arrow import unpacked

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
