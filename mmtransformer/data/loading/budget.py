"""Steps of about as many patches each, where pictures have sizes of their own: as many pictures as there is room for.

Shapes: n samples.
"""

import numpy as np


class PatchBudget:
    """Cuts the order of an epoch into steps, and a step into the batches of processes.

    Every epoch has the same number of steps, and each sample stands in exactly one of them: the order is cut where the
    sum of patches passes the next multiple of one share, which leaves room for the sample that passes it. So no step is
    larger than the budget, and none is empty.

    Args:
        sizes: Patches of every sample, (n,).
        per_batch: The most patches of a batch of one process.
        world: The number of processes; they share a step of `per_batch * world` patches.

    Raises:
        ValueError: If there is no room in a batch for three of the largest sample.
    """

    def __init__(self, sizes: np.ndarray, per_batch: int, world: int = 1) -> None:
        largest, total = int(sizes.max()), int(sizes.sum())
        if per_batch < 3 * largest:  # With less, some steps could be empty.
            raise ValueError(
                f"batches of {per_batch} patches (loader.max_patches_per_batch) are too small for pictures of up to "
                f"{largest}: allow {3 * largest} at least, or fewer patches a picture (native.max_num_patches)"
            )
        self.sizes, self.world, self._total = sizes, world, total
        self.steps = -(-total // (per_batch * world - largest))

    def ends(self, order: np.ndarray) -> np.ndarray:
        """Where each step of an order of all samples ends: how many samples have come by then, (steps,)."""
        before = np.cumsum(self.sizes[order]) - self.sizes[order]
        return np.searchsorted(before * self.steps // self._total, np.arange(self.steps), side="right")

    def deal(self, samples: np.ndarray, rank: int) -> np.ndarray:
        """The samples of a step that one process takes, in their order: patches are shared out as evenly as can be.

        The largest goes first, each to the process with the fewest patches: none has more than its share of the step
        and one sample.
        """
        if self.world == 1:
            return samples
        load, taken = np.zeros(self.world, np.int64), np.zeros(len(samples), np.int64)
        for i in np.argsort(-self.sizes[samples], kind="stable"):
            taken[i] = least = int(load.argmin())
            load[least] += self.sizes[samples[i]]
        return samples[taken == rank]
