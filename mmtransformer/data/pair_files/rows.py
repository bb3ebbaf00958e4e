"""Rows of pairs, a picture with its captions each: in memory, as they are read; and out of an index on disk.

Shapes: n rows.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.names import nfc
from mmtransformer.data.formats.parquet import TableBytes
from mmtransformer.data.loading.source import Caption, Contents
from mmtransformer.serialization.mapped import Mapped
from mmtransformer.text.conversation import Conversation

TablePlace = tuple[TableBytes, int, int]  # row group, row


@dataclass(slots=True)
class Pair:
    """One picture with its captions.

    Args:
        name: Its name, as its manifest gives it.
        place: Where its bytes lie.
        captions: Its captions.
        asked: The question, where the same picture stands here with several.
    """

    name: str
    place: Entry | TablePlace
    captions: list[Caption]
    asked: str = ""


class PairRows(Protocol):
    """Pairs by number."""

    @property
    def contents(self) -> Contents | None:
        """What tells these rows from others, also in another process; None where nobody knows."""
        ...

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, i: int, /) -> Pair:
        """One of them."""
        ...

    def follow_ups(self) -> np.ndarray:
        """Which are answers behind earlier turns of a conversation, (n) bool."""
        ...


class RowsInMemory(list[Pair]):
    """Pairs as they were read."""

    contents = None

    def follow_ups(self) -> np.ndarray:
        """Which are answers behind earlier turns of a conversation, (n) bool."""
        return np.array([isinstance(row.captions[0].question, Conversation) for row in self], bool)


class RowsOnDisk:
    """Pairs of an index: each is a line of JSON among others, found by its place. Can be pickled.

    Args:
        kept: The index's file.
    """

    def __init__(self, kept: Mapped):
        self._kept = kept
        self.contents: Contents | None = Contents(kept.path.stem, kept.checksum)
        self._tables = [TableBytes(path, column) for path, column in kept.about["tables"]]
        self._inside: list[str] = kept.about["inside"]

    def __len__(self) -> int:
        """How many there are."""
        return len(self._kept["ends"])

    def __getitem__(self, i: int) -> Pair:
        """One of them."""
        ends = self._kept["ends"]
        line = self._kept["lines"][ends[i - 1] if i else 0 : ends[i]].tobytes()
        name, asked, place, captions = json.loads(line.decode("utf-8", "surrogatepass"))
        return Pair(name, self._place(place), [_caption(*caption) for caption in captions], asked)

    def follow_ups(self) -> np.ndarray:
        """Which are answers behind earlier turns of a conversation, (n) bool."""
        return self._kept["follow_ups"].astype(bool)

    def _place(self, place: Any) -> Entry | TablePlace:
        if isinstance(place, str):  # a file of its own
            return Entry(place, nfc(place))
        if len(place) == 3:
            table, group, row = place
            return self._tables[table], group, row
        inner, archive, *rest = place
        return Entry(self._inside[archive] + inner, inner, archive, *rest)


def arrays_of(rows: Sequence[Pair]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `RowsOnDisk` reads: arrays, and what else is to be known.

    Args:
        rows: The pairs, in order.
    """
    lines, ends = bytearray(), np.zeros(len(rows), np.int64)
    tables: dict[tuple[str, str], int] = {}
    inside: dict[int, str] = {}
    for i, row in enumerate(tqdm(rows, desc="writing the index", unit=" rows", leave=False, dynamic_ncols=True)):
        place: Any = row.place
        if not isinstance(place, Entry):
            table, group, number = place
            place = [tables.setdefault((table.path, table.column), len(tables)), group, number]
        elif place.archive < 0:
            place = place.path
        else:
            inside.setdefault(place.archive, place.path.removesuffix(place.inner))
            place = place[1:]
        said = [[text, language, _turns(asked)] for text, language, asked in row.captions]
        line = json.dumps([row.name, row.asked, place, said], ensure_ascii=False, separators=(",", ":"))
        lines += line.encode("utf-8", "surrogatepass")
        ends[i] = len(lines)
    arrays = {"lines": np.frombuffer(lines, np.uint8), "ends": ends}
    arrays["follow_ups"] = RowsInMemory(rows).follow_ups().astype(np.uint8)
    prefixes = [inside.get(archive, "") for archive in range(max(inside, default=-1) + 1)]
    return arrays, {"tables": list(tables), "inside": prefixes}


def _turns(question: str | None) -> Any:
    return list(question.turns) if isinstance(question, Conversation) else question


def _caption(text: str, language: str | None, asked: str | list[str] | None) -> Caption:
    return Caption(text, language, Conversation(asked) if isinstance(asked, list) else asked)
