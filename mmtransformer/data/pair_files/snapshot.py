"""Whether files are still those that were read: their sizes and times, and those of the folders that they lie in."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmtransformer.data.files.archives import Selection
from mmtransformer.data.files.endings import ARCHIVES, IMAGES
from mmtransformer.data.files.names import is_hidden

_GONE = (-1, -1, -1)


@dataclass(frozen=True)
class Snapshot:
    """How files and folders were when they were read.

    Manifests, texts, archives and tables are kept by mode, size and time, and so are links, as what they lead to.
    Of loose pictures only the folders are: their times change when a picture is added, removed or renamed. The bytes of
    a picture may change meanwhile: nothing of them is in an index, and its fingerprint asks for its time.

    A file that is rewritten with the same size within one tick of the file system's clock (some ms) is not seen.

    Args:
        paths: The files and folders, as the system spells them.
        stamps: (n 3) int64: mode, size, time in nanoseconds; -1 where there is nothing.
    """

    paths: tuple[bytes, ...]
    stamps: np.ndarray

    @classmethod
    def take(cls, *roots: str | Path) -> "Snapshot":
        """What `Files` of these roots would look at, as it is now."""
        paths = tuple(dict.fromkeys(os.fsencode(path) for root in roots for path in _looked_at(root)))
        return cls(paths, _stamps(paths))

    def holds(self) -> bool:
        """Whether nothing has changed: one question to the system for each file, none for a loose picture."""
        return np.array_equal(self.stamps, _stamps(self.paths))

    def may_hold(self, rows: int) -> bool:
        """Whether there is enough to be so many rows, of 20 bytes or a file each."""
        return len(self.paths) >= rows or int(self.stamps[:, 1].sum()) >= 20 * rows


def _stamps(paths: Iterable[bytes]) -> np.ndarray:
    return np.array([_stamp(path) for path in paths], np.int64).reshape(-1, 3)


def _stamp(path: bytes) -> tuple[int, int, int]:
    try:
        found = os.stat(path)  # noqa: PTH116 (bytes, and a third of the time)
    except OSError:
        return _GONE
    return found.st_mode, found.st_size, found.st_mtime_ns


def _looked_at(root: str | Path) -> Iterator[str]:
    """The paths of all that opening a root looks at."""
    place = Path(root).expanduser().resolve()
    if isinstance(root, Selection):
        yield from (f"{place}/{path}" for path in root.splits)
    elif place.is_dir():
        yield from _below(str(place))
    else:
        yield str(place)
        if place.exists() and not place.name.lower().endswith(ARCHIVES):
            yield from _below(str(place.parent))


def _below(folder: str) -> Iterator[str]:
    yield folder
    try:
        with os.scandir(folder) as scan:
            items = [item for item in scan if not is_hidden(item.name)]
    except OSError:  # whoever opens it says what is wrong
        return
    for item in items:
        if item.is_dir(follow_symlinks=False):
            yield from _below(item.path)
        elif item.is_symlink() or not item.name.lower().endswith(IMAGES):
            yield item.path
