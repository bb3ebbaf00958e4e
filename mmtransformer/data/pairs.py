"""Users' own pictures and captions: `PairFiles` reads a folder, CSV, JSONL, COCO, Karpathy or Parquet in place."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.endings import plain_name
from mmtransformer.data.files.finder import Finder
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.names import nfc
from mmtransformer.data.files.normalize import (
    find_split,
    folder_splits,
    normalize_languages,
    normalize_splits,
    plain_captions,
)
from mmtransformer.data.files.read_options import ReadOptions, check_share
from mmtransformer.data.files.tables import ManifestRow
from mmtransformer.data.formats.manifests import Manifest, find_manifests, overlooked, read_folder, read_manifest
from mmtransformer.data.loading.errors import Report, TooManyErrors
from mmtransformer.data.loading.source import Caption
from mmtransformer.images import ImageError, load
from mmtransformer.images.sizes import stored_size
from mmtransformer.serialization.printable import counted
from mmtransformer.text.conversation import Conversation

_TITLES = {"folder": "pictures with text files", "csv": "CSV", "jsonl": "JSONL", "json": "JSON", "parquet": "Parquet",
           "arrow": "Arrow", "coco": "COCO captions", "karpathy": "Karpathy JSON", "flickr": "Flickr token file",
           "excel": "Excel"}  # fmt: skip


@dataclasses.dataclass(slots=True)
class _Image:
    name: str
    place: Any  # an Entry, or (TableBytes, row group, row)
    split: str | None
    captions: list[Caption]
    asked: str = ""  # the question, where the same picture stands here with several


class PairSplit:
    """One split of `PairFiles`: pictures by index, each with its captions. Can be pickled for loader workers.

    A picture of which several things are asked stands here once a question.
    """

    def __init__(self, files: Files, images: Sequence[_Image]):
        self._files = files
        self._images = list(images)

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self._images)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({counted(len(self), 'picture')})"

    def name(self, i: int) -> str:
        """The name of picture i, as its manifest gives it; behind it the question where there are several."""
        image = self._images[i]
        return f"{image.name}?{image.asked}" if image.asked else image.name

    def image(self, i: int) -> Image.Image:
        """Picture i as RGB.

        Raises:
            ImageError: If it can't be read or decoded; the message names the file and the fault.
        """
        return self.scaled_image(i)

    def scaled_image(self, i: int, *, at_least: tuple[float, float] | None = None) -> Image.Image:
        """Picture i, which may be decoded smaller; see `at_least` of `mmtransformer.images.load`."""
        data, label = self._data(i)
        return load(data, name=label, at_least=at_least)

    def stored_size(self, i: int) -> tuple[int, int]:
        """Height and width of picture i, px, as it lies in its file; only the beginning of it is looked at.

        Raises:
            ImageError: If it can't be read; the message names the file and the fault.
        """
        return stored_size(*self._data(i))

    def _data(self, i: int) -> tuple[bytes, str]:
        """The bytes of picture i's file, and what errors call it."""
        place = self._images[i].place
        label = place.path if isinstance(place, Entry) else self._images[i].name
        try:
            data = self._files.read(place) if isinstance(place, Entry) else place[0].read(*place[1:])
        except (OSError, ValueError) as error:
            said = str(error).removeprefix(f"{label}: ")
            raise ImageError(f"{label}: can't be read ({said}); replace it") from error
        if data is None:
            raise ImageError(f"{label}: the table holds no bytes in this row")
        return data, label

    def captions(self, i: int) -> list[Caption]:
        """All captions of picture i."""
        return list(self._images[i].captions)

    def without_follow_ups(self) -> "PairSplit":
        """The split without answers behind earlier turns, which mean nothing to a model that reads no prompts."""
        kept = [image for image in self._images if not isinstance(image.captions[0].question, Conversation)]
        return PairSplit(self._files, kept)

    def fingerprint(self, i: int) -> str:
        """What changes when the bytes of picture i do: its checksum or its file's time, at the cost of no reading."""
        place = self._images[i].place
        if isinstance(place, Entry):
            return self._files.fingerprint(place)
        try:
            return hashlib.sha256(place[0].read(*place[1:]) or b"").hexdigest()
        except (OSError, ValueError):
            return "unreadable"


