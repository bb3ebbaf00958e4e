"""The contract of all data: its own example, and what a data module of a few lines gets for it."""

import importlib
import inspect
import re
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import Dataset

from mmtransformer.data.loading.module import DataModule, Lengths, LoaderConfig, Splits
from mmtransformer.data.loading.sampler import ResumableLoader, SampleIndex
from mmtransformer.text.tokenizer import Tokenizer


class Numbers(Dataset[tuple[int, int, bool]]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, pick: SampleIndex) -> tuple[int, int, bool]:
        return pick


class Plain(DataModule):
    """The least that data can say of itself: the picks themselves."""

    unit = "number"

    def __init__(self, size: int = 23, **options: Any) -> None:
        settings: dict[str, Any] = {"batch_size": 4} | options
        super().__init__(**settings)
        self.size = size

    def dataset(self, split: str, *, training: bool = False) -> Numbers:
        return Numbers({"train": self.size, "val": 5, "hard": 3, "test": 2}[split])

    def collate(self, split: str, *, training: bool = False) -> Callable[[list[Any]], Any]:
        return list


class Named:
    """A source that says which splits it has, and knows "dev" as another name of val."""

    def splits(self) -> tuple[str, ...]:
        return ("train", "val")

    def split(self, name: str) -> str:
        if name not in ("train", "val", "dev"):
            raise ValueError(f"no split {name!r}")
        return name


