"""`mmt plan`: what it counts, beside what torch's profiler and the kernel of the system count."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mmtransformer.cli.plan import run
from mmtransformer.data.loading.sampler import IndexSampler
from mmtransformer.training.callbacks.memory_estimate import (
    LiveBytes,
    Needs,
    Watch,
    extended,
    longest_soon,
    private_bytes,
)
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.precision import KERNEL_BYTES, KERNELS, limit_kernel_cache
from mmtransformer.training.tasks.captioning import Captioning
from support import tiny

RECIPES = Path(__file__).parents[3] / "recipes"
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")


@pytest.fixture(autouse=True)
def lightning_is_quiet() -> None:
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def test_live_bytes_are_those_of_living_tensors() -> None:
    count = LiveBytes()
    with count:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:5]
        c = a + 1
        del c
        d = torch.zeros(250, dtype=torch.float64)
    assert count.live == 4000 + 2000
    assert count.peak == 8000
    del a
    assert count.live == 6000  # b holds it
    del b, d
    assert count.live == 0


def test_the_peak_is_that_of_the_profiler() -> None:
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 8))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.randn(300, 64)).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # The optimizer's state is there, as it is with each of the two that count.
    count = LiveBytes()
    for tensor in (*model.parameters(), *(x for state in optimizer.state.values() for x in state.values())):
        count.see(tensor)
    begin = count.live
    with count:
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    events.sort(key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, now)
    assert peak > 300 * 512 * 4
    assert count.peak - begin == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        (torch.bfloat16, "highest", 2),
        (torch.float32, "medium", 2),
        (torch.float32, "highest", 0),
        (torch.float64, "medium", 0),
    ],
)
def test_products_are_counted_once_a_shape(dtype: torch.dtype, precision: str, expected: int) -> None:
    torch.set_float32_matmul_precision(precision)
    with LiveBytes() as count:
        for rows in (3, 5, 3, 5):
            torch.mm(torch.ones(rows, 7, dtype=dtype), torch.ones(7, 2, dtype=dtype))
    assert len(count.products) == expected


@ON_LINUX
def test_bytes_of_the_process_follow_what_it_holds() -> None:
    begin = private_bytes()
    held = [torch.ones(2_500_000) for _ in range(4)]
    assert private_bytes() - begin == pytest.approx(40e6, rel=0.05)
    pieces = [torch.ones(5000) for _ in range(2000)]  # Small enough to lie on malloc's heap.
    assert private_bytes() - begin == pytest.approx(80e6, rel=0.05)
    last = pieces[-1]  # Below it the heap does not shrink by itself.
    del held, pieces
    assert abs(private_bytes() - begin) < 4e6
    assert last.sum() == 5000


def test_the_number_of_kernels_that_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert limit_kernel_cache() == KERNELS
    assert {os.environ[name] for name in names} == {str(KERNELS)}
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "300")
    assert limit_kernel_cache() == 300
    assert os.environ["LRU_CACHE_CAPACITY"] == "300"


GROWTH = """
import torch
from mmtransformer.training.callbacks.memory_estimate import private_bytes
from mmtransformer.training.engine.precision import set_up_process

torch.set_num_threads(1)
set_up_process()
weight = torch.ones(256, 256, dtype=torch.bfloat16)
torch.ones(64, 256, dtype=torch.bfloat16) @ weight
for begin, end in ((100, 164), (200, 600)):
    before = private_bytes()
    for rows in range(begin, end):
        torch.ones(rows, 256, dtype=torch.bfloat16) @ weight
    print(private_bytes() - before)
