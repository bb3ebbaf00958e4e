"""Whether a run that goes on still has the data it had: check sums of each picture's captions and file.

A run is a function of its data too. A caption that was edited or a picture that was replaced between stop and resume
changes it, and nothing else would tell.

Shapes: n pictures.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from mmtransformer.data.loading.source import Caption, Pairs

_MOST_FILES = 20_000  # that are asked for their size and time: on a network's disk each takes a moment


def traces(pairs: Pairs, captions: Sequence[Iterable[Caption]]) -> Tensor:
    """What a split's data are now.

    Args:
        pairs: The pictures; with a method `fingerprint(i) -> str` it tells when a file has changed: by its size and
            time, or its check sum in an archive.
        captions: The captions of each.

    Returns:
        (n 2) int32: of captions and name, and of the file; the latter 0 where it was not asked for: of more than 20,000
        pictures every second, third, ... is.
    """
    found = np.zeros((len(captions), 2), np.uint32)
    fingerprint: Callable[[int], str] | None = getattr(pairs, "fingerprint", None)
    step = -(-len(captions) // _MOST_FILES)
    for i, said in enumerate(captions):
        text = "\0".join([pairs.name(i), *(str(part) for caption in said for part in caption)])
        found[i, 0] = zlib.crc32(text.encode("utf-8", "surrogatepass"))
        if fingerprint is not None and i % step == 0:
            found[i, 1] = zlib.crc32(fingerprint(i).encode())
    return torch.from_numpy(found.view(np.int32))


def changes(was: Tensor, now: Tensor, pairs: Pairs) -> str:
    """What has changed, in words; "" if nothing has.

    Args:
        was: What `traces` gave for a split.
        now: What it gives now.
        pairs: The split, for names.
    """
    if was.shape != now.shape:
        return f"{len(was)} pictures have become {len(now)}"
    other = (was != now).numpy()
    said = []
    for column, what in ((0, "captions"), (1, "files")):
        places = np.flatnonzero(other[:, column])
        if len(places):
            names = ", ".join(pairs.name(int(i)) for i in places[:3]) + (", ..." if len(places) > 3 else "")
            said.append(f"the {what} of {len(places)} pictures ({names})")
    return " and ".join(said)
