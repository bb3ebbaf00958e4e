"""From the name that a manifest gives a picture to the one file that it can mean."""

import html
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, unquote_plus, urlsplit

from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.endings import IMAGES
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.names import join, join_into, nfc, refusal

_NUMBER = re.compile(r"0*(\d{1,18})(?:\.0+)?", re.ASCII)


class Finder:
    r"""Looks the names of one manifest up among the files below the root; never a file that only might be meant.

    There are five ways to read a name, and one manifest is read in one way only:

    1. as written: relative to the manifest, to the root, or to the inside of any archive;
    2. with folders in front left out: "a.jpg" for photos/a.jpg, if only one file fits;
    3. with the first folders, the same for all names, too many: "data/images/a.jpg" for images/a.jpg;
    4. as an id, without the file's ending: "a" for photos/a.jpg, if only one picture fits;
    5. as a number that a spreadsheet has written anew: "7" or "7.0" for 00007.jpg, if only one picture fits.

    The first way that finds at least half of the names is taken, or else the one that finds most. A name that is not
    there may differ from that of one file in upper and lower case (a.jpg for A.JPG), as on Windows; or it is spelt in
    another way, and read in one of these ways again: as in URLs ("a%20b.jpg", or a file is called so), with + for
    spaces, as in HTML, with a caption's number behind it ("a.jpg#0"), or, where no name at all is found, in folders
    that are called otherwise here ("train/a.jpg" for train_images/a.jpg), each of which can be one alone. Paths of
    other machines (C:\Users\..., Label Studio's /data/upload/...) and URLs mean the file with the longest end that is
    the same, if only one of them does. How many there were of each stands in `mapped`.

    Args:
        files: Where pictures may lie.
        base: The manifest's folder.
        names: All names in the manifest.
        beside: What the manifest is one of, if others than `files`: its names are read as below the root of `files`,
            and those that climb out of its folder may lead there too.
    """

    def __init__(self, files: Files, base: str, names: Iterable[str], beside: Files | None = None):
        folder = None if beside is None or beside is files else beside.root / base
        index, base, names = _Index(files, folder), "" if folder else base, list(dict.fromkeys(names))
        self._plain = _Reader(index, base, names)
        self.mapped: dict[str, list[str]] = {}
        self._spelt: list[tuple[str, Callable[[str], str], _Reader]] = []
        ends = [(name, self._plain.by_end(away[1])) for name in names if (away := _elsewhere(name)) is not None]
        often = Counter(found for _, found in ends)
        self._ends = {name: found for name, found in ends if isinstance(found, Entry) and often[found] == 1}
        missing = [name for name in names if _elsewhere(name) is None and isinstance(self._plain.find(name)[0], str)]
        renamed = _renamed(index, missing) if len(missing) == len(names) else {}
        for kind, spell in _spellings(files, renamed):
            if changed := [other for name in missing if (other := spell(name)) != name]:
                self._spelt.append((kind, spell, _Reader(index, base, changed)))

    @property
    def way(self) -> int:
        """How names are read: 1 to 5, as above."""
        return self._plain.way

    def find(self, name: str) -> tuple[Entry, str] | tuple[str, str]:
        """The file that a name means, and the name in its plain form; or the cause and what is wrong with it."""
        if (elsewhere := _elsewhere(name)) is not None:
            return self._by_end(name, *elsewhere)
        found = self._plain.find(name)
        if isinstance(found[0], Entry):
            if name in self._plain.other_case:
                kind, what = "names that differ in upper and lower case", found[0].path
                self.mapped.setdefault(kind, []).append(f"{name[:120]!r} is taken for {what}")
            return found
        for kind, spell, reader in self._spelt:
            if (other := spell(name)) != name and isinstance((again := reader.find(other))[0], Entry):
                self.mapped.setdefault(kind, []).append(f"{name[:120]!r} is taken for {again[0].path}")
                return again
        return found

    def _by_end(self, name: str, kind: str, ends: Sequence[str]) -> tuple[Entry, str] | tuple[str, str]:
        """The file with the longest end of a path of another machine."""
        found = self._ends.get(name) or self._plain.by_end(ends)
        if isinstance(found, Entry) and name in self._ends:
            self.mapped.setdefault(kind, []).append(f"{name[:120]!r} is taken for {found.path}")
            return found, nfc(found.path)
        if isinstance(found, Entry):
            return "ambiguous name", f"{name[:120]!r} and others end like {found.path}"
        if found:
            return "ambiguous name", f"{name[:120]!r} may be {' or '.join(found)}"
        said = (refusal(name) or "").partition(":")[0]
        if "URL" in said:
            return "refused path", f"{name[:120]!r} is {refusal(name)}"
        return "refused path", f"{name[:120]!r} is an absolute path, and no file here ends like it"


