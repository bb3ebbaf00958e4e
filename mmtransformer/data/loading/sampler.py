"""The order of a run: a pure function of (seed, epoch), exact for any number of workers and processes.

Nothing here draws from a global random generator and nothing here remembers where a generator stood. Every random
choice is a hash, `mix(seed, epoch, index, ...)`, so it can be asked for again at any time, in any process: which
picture comes when, which of its captions, whether it is flipped, how it is cropped. The epoch travels with the index
(`Pick`), so that a worker which lives for many epochs is never a step behind.

    order = f(seed, epoch)         augmentation = f(seed, epoch, index)         place = number of pictures consumed
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mmtransformer.data.loading.workers import deaf

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def mix(*words: int | np.ndarray) -> np.ndarray:
    """Hash integers, or arrays of them, into uniform 64-bit words: the one source of randomness of the data.

    SplitMix64 (Steele, Lea and Flood 2014) in a sponge: one round a word. It is defined by arithmetic, so a seed gives
    the same run with any version of numpy or torch.

    Args:
        words: Integers or integer arrays that broadcast together; their order matters.

    Returns:
        An array of `uint64` of the broadcast shape.
    """
    state = np.array(0, np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            bits = np.asarray(word & _WORD if isinstance(word, int) else word).astype(np.uint64)
            z = (state ^ bits) + np.uint64(_GOLDEN)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = z ^ (z >> np.uint64(31))
    return state


def generator(*words: int) -> torch.Generator:
    """Make the random generator of one sample.

    Args:
        words: What the sample is: seed, epoch, index.

    Returns:
        A CPU generator of its own; the global one is untouched.
    """
    return torch.Generator().manual_seed(int(mix(*words)) >> 1)  # manual_seed takes 63 bits


class Pick(NamedTuple):
    """One picture of a batch, as it travels from the sampler to the dataset, in whatever process that is.

    Attributes:
        epoch: The epoch it is picked for.
        index: The picture's place in its split.
        counted: False for a filler: it keeps a process in step with the others in an uneven last batch, and none of
            its tokens is a target.
    """

    epoch: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    counted: bool = True


class Pool(Protocol):
    """Which pictures an epoch goes through, where it is not each of them once: a weighted mixture."""

    size: int
    """Pictures of every epoch."""

    def images(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's pictures, (size,), and for each how often it has come before, (size,): a pure function."""
        ...