class PairFiles:
    """Pictures with captions as people keep them, read in place, in folders, zips and tars.

    The format is detected, and `describe()` says it: pictures with a .txt each, CSV or TSV, JSONL, JSON, COCO
    captions, Karpathy's JSON, Flickr8k's token file, Parquet, Excel: `mmtransformer.data.formats.manifests` lists them.

    Splits. What the data says holds: a split column, folders train/, val/, test/, manifests named by split. Where it
    says none, or has no val, the pictures whose name hashes below `val_fraction` are val: a picture is always in the
    same split, whatever is added. (Should that leave train or val empty, one picture is moved.) A split of which
    not a single picture is there, other than train, is left out as a whole and noted.

    Languages. A caption column's name ("caption_ko") wins, then a language column, then the script: captions in
    Hangul are "ko". The others are `language`; without it "en" where the data also holds Korean or named languages,
    and None, no language at all, where it doesn't. Fewer than one caption in a hundred in the other script make no
    second language.

    Nothing is skipped in silence: a row with a missing picture, an empty caption (also "NA" or "null"), text that
    isn't UTF-8, or a path that leaves the root is counted in `report`, and more than `max_bad` of them are an error.

    Args:
        root: A folder, an archive, or one manifest.
        read: How it is read, such as the names of its columns, where that is not to be detected.
        max_bad: Share of rows that may be unusable; one always may, unless this is 0.

    Raises:
        ValueError: If there are no pairs, the format can't be told, a column isn't there, or too many rows are bad.
    """

    def __init__(self, root: str | Path, read: ReadOptions = ReadOptions(), *, max_bad: float = 0.01):
        check_share("max_bad", max_bad, whole=True)
        self.root = Path(root).expanduser()
        self.report, self._plain = Report(), read.plain
        files = Files(root, read.encoding)
        manifests = find_manifests(files, read.format, read.wanted)
        self._images_in = files if read.images is None or not manifests else Files(files.folder(read.images))
        rule = ""
        self._found: dict[Any, _Image] = {}
        self._missing: list[tuple[str | None, ManifestRow, str, str]] = []
        self._said: list[str] = []
        if manifests:
            listing = ", ".join(m.entry.path for m in manifests[:3])
            listing += f" and {len(manifests) - 3} more" if len(manifests) > 3 else ""
            for manifest in manifests:
                columns, rows = read_manifest(files, manifest, read.wanted)
                self._said = [f"{_title(manifest)} {listing}"]
                self._said += [str(columns)] if columns else []
                base = manifest.base if self._images_in is files else ""
                rows = list(rows)
                if (told := files.split_of(manifest.entry)) is not None:
                    rows, rule = [row._replace(split=told) for row in rows], "by its files"
                elif any(row.split for row in rows):
                    rule = f"by the column {columns.split}" if columns and columns.split else "as the file names them"
                self._add(rows, base, manifest.split)
                rule = rule or ("by the names of the files" if manifest.split else "")
        else:
            self._said = [_TITLES["folder"]]
            self._add(list(read_folder(files)), "", None)
            for path, reason in overlooked(files, (image.name for image in self._found.values())):
                self.report.note("a manifest that was not read", path, reason)
        self._count_missing()
        what = f"{self.root} ({self._said[0]})"
        if not self.report.rows:
            raise ValueError(f"{what} holds no pictures and no manifest with captions" + _also(files.refused))
        for path, reason in files.refused.items():
            self.report.note("file left out", path, reason)
        self.report.enforce(what, max_bad)
        found = [image for image in self._found.values() if image.captions]
        if not found and max_bad < 1:
            raise TooManyErrors(f"{what}: not one of {counted(self.report.rows, 'row')} can be used:\n{self.report}")
        if all(image.split is None for image in found):
            paths = [image.place.inner if isinstance(image.place, Entry) else image.name for image in found]
            for image, split in zip(found, folder_splits(paths), strict=True):
                image.split, rule = split, "by their folders" if split else rule
        self._normalize_names(found)
        self.languages: tuple[str, ...]
        self.languages, said = normalize_languages([image.captions for image in found], read.language)
        self._said.append(said)
        names, splits = [p.name for p in found], [p.split for p in found]
        often = Counter(names)
        for image in found:
            image.asked = (image.captions[0].question or "") if often[image.name] > 1 else ""
        members, said = normalize_splits(names, splits, read.val_fraction)
        self._said += [said] if said else []
        self._rule = rule
        self._splits = {split: [found[i] for i in some] for split, some in members.items()}
        del self._found, self._missing

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.describe()})"

    def splits(self) -> tuple[str, ...]:
        """The names of the splits that hold pictures: train, val, test, then any others."""
        return tuple(self._splits)

    def split(self, name: str) -> PairSplit:
        """One split.

        Raises:
            ValueError: If there is no such split; the message lists those there are.
        """
        return PairSplit(self._images_in, self._splits[find_split(name, self._splits, str(self.root))])

    def describe(self) -> str:
        """What was found: "CSV captions.csv: 120 pictures, 240 captions; columns ...; splits ...; languages ..."."""
        images = len({(image.name, split) for split, some in self._splits.items() for image in some})
        captions = sum(len(image.captions) for split in self._splits.values() for image in split)
        parts = [f"{self._said[0]}: {counted(images, 'picture')}, {counted(captions, 'caption')}", *self._said[1:]]
        if self._splits:
            parts.append(
                f"splits{f' {self._rule}' * bool(self._rule)}: "
                + ", ".join(f"{name} {len({image.name for image in split})}" for name, split in self._splits.items())
            )
        return "; ".join(parts)

    def _add(self, rows: list[ManifestRow], base: str, split: str | None) -> None:
        """Finds the pictures of a manifest's rows and counts what is wrong with them."""
        finder = Finder(self._images_in, base, (row.image for row in rows if row.image and row.key is None))
        for row in rows:
            if row.split == "unlisted":
                self.report.note("on none of the split lists, left out", row.where, row.image or "")
                continue
            self.report.rows += 1
            for cause, what in row.errors:
                self.report.error(cause, row.where, what)
            for note, what in row.notes:
                self.report.note(note, row.where, what)
            captions = plain_captions(row.captions, self._plain)
            if len(captions) < len(row.captions):
                self.report.error("empty caption", row.where, f"{row.captions[0].text[:60]!r} holds HTML alone")
            if row.image is None or not captions:
                continue
            if row.key is None:
                place, name = finder.find(row.image)
                if isinstance(place, str):
                    self._missing.append((row.split or split, row, place, name))
                    continue
                key = nfc(place.path)
            elif isinstance(row.key, Entry):
                place, name, key = row.key, row.key.inner, row.image
            else:
                place, name, key = row.key, row.image, row.where
            key = (key, captions[0].question)
            known = self._found.get(key)
            if known is None:
                self._found[key] = _Image(name, place, row.split or split, captions)
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

    def _count_missing(self) -> None:
        there = {image.split for image in self._found.values()} | {"train", None}
        for split, row, cause, what in self._missing:
            if split in there or not self._found:
                self.report.error(cause, row.where, what)
            else:
                self.report.rows -= 1
                self.report.note(f"split {split} has no pictures here, left out", row.where, what)

    @staticmethod
    def _normalize_names(images: list[_Image]) -> None:
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
    return "TSV" if plain_name(manifest.entry.path).endswith((".tsv", ".tab")) else _TITLES[manifest.format]


def _also(refused: dict[str, str]) -> str:
    return "".join(f"; {path}: {reason}" for path, reason in list(refused.items())[:5])
