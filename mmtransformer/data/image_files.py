"""Pictures that a command line names: files, folders with all that lies below, patterns, archives, lists."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from mmtransformer.data.files.archives import FileError, Files, remedy
from mmtransformer.data.files.endings import ARCHIVES, IMAGES, unpack_hint
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.names import nfc
from mmtransformer.images import ImageError, load
from mmtransformer.images.files import kind_of, read_bytes

_CONTROL = re.compile(rb"[\x01-\x08\x0b\x0c\x0e-\x1f]")


class ImageFiles:
    """Pictures by index, in the order in which they are named; those of a folder by their names.

    Nothing is decoded before it is asked for. Can be pickled for other processes, and shared by threads.

    Args:
        places: Files (whatever they are called), folders (every picture below, also in zips and tars there), patterns
            such as `photos/**/*.jpg`, zips and tars. A picture in an archive can be named too: `photos.zip/cat.jpg`.

    Attributes:
        others: Files of the folders and archives that are called like no picture, and are left alone.
        hidden: Pictures there that are hidden, or in hidden folders, and are left out.

    Raises:
        ValueError: If a pattern fits no file, the one place named holds no picture, or an archive cannot be read.
    """

    def __init__(self, places: Iterable[str | Path]) -> None:
        self.others: list[str] = []
        self.hidden: list[str] = []
        self._files: list[Files] = []
        self._archives: dict[str, int] = {}
        self._found: dict[str, tuple[int, Entry] | str | None] = {}
        for place in places:
            self._add(str(place))
        if list(map(type, self._found.values())) == [str] and (name := next(iter(self._found))) in self._archives:
            raise ValueError(f"{name}: {self._found[name]}")
        self._names = list(self._found)

    def __len__(self) -> int:
        """The number of pictures; one that is named twice counts once."""
        return len(self._names)

    def name(self, i: int) -> str:
        """The name of picture i: its path as it was given, or below the folder or archive that was."""
        return self._names[i]

    def is_gone(self, name: str) -> bool:
        """Whether a picture is named by a path at which there is no file."""
        return self._found[name] is None and not os.path.lexists(name)

    def inner_name(self, i: int) -> str:
        """The path of picture i below the folder or archive that was given; of a file that was given, its name."""
        place = self._found[self._names[i]]
        return place[1].path if isinstance(place, tuple) else Path(self._names[i]).name

    def in_archive(self, i: int) -> bool:
        """Whether picture i lies in an archive, so that nothing can be put beside it."""
        place = self._found[self._names[i]]
        return isinstance(place, tuple) and place[1].archive >= 0

    def image(self, i: int) -> Image.Image:
        """Picture i as RGB.

        Raises:
            ImageError: If it can't be read or decoded; the message names the file and the fault.
        """
        return load(self.data(i), name=self._names[i])

    def data(self, i: int) -> bytes:
        """The bytes of picture i, as they lie in its file.

        Raises:
            ImageError: If it can't be read; the message names the file and the fault.
        """
        name = self._names[i]
        place = self._found[name]
        if isinstance(place, str):
            raise ImageError(f"{name}: {place}")
        if place is None:
            return read_bytes(name)
        try:
            return self._files[place[0]].read(place[1])
        except FileError as error:
            said = str(error).removeprefix(f"{place[1].path}: ")
            raise ImageError(f"{name}: can't be read ({said}); {remedy(error)}") from error

    def stamp(self, i: int) -> tuple[int, int] | None:
        """What tells without reading it that picture i has changed: its size in bytes, and when it was last written in
        nanoseconds (in a zip its check sum, in a tar when that was written); None if there is no telling.
        """
        place = self._found[self._names[i]]
        try:
            if place is None:
                info = Path(self._names[i]).stat()
                return info.st_size, info.st_mtime_ns
            if isinstance(place, tuple):
                entry = place[1]
                return entry.size, entry.crc if entry.crc >= 0 else self._files[place[0]].info(entry).st_mtime_ns
        except OSError:
            pass
        return None

    def _add(self, place: str) -> None:
        if not place:  # of a variable that is not set: pathlib would take it for the current folder
            raise ValueError('an empty name in the place of a picture or folder; of all that is here, write "."')
        path = Path(place)
        if path.is_dir() or (path.is_file() and _is_archive(place)):
            self._add_all(place)
        elif (archive := _archive_above(path)) is not None:
            self._found.setdefault(place, self._member(str(archive), path.relative_to(archive).as_posix()))
        elif glob.has_magic(place) and not path.exists():
            found = sorted(glob.glob(place, recursive=True))  # noqa: PTH207 (a pattern may be absolute)
            if not found:
                raise ValueError(f"{place}: no file fits this pattern")
            # A folder that `**` has found is there with its files; one that `*` has found is gone through.
            for item in found:
                if not Path(item).is_dir():
                    self._add(item)
                elif "**" not in place:
                    self._add_all(item)
        else:
            self._found.setdefault(place, None)

    def _add_all(self, place: str) -> None:
        """Every picture below a folder or in an archive."""
        at = self._open(place)
        files, before = self._files[at], len(self._found)
        lead = place.rstrip("/") + "/"
        for path, reason in files.refused.items():
            lost = path.lower().endswith((*IMAGES, *ARCHIVES)) or unpack_hint(path) or path in files.refused_folders
            if lost:
                self._found.setdefault(lead + path, reason)
        for entry in files.entries:
            if entry.path.lower().endswith(IMAGES):
                self._found.setdefault(lead + entry.path, (at, entry))
            else:
                self.others.append(lead + entry.path)
        self.hidden += [lead + path for path in files.hidden]
        if len(self._found) == before and not any(name.startswith(lead) for name in self._found):
            self._found[place] = f"no pictures there ({', '.join(IMAGES)})"

    def _member(self, archive: str, inner: str) -> tuple[int, Entry] | str:
        try:
            at = self._open(archive)
        except ValueError as error:
            return str(error)
        entry = self._files[at].by_path.get(nfc(inner))
        return (at, entry) if entry else self._files[at].refused.get(nfc(inner), f"not in {archive}; check the path")

    def _open(self, place: str) -> int:
        if place not in self._archives:
            self._files.append(Files(place))
            self._archives[place] = len(self._files) - 1
        return self._archives[place]


def listed(data: bytes, name: str) -> Iterator[str]:
    """The paths of a list, one a line; empty lines and those that begin with "# " say nothing.

    Args:
        data: The list: UTF-8, or UTF-16 with its mark, as PowerShell writes it, or with NUL bytes in place of line
            ends, as `find -print0` does. Names that are no UTF-8 are kept as they are, where files are called so; else
            they are those of CP949, as Korean Windows saves lists. Of a name in quotes, as Windows copies paths, the
            quotes are no part, where no file is called so.
        name: What errors call it.

    Raises:
        ValueError: If it is a picture.
    """
    head = data[:64]
    if kind_of(head) and (b"\0\0" in head or _CONTROL.search(head)):
        raise ValueError(f"{name} is a picture, and a list of paths is read from there: name the picture itself")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        data = data.decode("utf-16", "replace").encode("utf-8")
    data = data.removeprefix(b"\xef\xbb\xbf")
    for line in data.split(b"\0" if b"\0" in data else b"\n"):
        path = _spelt(line.rstrip(b"\r\n"))
        if path.strip() and not path.startswith("# "):
            yield path


def _spelt(line: bytes) -> str:
    """The path that a line of a list means; see `listed`."""
    path = line.decode("utf-8", "surrogateescape")
    quoted = line[1:-1] if len(line) > 2 and line[:1] == line[-1:] == b'"' else b""
    if (path.isprintable() and not quoted) or os.path.lexists(path):
        return path
    plain = quoted or line
    try:
        return plain.decode("utf-8")
    except UnicodeDecodeError:
        korean = plain.decode("cp949", "replace")
    return path if "\ufffd" in korean else korean


def _is_archive(place: str) -> bool:
    return place.lower().endswith(ARCHIVES) or unpack_hint(place) is not None


def _archive_above(path: Path) -> Path | None:
    """The archive that a path leads into, if it does."""
    return next((above for above in path.parents if _is_archive(above.name) and above.is_file()), None)