class Rich(Plain):
    """Data that says all it can: numbers that are as long as they are large, of which an epoch takes the even ones."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.prepared: list[str] = []

    def prepare(self, split: str) -> None:
        self.prepared.append(split)

    def lengths(self, split: str) -> Lengths:
        return lambda turn, index: index + 100 * np.asarray(turn)

    def identity(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer_hash, "size": self.size}


class Evens(Rich):
    size = 12

    def mixture(self, split: str) -> Any:
        turn = np.zeros(6, int)
        return SimpleNamespace(size=6, samples=lambda epoch: (np.arange(0, 12, 2), turn + epoch))


def trainer(rank: int = 0, world: int = 1, **options: Any) -> Any:
    settings = {
        "global_rank": rank, "world_size": world, "is_global_zero": rank == 0, "ckpt_path": None,
        "default_root_dir": "runs/one", "strategy": SimpleNamespace(root_device=torch.device("cpu")),
        "_accelerator_connector": SimpleNamespace(use_distributed_sampler=False),
    }  # fmt: skip
    return SimpleNamespace(**(settings | options))


def epoch_of(loader: ResumableLoader, epoch: int) -> list[Any]:
    """The batches of an epoch."""
    loader.place.set_epoch(epoch)
    return list(loader)


def picks_of(loader: ResumableLoader, epoch: int = 0) -> list[SampleIndex]:
    """The samples of an epoch of `Plain` data, in their order."""
    return [pick for batch in epoch_of(loader, epoch) for pick in batch]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["one two three", "four"], 270)


# ----------------------------------------------------------------------------------------------- the example


IMPORTS = """from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmtransformer.batch import Batch
from mmtransformer.data.loading.module import DataModule, LoaderConfig
from mmtransformer.data.loading.hashing import generator
from mmtransformer.data.loading.sampler import SampleIndex
"""


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The example in the docstring of `DataModule` as a module of one's own, word for word."""
    text = inspect.cleandoc(DataModule.__doc__ or "")
    code = re.search(r"^    @dataclass\n(.*\n)*?(?=\S)", text, re.MULTILINE)
    assert code is not None
    path = tmp_path_factory.mktemp("own") / "sounds.py"
    path.write_text(IMPORTS + "\n\n" + textwrap.dedent(code[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        yield importlib.import_module("sounds")
        sys.modules.pop("sounds")


def test_the_example_runs(sounds: Any, tmp_path: Path) -> None:
    torch.save(torch.arange(33.0).reshape(11, 3), tmp_path / "train.pt")
    torch.save(torch.arange(12.0).reshape(4, 3), tmp_path / "val.pt")
    data = sounds.SoundData(str(tmp_path), batch_size=4, loader=LoaderConfig(seed=7))
    epochs = [epoch_of(data.train_dataloader(), epoch) for epoch in range(2)]
    for batches in epochs:
        names = [name for batch in batches for name in batch.names]
        assert sorted(names) == sorted(f"sound {i}" for i in range(11))
    waves = [
        {name: wave for batch in epoch for name, wave in zip(batch.names, batch.waves, strict=True)} for epoch in epochs
    ]
    assert not torch.equal(waves[0]["sound 3"], waves[1]["sound 3"])
    assert (waves[0]["sound 3"] - torch.tensor([9.0, 10, 11])).abs().max() < 1
    (val,) = data.val_dataloader()
    assert torch.cat([batch.waves for batch in val]).tolist() == torch.arange(12.0).reshape(4, 3).tolist()
    # Broken off after a batch of the second epoch, and with other processes: the same.
    loader = data.train_dataloader()
    loader.place.set_epoch(1)
    next(iter(loader))
    later = sounds.SoundData(str(tmp_path), batch_size=4, loader=LoaderConfig(seed=7)).train_dataloader()
    later.load_state_dict(loader.state_dict())
    assert [batch.waves.tolist() for batch in later] == [batch.waves.tolist() for batch in epochs[1][1:]]
    moved = data.transfer_batch_to_device(epochs[0][0], torch.device("meta"), 0)
    assert moved.waves.device.type == moved.is_real.device.type == "meta"


# -------------------------------------------------------------------------------------------------- the contract


def test_a_contract_that_is_not_filled_in_is_refused() -> None:
    class Nothing(DataModule):
        pass

    with pytest.raises(TypeError, match=r"abstract methods? '?collate'?, '?dataset"):
        Nothing(batch_size=3)  # type: ignore[abstract]


def test_an_epoch_has_each_sample_once_in_an_order_of_its_own() -> None:
    epochs = [picks_of(Plain(loader=LoaderConfig(seed=3)).train_dataloader(), epoch) for epoch in range(2)]
    for epoch, picks in enumerate(epochs):
        assert sorted(picks) == [(epoch, i, True) for i in range(23)]
    assert [i for _, i, _ in epochs[0]] != [i for _, i, _ in epochs[1]] != list(range(23))
    assert picks_of(Plain(loader=LoaderConfig(seed=4)).train_dataloader()) != epochs[0]
    assert [len(loader) for loader in Plain(splits=Splits(val=["val", "hard"])).val_dataloader()] == [2, 1]
    assert [list(loader) for loader in Plain().test_dataloader()] == [[[(0, 0, True), (0, 1, True)]]]
    assert len(Plain(loader=LoaderConfig(drop_last=True)).train_dataloader()) == 5
    assert len(Plain(loader=LoaderConfig(drop_last=True)).val_dataloader()[0]) == 2


def test_samples_of_like_length_come_together_and_a_mixture_is_an_epoch(tokenizer: Tokenizer) -> None:
    data = Rich(size=800, tokenizer=tokenizer)
    spread = [max(p[1] for p in picks) - min(p[1] for p in picks) for picks in data.train_dataloader()]
    assert np.mean(spread) < 30  # windows of 200 of the 800
    assert [p[1] for picks in data.val_dataloader()[0] for p in picks] == list(range(5))
    data.trainer = trainer(accumulate_grad_batches=3)
    assert data.train_dataloader().place.block == 12
    loader = Evens(size=12, tokenizer=tokenizer).train_dataloader()
    assert sorted(picks_of(loader, 2)) == [(2, i, True) for i in range(0, 12, 2)]
    assert loader.place.lengths is not None
    assert loader.place.lengths(2).tolist() == [200, 202, 204, 206, 208, 210]


def test_processes_share_the_samples_and_lightnings_sampler_is_refused() -> None:
    def loader(rank: int, **options: Any) -> ResumableLoader:
        data = Plain()
        data.trainer = trainer(rank, 2, **options)
        return data.train_dataloader()

    shares = [picks_of(loader(rank)) for rank in range(2)]
    is_real = sorted(i for share in shares for _, i, is_counted in share if is_counted)
    assert is_real == list(range(23))
    assert [len(loader(rank)) for rank in range(2)] == [3, 3]
    with pytest.raises(ValueError, match="use_distributed_sampler to false: Plain shares the numbers among the 2"):
        loader(0, _accelerator_connector=SimpleNamespace(use_distributed_sampler=True))


def test_a_stage_prepares_its_splits(tokenizer: Tokenizer) -> None:
    for stage, splits in {
        "fit": ["train", "val", "hard"], "validate": ["val", "hard"], "test": ["test"],
        None: ["train", "val", "hard"], "predict": [],
    }.items():  # fmt: skip
        data = Rich(splits=Splits(val=["val", "hard"]), tokenizer=tokenizer)
        data.setup(stage)
        assert data.prepared == splits, stage


def test_a_run_goes_on_with_what_it_had(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = Rich(tokenizer=tokenizer, vocab_size=300)
    state = data.state_dict()
    assert state == {"tokenizer": data.tokenizer_hash, "size": 23}
    tokenizer.save_pretrained(tmp_path)
    Rich(tokenizer=str(tmp_path)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"cannot resume: the size of the run was 23 and is now 22, so its batches"):
        Rich(size=22, tokenizer=tokenizer).load_state_dict(state)
    other = Tokenizer.train(["quite other words"], 265)
    with pytest.raises(
        ValueError, match=rf"cannot resume: .*not that of the run .* was {data.tokenizer_hash}\).*\(4096\)"
    ):
        Rich(tokenizer=other).load_state_dict(state)
    with pytest.raises(ValueError, match=r"cannot resume: the checkpoint does not say its size: .* this Rich"):
        Rich(tokenizer=tokenizer).load_state_dict({"tokenizer": data.tokenizer_hash})
    with pytest.raises(ValueError, match="cannot resume: the checkpoint does not say its"):
        Rich(tokenizer=tokenizer).load_state_dict(5)  # type: ignore[arg-type]
    Plain().load_state_dict({})
    assert Plain().state_dict() == {}


def test_reports_belong_to_the_run_and_are_begun_once(tmp_path: Path) -> None:
    data = Plain()
    assert (data.report_folder(), data.is_new_run) == (Path(), False)
    data.report_dir = "there"
    assert data.report_folder() == Path("there")
    data.report_dir = None  # fmt: skip
    for rank, ckpt_path, begins in ((0, None, True), (1, None, False), (0, "last.ckpt", False)):
        data.trainer = trainer(rank, 2, ckpt_path=ckpt_path)
        assert data.is_new_run is begins
        assert data.report_folder() == Path("runs/one")


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size \(0\) must be at least 1 number"):
        Plain(batch_size=0)
    with pytest.raises(ValueError, match=r"splits.val must be a list of splits: \[hard\]"):
        Plain(splits=Splits(val="hard"))
    with pytest.raises(ValueError, match=r"splits.test must be a list of splits: \[hard\]"):
        Plain(splits=Splits(test="hard"))
    with pytest.raises(ValueError, match="Plain has no tokenizer, nor texts"):
        _ = Plain().tokenizer


class Module(lightning.LightningModule):
    """Learns nothing and remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.ones(3)), list[Any]()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch.names))
        return (self.weight * batch.waves).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(("val", batch.names))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def fitted(sounds: Any, folder: Path, val: int = 3, **options: Any) -> Module:
    """A module that was trained on 11 sounds, and validated on `val`."""
    for split, size in (("train", 11), ("val", val)):
        torch.save(torch.randn(size, 3), folder / f"{split}.pt")
    data, module = sounds.SoundData(str(folder), batch_size=4, loader=LoaderConfig(num_workers=1)), Module()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings: dict[str, Any] = {"num_sanity_val_steps": 0} | ({} if options.get("barebones") else quiet)
    lightning.Trainer(accelerator="cpu", default_root_dir=folder, **(settings | options)).fit(module, data)
    return module


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*")
def test_lightning_trains_on_it(sounds: Any, tmp_path: Path) -> None:
    module = fitted(sounds, tmp_path, max_epochs=2)
    assert [epoch for epoch, _ in module.seen] == [0] * 3 + ["val"] + [1] * 3 + ["val"]
    assert module.seen[0][1] != module.seen[4][1]
    assert module.seen[3][1] == module.seen[7][1] == ("sound 0", "sound 1", "sound 2")


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*")
@pytest.mark.parametrize(
    ("options", "batches", "same"),
    [
        ({"overfit_batches": 1}, 1, True),
        ({"overfit_batches": 0.7}, 2, True),
        ({"limit_train_batches": 2, "limit_val_batches": 1}, 2, False),  # as with any data that are shuffled
        ({"limit_train_batches": 0.4}, 1, False),
        ({"barebones": True}, 3, False),
        ({"barebones": True, "overfit_batches": 2}, 2, True),
    ],
)
def test_lightnings_flags_that_shorten_an_epoch(
    options: dict[str, Any], batches: int, same: bool, sounds: Any, tmp_path: Path
) -> None:
    module = fitted(sounds, tmp_path, val=7, max_epochs=3, **options)
    epochs = [[names for epoch, names in module.seen if epoch == wanted] for wanted in range(3)]
    assert [len(names) for names in epochs] == [batches] * 3
    assert all((names == epochs[0]) is same for names in epochs[1:])


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        (["val", "hard"], ("val",)),
        (["dev", "hard"], ("dev",)),
        (["hard"], ("hard",)),
        (["hard", "odd"], ("hard", "odd")),
    ],
)
def test_of_several_splits_those_that_there_are(asked: list[str], taken: tuple[str, ...]) -> None:
    """A source refuses, in its own words, where none is there; data that name none are asked for all."""
    data = Plain(splits=Splits(val=asked, test=asked))
    data.source = Named()  # pyright: ignore[reportAttributeAccessIssue]
    left_out = len(taken) < len(asked)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert data.val_splits == data.test_splits == taken
    assert [("'hard'" in str(one.message)) for one in told] == [True, True] * left_out
    assert Plain(splits=Splits(val=asked)).val_splits == tuple(asked)


def test_a_plain_loop_in_many_processes_gets_its_share_of_each() -> None:
    shares = []
    for rank in (0, 1):
        dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        try:
            loader = Plain(size=24).loader("train", training=True)
            shares.append([pick.index for batch in loader for pick in batch])
        finally:
            dist.destroy_process_group()
    assert [len(share) for share in shares] == [12, 12]
    assert sorted(shares[0] + shares[1]) == list(range(24))
    assert len(Plain(size=24).loader("train")) == 6
