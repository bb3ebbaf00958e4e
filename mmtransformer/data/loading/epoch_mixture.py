"""Which samples an epoch of a weighted mixture goes through: a pure function of (seed, epoch), as all else is.

Every part runs through its own shuffles, one after the other, and an epoch takes its share of that endless sequence:
so no picture of a part comes again before all others of the part had their turn, however small its weight, and a
resumed run needs no more memory than its place in the epoch.

    part k, epoch e:  places [e * quota_k, (e + 1) * quota_k) of  shuffle(seed, k, 0) + shuffle(seed, k, 1) + ...
"""

from collections.abc import Sequence

import numpy as np

from mmtransformer.data.loading.hashing import hash64
from mmtransformer.serialization.printable import counted


class EpochMixture:
    """Which members of the parts of a mixture an epoch goes through.

    Args:
        sizes: Members of each part; they are numbered through, part by part.
        weights: How much of an epoch comes from each part, in any unit; None = each in proportion to its size.
        epoch_size: Members of an epoch; None = as many as all parts together.
        seed: Seed of the shuffles.

    Attributes:
        size: Members of an epoch.
        quotas: How many of them come from each part.

    Raises:
        ValueError: If a part is empty, a weight isn't above 0, or a part would never come.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        epoch_size: int | None = None,
        seed: int = 0,
    ):
        weights = [float(size) for size in sizes] if weights is None else [float(w) for w in weights]
        if not sizes or min(sizes) < 1:
            raise ValueError(f"every part of a mixture needs a member, the sizes are {list(sizes)}")
        if len(weights) != len(sizes) or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"a mixture of {counted(len(sizes), 'part')} needs as many weights above 0, not {weights}")
        self.sizes, self.seed = tuple(sizes), seed
        self.size = sum(sizes) if epoch_size is None else epoch_size
        self.quotas = _shares(self.size, weights)
        if min(self.quotas) < 1:
            raise ValueError(
                f"an epoch of {self.size} gives the parts {list(self.quotas)}, so one of them never comes; raise its "
                f"weight (the weights are {weights}) or epoch_size"
            )
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])

    def samples(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's members (size,), part by part, and for each the shuffle of its part that it comes from (size,)."""
        index, turns = [], []
        for part, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            place = np.arange(epoch * quota, (epoch + 1) * quota)
            turn, place = place // size, place % size
            chosen = np.empty(quota, np.int64)
            for number in np.unique(turn):
                keys = hash64(self.seed, int(number), np.arange(size), part, 6)
                mine = turn == number
                chosen[mine] = np.argsort(keys, kind="stable")[place[mine]]
            index.append(chosen + self._offsets[part])
            turns.append(turn)
        return np.concatenate(index), np.concatenate(turns)


def _shares(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """`total` shared out by weight in whole numbers: rounded down, and the rest to the largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    rest = sorted(range(len(shares)), key=lambda k: (shares[k] - exact[k], k))[: total - sum(shares)]
    return tuple(share + (k in rest) for k, share in enumerate(shares))