class _Index:
    """The files below a root by parts of their names, and the folder of a manifest that lies elsewhere."""

    def __init__(self, files: Files, folder: Path | None):
        self.files, self.folder = files, folder
        self.inner: dict[str, list[Entry]] = {}
        self.by_last: dict[str, list[Entry]] = {}
        self.by_stem: dict[str, list[Entry]] = {}
        self.by_number: dict[int, list[Entry]] = {}
        self.by_low: dict[str, list[Entry]] = {}
        for entry in files.entries:
            if entry.archive >= 0:
                self.inner.setdefault(entry.inner, []).append(entry)
            last = nfc(entry.path).rpartition("/")[2]
            self.by_last.setdefault(last, []).append(entry)
            if last.lower().endswith(IMAGES):
                self.by_stem.setdefault(stem := last.rpartition(".")[0], []).append(entry)
                self.by_low.setdefault(last.casefold(), []).append(entry)
                if _NUMBER.fullmatch(stem):
                    self.by_number.setdefault(int(stem), []).append(entry)


class _Reader:
    """Reads names in the way that finds most of them.

    Args:
        index: The files.
        base: The manifest's folder.
        names: The names that are to be found.
    """

    def __init__(self, index: _Index, base: str, names: Iterable[str]):
        self.index = index
        self.base = base
        self.dropped = 0
        self.other_case: set[str] = set()
        paths = [path for name in set(names) if refusal(name) is None and (path := join("", name)) is not None]
        best, most = 1, -1
        for way in (1, 2, 3, 4, 5):
            self.way = way
            if way == 3:
                self.dropped, count = self._drop(paths)
            else:
                count = sum(isinstance(self._look(path, path), Entry) for path in paths)
            if count > most:
                best, most = way, count
            if 2 * count >= len(paths):
                break
        self.way = best

    def find(self, name: str) -> tuple[Entry, str] | tuple[str, str]:
        """The file that a name means, and the name in its plain form; or the cause and what is wrong with it."""
        if (reason := refusal(name)) is not None:
            return "refused path", f"{name[:120]!r} is {reason}"
        full, folder = join(self.base, name), self.index.folder
        if full is None and folder is not None:
            full = join_into(self.index.files.root, folder, name)
            if full is None:
                return "refused path", f"{name[:120]!r} is not below {self.index.files.root.name}, the pictures' folder"
        if full is None:
            way = "give a folder higher up as the root, or name the pictures' folder: --image-folder "
            way += "(data.read.image_folder)"
            return "refused path", f"{name[:120]!r} climbs out of the root: {way}"
        path = join("", name) or full
        found = self._look(path, full)
        if isinstance(found, Entry):
            return found, path
        if found[0] == "missing picture" and (other := self._in_other_case(path, full)) is not None:
            self.other_case.add(name)
            return other, path
        return (found[0], repr(name[:120])) if found[0] == "missing picture" else found

    def by_end(self, ends: Sequence[str]) -> Entry | tuple[str, ...]:
        """The file with the longest end of a path; those that are as long, if there are several; () = none."""
        for end in ends:
            last = nfc(end).rpartition("/")[2]
            found = [(_shared(nfc(entry.path), nfc(end)), entry) for entry in self.index.by_last.get(last, ())]
            if not found:
                continue
            most = max(shared for shared, _ in found)
            best = [entry for shared, entry in found if shared == most]
            return best[0] if len(best) == 1 else tuple(entry.path for entry in best[:2])
        return ()

    def _look(self, path: str, full: str) -> Entry | tuple[str, str]:
        if self.way == 3:
            path = full = "/".join(path.split("/")[self.dropped :])
        by_path, refused = self.index.files.by_path, self.index.files.refused
        based = f"{self.base}/{path}" if self.base else path
        for key in (full, based, path):
            if key in by_path:
                return by_path[key]
            reason = next((refused[above] for above in _above(key) if above in refused), None)
            if reason is not None:
                return "refused path", f"{path!r} is {reason}"
        found = self.index.inner.get(path, [])
        if self.way == 2 and not found:
            found = [e for e in self.index.by_last.get(path.rpartition("/")[2], []) if nfc(e.path).endswith("/" + path)]
            loose = [entry for entry in found if entry.archive < 0]
            found = loose if len(loose) == 1 else found  # an unpacked copy beside its archive
        if self.way == 4 and not found:
            ids = self.index.by_stem.get(path.rpartition("/")[2], [])
            found = [e for e in ids if f"/{nfc(e.path)}".rpartition(".")[0].endswith(f"/{path}")]
        if self.way == 5 and not found and (number := _NUMBER.fullmatch(path)):
            found = self.index.by_number.get(int(number[1]), [])
        if len(found) == 1:
            return found[0]
        if found:
            return "ambiguous name", f"{path!r} may be {found[0].path} or {found[1].path}"
        return "missing picture", path

    def _in_other_case(self, path: str, full: str) -> Entry | None:
        """The one picture whose path is that of a name but for upper and lower case."""
        if self.way == 3:
            path = full = "/".join(path.split("/")[self.dropped :])
        wanted = {one.casefold() for one in (path, full, f"{self.base}/{path}")}
        near = self.index.by_low.get(path.rpartition("/")[2].casefold(), ())
        low = {entry: nfc(entry.path).casefold() for entry in near}
        found = [entry for entry, name in low.items() if name in wanted or entry.inner.casefold() in wanted]
        if self.way == 2 and not found:
            found = [entry for entry, name in low.items() if name.endswith(f"/{path.casefold()}")]
        return found[0] if len(found) == 1 else None

    def _drop(self, paths: list[str]) -> tuple[int, int]:
        """How many of the folders that all names start with are to be left out, and how many names that finds."""
        if not paths:
            return 0, 0
        folders = [path.split("/")[:-1] for path in paths]
        low, high = min(folders), max(folders)
        shared = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
        best = (0, 0)
        for self.dropped in range(1, shared + 1):
            count = sum(isinstance(self._look(path, path), Entry) for path in paths)
            best = best if best[1] >= count else (self.dropped, count)
        return best


