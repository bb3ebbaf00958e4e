"""Which limit ends a run is said: of epochs and steps the first, time, and the callback that ends it early."""

import re
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping, Timer

from mmtransformer.training.callbacks.limits import Limits
from mmtransformer.training.callbacks.saving import LastCheckpoint
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.tasks.captioning import Captioning
from support import tiny


def fit(capsys: pytest.CaptureFixture[str], folder: Path, *callbacks: pl.Callback, **arguments: Any) -> str:
    """What is said of a run of eleven pictures, three steps an epoch."""
    warnings.simplefilter("ignore")
    capsys.readouterr()
    last = folder / "checkpoints" / "last.ckpt"
    run = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        callbacks=[Limits(), LastCheckpoint(), *callbacks],
        **arguments,
    )
    module = Captioning(tiny.captioner(), optim=OptimConfig(kind="adamw", lr=0.01), image_ablation_batches=0)
    run.fit(module, datamodule=tiny.scenes(), ckpt_path=last if last.exists() else None)
    return "".join(capsys.readouterr()).strip()


def test_of_epochs_and_steps_the_one_that_comes_first_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(capsys, tmp_path, max_epochs=1, max_steps=1000, accumulate_grad_batches=2) == (
        "trainer.max_epochs (1) ends the run at step 2, before trainer.max_steps (1,000), as an epoch of the data has "
        "2 steps; trainer.max_epochs -1 leaves it to max_steps"
    )
    assert (
        fit(capsys, tmp_path / "a", max_epochs=50, max_steps=4) == "trainer.max_steps (4) ends the run in epoch 2 of 50"
    )
    for more in ({"max_epochs": 1}, {"max_steps": 2}, {"max_epochs": 1, "max_steps": 3}):
        assert fit(capsys, tmp_path / str(more), **more) == ""


def test_time_that_is_over_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = [0.0]

    class Slow(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            gone[0] = 60.0 if trainer.global_step == 4 else 0.0

    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: gone[0])
    limits: dict[str, Any] = {"max_epochs": 9, "max_time": timedelta(seconds=60)}
    assert fit(capsys, tmp_path, Slow(), **limits) == "trainer.max_time (1:00) ended the run at step 5 of 27"
    assert fit(capsys, tmp_path, **limits) == (
        "nothing was left to train, as the run had reached trainer.max_time (1:00) at step 5: a larger one goes on"
    )
    said = "nothing was left to train, as the run had reached trainer.max_steps (5) at step 5: a larger one goes on"
    assert fit(capsys, tmp_path, max_epochs=9, max_steps=5) == said
    assert fit(capsys, tmp_path, max_epochs=2) == ""


def test_a_run_that_gets_no_better_says_why_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop = EarlyStopping("val/loss", mode="max", patience=1)
    said = fit(capsys, tmp_path, stop, max_epochs=9)
    assert said.startswith("EarlyStopping (Monitored metric val/loss did not improve in the last 1 records"), said
    assert re.search(r"\) ended the run at step \d+ of 27$", said)
    assert "\n" not in said


@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_epochs": 9, "max_steps": 4}], ids=["epochs", "steps"])
def test_a_run_shorter_than_the_way_to_a_validation_is_validated_at_its_end(
    length: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = []

    class Seen(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            at.append(trainer.fit_loop.total_batch_idx + 1)

    over_epochs: dict[str, Any] = {"check_val_every_n_epoch": None, "accumulate_grad_batches": 2}
    said = fit(capsys, tmp_path / "a", Seen(), val_check_interval=1000, **over_epochs, **length)
    assert "the run has 6 batches, fewer than trainer.val_check_interval (1,000): it is validated once" in said
    assert at == [6]
    at.clear()
    said = fit(capsys, tmp_path / "b", Seen(), val_check_interval=5, **over_epochs, **length)
    assert "validated" not in said
    assert at == [5]
