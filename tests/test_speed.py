"""Activation checkpointing, compiled blocks and the meter: the same gradient, less memory, honest numbers."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import tiny
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import Tensor

from mmtransformer.captioner import CaptionBatch
from mmtransformer.training.captioning import Captioning
from mmtransformer.training.log import MetricsLog
from mmtransformer.training.optim import Optim
from mmtransformer.training.plan import LiveBytes, Needs, Watch, extended
from mmtransformer.training.speed import blocks, checkpoint_activations, compile_blocks
from mmtransformer.training.throughput import Throughput, gemm_rate


@pytest.fixture(autouse=True)
def lightning_is_quiet() -> None:
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def batch() -> CaptionBatch:
    torch.manual_seed(7)
    tokens = torch.randint(3, tiny.VOCAB, (5, 13))
    valid = torch.ones_like(tokens, dtype=torch.bool)
    return CaptionBatch(tokens, valid, valid, torch.randn(5, 1, 3, 32, 32), names=tuple("abcde"))


def step(module: Captioning) -> tuple[float, list[Tensor], int]:
    """Loss, gradients, and the bytes that the backward pass found kept; dropout draws from the same seed."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    torch.manual_seed(11)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module.captioner.train().loss(batch())
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
    slow, fast = (
        gemm_rate(torch.device("cpu"), torch.float64, 16),
        gemm_rate(torch.device("cpu"), torch.float32, 512),
    )
    assert 1e6 < slow < fast < 1e15


# ------------------------------------------------------------------------------------------------------ the plan


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


def test_needs_grow_in_a_line_with_the_batch() -> None:
    small, large = (
        Watch(Needs(parameters=7, activations=110), 2),
        Watch(Needs(parameters=7, activations=210), 4),
    )
    assert extended(small, large, 8) == Needs(parameters=7, activations=410)
    assert extended(small, large, 8).memory == 417
    text = Needs(1500, 300, 1200, 2_400_000, 0, 7 * 10**9, 2000, 99).table(8, "pictures")
    for part in (
        "1.5 kB  (300 B of them frozen)",
        "2.4 MB",
        "7.00 GB  (batches of 8 pictures)",
        "99 B  on the disk",
    ):
        assert part in text


def test_a_run_is_watched(tmp_path: Path) -> None:
    watch = Watch()
    arguments: dict[str, Any] = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "logger": False,
    }
    trainer = pl.Trainer(
        accelerator="cpu", enable_progress_bar=False, max_steps=3, callbacks=[watch], limit_val_batches=0,
        default_root_dir=tmp_path, **arguments,
    )  # fmt: skip
    task = Captioning(tiny.captioner(freeze_vision=True), optim=Optim(ema=0.9))
    trainer.fit(task, datamodule=tiny.scenes())
    needs = watch.needs
    learned = sum(p.numel() for p in task.parameters() if p.requires_grad)
    assert needs.gradients == needs.average == 4 * learned
    assert 8 * learned <= needs.optimizer <= 8 * learned + 8 * 100
    assert needs.frozen == sum(4 * p.numel() for p in task.captioner.vision.parameters())
    assert needs.activations > 4 * 4 * 13 * 24
    assert watch.samples == 4
