"""The order of a run: a pure function of (seed, epoch), exact for any number of workers and processes.

Every random choice is a hash, `hash64(seed, epoch, index, ...)`, so it can be asked for again at any time, in any
process: which sample comes when, which of its captions, whether it is flipped, how it is cropped. The epoch travels
with the index (`SampleIndex`), so that a worker which lives for many epochs is never a step behind.

    order = f(seed, epoch)         augmentation = f(seed, epoch, index)         place = number of samples consumed
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from mmtransformer.data.loading.budget import PatchBudget
from mmtransformer.data.loading.epoch_mixture import EpochMixture
from mmtransformer.data.loading.hashing import hash64, hash64_range
from mmtransformer.data.loading.workers import ignore_signals
from mmtransformer.serialization.printable import counted


def processes() -> tuple[int, int]:
    """This process's rank and the number of processes of torch.distributed's group; 0 and 1 where there is none."""
    grouped = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)


class SampleIndex(NamedTuple):
    """One sample of a batch, as it travels from the sampler to the dataset, in whatever process that is.

    Attributes:
        epoch: The epoch it is taken in.
        index: The sample's place in its split.
        is_real: False for a padding sample: it keeps a process in step with the others in an uneven last batch, and
            none of its tokens has a loss.
    """

    epoch: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    is_real: bool = True


class IndexSampler(Sampler[list[SampleIndex]]):
    """Yields the batches of one process, as lists of `SampleIndex`.

    All processes see one order of samples, f(seed, epoch), cut into steps of `batch_size * world` samples; a process
    takes every `world`-th sample of a step. So one process with batches of 8 and two processes with batches of 4 see
    the same steps. The last step of an epoch may be uneven: its samples are shared out as evenly as possible, and a
    process that gets none gets a padding sample (`SampleIndex.is_real` is False), so every process takes the same
    number of steps and every sample is seen exactly once.

    With `lengths`, samples of similar length are put together: the shuffled order is cut into windows of `window`
    blocks, each window is sorted by length and cut into blocks, and the blocks are shuffled. The order depends on the
    size of a block, not on how a block is shared out.

    Args:
        num_samples: Samples in the split.
        batch_size: Samples in a batch of one process.
        seed: Seed of the order.
        shuffle: Take a new order every epoch; otherwise the samples come as they are, without grouping.
        lengths: From the epoch to the tokens of every sample, (num_samples,); None does not group.
        mixture: The samples of each epoch, where they are not all of them once. A sample's `SampleIndex.epoch` is then
            the number of times that it has come before, so that it is never cropped or captioned twice in the same way;
            `num_samples` is the mixture's size, and `lengths` gives those of its samples in their order.
        repeat: Whether every epoch is the first one again, with its samples, captions and crops: for overfitting.
        group_size: So many neighbours, as the samples lie in the split, stay side by side in the shuffled order: a
            batch then holds samples that are hard to tell apart, where neighbours are. Batches that it does not
            divide cut some runs in two.
        block: Samples that stay together when grouping; a step (`batch_size * world`) unless told. Give the samples
            of one optimizer step to make gradient accumulation see the same groups as one large batch.
        window: Blocks in which samples are sorted by length. More gives less padding and less shuffling.
        rank: This process, counted from 0.
        world: The number of processes.
        drop_last: Leave out the last step of an epoch if it is not full.
        budget: Fills batches up to so many patches, in place of `batch_size` samples; all steps are then about full.

    Raises:
        ValueError: If the sizes cannot be: no sample, a rank past the world.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        lengths: Callable[[int], np.ndarray] | None = None,
        mixture: EpochMixture | None = None,
        repeat: bool = False,
        group_size: int = 1,
        block: int | None = None,
        window: int = 50,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        budget: PatchBudget | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1 sample")
        if not 0 <= rank < world:
            raise ValueError(f"rank ({rank}) must be from 0 to world - 1 ({world - 1})")
        self.step = batch_size * world
        if num_samples < (self.step if drop_last else 1):
            raise ValueError(
                f"{counted(num_samples, 'sample')} cannot fill one step of {batch_size} x {world} processes; "
                f"use a smaller batch_size or drop_last=False"
                if num_samples
                else "there are no samples to take (0)"
            )
        if (block is not None and block < 1) or window < 1:
            raise ValueError(f"block ({block}) and window ({window}) must be at least 1")
        if mixture is not None and (not shuffle or mixture.size != num_samples):
            raise ValueError(
                f"a mixture of {mixture.size} samples needs num_samples={mixture.size} (not {num_samples}) and shuffle"
            )
        if group_size < 1 or (group_size > 1 and mixture is not None):
            raise ValueError(f"group_size ({group_size}) must be at least 1, and 1 beside a mixture")
        self.num_samples, self.batch_size, self.seed, self.shuffle = num_samples, batch_size, seed, shuffle
        self.group_size = group_size
        self.lengths, self.mixture, self.repeat = lengths, mixture, repeat
        self.block, self.window = block or self.step, window
        if budget is not None and (mixture is not None or len(budget.sizes) != num_samples):
            raise ValueError(
                f"a budget of patches for {len(budget.sizes)} samples is not for {num_samples}"
                if mixture is None
                else "a budget of patches is not for a mixture, whose epochs have different samples"
            )
        self.rank, self.world, self.drop_last, self.budget = rank, world, drop_last, budget
        self.epoch = 0
        self.start = 0  # samples of this epoch that the next pass leaves out; only a resumed pass has any
        self.position = 0  # samples of this epoch that all processes together have consumed
        self.passed = False  # whether a pass over this epoch has come to its end since `set_epoch`
        # an epoch that was begun with blocks of another size, and that size
        self.begun: tuple[int, int] | None = None

    @property
    def sampler(self) -> "IndexSampler":
        """Itself: Lightning calls `set_epoch` on `dataloader.batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; the epoch that one is in the middle of goes on where it was."""
        self.passed = False
        if epoch != self.epoch:
            self.epoch, self.start, self.position = epoch, 0, 0

    def order(self, epoch: int) -> np.ndarray:
        """All samples (of the mixture) in the order of an epoch, (num_samples,): a pure function of (seed, epoch)."""
        if not self.shuffle:
            return np.arange(self.num_samples)
        together = self.group_size
        runs = self.num_samples // together  # what is left over comes last
        order = np.argsort(hash64_range(runs, self.seed, epoch), kind="stable")
        if self.lengths is not None:
            block = self.begun[1] if self.begun and self.begun[0] == epoch else self.block
            longest = self.lengths(epoch)[: runs * together]
            longest = longest if together == 1 else longest.reshape(runs, together).max(1)
            order = self._grouped(order, longest, max(block // together, 1), epoch)
        if together == 1:
            return order
        kept = order[:, None] * together + np.arange(together)
        return np.concatenate([kept.reshape(-1), np.arange(runs * together, self.num_samples)])

    def _grouped(self, order: np.ndarray, lengths: np.ndarray, block: int, epoch: int) -> np.ndarray:
        size = block * self.window
        windows = (order[i : i + size] for i in range(0, len(order), size))
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in windows])
        full = len(order) // block  # the incomplete block stays last
        blocks = np.argsort(hash64(self.seed, epoch, np.arange(full), 1), kind="stable")
        head = order[: full * block].reshape(full, block)[blocks]
        return np.concatenate([head.reshape(-1), order[full * block :]])

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        first, self.start = self.start, 0  # when the first batch is asked for: a loader makes iterators it never reads
        yield from self.batches(first)

    def batches(self, first: int) -> Iterator[list[SampleIndex]]:
        """This process's batches of the epoch behind so many samples."""
        epoch = 0 if self.repeat else self.epoch
        index, times = (None, None) if self.mixture is None else self.mixture.samples(epoch)
        order = self.order(epoch)
        for end in self.ends(first, order):
            step, first = order[first:end], int(end)
            mine = step[self.rank :: self.world] if self.budget is None else self.budget.deal(step, self.rank)
            found = mine if len(mine) else step[:1]
            yield [
                SampleIndex(
                    epoch if times is None else int(times[i]), int(i if index is None else index[i]), len(mine) > 0
                )
                for i in found
            ]

    def ends(self, first: int, order: np.ndarray | None = None) -> np.ndarray:
        """How many samples of the epoch have come by the end of each step that follows so many.

        Args:
            first: How many have come.
            order: Of the epoch; that of the current one unless told.
        """
        if self.budget is None:
            return np.minimum(np.arange(first, self._end, self.step) + self.step, self.num_samples)
        ends = self.budget.ends(self.order(0 if self.repeat else self.epoch) if order is None else order)
        return ends[ends > first]

    def steps_before(self, first: int) -> int:
        """How many steps of this size the first so many samples of the epoch are, a part of one counted whole."""
        return -(-first // self.step) if self.budget is None else self.budget.steps - len(self.ends(first))

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever one is in it."""
        return -(-self._end // self.step) if self.budget is None else self.budget.steps

    @property
    def _end(self) -> int:
        return self.num_samples - (self.num_samples % self.step if self.drop_last else 0)

    def state_dict(self) -> dict[str, int]:
        """The place in the run, which is good for any number of processes and workers."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "num_samples": self.num_samples,
            "group_size": self.group_size,
            "block": self.begun[1] if self.begun and self.begun[0] == self.epoch else self.block,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a place in a run.

        Raises:
            ValueError: If the state is of another order of samples.
        """
        state = {"group_size": 1, **state}
        for key, what in (
            ("seed", "the data's seed"),
            ("num_samples", "the number of samples in an epoch"),
            ("group_size", "loader.group_size"),
        ):
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"cannot resume: {what} was {state[key]} and is now {getattr(self, key)}, so the order of the "
                    f"samples differs; use the data, languages and seed of the run, or start a new one"
                )
        self.epoch, self.start, self.position = state["epoch"], state["position"], state["position"]
        self.passed = False
        self.begun = (state["epoch"], state.get("block", self.block))


class LoadingError(ValueError):
    """The workers that load give no batch any more; the message names the samples that were awaited."""


class ResumableLoader(DataLoader):
    """A DataLoader over a `IndexSampler` that knows how far the run has got.

    What counts is what was handed out, not what the workers have prepared, so `state_dict` is exact at any batch.
    Iterating starts at the first `next`, not at `iter`, because Lightning calls `iter` before it sets the epoch. Where
    nobody sets it, as in a plain loop, every pass over shuffled samples is the next epoch. The global random generator
    is left alone.

    Args:
        dataset: A dataset that takes a `SampleIndex`.
        sampler: Which batches.
        collate: From a list of samples to a batch.
        num_workers: Processes that load; 0 loads in this one. The batches are the same.
        timeout: Most seconds to wait for them; 0 waits for ever.
        pin_memory: Copy batches to page-locked memory, for a GPU.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: IndexSampler,
        collate: Callable[[list[Any]], Any],
        *,
        num_workers: int = 0,
        timeout: float = 0.0,
        pin_memory: bool = False,
    ):
        if num_workers < 0:
            raise ValueError(f"loader.num_workers ({num_workers}) must be at least 0, the run's own process")
        super().__init__(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            timeout=timeout if num_workers else 0,
            pin_memory=pin_memory,
            worker_init_fn=ignore_signals,
            generator=torch.Generator().manual_seed(sampler.seed),
        )
        self.place = sampler
        self.waiting = False
        """Whether the run stands still until the next batch is there."""

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sampler = self.place
        if sampler.shuffle and sampler.passed:
            sampler.set_epoch(sampler.epoch + 1)
        epoch, position = sampler.epoch, sampler.start
        ends = iter(sampler.ends(position).tolist())
        batches = super().__iter__()
        while True:
            self.waiting = True
            try:
                batch = next(batches)
            except StopIteration:
                sampler.passed = sampler.passed or sampler.epoch == epoch
                return
            except RuntimeError as error:
                if found := re.match(r"DataLoader (timed out|worker \(pid\S* (.*?)\) )", str(error)):
                    raise LoadingError(self._lost(position, found[2])) from error
                raise
            finally:
                self.waiting = False
            position = next(ends)
            if sampler.epoch == epoch:
                sampler.position = position
            yield batch

    def _lost(self, position: int, worker: str | None) -> str:
        """Which batch does not come, and why."""
        awaited, name = next(self.place.batches(position), []), getattr(self.dataset, "name", None)
        names = [name(sample.index) if name else f"sample {sample.index}" for sample in awaited]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        if worker is None:
            why = f"no batch came in {self.timeout:g} s (data.loader.timeout), from a dead disk, say"
        else:
            why = f"a loading worker (process {worker}) was killed: by the kernel, say, as memory was short"
        return f"{why}; awaited: {shown}. The run goes on with --resume"

    def state_dict(self) -> dict[str, int]:
        """The place after the batch that was handed out last."""
        return self.place.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batch that a state was taken at; see `IndexSampler.load_state_dict`."""
        self.place.load_state_dict(state)
