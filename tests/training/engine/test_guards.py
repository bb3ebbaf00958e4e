"""Faults are said, not trained through: numbers that are not finite, and memory that runs out."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mmtransformer.batch import CaptionBatch
from mmtransformer.cli.guards.errors import one_line
from mmtransformer.training.callbacks.saving import LastCheckpoint
from mmtransformer.training.engine.guard import (
    MOST_IN_A_ROW,
    RECORD,
    NonFiniteError,
    OutOfMemory,
    first_bad_module,
    not_finite,
)
from mmtransformer.training.engine.optim import OptimConfig, warmup_inverse_sqrt
from mmtransformer.training.engine.run import Run
from mmtransformer.training.tasks.captioning import Captioning
from support import tiny


@pytest.fixture(autouse=True)
def lightning_is_quiet() -> None:
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def batch(seed: int, poison: float | None = None) -> CaptionBatch:
    torch.manual_seed(seed)
    tokens = torch.randint(3, tiny.VOCAB, (3, 7))
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    loss_mask = attention_mask.clone()
    loss_mask[:, 0] = False
    pixels = torch.randn(3, 1, 3, 32, 32)
    if poison is not None:
        pixels[1, 0, 2, 5, 5] = poison
    return CaptionBatch(tokens, attention_mask, loss_mask, pixels, names=tuple(f"picture-{seed}-{i}" for i in range(3)))


def train(
    folder: Path, batches: list[CaptionBatch], accumulate: int = 1, precision: Any = "32-true", **optim: Any
) -> tuple[Captioning, pl.Trainer]:
    module = Captioning(tiny.captioner(), optim=OptimConfig(**({"lr": 0.01, "warmup_steps": 1} | optim)))
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        max_steps=len(batches) // accumulate,
        accumulate_grad_batches=accumulate,
        precision=precision,
    )
    loader = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, train_dataloaders=loader)
    return module, trainer


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_the_message_says_where(tmp_path: Path, poison: float) -> None:
    with pytest.raises(NonFiniteError) as caught:
        train(tmp_path, [batch(0), batch(1), batch(2, poison), batch(3)], lr=0.25)
    text = str(caught.value)
    assert text.startswith("step 2: the loss is nan and the gradient's norm nan")
    assert "samples: picture-2-0, picture-2-1, picture-2-2." in text
    assert "first bad module: captioner.vision.patch_embed" in text
    assert "whose input is not finite already" in text
    assert "first bad gradient: captioner." in text
    assert "Learning rate 0.1" in text
    assert "nonfinite=skip" in text
    assert one_line(caught.value) == text


def test_of_an_accumulated_step_the_bad_part_is_named(tmp_path: Path) -> None:
    """Not the part that came last, nor all of them."""
    with pytest.raises(NonFiniteError) as caught:
        train(tmp_path, [batch(0), batch(1), batch(2), batch(3, math.nan), batch(4), batch(5)], accumulate=3)
    text = str(caught.value)
    assert text.startswith("step 1: the loss is nan")
    assert "samples: picture-3-0, picture-3-1, picture-3-2." in text
    assert "first bad module: captioner.vision.patch_embed" in text


def test_every_sample_of_a_bad_step_stands_in_a_file(tmp_path: Path) -> None:
    many = batch(1, math.inf)
    names = tuple(f"그림-{i}" for i in range(17))
    rows = torch.arange(17) % 3
    many = CaptionBatch(
        many.tokens[rows], many.attention_mask[rows], many.loss_mask[rows], many.pixels[rows], names=names
    )  # type: ignore[index]
    with pytest.raises(NonFiniteError, match="그림-7 and 9 more") as caught:
        train(tmp_path, [batch(0), many], lr=0.25)
    assert f"(all in {tmp_path / 'not_finite.jsonl'})" in str(caught.value)
    (line,) = (tmp_path / "not_finite.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert row["samples"] == list(names)
    assert (row["step"], row["loss"], row["lr"]) == (1, "nan", 0.25)
    assert (row["process"], row["bad_here"]) == (0, True)
    assert row["module"].startswith("captioner.vision.patch_embed")
    assert row["gradient"].startswith("captioner.")


def test_a_run_that_starts_anew_forgets_an_older_runs_faults(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text("of an older run\n", "utf-8")
    with pytest.raises(NonFiniteError):
        train(tmp_path, [batch(0), batch(1, math.nan)])
    (line,) = (tmp_path / RECORD).read_text("utf-8").splitlines()
    assert json.loads(line)["step"] == 1
    train(tmp_path, [batch(0)])
    assert not (tmp_path / RECORD).exists()


def test_a_step_that_is_taken_again_is_noted_once(tmp_path: Path) -> None:
    record = tmp_path / RECORD
    for step in (3, 5, 5):
        not_finite(loss=math.nan, grad_norm=1.0, step=step, lr=0.1, names=["a"], record=record)
    assert [json.loads(line)["step"] for line in record.read_text("utf-8").splitlines()] == [3, 5]


def test_the_look_for_the_bad_module_computes_as_the_step_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the run's number format: what float32 can hold is not where bfloat16 failed."""
    seen = []
    loss = Captioning.loss

    def look(self: Captioning, batch: CaptionBatch) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return loss(self, batch)

    monkeypatch.setattr(Captioning, "loss", look)
    with pytest.raises(NonFiniteError, match="first bad module"):
        train(tmp_path, [batch(0), batch(1, math.nan)], precision="bf16-mixed")
    assert seen == [True, True, True]


