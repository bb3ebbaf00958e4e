"""Pairs out of users' files: what `PairFiles` answers, found out by reading all manifests once."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmtransformer.data.documents.document_records import document_files
from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.columns import Columns
from mmtransformer.data.files.endings import plain_name
from mmtransformer.data.files.finder import Finder
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.names import nfc
from mmtransformer.data.files.normalize import folder_splits, normalize_languages, normalize_splits, plain_captions
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.files.tables import ManifestRow
from mmtransformer.data.formats.folders import ENDINGS, read_folder
from mmtransformer.data.formats.manifests import Manifest, find_manifests
from mmtransformer.data.formats.overlooked import captions_inside, overlooked, unlisted
from mmtransformer.data.formats.readers import FORMATS
from mmtransformer.data.loading.errors import Report, TooManyErrors
from mmtransformer.data.pair_files.rows import Pair, PairRows, RowsInMemory
from mmtransformer.serialization.printable import counted

HIDDEN = "hidden pictures, or in hidden folders, left out"


@dataclass(frozen=True)
class Found:
    """What was found in a data set of pairs, all that is ever asked of it.

    Args:
        title: Its format, and its manifests: "CSV captions.csv".
        files: What its pictures are read out of.
        rows: Its pairs.
        splits: Split -> the numbers of its rows: train, val, test, then any others.
        languages: The languages of its captions.
        description: All of it in words.
        report: What is wrong with it.
        documents: Whether it could be taken for interleaved documents too.
    """

    title: str
    files: Files
    rows: PairRows
    splits: Mapping[str, Sequence[int]]
    languages: tuple[str, ...]
    description: str
    report: Report
    documents: bool


@dataclass(slots=True)
class _Row(Pair):
    split: str | None = None  # that it is in; None = the data say none


def read_pairs(root: str | Path, read: ReadOptions, *, max_bad_fraction: float, progress: bool = False) -> Found:
    """Reads all of a data set.

    Args:
        root: A folder, an archive, or one manifest.
        read: How it is read.
        max_bad_fraction: Share of rows that may be unusable.
        progress: Show progress bars.

    Raises:
        ValueError: As `PairFiles`.
    """
    files = Files(root, read.encoding, progress=progress)
    manifests = find_manifests(files, read.format, read.wanted)
    images_in = files if read.image_folder is None else Files(files.folder(read.image_folder), progress=progress)
    reader = _Reader(images_in, read, progress)
    said = ["pictures with text files"]
    listing = ", ".join(m.entry.path for m in manifests[:3])
    listing += f" and {len(manifests) - 3} more" if len(manifests) > 3 else ""
    if manifests:
        for manifest in manifests:
            columns = reader.read(files, manifest)
            said = [f"{_title(manifest)} {listing}", *([str(columns)] if columns else [])]
    else:
        rows = list(read_folder(files, images_in, read.wanted))
        reader.rule = "by lists of names, or by their files" if any(row.split for row in rows) else ""
        reader.add(rows, "", None)
        for path, reason in overlooked(files, (row.name for row in reader.found.values())):
            reader.report.note("a manifest that was not read", path, reason)
        for path, reason in captions_inside(images_in) if not reader.found else ():
            reader.report.note("pictures that may hold captions of their own", path, reason)
    reader.count_missing()
    report, what = reader.report, f"{Path(root).expanduser()} ({said[0]})"
    if not report.rows:
        left = files.refused | dict(overlooked(files, ())) if not manifests else files.refused
        raise ValueError(f"{what} holds no pictures and no manifest with captions" + _also(left))
    for path, reason in files.refused.items():
        report.note("file left out", path, reason)
    report.enforce(what, max_bad_fraction)
    left_over = unlisted(files, images_in, reader.listed) if manifests else []
    for path in left_over:
        report.note(f"pictures in {images_in.root.name} without a caption in {listing}, left out", path)
    for path in images_in.hidden:
        report.note(HIDDEN, path)
    rows = [row for row in reader.found.values() if row.captions]
    if not rows and max_bad_fraction < 1:
        raise TooManyErrors(f"{what}: not one of {counted(report.rows, 'row')} can be used:\n{report}")
    members, languages, about = _normalize(rows, read, reader.rule)
    images = len({(rows[i].name, split) for split, some in members.items() for i in some})
    captions = sum(len(row.captions) for row in rows)
    title = said.pop(0)
    about += [f"without a caption: {counted(len(left_over), 'picture')}"] if left_over else []
    for what in (ENDINGS, HIDDEN):
        about += [f"{what}: {counted(report.notes[what], 'picture')}"] if what in report.notes else []
    said = [f"{title}: {counted(images, 'picture')}, {counted(captions, 'caption')}", *said, *about]
    documents = bool(document_files(files))
    return Found(title, images_in, RowsInMemory(rows), members, languages, "; ".join(said), report, documents)


def _normalize(
    rows: list[_Row], read: ReadOptions, rule: str
) -> tuple[dict[str, list[int]], tuple[str, ...], list[str]]:
    """Gives rows their names, languages and questions, and shares them out to splits, as data and options say.

    Rows without a caption in the languages that are wanted are taken out.

    Returns:
        The members of each split, the languages there are, and what was done, in words.
    """
    if all(row.split is None for row in rows):
        paths = [nfc(row.place.path) if isinstance(row.place, Entry) else row.name for row in rows]
        for row, split in zip(rows, folder_splits(paths), strict=True):
            row.split, rule = split, "by their folders" if split else rule
    _normalize_names(rows)
    languages, said = normalize_languages([row.captions for row in rows], read.default_language)
    about = [said]
    if read.languages is not None and rows:
        languages, said = _in_languages(rows, read.languages, languages)
        about.append(said)
    names = [row.name for row in rows]
    often = Counter(names)
    for row in rows:
        row.asked = (row.captions[0].question or "") if often[row.name] > 1 else ""
    members, said = normalize_splits(names, [row.split for row in rows], read.val_fraction)
    about += [said] if said else []
    if members:
        listing = ", ".join(f"{split} {len({names[i] for i in some})}" for split, some in members.items())
        about.append(f"splits{f' {rule}' * bool(rule)}: {listing}")
    return members, languages, about


def _in_languages(rows: list[_Row], wanted: str | list[str], there: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Takes out captions in other languages, and rows that have no others; the languages left, and what was done."""
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if absent := [code for code in wanted if code not in there]:
        listed = ", ".join(there) or "none that is named"
        raise ValueError(f"read.languages: no caption is in {absent[0]}; the languages of the captions: {listed}")
    captions, pictures = sum(len(row.captions) for row in rows), len(rows)
    for row in rows:
        row.captions = [caption for caption in row.captions if caption.language in wanted]
    rows[:] = [row for row in rows if row.captions]
    captions -= sum(len(row.captions) for row in rows)
    said = f"left out: {counted(captions, 'caption')} in other languages than {', '.join(wanted)}"
    return tuple(code for code in there if code in wanted), (
        said + (f", with them {counted(pictures - len(rows), 'picture')}" if len(rows) < pictures else "")
    )


