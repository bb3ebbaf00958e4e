"""The index of a large data set of pairs, by which it opens without being read again.

All that `Found` says is kept in one file in the user's cache (`Mapped`: no code in it), under a name made of the data's
place and of how they are read, and used as long as the `Snapshot` of what was read holds. Anything else is made anew:
data that have changed, an index that is damaged, or that another version of the library has written.
"""

import dataclasses
import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mmtransformer.data.files.archives import Files, Selection
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.loading.errors import Report
from mmtransformer.data.pair_files.reading import Found, read_pairs
from mmtransformer.data.pair_files.rows import RowsOnDisk, arrays_of
from mmtransformer.data.pair_files.snapshot import Snapshot
from mmtransformer.serialization.mapped import SUFFIX, Mapped, cache_folder, keep_mapped, making, open_mapped

LARGE = 20_000  # pairs that an index pays for: they take 2 s to read
_FORMAT = 1  # raise it when the meaning of the file changes, or what is read out of manifests does


def open_found(root: str | Path, read: ReadOptions, *, max_bad_fraction: float) -> Found:
    """What there is in a data set: by its index, or else read, and if it is large its index is made.

    Processes that open it at once wait for the one that reads it.

    Args:
        root: A folder, an archive, or one manifest.
        read: How it is read.
        max_bad_fraction: Share of rows that may be unusable.

    Raises:
        ValueError: As `PairFiles`.
    """
    if (found := find_kept(root, read)) is not None:
        return found
    path, identity = _place(root, read)
    before = Snapshot.take(*_roots(root, read))
    if not before.may_hold(LARGE):
        return read_pairs(root, read, max_bad_fraction=max_bad_fraction)
    with making(path) as another:
        if another and (found := find_kept(root, read)) is not None:
            return found
        with _no_collection():
            found = read_pairs(root, read, max_bad_fraction=max_bad_fraction, progress=True)
            if len(found.rows) < max(LARGE, 1) or not before.holds():
                return found
            kept = _keep(path, identity, found, before)
        return found if kept is None else _found(kept)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector of cycles waits: rows make none, and it would go through millions of them again and again.

    It took 8 of 24 s for 400,000 pairs, and more of more.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def find_kept(root: str | Path, read: ReadOptions) -> Found | None:
    """What the index of a data set says; None if it has none, or it is not of the data as they are now."""
    kept = open_mapped(*_place(root, read))
    if kept is None:
        return None
    snapshot = Snapshot(tuple(kept["paths"].tobytes().split(b"\0")), kept["stamps"])
    return _found(kept) if snapshot.holds() else None


def _place(root: str | Path, read: ReadOptions) -> tuple[Path, dict[str, Any]]:
    """Where the index of a data set lies, and what it is of."""
    options = {key: str(value) for key, value in dataclasses.asdict(read).items()}
    asked: list[Any] = [*map(str, _roots(root, read)), options]
    if isinstance(root, Selection):
        asked.append(sorted(root.splits.items()))
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    stem = "".join(char if char.isalnum() else "_" for char in Path(root).stem)[:40] or "pairs"
    identity = {"format": _FORMAT, "code": _code(), "pairs": key}
    return cache_folder("pairs") / f"{stem}-{key[:16]}{SUFFIX}", identity


def _roots(root: str | Path, read: ReadOptions) -> list[str | Path]:
    """All that a data set is read out of, links followed, in the spelling that every process has for it."""
    place = Path(root).expanduser().resolve()
    whole: str | Path = Selection(place, root.splits) if isinstance(root, Selection) else place
    if read.image_folder is None:
        return [whole]
    inside = (place if place.is_dir() else place.parent) / read.image_folder
    return [whole, (inside if inside.exists() else Path(read.image_folder)).expanduser().resolve()]


@cache
def _code() -> str:
    """What is another where another version of the library reads other things out of the same files."""
    folders = (Path(__file__).parents[2] / name for name in ("data/files", "data/formats", "data/pair_files", "text"))
    files = (file for folder in folders for file in sorted(folder.glob("*.py")))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _keep(path: Path, identity: dict[str, Any], found: Found, before: Snapshot) -> Mapped | None:
    """Writes what was found, the rows of each split together."""
    arrays, more = arrays_of([found.rows[i] for some in found.splits.values() for i in some])
    arrays |= {"paths": np.frombuffer(b"\0".join(before.paths), np.uint8), "stamps": before.stamps}
    about = {
        "title": found.title,
        "root": str(found.files.root),
        "archives": found.files.archives,
        "splits": {split: len(some) for split, some in found.splits.items()},
        "languages": found.languages,
        "description": found.description,
        "report": found.report.to_dict(),
        "documents": found.documents,
    }
    return keep_mapped(path, arrays, identity, about | more)


def _found(kept: Mapped) -> Found:
    """What an index says."""
    about, report = kept.about, Report()
    vars(report).update(about["report"])
    ends = accumulate(about["splits"].values())
    return Found(
        title=about["title"],
        files=Files.of_archives(about["archives"], about["root"]),
        rows=RowsOnDisk(kept),
        splits={
            split: range(end - count, end) for end, (split, count) in zip(ends, about["splits"].items(), strict=True)
        },
        languages=tuple(about["languages"]),
        description=about["description"],
        report=report,
        documents=about["documents"],
    )