def test_weights_are_what_they_were_before_the_bad_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, _ = train(tmp_path, [batch(0), batch(1)], lr_schedule="inverse_sqrt")
    seen: list[Captioning] = []

    class Keep(Captioning):
        def on_fit_start(self) -> None:
            seen.append(self)

    monkeypatch.setitem(globals(), "Captioning", Keep)
    with pytest.raises(NonFiniteError):
        train(tmp_path, [batch(0), batch(1), batch(2, math.nan)], lr_schedule="inverse_sqrt")
    for a, b in zip(good.parameters(), seen[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_learning_rate_that_is_nan_does_not_enter_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nonfinite: str
) -> None:
    good, _ = train(tmp_path, [batch(0), batch(1)], lr_schedule="inverse_sqrt")
    for bad in (math.nan, math.inf):
        seen: list[Captioning] = []

        def schedule(optim: OptimConfig, optimizer: torch.optim.Optimizer, steps: int, bad: float = bad) -> LambdaLR:
            usual = warmup_inverse_sqrt(optimizer, warmup_steps=optim.warmup_steps).lr_lambdas[0]
            return LambdaLR(optimizer, lambda step: usual(step) if step < 2 else bad)

        class Keep(Captioning):
            def on_fit_start(self, seen: list[Captioning] = seen) -> None:
                seen.append(self)

        with monkeypatch.context() as patch:
            patch.setitem(globals(), "Captioning", Keep)
            patch.setattr(OptimConfig, "schedule", schedule)
            with pytest.raises(NonFiniteError, match=f"step 2: the learning rate is {bad:g}; the weights were left"):
                train(tmp_path, [batch(0), batch(1), batch(2)], lr_schedule="inverse_sqrt", nonfinite=nonfinite)
        for a, b in zip(good.parameters(), seen[0].parameters(), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"optim\.lr \(nan\) must be a number of at least 0"):
        OptimConfig(lr=math.nan)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_bad_steps_can_be_left_out(tmp_path: Path, kind: str) -> None:
    """As if the step had not been, but for the schedule; the next ones learn."""
    batches = [batch(0), batch(1, math.nan), batch(2, math.inf), batch(3)]
    with pytest.warns(UserWarning, match=r"step left out \(\d so far\): step \d: the loss is nan") as caught:
        module, trainer = train(tmp_path, batches, kind=kind, nonfinite="skip", lr_schedule="inverse_sqrt")
    assert len([w for w in caught if "step left out" in str(w.message)]) == 2
    assert (module.skipped, trainer.global_step) == (2, 4)
    assert all(p.isfinite().all() for p in module.parameters())
    state = [value for values in trainer.optimizers[0].state.values() for value in values.values()]
    assert all(torch.as_tensor(value).isfinite().all() for value in state)
    assert module.last_loss.isfinite()
    start = tiny.captioner()
    moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), module.captioner.parameters(), strict=True)]
    assert all(moved)


