"""Arrow files as `datasets.save_to_disk` writes them (a stream) and as Feather does (a file with a footer)."""

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmtransformer.data.files.endings import MOST_RATIO, SMALL_BYTES

_BOMB = 1 << 28  # bytes of a file; a bomb is small


class ArrowFile:
    """One Arrow file, mapped into memory, its record batches called row groups as in Parquet.

    Args:
        path: The file.

    Raises:
        pyarrow.ArrowException: If it is not Arrow, cut short, or packed so much that it must be a bomb.
        OSError: If it can't be read.
    """

    def __init__(self, path: str):
        self._most = max(SMALL_BYTES, MOST_RATIO * Path(path).stat().st_size)
        if (size := _packed(path)) > self._most:
            raise pa.ArrowInvalid(f"{size:,} bytes once unpacked: a bomb")
        mapped = pa.memory_map(path)
        try:
            self._reader: Any = pa.ipc.open_file(mapped)
            self._batches: list[Any] | None = None  # read when wanted: those of Feather are packed
            self.num_row_groups = self._reader.num_record_batches
        except pa.ArrowInvalid:
            mapped.seek(0)
            self._reader = pa.ipc.open_stream(mapped)
            self._batches = [self._checked(batch) for batch in self._reader]
            self.num_row_groups = len(self._batches)
        self.schema_arrow: Any = self._reader.schema

    def read_row_group(self, group: int, columns: Sequence[str]) -> Any:
        """Some columns of a record batch, as a table."""
        batch = self._checked(self._reader.get_batch(group)) if self._batches is None else self._batches[group]
        return pa.table({name: batch.column(name) for name in columns})

    def _checked(self, batch: Any) -> Any:
        if batch.nbytes > self._most:
            raise pa.ArrowInvalid(f"{batch.nbytes:,} bytes in one batch: a bomb")
        return batch


def _packed(path: str) -> int:
    """How many bytes the packed buffers of a file will be: each begins with that number, before its packer's mark."""
    total = 0
    if 0 < Path(path).stat().st_size <= _BOMB:
        with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for mark in (b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"):  # zstd, LZ4
                at = data.find(mark, 8)
                while at >= 0:
                    size = int.from_bytes(data[at - 8 : at], "little", signed=True)
                    total += size if 0 < size < 1 << 40 else 0  # else it is chance, in a picture's bytes
                    at = data.find(mark, at + 4)
    return total


def unpacked(values: Any) -> int:
    """How many bytes values are when each is written out, counted without doing so: one text may stand for a million.

    Args:
        values: An array of pyarrow, or several in one column.
    """
    if isinstance(values, (pa.ChunkedArray, pa.Table)):
        return sum(map(unpacked, values.chunks if isinstance(values, pa.ChunkedArray) else values.columns))
    kind = values.type
    if pa.types.is_dictionary(kind):
        words = values.dictionary
        flat = pa.types.is_string(words.type) or pa.types.is_large_string(words.type) or pa.types.is_binary(words.type)
        sizes = [len(word or "") for word in words.to_pylist()] if flat else [words.nbytes] * len(words)
        places = values.indices.drop_null().to_numpy(zero_copy_only=False)
        return int(np.array(sizes or [0], np.int64)[places].sum())
    if pa.types.is_struct(kind):
        return sum(unpacked(field) for field in values.flatten())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return unpacked(values.flatten())
    if pa.types.is_run_end_encoded(kind) or "view" in str(kind):  # which may point at one place many times
        raise ValueError(f"columns of type {kind} are not read")
    return values.nbytes