class _Reader:
    """Finds the pictures of rows, and counts what is wrong with these."""

    def __init__(self, images_in: Files, how: ReadOptions, progress: bool):
        self.images_in, self.how, self.progress = images_in, how, progress
        self.report = Report()
        self.found: dict[Any, _Row] = {}
        self.listed: set[str] = set()  # the paths of pictures that rows name
        self.rule = ""  # how splits are told
        self._missing: list[tuple[str | None, ManifestRow, str, str]] = []

    def read(self, files: Files, manifest: Manifest) -> Columns | None:
        """Reads a manifest; the columns that it is read by."""
        columns, rows = FORMATS[manifest.format].read(files, manifest.entry, self.how.wanted)
        rows = list(self._shown(rows, f"reading {manifest.entry.path}"))
        if (told := files.split_of(manifest.entry)) is not None:
            rows, self.rule = [row._replace(split=told) for row in rows], "by its files"
        elif any(row.split for row in rows):
            self.rule = f"by the column {columns.split}" if columns and columns.split else "as the file names them"
        self.add(rows, manifest.base, manifest.split, files)
        self.rule = self.rule or ("by the names of the files" if manifest.split else "")
        return columns

    def add(self, rows: list[ManifestRow], base: str, split: str | None, files: Files | None = None) -> None:
        """Finds the pictures of a manifest's rows and counts what is wrong with them."""
        finder = Finder(self.images_in, base, (row.image for row in rows if row.image and row.key is None), files)
        left: list[str] = []
        for row in self._shown(rows, "finding pictures"):
            if row.split == "unlisted":
                self.report.note("on none of the split lists, left out", row.where, row.image or "")
                left.append(row.image or "")
                continue
            self.report.rows += 1
            for cause, what in row.errors:
                self.report.error(cause, row.where, what)
            for note, what in row.notes:
                self.report.note(note, row.where, what)
            captions = plain_captions(row.captions, self.how.plain)
            if len(captions) < len(row.captions):
                self.report.error("empty caption", row.where, f"{row.captions[0].text[:60]!r} holds HTML alone")
            if row.image is None or not captions:
                left.append(row.image or "")
                continue
            if row.key is None:
                place, name = finder.find(row.image)
                if isinstance(place, str):
                    self._missing.append((row.split or split, row, place, name))
                    continue
                self.listed.add(key := nfc(place.path))
            elif isinstance(row.key, Entry):
                place, name, key = row.key, row.key.inner, row.image
            else:
                place, name, key = row.key, row.image, row.where
            key = (key, captions[0].question)
            known = self.found.get(key)
            if known is None:
                self.found[key] = _Row(name, place, captions, split=row.split or split)
            elif known.name != name and finder.way > 1:
                self.report.error("ambiguous name", row.where, f"{name!r} and {known.name!r} both lead to {key[0]}")
            elif known.split != (row.split or split):
                what = f"{name!r} is in {known.split or 'no split'} already, not in {row.split or split or 'none'}"
                self.report.error("picture in two splits", row.where, what)
            else:
                known.captions.extend(captions)
        for kind, found in finder.mapped.items():
            for what in found:
                self.report.note(kind, what)
        found = (finder.find(name)[0] for name in left if name)
        self.listed.update(nfc(place.path) for place in found if isinstance(place, Entry))

    def count_missing(self) -> None:
        """Counts pictures that are not there; a split of which none is there is left out."""
        there = {row.split for row in self.found.values()} | {"train", None}
        for split, row, cause, what in self._missing:
            if split in there or not self.found:
                self.report.error(cause, row.where, what)
            else:
                self.report.rows -= 1
                self.report.note(f"split {split} has no pictures here, left out", row.where, what)

    def _shown(self, rows: Iterable[ManifestRow], what: str) -> Iterable[ManifestRow]:
        return tqdm(rows, desc=what, unit=" rows", leave=False, dynamic_ncols=True) if self.progress else rows


def _normalize_names(images: Sequence[Pair]) -> None:
    """Makes names unique: shards may hold the same names, and tables the same file name in every row."""
    often = Counter(name for name, _ in {(image.name, image.place) for image in images})
    for image in images:
        if often[image.name] > 1:
            place = image.place
            image.name = (
                nfc(place.path)
                if isinstance(place, Entry)
                else f"{Path(place[0].path).name}/{place[1]}/{place[2]}/{image.name}"
            )


def _title(manifest: Manifest) -> str:
    return "TSV" if plain_name(manifest.entry.path).endswith((".tsv", ".tab")) else FORMATS[manifest.format].title


def _also(refused: dict[str, str]) -> str:
    return "".join(f"; {path}: {reason}" for path, reason in list(refused.items())[:5])
