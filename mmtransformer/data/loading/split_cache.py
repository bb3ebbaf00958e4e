"""What data compute once for each split."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar


class Keeps(Protocol):
    """Has a place for what was computed."""

    _kept: dict[tuple[str, str], Any]


Own = TypeVar("Own", bound=Keeps)
Made = TypeVar("Made")


def once_a_split(make: Callable[[Own, str], Made]) -> Callable[[Own, str], Made]:
    """Lets a method of `DataModule` be computed once for each split; `DataModule.forget` forgets all that was."""

    @functools.wraps(make)
    def kept(self: Own, split: str) -> Made:
        key = (make.__name__, split)
        if key not in self._kept:
            self._kept[key] = make(self, split)
        return self._kept[key]

    return kept
