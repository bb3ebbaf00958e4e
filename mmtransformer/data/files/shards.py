"""Tar shards in webdataset's format, map-style: any sample by its number, so resume is as exact as for files.

00017.jpg  00017.txt  00017.json  00018.jpg  ...          members that share a name are one sample
"""

import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from mmtransformer.data.files.archives import FileError, Files, Selection
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.normalize import find_split, normalize_languages, normalize_splits, plain_captions
from mmtransformer.data.files.read_options import Plain, check_share
from mmtransformer.data.files.tar_index import TEXTS, ShardError, ShardSample, read_index
from mmtransformer.data.files.text import SPLITS, split_word
from mmtransformer.data.loading.errors import Report, TooManyErrors
from mmtransformer.data.loading.source import Caption
from mmtransformer.images import ImageError, load
from mmtransformer.images.sizes import stored_size
from mmtransformer.serialization.printable import counted
from mmtransformer.serialization.untrusted import leads_out

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*)\}")
_MOST = 100_000  # shards that one pattern may stand for


class ShardSplit:
    """One split of `TarShards`: pictures by index, each with its captions. Can be pickled for loader workers."""

    def __init__(
        self, files: Files, times: Sequence[int], places: np.ndarray, names: list[str], captions: list[list[Caption]]
    ):
        self._files, self._times, self._places = files, list(times), places
        self._names, self._captions = names, captions

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self._names)

    def name(self, i: int) -> str:
        """The name of picture i: its shard and its key."""
        return self._names[i]

    def image(self, i: int) -> Image.Image:
        """Picture i as RGB.

        Raises:
            ImageError: If it can't be read or decoded; the message names the shard, the byte and the fault.
        """
        return self.scaled_image(i)

    def scaled_image(self, i: int, *, at_least: tuple[float, float] | None = None) -> Image.Image:
        """Picture i, which may be decoded smaller; see `at_least` of `mmtransformer.images.load`."""
        data, label = self._data(i)
        return load(data, name=label, at_least=at_least)

    def stored_size(self, i: int) -> tuple[int, int]:
        """Height and width of picture i, px, as it lies in its file; only the beginning of it is looked at.

        Raises:
            ImageError: If it can't be read; the message names the shard, the byte and the fault.
        """
        return stored_size(*self._data(i))

    def _data(self, i: int) -> tuple[bytes, str]:
        """The bytes of picture i's file, and what errors call it."""
        archive, offset, size = self._places[i].tolist()
        label = f"{self._names[i]} (byte {offset} of {self._files.archives[archive]})"
        try:
            return self._files.read(Entry(label, label, archive, offset, size, size)), label
        except FileError as error:
            said = str(error).removeprefix(f"{label}: ")
            raise ImageError(f"{label}: can't be read ({said}); has the shard changed since the run began?") from error

    def captions(self, i: int) -> list[Caption]:
        """All captions of picture i."""
        return list(self._captions[i])

    def fingerprint(self, i: int) -> str:
        """What changes when the bytes of picture i do: its shard's time, and its place."""
        archive, offset, size = self._places[i].tolist()
        return f"{self._times[archive]} {offset} {size}"