def _elsewhere(name: str) -> tuple[str, tuple[str, ...]] | None:
    """What a path of another machine is called, and the paths that may end like a file here; None if it is none."""
    if re.match(r"[A-Za-z]:[\\/]|\\\\", name):
        return "Windows paths, found by their ends", (name.replace("\\", "/"),)
    if name.startswith("/data/local-files/?d="):
        return "Label Studio's paths, found by their ends", (unquote(name.partition("?d=")[2]),)
    if name.startswith("/data/upload/"):
        plain = unquote(name)
        return "Label Studio's paths, found by their ends", (plain, re.sub(r"/[0-9a-f]{8}-([^/]+)$", r"/\1", plain))
    if (scheme := name.partition("://")[0].lower()) in ("file", "http", "https", "s3", "gs") and "://" in name:
        try:
            path = urlsplit(name).path
        except ValueError:
            return None
        kind = "file paths" if scheme == "file" else "URLs"
        return f"{kind}, found by their ends", tuple(dict.fromkeys((unquote(path), path)))
    if name.startswith(("/", "~/")) and "absolute" in (refusal(name) or ""):
        return "absolute paths, found by their ends", (name,)
    return None


def _renamed(index: _Index, names: Sequence[str]) -> dict[str, str]:
    """How the folders that names begin with are called here, where each of them can be one alone; {} if they can't."""
    found: dict[str, set[str]] = {}
    for folder, _, last in (nfc(name).replace("\\", "/").rpartition("/") for name in names):
        there = index.by_last.get(last, ())
        if folder and len(there) == 1:
            found.setdefault(folder, set()).add(nfc(there[0].path).rpartition("/")[0])
    others = [folder for some in found.values() for folder in some]
    return {folder: some.pop() for folder, some in found.items()} if len({*others}) == len(found) == len(others) else {}


def _spellings(files: Files, renamed: Mapping[str, str]) -> Iterator[tuple[str, Callable[[str], str]]]:
    """Other ways to spell a name, each with what it is called.

    Args:
        files: All files.
        renamed: Folders of names, and what they are called here.
    """
    folders = {part for entry in files.entries if "%" in entry.path for part in nfc(entry.path).split("/")}
    escaped = {nfc(unquote(part)): part for part in folders}
    yield "names with a caption's number behind (#0)", lambda name: re.sub(r"#\d+$", "", name)
    yield "names as URLs write them (%20)", lambda name: unquote(re.split("[?#]", name)[0])
    if escaped:
        kind = "files whose names are as URLs write them (%20)"
        yield kind, lambda name: "/".join(escaped.get(part, part) for part in nfc(name).replace("\\", "/").split("/"))
    yield "names with + for spaces", unquote_plus
    if renamed:
        kind = "folders that are called otherwise here"
        yield kind, lambda name: "/".join((renamed.get(name.rpartition("/")[0], ""), name.rpartition("/")[2]))
    yield "names as HTML writes them (&amp;)", html.unescape


def _shared(path: str, other: str) -> int:
    """How many parts the ends of two paths share."""
    pairs = zip(reversed(path.split("/")), reversed(other.split("/")), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(path.count("/"), other.count("/")) + 1)


def _above(path: str) -> Iterable[str]:
    """A path and every folder above it."""
    while path:
        yield path
        path = path.rpartition("/")[0]
