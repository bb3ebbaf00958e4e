"""Whether a run that goes on still has the data it had: check sums of each sample's texts and files.

A run is a function of its data too. A caption that was edited or a picture that was replaced between stop and resume
changes it, and nothing else would tell.

Shapes: n samples.
"""

import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmtransformer.serialization.printable import counted, printable

_MOST_FILES = 20_000  # that are asked for their size and time: on a network's disk each takes a moment


class Parts(NamedTuple):
    """What a split's samples are made of.

    Attributes:
        name: From a sample's number to its name.
        texts: What is learned from each sample beside pictures: captions, say, or its class.
        file: From a sample's number to what is another when its files are: their size and time, or their check sums.
        called: What samples are called, and their texts; "" where the texts are all there is of them.
        sums: The `text_sum` of each sample, (n), where they are known.
    """

    name: Callable[[int], str]
    texts: Sequence[Iterable[object]]
    file: Callable[[int], str] | None = None
    called: tuple[str, str] = ("pictures", "captions")
    sums: np.ndarray | None = None


def text_sum(name: str, said: Iterable[object]) -> int:
    """A check sum, 32 bits, of a sample's name and texts."""
    return zlib.crc32("\0".join([name, *map(str, said)]).encode("utf-8", "surrogatepass"))


def fingerprints(parts: Parts) -> Tensor:
    """What a split's data are now.

    Args:
        parts: The split.

    Returns:
        (n 2) int32: of texts and name, and of the files; the latter 0 where it was not asked for: of more than 20,000
        samples every second, third, ... is.
    """
    found = np.zeros((len(parts.texts), 2), np.uint32)
    step = max(-(-len(parts.texts) // _MOST_FILES), 1)
    sums, file = parts.sums, parts.file
    found[:, 0] = [text_sum(parts.name(i), said) for i, said in enumerate(parts.texts)] if sums is None else sums
    if file is not None:
        found[::step, 1] = [zlib.crc32(file(i).encode()) for i in range(0, len(found), step)]
    return torch.from_numpy(found.view(np.int32))


def changes(was: Tensor, now: Tensor, parts: Parts) -> str:
    """What has changed, in words; "" if nothing has.

    Args:
        was: What `fingerprints` gave for a split.
        now: What it gives now.
        parts: The split, for names.
    """
    samples, texts = parts.called
    if was.shape != now.shape:
        return f"{len(was)} {samples} have become {len(now)}"
    other = (was != now).numpy()
    said = []
    for column, what in ((0, texts), (1, "files")):
        places = np.flatnonzero(other[:, column])
        if len(places):
            names = ", ".join(parts.name(int(i)) for i in places[:3]) + (", ..." if len(places) > 3 else "")
            count = counted(len(places), samples.removesuffix("s"), samples)
            said.append(f"{f'the {what} of ' if what else ''}{count} ({names})")
    return " and ".join(said)


def tell_changes(was: Tensor, now: Tensor, parts: Parts, split: str, dataset: Callable[..., Any] | None) -> None:
    """Warns of what has changed in a split, or refuses to go on where the order of its samples has.

    Args:
        was: What `fingerprints` gave for it.
        now: What it gives now.
        parts: The split.
        split: Its name.
        dataset: What gives the split's samples, where an epoch takes each of them once.

    Raises:
        ValueError: If it does, and there is another number of them.
    """
    if not (said := changes(was, now, parts)):
        return
    if len(was) != len(now) and dataset is not None and len(dataset(split, training=True)) == len(now):
        raise ValueError(
            f"cannot resume: the run had {len(was):,} {parts.called[0]} in {split!r}, and there are now {len(now):,}. "
            f"Use its data, languages and seed (config.yaml in its folder names them), or start a new run, without "
            f"--resume"
        )
    warnings.warn(
        f"the data have changed since the run was saved: {printable(said)} of {split!r}. The run goes on with what is "
        f"there now, and is no longer the one that it would have been",
        stacklevel=3,
    )
