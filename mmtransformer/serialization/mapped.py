"""Arrays in the user's cache, made once and mapped into memory by every later run.

One safetensors file, written beside its final name and renamed when it is whole. Its metadata say what it is of. Its
last four bytes are the check sum of all before them, which is compared when the file is opened, by reading it once in
a stream: so memory is taken only for what is looked at.

Shapes: those of the arrays; none is this module's.
"""

import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mmtransformer.serialization.printable import say
from mmtransformer.serialization.untrusted import check_plain
from mmtransformer.serialization.writing import alone, write_whole

SUFFIX = ".safetensors"
_CODES = {"int64": "I64", "int32": "I32", "uint8": "U8"}
_CHUNK = 1 << 24  # bytes
_SUM = 4  # bytes of CRC-32


def cache_folder(name: str) -> Path:
    """The user's cache for things of a kind, `$XDG_CACHE_HOME/mmtransformer/NAME` or `~/.cache/mmtransformer/NAME`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mmtransformer", name)


class Mapped:
    """The arrays of one file, by name; pages are read when they are touched, and shared by processes.

    Can be pickled: another process maps the same file, and refuses one that has taken its place.

    Args:
        path: The file.
        identity: What it must be of; None = of anything.

    Attributes:
        about: What else was written beside the arrays.
        checksum: Eight hexadecimal digits that tell this file's contents from others'.

    Raises:
        OSError: If there is none, or it cannot be read.
        ValueError: If it is damaged, cut, of another kind or of something else; says which.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any] | None = None):
        self.path = path
        check_plain(path)
        self.checksum = _sum_of(path)
        self._open()
        if identity is not None and (own := self._identity) != json.loads(json.dumps(identity)):
            different = [key for key in {**own, **identity} if own.get(key) != identity.get(key)]
            raise ValueError("of " + ", ".join(f"{key} {own.get(key)!r:.60}" for key in different))

    def _open(self) -> None:
        try:
            with safe_open(self.path, "pt") as file:  # which maps, where its numpy copies
                metadata = file.metadata() or {}
                self._identity: dict[str, Any] = json.loads(metadata["identity"])
                self.about: dict[str, Any] = json.loads(metadata["about"])
                self.arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
            for array in self.arrays.values():
                array.flags.writeable = False
        except (SafetensorError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"damaged, or another tool's ({error})") from error
        if self["checksum"].tobytes().hex() != self.checksum:
            raise ValueError(f"{self.path} was made anew while it was used: start the run again")

    def __getitem__(self, name: str) -> np.ndarray:
        """An array, which cannot be written to the file."""
        return self.arrays[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "checksum": self.checksum}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def open_mapped(path: Path, identity: Mapping[str, Any]) -> Mapped | None:
    """A kept file; None if there is none. One that cannot be used is none: a line says why.

    Args:
        path: The file.
        identity: What it must be of.
    """
    if not path.exists():
        return None
    try:
        return Mapped(path, identity)
    except (OSError, ValueError) as error:
        say(f"{path}: not used, and made anew: {str(error).removeprefix(f'{path}: ')}", file=sys.stderr)
        return None


def keep_mapped(
    path: Path, arrays: Mapping[str, np.ndarray], identity: Mapping[str, Any], about: Mapping[str, Any]
) -> Mapped | None:
    """Writes a file and maps it; None if it cannot be kept: a line says why, and the next run makes it anew.

    Args:
        path: The file; its folder is made, for the user alone.
        arrays: Of int64, int32 and uint8.
        identity: What it is of: plain values, compared when it is opened.
        about: What else is to be known: plain values.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(path, _parts(arrays, identity, about))
        return Mapped(path, identity)
    except (OSError, ValueError) as error:
        say(f"{path}: cannot be kept, so it is made anew each time: {error}", file=sys.stderr)
        return None


def mapped_or_made(
    path: Path, identity: Mapping[str, Any], make: Callable[[], tuple[Mapping[str, np.ndarray], Mapping[str, Any]]]
) -> Mapped | tuple[Mapping[str, np.ndarray], Mapping[str, Any]]:
    """A kept file; where there is none it is made, by one process while the others wait.

    Args:
        path: The file.
        identity: What it must be of.
        make: Makes its arrays, and what else is to be known.

    Returns:
        The file, or where it cannot be kept what `make` has made.
    """
    if (kept := open_mapped(path, identity)) is not None:
        return kept
    with making(path) as another:
        if another and (kept := open_mapped(path, identity)) is not None:
            return kept
        made = make()
        return keep_mapped(path, made[0], identity, made[1]) or made


@contextmanager
def making(path: Path) -> Iterator[bool]:
    """Lets one process make a file while others wait; gives whether another has made it meanwhile."""
    was = _time_of(path)
    with suppress(OSError):  # the cache may be read-only
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with alone(path.with_name(f".{path.name}.lock")):
        yield _time_of(path) != was


def _time_of(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _parts(
    arrays: Mapping[str, np.ndarray], identity: Mapping[str, Any], about: Mapping[str, Any]
) -> Iterator[memoryview]:
    """The bytes of a file: the header, the arrays with the widest numbers first, the check sum."""
    header: dict[str, Any] = {"__metadata__": {"identity": json.dumps(identity), "about": json.dumps(about)}}
    ordered = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))
    at = 0
    for name, array in {**ordered, "checksum": np.empty(_SUM, np.uint8)}.items():
        header[name] = {
            "dtype": _CODES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    total, bodies = 0, (np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in ordered.values())
    for part in (memoryview(len(text).to_bytes(8, "little") + text), *bodies):
        total = zlib.crc32(part, total)
        yield part
    yield memoryview(total.to_bytes(4, "little"))


def _sum_of(path: Path) -> str:
    """The check sum at the end of a file, compared with what stands before it.

    Raises:
        ValueError: If it is another one.
    """
    left, total = path.stat().st_size - _SUM, 0
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, _CHUNK))):
            total, left = zlib.crc32(chunk, total), left - len(chunk)
        last = file.read()
    if total.to_bytes(_SUM, "little") != last:
        raise ValueError("damaged, cut, or another tool's: its check sum is another")
    return last.hex()
