"""Users' own pictures and captions: `PairFiles` reads a folder, CSV, JSONL, COCO, Karpathy or Parquet in place."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

from mmtransformer.data.files.archives import Files, remedy
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.normalize import find_split
from mmtransformer.data.files.read_options import ReadOptions, check_share
from mmtransformer.data.loading.source import Caption, Contents
from mmtransformer.data.pair_files.index import open_found
from mmtransformer.data.pair_files.reading import Found
from mmtransformer.data.pair_files.rows import Pair, PairRows
from mmtransformer.images import ImageError, load
from mmtransformer.images.sizes import stored_size
from mmtransformer.serialization.printable import counted


class PairSplit:
    """One split of `PairFiles`: pictures by index, each with its captions. Can be pickled for loader workers.

    A picture of which several things are asked stands here once a question.
    """

    def __init__(self, files: Files, rows: PairRows, members: Sequence[int] | np.ndarray, name: str = ""):
        self._files, self._rows, self._members, self._name = files, rows, members, name

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self._members)

    @property
    def contents(self) -> Contents | None:
        """What tells these pairs from others; None where there is no index."""
        if (whole := self._rows.contents) is None:
            return None
        some = self._members
        said = f"{whole.checksum} {some if isinstance(some, range) else crc32(np.ascontiguousarray(some).data)}"
        return Contents(f"{whole.name}-{self._name}", said)

    def _row(self, i: int) -> Pair:
        return self._rows[int(self._members[i])]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({counted(len(self), 'picture')}, by index: image(i), captions(i), name(i))"

    def name(self, i: int) -> str:
        """The name of picture i, as its manifest gives it; behind it the question where there are several."""
        row = self._row(i)
        return f"{row.name}?{row.asked}" if row.asked else row.name

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
        row = self._row(i)
        place = row.place
        label = place.path if isinstance(place, Entry) else row.name
        try:
            data = self._files.read(place) if isinstance(place, Entry) else place[0].read(*place[1:])
        except (OSError, ValueError) as error:
            said = str(error).removeprefix(f"{label}: ")
            raise ImageError(f"{label}: can't be read ({said}); {remedy(error)}") from error
        if data is None:
            raise ImageError(f"{label}: the table holds no bytes in this row")
        return data, label

    def captions(self, i: int) -> list[Caption]:
        """All captions of picture i."""
        return list(self._row(i).captions)

    def without_follow_ups(self) -> "PairSplit":
        """The split without answers behind earlier turns, which mean nothing to a model that reads no prompts."""
        members = np.asarray(self._members)
        kept = members[~self._rows.follow_ups()[members]]
        return self if len(kept) == len(members) else PairSplit(self._files, self._rows, kept, f"{self._name}-first")

    def fingerprint(self, i: int) -> str:
        """What changes when the bytes of picture i do: its checksum or its file's time, at the cost of no reading."""
        place = self._row(i).place
        if isinstance(place, Entry):
            return self._files.fingerprint(place)
        try:
            return hashlib.sha256(place[0].read(*place[1:]) or b"").hexdigest()
        except (OSError, ValueError):
            return "unreadable"


class PairFiles:
    """Pictures with captions as people keep them, read in place, in folders, zips and tars.

    The format is detected, and `describe()` says it: pictures with a .txt each, CSV or TSV, JSONL, JSON, COCO
    captions, Karpathy's JSON, Flickr8k's token file, Multi30k's lists, Parquet, Excel:
    `mmtransformer.data.formats.manifests` lists them.

    Splits. What the data says holds: a split column, folders train/, val/, test/, manifests named by split. Where it
    says none, or has no val, the pictures whose name hashes below `val_fraction` are val: a picture is always in the
    same split, whatever is added. (Should that leave train or val empty, one picture is moved.) A split of which
    not a single picture is there, other than train, is left out as a whole and noted.

    Languages. A caption column's name ("caption_ko") wins, then a language column, then the script: captions in
    Hangul are "ko". The others are `default_language`; without it "en" where the data also holds Korean or named
    languages, and None, no language at all, where it doesn't. Fewer than one caption in a hundred in the other script
    make no second language.

    Nothing is skipped in silence: a row with a missing picture, an empty caption (also "NA" or "null"), text that
    isn't UTF-8, or a path that leaves the root is counted in `report`, and more than `max_bad_fraction` of them are an
    error.

    Of 20,000 pairs and more an index is kept in the user's cache (`$XDG_CACHE_HOME/mmtransformer/pairs`, or below
    `~/.cache`), by which they open again at once, as long as manifests, texts, archives and folders have the sizes and
    times that they had (`Snapshot`). It changes no answer.

    Args:
        root: A folder, an archive, or one manifest.
        read: How it is read, such as the names of its columns, where that is not to be detected.
        max_bad_fraction: Share of rows that may be unusable; one always may, unless this is 0.
        found: What is known of the root already; None = it is looked up in its index, or read.

    Raises:
        ValueError: If there are no pairs, the format can't be told, a column isn't there, or too many rows are bad.
    """

    def __init__(
        self,
        root: str | Path,
        read: ReadOptions = ReadOptions(),
        *,
        max_bad_fraction: float = 0.01,
        found: Found | None = None,
    ):
        check_share("max_bad_fraction", max_bad_fraction, whole=True)
        self.root = Path(root).expanduser()
        self._found = found or open_found(root, read, max_bad_fraction=max_bad_fraction)
        self.report, self.languages = self._found.report, self._found.languages
        self.report.enforce(f"{self.root} ({self._found.title})", max_bad_fraction)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.describe()})"

    def splits(self) -> tuple[str, ...]:
        """The names of the splits that hold pictures: train, val, test, then any others."""
        return tuple(self._found.splits)

    def split(self, name: str) -> PairSplit:
        """One split.

        Raises:
            ValueError: If there is no such split; the message lists those there are.
        """
        found, name = self._found, find_split(name, self._found.splits, str(self.root))
        return PairSplit(found.files, found.rows, found.splits[name], name)

    def describe(self) -> str:
        """What was found: "CSV captions.csv: 120 pictures, 240 captions; columns ...; splits ...; languages ..."."""
        left = ", ".join(f"{cause} {count:,}" for cause, count in self.report.errors.items())
        bad, rows = self.report.bad_rows, counted(self.report.rows, "row")
        return self._found.description + (f"; left out {bad:,} of {rows}: {left}" if bad else "")
