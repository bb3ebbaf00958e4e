"""Activation checkpointing, compiled blocks and the meter: the same gradient, less memory, honest numbers."""

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import Tensor

from mmtransformer.captioners.base import CaptionBatch
from mmtransformer.training.callbacks.throughput import Throughput, gemm_rate
from mmtransformer.training.engine.log import MetricsLog
from mmtransformer.training.engine.optim import Optim
from mmtransformer.training.engine.speed import PROCESSES, blocks, checkpoint_activations, compile_blocks, share_cpu
from mmtransformer.training.tasks.captioning import Captioning
from support import tiny
from support.recipes import RECIPES


@pytest.fixture(autouse=True)
def lightning_is_quiet() -> None:
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def batch() -> CaptionBatch:
    torch.manual_seed(7)
    tokens = torch.randint(3, tiny.VOCAB, (5, 13))
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    return CaptionBatch(tokens, attention_mask, attention_mask, torch.randn(5, 1, 3, 32, 32), names=tuple("abcde"))


def step(module: Captioning) -> tuple[float, list[Tensor], int]:
    """Loss, gradients, and the bytes that the backward pass found kept; dropout draws from the same seed."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    torch.manual_seed(11)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module.captioner.train()(batch()).sums
    size = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    loss.sum.backward()
    return float(loss.sum.detach()), [p.grad for p in module.parameters() if p.grad is not None], size


def module(depth: int = 2) -> Captioning:
    return Captioning(tiny.captioner(depth=depth), optim=Optim())


def test_blocks_are_those_of_all_towers() -> None:
    found = list(blocks(module(depth=3)))
    assert [type(block).__name__ for block in found] == ["EncoderBlock"] + ["DecoderBlock"] * 3
    model = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Linear(2, 2)]), torch.nn.ReLU()])
    assert list(blocks(model)) == [model[0]]


def test_recomputed_activations_give_the_same_gradient_for_less_memory() -> None:
    plain, saving = module(), module()
    assert checkpoint_activations(saving) == 3
    assert saving.state_dict().keys() == plain.state_dict().keys()
    (loss, gradients, size), (again, others, less) = step(plain), step(saving)
    assert again == loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert less < 0.5 * size
    saving.eval()
    with torch.no_grad():
        assert torch.equal(saving.captioner.logits(batch()), plain.eval().captioner.logits(batch()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_recomputes_its_own_blocks(copied: Any) -> None:
    saving = module()
    checkpoint_activations(saving)
    other = copied(saving)
    with torch.no_grad():
        for parameter in saving.parameters():
            parameter.zero_()
    (loss, gradients, _), (again, others, less) = step(module()), step(other)
    assert again == loss
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert less < 0.5 * step(module())[2]
    assert all(parameter.grad is None for parameter in saving.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_compiled_blocks_are_the_same_blocks() -> None:
    plain, compiled = module(), module()
    assert compile_blocks(compiled, backend="eager") == 3
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    (loss, gradients, _), (again, others, _) = step(plain), step(compiled)
    assert again == pytest.approx(loss, rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, others, strict=True))


# ----------------------------------------------------------------------------------------------------- the meter


def test_throughput_is_logged(tmp_path: Path) -> None:
    meter = Throughput(size=64)
    trainer = pl.Trainer(
        accelerator="cpu", logger=MetricsLog(tmp_path), enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, log_every_n_steps=1, max_steps=5, num_sanity_val_steps=0, callbacks=[meter],
        limit_val_batches=0,
    )  # fmt: skip
    task = Captioning(tiny.captioner(), optim=Optim())
    trainer.fit(task, datamodule=tiny.scenes())
    rows = MetricsLog(tmp_path)._read()
    speeds = [float(row["train/samples_per_second"]) for row in rows if row.get("train/samples_per_second")]
    assert len(speeds) == 3
    assert all(speed > 0 for speed in speeds)
    assert meter.mfu > 0
    assert "MFU" in meter.words(task.device)
    # The second batch of four pictures, counted: six FLOPs a weight and token at least.
    weights = sum(p.numel() for p in task.captioner.vision.parameters())
    assert 0.5 * 6 * 16 * weights < meter.flops_per_sample < 200 * 6 * 16 * weights


def test_the_rate_of_products_is_measured() -> None:
    slow, fast = (gemm_rate(torch.device("cpu"), torch.float64, 16), gemm_rate(torch.device("cpu"), torch.float32, 512))
    assert 1e6 < slow < fast < 1e15


@pytest.mark.parametrize(
    ("threads", "batch_size", "frozen", "width", "processes"),
    [(2, 64, False, 8, 2), (5, 64, False, 8, 2), (1, 64, False, 8, 1), (2, 63, False, 8, 1), (2, 64, True, 8, 1)]
    + [(2, 64, False, 20_000, 1)],
)
def test_two_processes_share_a_cpu_for_a_small_model_that_learns_whole(
    monkeypatch: pytest.MonkeyPatch, threads: int, batch_size: int, frozen: bool, width: int, processes: int
) -> None:
    for name in (PROCESSES, "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    module = torch.nn.Linear(1024, width, device="meta")
    module.bias.requires_grad_(not frozen)
    assert share_cpu(module, batch_size) == processes
    assert taken == ([threads // 2] if processes == 2 else [])
    assert os.environ.get("OMP_NUM_THREADS") == (str(threads // 2) if processes == 2 else None)
    assert share_cpu(torch.nn.Linear(1, 1), 3) == (processes if processes == 2 else 1)  # a process that it started


def test_processes_started_by_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert share_cpu(torch.nn.Linear(2, 2), 64) == 1
    assert PROCESSES not in os.environ


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="two processes are started on Linux only")
def test_a_run_shares_the_cpu_by_itself_and_learns_the_same(tmp_path: Path) -> None:
    small = {"vision.dim": 48, "vision.depth": 1, "decoder.dim": 48, "decoder.depth": 1, "decoder.cross_dim": 48}
    words = ["fit", f"--config={RECIPES / 'caption_scenes.yaml'}", f"--config={RECIPES / 'tiny.yaml'}"]
    words += [f"--model.captioner.{key}={value}" for key, value in small.items()]
    words += ["--data.batch_size=4", "--max_drawn=400", "--trainer.max_steps=100", "--trainer.limit_train_batches=1.0"]
    words += ["--model.optim.lr=0.001", "--trainer.precision=32-true"]
    found = {}
    for folder, more in (("two", []), ("one", ["--trainer.devices=1"])):
        run = subprocess.run(
            [
                sys.executable,
                "-m",
                "mmtransformer.cli",
                *words,
                f"--trainer.default_root_dir={tmp_path / folder}",
                *more,
            ],
            env=os.environ | {"OMP_NUM_THREADS": "2"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("two processes share the CPU" in run.stdout) == (folder == "two"), run.stdout
        assert ("2 processes" in run.stdout) == (folder == "two")
        assert "Warning" not in run.stderr, run.stderr
        metrics = json.loads((tmp_path / folder / "metrics.json").read_text())
        found[folder] = metrics["image_ablation"]["val"]
    assert found["two"] == pytest.approx(found["one"], rel=1e-3)
