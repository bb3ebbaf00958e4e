"""Activation checkpointing, compiled blocks and the meter: the same gradient, less memory, honest numbers."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import Tensor

from mmtransformer.batch import CaptionBatch
from mmtransformer.training.callbacks.throughput import Throughput, gemm_rate
from mmtransformer.training.engine.log import MetricsLog
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.recompute_and_compile import blocks, checkpoint_activations, compile_blocks
from mmtransformer.training.tasks.captioning import Captioning
from support import tiny


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
    return Captioning(tiny.captioner(depth=depth), optim=OptimConfig())


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
    task = Captioning(tiny.captioner(), optim=OptimConfig())
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
