"""Pairs of a data set on the hub, of which the files of a split are fetched when it is asked for."""

import dataclasses
import sys
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from mmtransformer.data.files.archives import Selection
from mmtransformer.data.files.normalize import find_split, split_order
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.files.text import SPLITS
from mmtransformer.data.formats.columnar import holds_images
from mmtransformer.data.formats.parquet import COLUMNAR, require_pyarrow
from mmtransformer.data.hub_splits import Chosen, choose_files, may_be_pairs
from mmtransformer.data.loading.errors import Report
from mmtransformer.data.loading.source import Pairs
from mmtransformer.serialization.hub_dataset import HubDataset
from mmtransformer.serialization.printable import say

Opened = TypeVar("Opened")


def open_dataset(
    dataset: HubDataset,
    read: ReadOptions,
    open_files: Callable[[Selection, ReadOptions], Opened],
    *,
    below: str = "",
    splits: Collection[str] | None = None,
) -> "Opened | HubPairs":
    """Opens a subset of a data set.

    Args:
        dataset: What there is.
        read: How its files are read, and which subset.
        open_files: Opens those of them that were fetched.
        below: A folder, a file or a pattern that is wanted alone.
        splits: What is going to be asked for first, or at all; None = all splits.

    Returns:
        `HubPairs` where the data set's card, or names, tell the splits; otherwise all its files, opened at once.

    Raises:
        ValueError: If there is nothing of that name, or several subsets and none is the default.
    """
    if not any(map(may_be_pairs, dataset.files)):
        why = (
            f"; a program makes them, and it is not run: the hub may have done so, see "
            f"hf://datasets/{dataset.name}@refs/convert/parquet"
        )
        raise ValueError(f"{dataset.name}: no files with pictures or captions{why if dataset.programs else ''}")
    files, said = choose_files(dataset.name, dataset.files, dataset.configs, below=below, subset=read.subset)
    if dataset.partial and not below:
        dataset.refuse_parts(files)
    if said:
        say(f"{dataset.name}: {said}", file=sys.stderr)
    if any(files.values()):
        return HubPairs(dataset, files, read, open_files, splits)
    return open_files(_fetched(dataset, files), read)


class HubPairs:
    """A data set on the hub whose splits are known before anything is fetched: a `PairSource`.

    The splits that are asked for first are fetched and read together, any other one when it is asked for. Where there
    is no val, it is made of train, as `PairFiles` does.

    Args:
        dataset: What there is.
        files: What is read of it, each file with its split, or None if all splits need it.
        read: How they are read.
        open_files: Opens those of them that were fetched.
        splits: The splits that are read together; None = all.

    Attributes:
        languages: The languages of the captions of the splits that were asked for first.
        report: What is wrong with these.
    """

    def __init__(
        self,
        dataset: HubDataset,
        files: Chosen,
        read: ReadOptions,
        open_files: Callable[[Selection, ReadOptions], Any],
        splits: Collection[str] | None,
    ):
        self._dataset, self._files, self._read, self._open_files = dataset, files, read, open_files
        told = {split for split in files.values() if split}
        self._hashed = "train" in told and "val" not in told and read.val_fraction > 0  # val is a part of train
        self._names = tuple(sorted(told | ({"val"} if self._hashed else set()), key=split_order))
        asked = None if splits is None else {SPLITS.get(name.casefold(), name) for name in splits} | {*splits}
        first = [name for name in self._names if asked is None or name in asked]
        if not first:  # before anything is fetched
            find_split(next(iter(splits or [""])), self._names, dataset.name)
        self._opened: dict[str, Any] = {}  # by split; those that were read together have one source
        self._main = self._open(first)
        self.languages: tuple[str, ...] = self._main.languages
        self.report: Report | None = getattr(self._main, "report", None)

    def splits(self) -> tuple[str, ...]:
        """The names of the splits there are: train, val, test, then any others."""
        return self._names

    def split(self, name: str) -> Pairs:
        """One split, which is fetched if it is not here.

        Raises:
            ValueError: If there is no such split; the message lists those there are.
        """
        name = find_split(name, self._names, self._dataset.name)
        return (self._opened.get(name) or self._open([name])).split(name)

    def describe(self) -> str:
        """What was found in the splits that were asked for first."""
        return f"{self._dataset.name}: {self._main.describe()}"

    def _open(self, names: Collection[str]) -> Any:
        read, wanted = self._read, {*names}
        if self._hashed and wanted & {"train", "val"}:
            wanted |= {"train", "val"}
        elif not self._hashed:  # the val there is may not be read with train
            read = dataclasses.replace(read, val_fraction=0.0)
        if (
            self._opened and read.default_language is None and (known := self.languages)
        ):  # what is said of the first holds
            read = dataclasses.replace(read, default_language="en" if "en" in known else known[0])
        files = {file: split for file, split in self._files.items() if split in (None, *wanted)}
        source = self._open_files(_fetched(self._dataset, files), read)
        self._opened |= dict.fromkeys(wanted, source)
        return source


def _fetched(dataset: HubDataset, files: Chosen) -> Selection:
    """Some files, once they are here; pictures beside tables that hold their own are left where they are."""
    if tables := {file: split for file, split in files.items() if file.lower().endswith(COLUMNAR)}:
        require_pyarrow(dataset.name)
        if len(tables) < len(files) and holds_images(dataset.fetch(tables) / next(iter(tables))):
            files = tables
    return Selection(dataset.fetch(files), files)