"""


@ON_LINUX
@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN has no bfloat16 here",
)
def test_a_cpu_keeps_few_kernels_of_the_planned_size() -> None:
    clean = {k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")}
    command = [sys.executable, "-c", GROWTH]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    assert few == pytest.approx(64 * KERNEL_BYTES, rel=0.1)
    assert few + many == pytest.approx(KERNELS * KERNEL_BYTES, rel=0.1)  # 400 more shapes, and no more than that.


@pytest.mark.parametrize(("rows", "third"), [(200, 2), (18, 2), (13, 1), (6, 0), (5, 0)])
def test_the_batch_with_the_longest_sample_comes_third(rows: int, third: int) -> None:
    lengths = np.random.default_rng(3).permutation(rows)
    plain, sampler = (IndexSampler(rows, 6, seed=5, lengths=lambda _: lengths, window=4) for _ in range(2))
    longest_soon(sampler)
    before, after = list(plain), list(sampler)
    full = [batch for batch in before if len(batch) == 6] or before
    longest = max(full, key=lambda batch: lengths[[pick.index for pick in batch]].max())
    others = [batch for batch in before if batch is not longest]
    assert after == [*others[:third], longest, *others[third:]]


def test_samples_of_one_length_keep_their_order() -> None:
    plain, sampler = IndexSampler(20, 6, seed=5), IndexSampler(20, 6, seed=5)
    longest_soon(sampler)
    assert list(plain) == list(sampler)


def test_needs_grow_in_a_line_with_the_batch() -> None:
    small, large = (Watch(Needs(parameters=7, activations=110), 2), Watch(Needs(parameters=7, activations=210), 4))
    assert extended(small, large, 8) == Needs(parameters=7, activations=410)
    assert extended(small, large, 8).memory == 417
    text = Needs(1500, 300, 1200, 2_400_000, 0, 7 * 10**9, 5 * 10**6, 10**9, 2000, 99).table(8, "pictures")
    for part in (
        "1.5 kB  (300 B of them frozen)",
        "2.4 MB",
        "7.00 GB  (batches of 8 pictures)",
        "5.0 MB  (of products",
        "1.00 GB  (Python",
        "memory               8.01 GB",
        "99 B  on the disk",
    ):
        assert part in text


def test_a_run_is_watched(tmp_path: Path) -> None:
    watch = Watch()
    arguments: dict[str, Any] = {"enable_checkpointing": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(
        accelerator="cpu", enable_progress_bar=False, max_steps=3, callbacks=[watch], limit_val_batches=0,
        default_root_dir=tmp_path, **arguments,
    )  # fmt: skip
    task = Captioning(tiny.captioner(freeze_vision=True), optim=OptimConfig(ema_decay=0.9))
    trainer.fit(task, datamodule=tiny.scenes())
    needs = watch.needs
    learned = sum(p.numel() for p in task.parameters() if p.requires_grad)
    assert needs.gradients == needs.average == 4 * learned
    assert 8 * learned <= needs.optimizer <= 8 * learned + 8 * 100
    assert needs.frozen == sum(4 * p.numel() for p in task.captioner.vision.parameters())
    assert needs.activations > 4 * 4 * 13 * 24
    assert watch.samples == 4
    assert needs.kernels == 0  # Its products are in float32, exactly.
    assert needs.memory == needs.tensors + needs.program
    if Path("/proc/self/status").exists():
        assert needs.program == pytest.approx(private_bytes(), rel=0.1)


class Lengths(pl.LightningModule):
    """A product of bfloat16 a step, of as many rows as its sample says."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
        self.register_buffer("table", torch.ones(10_000_000))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.linear(torch.ones(int(batch), 8, dtype=torch.bfloat16)).float().sum()

    def names(self, batch: Any) -> list[str]:
        return ["one"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("lengths", "expected"), [([4] * 5, 2), ([4, 5] * 3, 4), ([4, 4, 4, 5, 4], KERNELS)])
def test_unlike_lengths_come_to_as_many_kernels_as_are_kept(
    lengths: list[int], expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mmtransformer.training.callbacks.memory_estimate._keeps_kernels", lambda _: True)
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.setenv(name, str(KERNELS))
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[watch], logger=False, default_root_dir=tmp_path,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = Lengths()
        trainer.fit(module, torch.utils.data.DataLoader(lengths, batch_size=1))  # type: ignore[arg-type]
    assert watch.needs.kernels == expected * KERNEL_BYTES
    assert watch.needs.parameters == 40_000_000 + 2 * 64
    if Path("/proc/self/status").exists():
        # The tensors and the kernels that are there already are not the program's.
        assert watch.needs.program == pytest.approx(private_bytes() - 40e6 - 4 * KERNEL_BYTES, abs=8e6)


def test_a_recipe_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data.source.train_size=64", "--data.source.val_size=4", "--data.source.compositional_size=4"]
    words = [str(RECIPES / "caption_scenes.yaml"), "--config", str(RECIPES / "tiny.yaml"), *small]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run("plan", [*words, "--data.batch_size=8", "--model.optim.ema_decay=0.9"]) == 0
    sizes = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
    out, err = capsys.readouterr()
    assert "a few steps" in err
    assert out.count("precision: ") == 1  # and not once a trial
    found = re.findall(r"^  ([a-z ]+?) +([\d.]+) (kB|MB|GB)", out, re.MULTILINE)
    table = {name: float(number) * sizes[unit] for name, number, unit in found}
    learned = table["weights"]
    assert table["gradients"] == table["moving average"] == pytest.approx(learned, rel=0.01)
    parts = [value for name, value in table.items() if name not in ("memory", "a checkpoint")]
    assert table["memory"] == pytest.approx(sum(parts), rel=0.01)
    assert table["activations"] > 8 * 64 * 192 * 4