def test_steps_left_out_are_counted_through_a_resume(tmp_path: Path) -> None:
    class Poison(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: CaptionBatch, index: int) -> None:
            if index == 1:
                batch.pixels[0] = math.nan  # type: ignore[index]

    def run(steps: int, path: Path | None) -> Captioning:
        module = Captioning(tiny.captioner(), optim=OptimConfig(nonfinite="skip"))
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_model_summary=False, enable_progress_bar=False, max_steps=steps,
            default_root_dir=tmp_path, limit_val_batches=0, callbacks=[LastCheckpoint(every_n_train_steps=1), Poison()],
        )  # fmt: skip
        trainer.fit(module, datamodule=tiny.scenes(), ckpt_path=path)
        return module

    with pytest.warns(UserWarning, match="step left out"):
        assert run(2, None).skipped == 1
    module = run(3, tmp_path / "checkpoints/last.ckpt")
    assert (module.skipped, module.trainer.global_step) == (1, 3)
    facts = module.training_facts(Run(tmp_path, 1.0, torch.device("cpu")))
    assert (facts["steps"], facts["skipped_steps"]) == (3, 1)


def test_a_run_that_only_skips_stops(tmp_path: Path) -> None:
    batches = [batch(0), *(batch(i, math.nan) for i in range(1, MOST_IN_A_ROW + 3))]
    with (
        pytest.warns(UserWarning, match="step left out"),
        pytest.raises(NonFiniteError, match=f"step {MOST_IN_A_ROW + 1}"),
    ):
        train(tmp_path, batches, nonfinite="skip")


def test_bad_steps_among_good_ones_do_not_stop_a_run_that_skips(tmp_path: Path) -> None:
    bad = MOST_IN_A_ROW + 2
    batches = [batch(i, math.nan if i % 2 else None) for i in range(2 * bad)]
    with pytest.warns(UserWarning, match="step left out"):
        module, trainer = train(tmp_path, batches, nonfinite="skip")
    assert (module.skipped, trainer.global_step) == (bad, 2 * bad)


def test_micro_batches_of_a_step_draw_differently(tmp_path: Path) -> None:
    drawn = []
    module = Captioning(tiny.captioner(), optim=OptimConfig(lr=0.01))
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, max_steps=2,
        enable_progress_bar=False, default_root_dir=tmp_path, accumulate_grad_batches=2, precision="32-true",
    )  # fmt: skip
    hook = module.on_train_batch_start

    def then_draw(*words: Any) -> None:
        hook(*words)
        drawn.append(float(torch.rand(())))

    module.on_train_batch_start = then_draw  # type: ignore[method-assign]
    loader = torch.utils.data.DataLoader([batch(i) for i in range(4)], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, train_dataloaders=loader)
    assert len(drawn) == len(set(drawn)) == 4


def test_a_batch_without_targets_is_a_fault(tmp_path: Path) -> None:
    empty = batch(1)
    empty.loss_mask[:] = False
    with pytest.raises(ValueError, match="step 1: none of the samples has a target token"):
        train(tmp_path, [batch(0), empty])


def test_choices_are_checked() -> None:
    with pytest.raises(ValueError, match='nonfinite must be "stop" or "skip", not "ignore"'):
        OptimConfig(nonfinite="ignore")  # type: ignore[arg-type]


def test_the_first_bad_module_is_found() -> None:
    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.log()

    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Sequential(Log(), nn.Linear(3, 2))})
    nn.init.constant_(model["a"].weight, 0.0)
    nn.init.constant_(model["a"].bias, -1.0)

    def compute() -> torch.Tensor:
        return model["b"](model["a"](torch.ones(2, 3)))

    assert first_bad_module(model, compute) == "b.0 (Log)"
    nn.init.constant_(model["a"].bias, 1.0)
    assert first_bad_module(model, compute) is None
    nn.init.constant_(model["b"][1].weight, math.inf)
    assert first_bad_module(model, compute) == "b.1 (Linear), whose weight weight is not finite"
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("where", ["loss", "backward", "optimizer"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        MemoryError("no memory"),
    ],
)
def test_out_of_memory_says_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    if where == "loss":
        monkeypatch.setattr(Captioning, "loss", fail)
    elif where == "backward":
        monkeypatch.setattr(pl.LightningModule, "backward", fail)
    else:  # where the optimizer first takes room for its moments

        def after_backward(self: Any, *args: Any) -> None:
            args[-1]()
            fail()

        monkeypatch.setattr(pl.LightningModule, "optimizer_step", after_backward)
    with pytest.raises(OutOfMemory) as caught:
        train(tmp_path, [batch(0)])
    text = str(caught.value)
    assert text.startswith("step 0: out of memory on cpu with batches of 3 samples")
    for remedy in ("--data.batch_size=1", "accumulate_grad_batches=2", "activation_checkpointing", "mmt plan"):
        assert remedy in text
    assert "\n" not in text


def test_other_errors_stay_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Captioning, "loss", fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(tmp_path, [batch(0)])
