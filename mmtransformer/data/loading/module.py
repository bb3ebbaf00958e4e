"""DataModule: what every data module is. One of your own says what a sample is, and how samples become a batch.

The batches are a pure function of (seed, epoch), the same for any number of workers and processes; see `sampler`.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmtransformer.data.loading.budget import PatchBudget
from mmtransformer.data.loading.epoch_mixture import EpochMixture
from mmtransformer.data.loading.errors import BadImages
from mmtransformer.data.loading.fingerprints import Parts, fingerprints, tell_changes
from mmtransformer.data.loading.sampler import IndexSampler, ResumableLoader, processes
from mmtransformer.data.loading.source import splits_there
from mmtransformer.data.loading.split_cache import once_a_split
from mmtransformer.layers.config import known_fields
from mmtransformer.serialization.pretrained import find_folder
from mmtransformer.text.tokenizer import Tokenizer

Lengths = Callable[[int | np.ndarray, np.ndarray], np.ndarray]
"""From an epoch (or that of each sample, (n,)) and the places of samples, (n,), to their tokens, (n,)."""


@known_fields
@dataclass(frozen=True)
class Splits:
    """Which splits of the data are for what.

    Args:
        train: The split to train on.
        val: The splits to validate on.
        test: The splits to test on.

    Raises:
        ValueError: If several splits are given as a string, which would be taken for a list of letters.
    """

    train: str = "train"
    val: Sequence[str] = ("val",)
    test: Sequence[str] = ("test",)

    def __post_init__(self) -> None:
        for name in ("val", "test"):
            if isinstance(splits := getattr(self, name), str):
                raise ValueError(f"splits.{name} must be a list of splits: [{splits}]")
            object.__setattr__(self, name, tuple(splits))


@known_fields
@dataclass(frozen=True)
class LoaderConfig:
    """How samples are loaded.

    Args:
        num_workers: Processes that load samples. The batches are the same for any number.
        seed: Seed of all that is random in the data, such as order, augmentation, choice of captions, packing, masks.
        drop_last: Leave out the last training batch of an epoch if it is not full.
        max_bad_fraction: Share of a table's rows, and of the pictures, that may be unusable before the run stops.
        timeout: Most seconds to wait for the workers' next batch before the run stops and names its samples; 0 waits
            for ever. Ten minutes are far above what a batch takes, and below what a dead disk costs on a rented GPU.
        group_size: So many neighbours of the training split stay in one batch: hard negatives for contrast, where
            the data lie so that neighbours are alike.
        max_patches_per_batch: Of pictures of native size, the most patches of a training batch of one process, in place
            of `batch_size` pictures: small pictures then come in larger batches, and a step costs about the same as
            any other. Beside others, a process may get one picture more. The sizes of all pictures are read before.
            None = batches of `batch_size`.
    """

    num_workers: int = 0
    seed: int = 0
    drop_last: bool = False
    max_bad_fraction: float = 0.01
    timeout: float = 600.0
    group_size: int = 1
    max_patches_per_batch: int | None = None

    def __post_init__(self) -> None:
        if self.max_patches_per_batch is not None and self.max_patches_per_batch < 1:
            raise ValueError(f"loader.max_patches_per_batch ({self.max_patches_per_batch}) must be at least 1")
        if not 0 <= self.timeout < float("inf"):
            raise ValueError(f"loader.timeout ({self.timeout}) must be at least 0 seconds; 0 waits for ever")


class DataModule(lightning.LightningDataModule, ABC):
    """The contract between data and a run: it shuffles, groups, shares out among processes, stops and goes on.

    `dataset` and `collate` are to be filled in; the other hooks can be, where data has texts, lengths, a mixture. What
    is random in a sample is drawn from its `SampleIndex`, then a run is the same wherever it is interrupted:

        @dataclass
        class SoundBatch(Batch):
            waves: Tensor  # (b t)
            is_real: Tensor  # (b) bool, False = a padding sample, to be left out of the loss
            names: tuple[str, ...]

        class Sounds(Dataset):
            def __init__(self, waves: Tensor, noise: float, seed: int):
                self.waves, self.noise, self.seed = waves, noise, seed

            def __len__(self):
                return len(self.waves)

            def __getitem__(self, pick: SampleIndex):
                chance = generator(self.seed, pick.epoch, pick.index)
                wave = self.waves[pick.index] + self.noise * torch.randn(self.waves.shape[1], generator=chance)
                return wave, pick.is_real, f"sound {pick.index}"

        def stack(samples):
            waves, is_real, names = zip(*samples, strict=True)
            return SoundBatch(torch.stack(waves), torch.tensor(is_real), names)

        class SoundData(DataModule):
            unit = "sound"

            def __init__(self, folder: str, *, batch_size: int = 8, loader: LoaderConfig = LoaderConfig()):
                super().__init__(batch_size=batch_size, loader=loader)
                self.folder = folder

            def dataset(self, split, *, training=False):
                return Sounds(torch.load(f"{self.folder}/{split}.pt"), 0.1 if training else 0.0, self.seed)

            def collate(self, split, *, training=False):
                return stack

    A recipe names it by its path (`class_path: sounds.SoundData`), and its arguments are the recipe's keys.

    Args:
        batch_size: Samples in a batch of one process.
        loader: How samples are loaded and ordered, and how many may be unusable.
        splits: Which splits are for training, validation and test.
        tokenizer: Of data with texts: a tokenizer, or a folder or hub name to load one from; None trains one.
        vocab_size: The most tokens of a tokenizer that is trained here.

    Attributes:
        report_dir: Folder of the reports on unusable samples; that of the run unless set.

    Raises:
        ValueError: If there is no sample in a batch.
    """

    unit = "row"
    """What a sample is called where something is wrong."""
    report_dir: str | Path | None = None

    def __init__(
        self,
        *,
        batch_size: int,
        loader: LoaderConfig = LoaderConfig(),
        splits: Splits = Splits(),
        tokenizer: Tokenizer | str | None = None,
        vocab_size: int = 4096,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1 {self.unit}")
        self.batch_size, self.loader_config = batch_size, loader
        self.num_workers, self.seed, self.max_bad_fraction = loader.num_workers, loader.seed, loader.max_bad_fraction
        self.drop_last, self.timeout, self.group_size = loader.drop_last, loader.timeout, loader.group_size
        self.train_split, self._splits = splits.train, splits
        self.vocab_size, self._given = vocab_size, tokenizer
        self._kept: dict[tuple[str, str], Any] = {}

    # -------------------------------------------------------------------------------- what data must say of itself

    @abstractmethod
    def dataset(self, split: str, *, training: bool = False) -> Dataset[Any]:
        """A split's samples: it has a length, and what it returns for a `SampleIndex` depends on that only."""

    @abstractmethod
    def collate(self, split: str, *, training: bool = False) -> Callable[[list[Any]], Any]:
        """What makes a `Batch` of a list of samples."""

    # --------------------------------------------------------------------------------- what data may say of itself

    def prepare(self, split: str) -> None:
        """Read a split of the run's stage before anything is computed: what is wrong with it is told at once."""

    def bad_samples(self, split: str) -> BadImages | None:
        """Where samples of a split that cannot be read are recorded; None where there can be none."""
        return None

    def bad_sample_readers(self, split: str, names: Collection[str]) -> dict[str, Callable[[], Any]]:
        """Of samples that could not be read, those that are still in a split, each with what reads it."""
        return {}

    def lengths(self, split: str) -> Lengths | None:
        """How long samples are: those of similar length are trained on together. None = they are not grouped."""
        return None

    @once_a_split
    def patches(self, split: str) -> np.ndarray | None:
        """How many patches each sample has, where pictures have sizes of their own; None = they have one size."""
        return None

    def mixture(self, split: str) -> EpochMixture | None:
        """Which samples a training epoch takes, where that is not each of them once (None)."""
        return None

    def parts(self, split: str) -> Parts | None:
        """What samples are made of: what has changed when a run goes on is told. None = it is not looked for."""
        return None

    def train_tokenizer(self) -> Tokenizer:
        """Train a tokenizer on the training texts: for data that has texts, and was given no tokenizer."""
        raise ValueError(f"{type(self).__name__} has no tokenizer, nor texts that one could be trained on")

    def identity(self) -> dict[str, Any]:
        """What a run must have again when it goes on: plain values by name, saved with it and compared."""
        return {}

    def mismatch_message(self, name: str, was: Any, now: Any) -> str:
        """What to say of a part of the `identity` that is not what it was, behind "cannot resume: "."""
        if name == "tokenizer":
            return (
                f"the tokenizer is not that of the run ({now}, was {was}); the training texts or vocab_size "
                f"({self.vocab_size}) have changed"
            )
        return (
            f"the {name} of the run was {was} and is now {now}, so its batches differ; use the data and settings of "
            f"the run, or start a new one"
        )

    # ------------------------------------------------------------------------------------- what all data have alike

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: the one given, loaded, or trained on the training texts at the first call."""
        if (given := self._given) is None:
            return self.train_tokenizer()
        return given if isinstance(given, Tokenizer) else Tokenizer.from_pretrained(find_folder(given))

    @cached_property
    def val_splits(self) -> tuple[str, ...]:
        """The splits to validate on, as far as there are: see `splits_there`."""
        return splits_there(getattr(self, "source", None), self._splits.val)

    @cached_property
    def test_splits(self) -> tuple[str, ...]:
        """The splits to test on, as far as there are: see `splits_there`."""
        return splits_there(getattr(self, "source", None), self._splits.test)

    @property
    def tokenizer_hash(self) -> str:
        """Tells tokenizers apart: for the `identity`."""
        return hashlib.sha256(self.tokenizer.backend.to_str().encode()).hexdigest()[:16]

    def report_folder(self) -> Path:
        """Where reports on the data belong: `report_dir`, or the folder of the run."""
        return Path(self.report_dir or (self.trainer.default_root_dir if self.trainer else "."))

    def clear_cache(self) -> None:
        """Drop what was read and tokenised, as a tokenizer that is replaced asks for."""
        self._kept.clear()

    @property
    def is_new_run(self) -> bool:
        """Whether this is the first process of a run that starts anew: the one to remove an earlier run's reports."""
        return self.trainer is not None and self.trainer.is_global_zero and not self.trainer.ckpt_path

    def splits_of(self, stage: str | None) -> tuple[str, ...]:
        """The splits of a stage: "fit", "validate" or "test"."""
        validate, test = self.val_splits, self.test_splits
        splits = {"fit": (self.train_split, *validate), "validate": validate, "test": test}
        return splits.get(stage or "fit", ())

    def block(self, world: int) -> int:
        """Samples of similar length that are trained on together: those of an optimizer step of all processes."""
        return self.batch_size * world * getattr(self.trainer, "accumulate_grad_batches", 1)

    def setup(self, stage: str | None = None) -> None:
        """Prepare a stage's splits, and the reports on them; see `clear_reports`."""
        for split in self.splits_of(stage):
            self.prepare(split)
        if not (self.trainer and self.trainer.ckpt_path and self.trainer.state.fn == "fit"):
            self.clear_reports(stage)

    def clear_reports(self, stage: str | None = "fit") -> None:
        """Forget an earlier run's reports; one that goes on keeps what still cannot be read, once it is accepted."""
        for split in self.splits_of(stage) if self.trainer and self.trainer.is_global_zero else ():
            if bad := self.bad_samples(split):
                if self.is_new_run:
                    bad.reset()
                elif listed := bad.names():
                    bad.keep(self.bad_sample_readers(split, listed.keys()))

    def loader(self, split: str, *, training: bool = False) -> ResumableLoader:
        """Return a process's loader of a split: shuffled, mixed, grouped by length for training, as it is otherwise.

        Raises:
            ValueError: If Lightning would replace the sampler.
        """
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else processes()
        if self.trainer and world > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                f"set use_distributed_sampler to false: {type(self).__name__} shares the {self.unit}s among the "
                f"{world} processes itself, and Lightning's sampler would change their order"
            )
        dataset = self.dataset(split, training=training)
        size = len(dataset)  # pyright: ignore[reportArgumentType]
        mixture, tokens = (self.mixture(split), self.lengths(split)) if training else (None, None)

        def lengths(epoch: int) -> np.ndarray:
            assert tokens is not None
            index, times = (np.arange(size), epoch) if mixture is None else mixture.samples(epoch)
            return tokens(times, index)

        sampler = IndexSampler(
            size if mixture is None else mixture.size,
            self.batch_size,
            seed=self.seed,
            shuffle=training,
            lengths=None if tokens is None else lengths,
            mixture=mixture,
            repeat=training and bool(getattr(self.trainer, "overfit_batches", 0)),
            group_size=self.group_size if training else 1,
            block=self.block(world),
            rank=rank,
            world=world,
            drop_last=training and self.drop_last,
            budget=self._budget(split, world) if training else None,
        )
        return ResumableLoader(
            dataset,
            sampler,
            self.collate(split, training=training),
            num_workers=self.num_workers,
            timeout=self.timeout,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def _budget(self, split: str, world: int) -> PatchBudget | None:
        """What fills training batches up to a number of patches; None = they are of `batch_size` samples."""
        if (most := self.loader_config.max_patches_per_batch) is None:
            return None
        if (sizes := self.patches(split)) is None:
            raise ValueError(
                f"loader.max_patches_per_batch ({most}) is for pictures of native size, which these {self.unit}s have "
                f'not: leave it out, or set data.resize (or transform.resize) to "native"'
            )
        return PatchBudget(sizes, most, world)

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches."""
        return self.loader(self.train_split, training=True)

    def val_dataloader(self) -> list[ResumableLoader]:
        """Return one loader for each of `val_splits`, in this order."""
        return [self.loader(split) for split in self.val_splits]

    def test_dataloader(self) -> list[ResumableLoader]:
        """Return one loader for each of `test_splits`, in this order."""
        return [self.loader(split) for split in self.test_splits]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy a batch to the device beside its computation."""
        return batch.to(device, non_blocking=True)

    @once_a_split
    def fingerprints(self, split: str) -> Tensor | None:
        """What tells whether the `parts` of a split have changed."""
        return None if (parts := self.parts(split)) is None else fingerprints(parts)

    def state_dict(self) -> dict[str, Any]:
        """The `identity`, which is saved with a run, and the `fingerprints`; those of the first process are kept."""
        first = self.trainer is None or self.trainer.is_global_zero
        splits = self.splits_of("fit") if first else ()
        kept = {split: trace for split in splits if (trace := self.fingerprints(split)) is not None}
        return self.identity() | ({"fingerprints": kept} if kept else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a run which goes on has the `identity` it had, and warn if its data are not what they were.

        Raises:
            ValueError: If it has another one, or the checkpoint does not say.
        """
        for name, now in self.identity().items():
            if not isinstance(state_dict, dict) or name not in state_dict:
                raise ValueError(
                    f"cannot resume: the checkpoint does not say its {name}: it is not of this {type(self).__name__}"
                )
            if state_dict[name] != now:
                raise ValueError(f"cannot resume: {self.mismatch_message(name, state_dict[name], now)}")
        if self.trainer is not None and not self.trainer.is_global_zero:
            return
        for split, was in (state_dict or {}).get("fingerprints", {}).items():
            if split in self.splits_of("fit") and (now := self.fingerprints(split)) is not None:
                alone = split == self.train_split and self.mixture(split) is None
                tell_changes(was, now, cast(Parts, self.parts(split)), split, self.dataset if alone else None)