class TarShards:
    """Pictures with captions in tar shards, as webdataset and img2dataset write them: a `PairSource`.

    Shards are not streamed: an index of byte offsets, made once and kept beside each shard, gives any sample by its
    number. So shards are shuffled, mixed, resumed and shared among processes as single files are, sample by sample.

    A sample's picture is the member that ends like one (.jpg, .png, .webp ...). Its captions are in the first of
    `texts` that it has: lines of .txt or .caption (.ko.txt holds Korean ones), or "caption" or "captions" in .json.
    Members of other kinds are left alone: nothing is unpickled, nothing is executed, nothing is downloaded.

    Splits are told by the shards' names ("val-0003.tar", "val/0003.tar"), and where none says val, by a hash of the
    samples' keys; languages as in `PairFiles`. A sample that lacks a picture or a caption is counted in `report`.

    Args:
        shards: A tar, a folder of tars, a pattern ("data/train-{0000..0123}.tar", "data/*.tar"), or a list of these.
        cache_dir: Where indices are kept; as hidden files beside the shards unless told.
        texts: Endings of the members that hold captions; the first that a sample has counts.
        default_language: The language of captions that neither the data nor their script tells.
        normalize: What is done to captions, as `ReadOptions` has it.
        val_fraction: Share of the pictures for val where no name says one; 0 for no val.
        max_bad_fraction: Share of samples that may be unusable; one always may, unless this is 0.
        progress: Show a progress bar while shards are read for the first time.

    Raises:
        ValueError: If there are no shards or no samples, or too many of them are bad.
        ShardError: If a shard is damaged, cut short, compressed, or holds links, devices or hostile names.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        cache_dir: str | None = None,
        texts: Sequence[str] = TEXTS,
        default_language: str | None = None,
        normalize: Sequence[Plain] = (),
        val_fraction: float = 0.1,
        max_bad_fraction: float = 0.01,
        progress: bool = False,
    ):
        check_share("val_fraction", val_fraction)
        check_share("max_bad_fraction", max_bad_fraction, whole=True)
        told: dict[Path, str | None] = {}
        if isinstance(shards, Selection):
            told = {Path(shards, path): split for path, split in sorted(shards.splits.items())}
            self.paths = list(told)
        else:
            given = [shards] if isinstance(shards, str | Path) else shards
            self.paths = [path for one in given for path in find_shards(str(one))]
        self.report = Report()
        from tqdm import tqdm

        names, splits, captions, places = [], [], [], []
        titles = _titles(self.paths)
        bar = tqdm(self.paths, desc="index", unit=" shards", disable=not progress, leave=False)
        for archive, path in enumerate(bar):
            samples, unkept = read_index(path, None if cache_dir is None else Path(cache_dir).expanduser())
            if unkept:
                self.report.note("index not kept, so shards are read anew each time: name a cache_dir", unkept)
            split = told.get(path) or split_word(path.name) or SPLITS.get(path.parent.name.casefold())
            for sample in samples:
                self.report.rows += 1
                where = f"{path.name}:{sample.key}"
                found = self._choose(sample, where, texts, normalize)
                if found is not None:
                    names.append(f"{titles[archive]}/{sample.key}" if len(self.paths) > 1 else sample.key)
                    splits.append(split)
                    captions.append(found[0])
                    places.append((archive, *found[1]))
        given = shards if isinstance(shards, str | Path) else ", ".join(map(str, shards))
        what = f"{len(self.paths)} tar shard{'s' * (len(self.paths) > 1)} {given}"
        if not self.report.rows:
            raise ValueError(f"{what}: no samples in them")
        self.report.enforce(what, max_bad_fraction)
        if not names:
            raise TooManyErrors(f"{what}: not one of {counted(self.report.rows, 'sample')} can be used:\n{self.report}")
        self.languages: tuple[str, ...]
        self.languages, languages = normalize_languages(captions, default_language)
        members, shared = normalize_splits(names, splits, val_fraction)
        self._said = [what, f"{counted(len(names), 'picture')}, {counted(sum(map(len, captions)), 'caption')}"]
        self._said += [languages, *([shared] if shared else [])]
        files, times = Files.of_archives(self.paths), [path.stat().st_mtime_ns for path in self.paths]
        table = np.array(places, np.int64)
        self._splits = {
            split: ShardSplit(files, times, table[some], [names[i] for i in some], [captions[i] for i in some])
            for split, some in members.items()
        }

    def splits(self) -> tuple[str, ...]:
        """The names of the splits that hold pictures: train, val, test, then any others."""
        return tuple(self._splits)

    def split(self, name: str) -> ShardSplit:
        """One split.

        Raises:
            ValueError: If there is no such split; the message lists those there are.
        """
        return self._splits[find_split(name, self._splits, self._said[0])]

    def describe(self) -> str:
        """What was found: "2 tar shards data/*.tar: 120 pictures, 240 captions; ...; splits ..."."""
        splits = ", ".join(f"{name} {len(split)}" for name, split in self._splits.items())
        return "; ".join([": ".join(self._said[:2]), *self._said[2:], f"splits {splits}"])

    def _choose(
        self, sample: ShardSample, where: str, texts: Sequence[str], normalize: Sequence[Plain]
    ) -> tuple[list[Caption], tuple[int, int]] | None:
        """The captions and the picture's place of a sample; None if it can't be used, which is counted."""
        plain = [image for image in sample.images if "." not in image[0]] or sample.images
        if len(plain) != 1:
            cause = "several pictures" if plain else "no picture"
            self.report.error(cause, where, ", ".join(ending for ending, _, _ in plain))
            return None
        for note, what in sample.notes:
            self.report.note(note, where, what)
        captions: list[Caption] = []
        for kind in texts:
            for ending, found in sample.captions.items():
                captions += plain_captions(found, normalize) if ending.rpartition(".")[2] == kind else []
            if captions:
                break
        if not captions:
            for cause, what in sample.errors or [("no caption", "")]:
                self.report.error(cause, where, what)
            return None
        return captions, plain[0][1:]


def find_shards(pattern: str) -> list[Path]:
    """The tar files that a name, a folder or a pattern stands for, in the order of their names.

    Raises:
        ValueError: If it is a command or an address, or there is no such file.
    """
    if re.match(r"\s*pipe:", pattern):
        raise ValueError(f"{pattern[:80]!r} would run a command; shards are files: give their paths")
    if re.match(r"\s*\w+://", pattern):
        raise ValueError(f"{pattern[:80]!r} is an address, and nothing is downloaded: fetch the shards first")
    names = list(islice(_expand(pattern), _MOST + 1))
    if len(names) > _MOST:
        raise ValueError(f"{pattern[:80]!r} stands for more than {_MOST:,} shards")
    found: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(item for item in path.rglob("*.tar") if not item.name.startswith("."))
            if out := [item for item in inside if leads_out(item, path)]:
                raise ValueError(
                    f"{out[0]}: a link that leads out of {path}, to {out[0].resolve()}: name that folder, or the shards"
                )
            found += inside
        elif glob.has_magic(name) and not path.exists():
            found += sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207 (absolute ones too)
        else:
            found.append(path)
    if not found:
        raise ValueError(f"{pattern}: no .tar file there")
    missing = [path for path in found if not path.exists()]
    if missing:
        raise ValueError(
            f"{pattern}: {len(missing)} of {counted(len(found), 'shard')} do not exist; the first: {missing[0]}"
        )
    return found


def _expand(pattern: str) -> Iterator[str]:
    """A pattern with {0000..0123} or {a,b} written out, as the shell does."""
    match = _RANGE.search(pattern) or _CHOICE.search(pattern)
    if match is None:
        yield pattern
        return
    if match.re is _RANGE:
        first, last = int(match[1]), int(match[2])
        if not first <= last < first + _MOST:
            raise ValueError(f"{pattern}: {{{match[1]}..{match[2]}}} must go up, by fewer than {_MOST:,}")
        options = [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    else:
        options = match[1].split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    for option in options:
        yield from _expand(head + option + tail)


def _titles(paths: Sequence[Path]) -> list[str]:
    """A short name for each shard: its stem, or its path where stems come twice."""
    often = Counter(path.stem for path in paths)
    return [path.stem if often[path.stem] == 1 else str(path.with_suffix("")) for path in paths]


__all__ = ["ShardError", "ShardSplit", "TarShards", "find_shards"]