class IndexSampler(Sampler[list[Pick]]):
    """Yields the batches of one process, as lists of `Pick`.

    All processes see one order of pictures, f(seed, epoch), cut into steps of `batch_size * world` pictures; a process
    takes every `world`-th picture of a step. So one process with batches of 8 and two processes with batches of 4 see
    the same steps. The last step of an epoch may be uneven: it is dealt out as evenly as it goes, and a process that
    gets nothing gets a filler (`Pick.counted` is False), so every process takes the same number of steps and every
    picture is seen exactly once.

    With `lengths`, pictures of similar caption length are put together: the shuffled order is cut into windows of
    `window` blocks, each window is sorted by length and cut into blocks, and the blocks are shuffled. The order depends
    on the size of a block, not on how a block is shared out.

    Args:
        num_images: Pictures in the split.
        batch_size: Pictures in a batch of one process.
        seed: Seed of the order.
        shuffle: Take a new order every epoch; otherwise the pictures come as they are, without grouping.
        lengths: From the epoch to the tokens of every picture, (num_pictures,); None does not group.
        pool: The pictures of each epoch, where they are not all of them once. A picture's `Pick.epoch` is then the
            number of times that it has come before, so that it is never cropped or captioned twice in the same way;
            `num_images` is the pool's size, and `lengths` gives those of the pool's pictures in their order.
        block: Pictures that stay together when grouping; a step (`batch_size * world`) unless told. Give the pictures
            of one optimizer step to make gradient accumulation see the same groups as one large batch.
        window: Blocks in which pictures are sorted by length. More gives less padding and less mixing.
        rank: This process, counted from 0.
        world: The number of processes.
        drop_last: Leave out the last step of an epoch if it is not full.

    Raises:
        ValueError: If the sizes cannot be: no picture, a rank past the world.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        lengths: Callable[[int], np.ndarray] | None = None,
        pool: Pool | None = None,
        block: int | None = None,
        window: int = 50,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1 picture")
        if not 0 <= rank < world:
            raise ValueError(f"rank ({rank}) must be from 0 to world - 1 ({world - 1})")
        self.step = batch_size * world
        if num_images < (self.step if drop_last else 1):
            raise ValueError(
                f"{num_images} pictures do not fill one step of {batch_size} x {world} processes; "
                f"use a smaller batch_size or drop_last=False"
                if num_images
                else "there are no pictures to sample from (0)"
            )
        if (block is not None and block < 1) or window < 1:
            raise ValueError(f"block ({block}) and window ({window}) must be at least 1")
        if pool is not None and (not shuffle or pool.size != num_images):
            raise ValueError(
                f"a pool of {pool.size} pictures needs num_pictures={pool.size} (not {num_images}) and shuffle"
            )
        self.num_images, self.batch_size, self.seed, self.shuffle = num_images, batch_size, seed, shuffle
        self.lengths, self.pool = lengths, pool
        self.block, self.window = block or self.step, window
        self.rank, self.world, self.drop_last = rank, world, drop_last
        self.epoch = 0
        self.start = 0  # pictures of this epoch that the next pass leaves out; only a resumed pass has any
        self.position = 0  # pictures of this epoch that all processes together have consumed
        self.begun: tuple[int, int] | None = (
            None  # an epoch that was begun with blocks of another size, and that size
        )

    @property
    def sampler(self) -> "IndexSampler":
        """Itself: Lightning calls `set_epoch` on `dataloader.batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; the epoch that one is in the middle of goes on where it was."""
        if epoch != self.epoch:
            self.epoch, self.start, self.position = epoch, 0, 0

    def order(self, epoch: int) -> np.ndarray:
        """All pictures (of the pool) in the order of an epoch, (num_pictures,): a pure function of (seed, epoch)."""
        if not self.shuffle:
            return np.arange(self.num_images)
        order = np.argsort(mix(self.seed, epoch, np.arange(self.num_images)), kind="stable")
        if self.lengths is None:
            return order
        block = self.begun[1] if self.begun and self.begun[0] == epoch else self.block
        lengths, size = self.lengths(epoch), block * self.window
        order = np.concatenate(
            [
                part[np.argsort(lengths[part], kind="stable")]
                for part in (order[i : i + size] for i in range(0, len(order), size))
            ]
        )
        full = len(order) // block  # the incomplete block stays last
        blocks = np.argsort(mix(self.seed, epoch, np.arange(full), 1), kind="stable")
        head = order[: full * block].reshape(full, block)[blocks]
        return np.concatenate([head.reshape(-1), order[full * block :]])

    def __iter__(self) -> Iterator[list[Pick]]:
        order = self.order(self.epoch)
        if self.pool is None:
            picks = np.stack([np.full(self.num_images, self.epoch), order], axis=1)
        else:
            index, epoch = self.pool.images(self.epoch)
            picks = np.stack([epoch, index], axis=1)[order]
        first, self.start = self.start, 0
        for start in range(first, self._end, self.step):
            step = picks[start : start + self.step].tolist()
            mine = [Pick(*pick) for pick in step[self.rank :: self.world]]
            yield mine or [Pick(*step[0], counted=False)]

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever one is in it."""
        return -(-self._end // self.step)

    @property
    def _end(self) -> int:
        return self.num_images - (self.num_images % self.step if self.drop_last else 0)

    def state_dict(self) -> dict[str, int]:
        """The place in the run, which is good for any number of processes and workers."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "num_images": self.num_images,
            "block": self.begun[1] if self.begun and self.begun[0] == self.epoch else self.block,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a place in a run.

        Raises:
            ValueError: If the state is of another order of pictures.
        """
        for key in ("seed", "num_images"):
            if state[key] != getattr(self, key):
                raise ValueError(
                    f"cannot resume: {key} was {state[key]} and is now {getattr(self, key)}, so the order of the "
                    f"pictures differs; use the data and seed of the run, or start a new one"
                )
        self.epoch, self.start, self.position = state["epoch"], state["position"], state["position"]
        self.begun = (state["epoch"], state.get("block", self.block))


class ResumableLoader(DataLoader):
    """A DataLoader over a `IndexSampler` that knows how far the run has got.

    What counts is what was handed out, not what the workers have prepared, so `state_dict` is exact at any batch.
    Iterating starts at the first `next`, not at `iter`, because Lightning calls `iter` before it sets the epoch. The
    global random generator is left alone.

    Args:
        dataset: A dataset that takes a `Pick`.
        sampler: Which batches.
        collate: From a list of samples to a batch.
        num_workers: Processes that load; 0 loads in this one. The batches are the same.
        pin_memory: Copy batches to page-locked memory, for a GPU.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: IndexSampler,
        collate: Callable[[list[Any]], Any],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        super().__init__(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=deaf,
            generator=torch.Generator().manual_seed(sampler.seed),
        )
        self.place = sampler

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        sampler = self.place
        epoch, position = sampler.epoch, sampler.start
        for batch in super().__iter__():
            position = min(position + sampler.step, sampler.num_images)
            if sampler.epoch == epoch:
                sampler.position = position
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The place after the batch that was handed out last."""
        return self.place.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batch that a state was taken at; see `IndexSampler.load_state_dict`."""
        self.place.load_state_dict(state)
