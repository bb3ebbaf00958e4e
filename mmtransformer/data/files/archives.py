"""Files in folders, zips and tars, listed once and read in place by random access.

A name that a manifest or an archive gives is never handed to the file system: it is looked up among the
files that were found below the root. So no name, however hostile, can reach a file outside it.
"""

import os
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

from tqdm import tqdm

from mmtransformer.data.files.endings import ARCHIVES, IMAGES, unpack_hint, unpacked
from mmtransformer.data.files.members import Entry, list_tar, list_zip, pread
from mmtransformer.data.files.names import is_hidden, is_hidden_by_dot, join, nfc, refusal
from mmtransformer.serialization.printable import seen_from

_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, OSError, NotImplementedError, ValueError, struct.error, EOFError)
_OPEN = 256  # archives that are kept open
MAX_BYTES = 1 << 30  # one file; a zip entry that claims more is a bomb
POINTER = "a Git LFS pointer (run `git lfs pull`)"
_SINGLE = (*IMAGES, ".txt", ".caption")  # of one picture: read when it is asked for, so not opened when listed


class FileError(ValueError):
    """A file that is there but can't be read; the message names it."""


def remedy(error: BaseException) -> str:
    """What to do about a file that can't be read."""
    denied = isinstance(error, PermissionError) or isinstance(error.__context__, PermissionError)
    return "check its permissions" if denied else "replace it"


class Selection(str):
    """The path of a folder of which some files are meant, and no others.

    Args:
        root: The folder.
        splits: The files' paths below it, each with the split that it is said to be of, or None.
    """

    __slots__ = ("splits",)
    splits: Mapping[str, str | None]

    def __new__(cls, root: str | Path, splits: Mapping[str, str | None]) -> Self:
        """A path that knows its files; see the class."""
        path = super().__new__(cls, root)
        path.splits = splits
        return path


class Files:
    """Every regular file below a root, those inside zips and tars included, each readable by offset.

    Can be pickled, and shared by threads and forked workers: archives are opened on first use, in each process,
    and read with `pread`, which has no position to share. Hidden files are left out, pictures among them
    listed in `hidden`. What can't be used is kept in `refused` with the reason: links that lead out of the root,
    hostile names, archives that are damaged or compressed as a whole, pipes and devices.

    Args:
        root: A folder (of a `Selection` some files alone), or one zip or tar. Of any other file the folder is listed,
            and the file is `asked`.
        encoding: Of texts that are not UTF-8 (`read_text`); None knows none.
        progress: Show a progress bar.

    Raises:
        ValueError: If the root doesn't exist, or is an archive that can't be read.
    """

    def __init__(self, root: str | Path, encoding: str | None = None, *, progress: bool = False):
        self.encoding = encoding
        self.selected: dict[str, str | None] | None = None
        if isinstance(root, Selection):
            self.selected = {nfc(path): split for path, split in root.splits.items()}
        given = Path(root).expanduser()
        if not given.exists():
            raise ValueError(f"{given} does not exist{seen_from(given)}")
        self.root = given.resolve()
        self._bounds = _bounds(self.root)
        self.archives: list[str] = []
        self.entries: list[Entry] = []
        self.hidden: list[str] = []
        self.refused: dict[str, str] = {}
        self.refused_folders: set[str] = set()
        asked = ""
        with tqdm(
            desc=f"listing {self.root.name}", unit=" files", leave=False, dynamic_ncols=True, disable=not progress
        ) as bar:
            if self.root.is_dir():
                self._walk("", bar)
            elif not self.root.is_file():
                raise ValueError(f"{given}: not a regular file")
            elif self.root.name.lower().endswith(ARCHIVES) or unpack_hint(self.root.name):
                self._open_archive("", self.root, bar)
                if self.refused.get(""):
                    raise ValueError(f"{given}: {self.refused['']}")
            else:
                asked, self.root = self.root.name, self.root.parent
                self._walk("", bar)
        self.by_path = {nfc(entry.path): entry for entry in self.entries}
        self.asked = self.by_path.get(nfc(asked)) if asked else None
        if asked and self.asked is None:
            raise ValueError(f"{given}: {self.refused.get(nfc(asked), 'a hidden file')}")
        self._prepare()

    @classmethod
    def of_archives(cls, archives: Sequence[str | Path], root: str | Path = "") -> Self:
        """Archives, and files below a root, whose entries are known from elsewhere (an index): nothing is looked at."""
        files = cls.__new__(cls)
        files.root, files.archives, files.asked = Path(root), [str(archive) for archive in archives], None
        files.encoding, files.selected = None, None
        files.entries, files.refused, files.refused_folders, files.by_path = [], {}, set(), {}
        files.hidden = []
        files._prepare()
        return files

    @cached_property
    def image_ids(self) -> set[str]:
        """The names of all pictures, without folders and endings."""
        names = (nfc(entry.path).rpartition("/")[2] for entry in self.entries)
        return {name.rpartition(".")[0] for name in names if name.lower().endswith(IMAGES)}

    @cached_property
    def own_texts(self) -> bool:
        """Whether pictures have texts of their own, beside them and of their names."""
        ends = [nfc(entry.path).rpartition(".") for entry in self.entries]
        pictures = {stem for stem, _, end in ends if f".{end.lower()}" in IMAGES}
        return any(stem in pictures for stem, _, end in ends if end.lower() in ("txt", "caption"))

    def _prepare(self) -> None:
        self._handles: dict[int, int] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("_handles", "_lock", "image_ids", "own_texts")
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)

    def read(self, entry: Entry) -> bytes:
        """The bytes of one file, checked against their length and checksum.

        Raises:
            FileError: If they can't be read, are cut short, or fail the checksum.
        """
        try:
            return self._read(entry)
        except OSError as error:
            reason = str(error) if error.errno is None else error.strerror
            raise FileError(f"{entry.path}: {reason}") from None

    def read_text(self, entry: Entry) -> bytes:
        """The bytes of a text as UTF-8, out of `encoding` where one is named and they are not UTF-8 already.

        Raises:
            FileError: As `read`; or if they are not of that encoding either, or packed and damaged.
        """
        try:
            data = unpacked(self.read(entry), entry.path)
        except ValueError as error:
            raise FileError(str(error)) from None
        if self.encoding is None:
            return data
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            try:
                return data.decode(self.encoding).encode("utf-8")
            except UnicodeDecodeError as error:
                place = f"line {data[: error.start].count(bytes([10])) + 1}, byte 0x{data[error.start]:02x}"
                raise FileError(f"{entry.path}: neither UTF-8 nor {self.encoding} ({place})") from None
        return data

    def _read(self, entry: Entry) -> bytes:
        _refuse_large(max(entry.size, entry.compressed_size))
        if entry.archive < 0:
            # O_NONBLOCK: a pipe that took the file's place must not hang the run
            handle = os.open(self.root / entry.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            with os.fdopen(handle, "rb") as file:
                info = os.fstat(handle)
                if not stat.S_ISREG(info.st_mode):
                    raise OSError("no longer a regular file")
                _refuse_large(info.st_size)
                return file.read()
        if len(self.archives) > _OPEN:  # more than a process may hold open
            handle = os.open(self.archives[entry.archive], os.O_RDONLY)
            try:
                return self._read_at(handle, entry)
            finally:
                os.close(handle)
        return self._read_at(self._handle(entry.archive), entry)

    def _read_at(self, handle: int, entry: Entry) -> bytes:
        offset = entry.offset
        if self.archives[entry.archive].lower().endswith(".zip"):
            header = pread(handle, 30, offset)
            if header[:4] != b"PK\x03\x04" or len(header) < 30:
                raise OSError(f"no local header at byte {offset}; the zip is damaged or has changed")
            offset += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = pread(handle, entry.compressed_size, offset)
        if len(data) == entry.compressed_size and entry.method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-15).decompress(data, entry.size + 1)
            except zlib.error as error:
                raise OSError(str(error)) from None
        if len(data) != entry.size:
            raise OSError(f"{len(data):,} bytes where its archive says {entry.size:,}")
        if entry.crc >= 0 and zlib.crc32(data) != entry.crc:
            raise OSError("bytes fail the zip's checksum")
        return data

    def split_of(self, entry: Entry) -> str | None:
        """The split that a selection says a file, or the archive that holds it, is of."""
        path = nfc(entry.path)
        return (self.selected or {}).get(path if entry.archive < 0 else path.removesuffix(f"/{entry.inner}"))

    def folder(self, given: str | Path) -> Path:
        """A folder that the user names, seen from the root if it is there, else from the current folder."""
        given = Path(given).expanduser()
        inside = self.root / given
        return inside if self.root.is_dir() and inside.exists() else given

    def info(self, entry: Entry) -> os.stat_result:
        """Size and times of a file, or of the archive that holds it."""
        return (self.root / entry.path if entry.archive < 0 else Path(self.archives[entry.archive])).stat()

    def fingerprint(self, entry: Entry) -> str:
        """What changes when a file's bytes do, at the cost of no reading: its check sum or its time, and its place."""
        if entry.crc >= 0:
            return f"{entry.crc:08x} {entry.offset} {entry.size}"
        try:
            info = self.info(entry)
        except (OSError, ValueError):
            return "unreadable"
        return f"{info.st_mtime_ns} {entry.offset} {info.st_size if entry.archive < 0 else entry.size}"

    def _handle(self, archive: int) -> int:
        with self._lock:
            if archive not in self._handles:
                self._handles[archive] = os.open(self.archives[archive], os.O_RDONLY)
            return self._handles[archive]

    def _walk(self, folder: str, bar: tqdm) -> None:
        try:
            with os.scandir(self.root / folder) as scan:
                items = sorted(scan, key=lambda item: item.name)
        except PermissionError as error:
            self._refuse(nfc(folder or "."), True, str(error.strerror))
            return
        bar.update(len(items))
        for item in items:
            path = f"{folder}/{item.name}" if folder else item.name
            if is_hidden(item.name):
                if self.selected is None:
                    self._hide(path, item)
                continue
            if self.selected is not None and nfc(path) not in self.selected and not item.is_dir():
                continue
            if not item.name.isascii() and item.name != item.name.encode("utf-8", "replace").decode("utf-8"):
                self._refuse(
                    ascii(path)[1:-1],
                    item.is_dir(),
                    "a name that is not UTF-8: rename it (if it is UTF-8, set PYTHONUTF8=1)",
                )
                continue
            if item.is_symlink():
                target = Path(os.path.realpath(item.path))
                if not target.is_relative_to(self._bounds):
                    self._refuse(
                        nfc(path), target.is_dir(), "a link that leads out of the root: name its folder with images="
                    )
                    continue
                if not target.exists() or target.is_dir():
                    self.refused[nfc(path)] = "a link to a folder" if target.is_dir() else "a link to nothing"
                    continue
            elif item.is_dir():
                self._walk(path, bar)
                continue
            info = item.stat()
            if not stat.S_ISREG(info.st_mode):
                self.refused[nfc(path)] = "not a regular file"
            elif not item.name.lower().endswith(_SINGLE) and is_pointer(Path(item.path)):
                self.refused[nfc(path)] = POINTER
            elif item.name.lower().endswith(ARCHIVES) or unpack_hint(item.name):
                self._open_archive(path, Path(item.path), bar)
            else:
                # `path` keeps the spelling on disk, which opens it; names are looked up in composed form
                self.entries.append(Entry(path, nfc(path), size=info.st_size, compressed_size=info.st_size))

    def _hide(self, path: str, item: os.DirEntry[str]) -> None:
        """Lists a hidden picture, or those of a hidden folder."""
        below = os.walk(item.path) if item.is_dir(follow_symlinks=False) else ()
        inner = (f"{top[len(item.path) :]}/{name}" for top, _, names in below for name in names)
        some = (nfc(path + end) for end in ("", *inner))
        self.hidden += sorted(name for name in some if name.lower().endswith(IMAGES) and is_hidden_by_dot(name))

    def _refuse(self, name: str, folder: bool, reason: str) -> None:
        self.refused[name] = reason
        if folder:
            self.refused_folders.add(name)

    def _open_archive(self, prefix: str, path: Path, bar: tqdm) -> None:
        if (hint := unpack_hint(path.name)) is not None:
            self.refused[nfc(prefix)] = hint
            return
        if is_pointer(path):
            self.refused[nfc(prefix)] = POINTER
            return
        lister = list_zip if path.name.lower().endswith(".zip") else list_tar
        found: dict[str, Entry] = {}
        try:
            for name, entry in lister(path):
                bar.update()
                inner = join("", name)
                full = f"{prefix}/{inner or name}" if prefix else inner or name
                reason = entry if isinstance(entry, str) else refusal(name)
                if reason is None and (inner is None or ".." in name.split("/")):
                    reason = "a path that climbs out of its archive"
                lower = name.lower()
                if reason is None and not lower.endswith(_SINGLE) and (lower.endswith(ARCHIVES) or unpack_hint(lower)):
                    reason = "an archive inside an archive, which can't be read in place: unpack it"
                if reason is not None:
                    self.refused[nfc(full)] = reason
                elif inner and not any(map(is_hidden, inner.split("/"))):
                    assert isinstance(entry, Entry)
                    found[inner] = entry._replace(path=nfc(full), inner=inner, archive=len(self.archives))
                elif inner and inner.lower().endswith(IMAGES) and is_hidden_by_dot(inner):
                    self.hidden.append(nfc(full))
        except _DAMAGED as error:
            self.refused[nfc(prefix)] = f"a damaged archive ({error})"
            return
        self.archives.append(str(path))
        self.entries.extend(found.values())


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in the place of one that was not fetched."""
    try:
        if path.stat().st_size > 1024 or not path.is_file():
            return False
        return path.read_bytes().startswith(b"version https://git-lfs")
    except OSError:
        return False


def _bounds(root: Path) -> Path:
    """The folder that links may not leave: in a hub's cache the repository's own, where its files' contents lie."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("datasets--"):
            return folder.parents[1]
    return root


def _refuse_large(size: int) -> None:
    if size > MAX_BYTES:
        raise OSError(f"{size:,} bytes, over the limit of {MAX_BYTES:,}")
