"""A run that is killed at any moment and goes on is, bit for bit, the run that was not."""

import csv
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import Precision

from mmtransformer import TextDecoder
from mmtransformer.cli import main
from mmtransformer.data.loading.dataset import CaptionDataset
from mmtransformer.training.callbacks.saving import LastCheckpoint
from mmtransformer.training.engine.checkpoints import AtomicCheckpointIO, CheckpointError, read
from mmtransformer.training.engine.guard import RECORD
from mmtransformer.training.engine.internals import Place, checkpoint_of, in_a_step, place_of
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.resume import frozen_hashes, restore_frozen, seed_step, strip_frozen
from mmtransformer.training.tasks.captioning import Captioning
from support import tiny

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From a setting to what the unbroken run saw and logged; each setting is run once."""
    known: dict[str, tuple[list[Any], str]] = {}

    def get(**setting: Any) -> tuple[list[Any], str]:
        key = repr(sorted(setting.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("unbroken")
            assert tiny.run(folder / "run", folder / "log", **setting) == 0
            known[key] = tiny.lines(folder / "log"), (folder / "run" / "metrics.csv").read_text()
        return known[key]

    return get


def check(folder: Path, reference: tuple[list[Any], str], setting: dict[str, Any], **kill: Any) -> None:
    """Kills a run, goes on, and compares everything from there on, and the log as a whole."""
    run, number = folder / "run", kill.get("number", signal.SIGKILL)
    workers = setting.get("workers", 0)
    code = tiny.run(run, folder / "before", **setting, **kill)
    assert code == (-9 if number == signal.SIGKILL else 128 + number)
    assert tiny.run(run, folder / "after", resume=True, **(setting | {"workers": 0 if workers else 2})) == 0
    seen, log = reference
    before, after = tiny.lines(folder / "before"), tiny.lines(folder / "after")
    first = max(setting.get("accumulate_grad_batches", 1), setting.get("every_steps", 1))
    assert 0 < len(after) < len(seen) or kill["at"] <= first  # before the first checkpoint it begins anew
    assert before == seen[: len(before)]
    assert after == seen[len(seen) - len(after) :]
    assert len(before) + len(after) >= len(seen)
    assert (run / "metrics.csv").read_text() == log
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["last.ckpt"]


FROZEN = partial(tiny.captioner, freeze_vision=True)
SETTINGS: dict[str, dict[str, Any]] = {
    "epochs": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "steps": {"max_steps": 8, "max_epochs": -1, "ema": 0.0},
    "validation in mid-epoch": {"val_check_interval": 0.67},
    "validation over epochs": {"val_check_interval": 4, "check_val_every_n_epoch": None},
    "part of an epoch": {"limit_train_batches": 2, "every_steps": 3},
    "workers": {"workers": 2},
    "mixture": {"mixture": True, "every_steps": 2},
    "native sizes": {"data": tiny.many_sizes, "every_steps": 2},
    "native sizes, workers": {"data": tiny.many_sizes, "workers": 2},
    "contrast, hard negatives": {"task": tiny.contrast, "loading": {"group_size": 2}},
    "contrast, accumulated": {"task": tiny.contrast, "loading": {"group_size": 2}, "accumulate_grad_batches": 2},
    # Lightning changes the number format of the weights after it has read the checkpoint.
    "float64, frozen tower": {"precision": "64-true", "captioner": FROZEN},
    "bfloat16, frozen tower": {"precision": "bf16-true", "captioner": FROZEN},
}


@pytest.mark.parametrize(
    ("name", "kill"),
    [
        ("epochs", {"at": 2}),
        ("epochs", {"at": 3}),  # the end of an epoch: killed before its validation is over
        ("epochs", {"at": 4}),  # nothing of the new epoch is saved
        ("epochs", {"at": 6, "where": "validation"}),
        ("epochs", {"at": 5, "number": signal.SIGTERM}),
        ("epochs", {"at": 6, "number": signal.SIGINT, "where": "validation"}),
        ("accumulation", {"at": 5}),
        ("accumulation", {"at": 4, "number": signal.SIGTERM}),
        ("steps", {"at": 6}),
        ("validation in mid-epoch", {"at": 5}),
        ("validation over epochs", {"at": 5}),
        ("validation over epochs", {"at": 8, "where": "validation"}),
        ("validation over epochs", {"at": 6, "number": signal.SIGTERM}),
        ("part of an epoch", {"at": 5}),
        ("workers", {"at": 4}),
        ("mixture", {"at": 6}),
        ("native sizes", {"at": 5}),
        ("native sizes", {"at": 7, "number": signal.SIGTERM}),
        ("native sizes, workers", {"at": 3}),
        ("contrast, hard negatives", {"at": 5}),
        ("contrast, hard negatives", {"at": 6, "where": "validation"}),
        ("contrast, hard negatives", {"at": 4, "number": signal.SIGTERM}),
        ("contrast, accumulated", {"at": 5}),
        ("float64, frozen tower", {"at": 5}),
        ("bfloat16, frozen tower", {"at": 5}),
        ("workers", {"at": 4, "number": signal.SIGTERM, "all": True}),
        ("workers", {"at": 6, "number": signal.SIGINT, "all": True, "where": "validation"}),
    ],
)
def test_killed_and_resumed_is_the_unbroken_run(tmp_path: Path, unbroken: Any, name: str, kill: dict[str, Any]) -> None:
    setting = SETTINGS[name]
    check(tmp_path, unbroken(**setting), setting, **kill)


def mmt_fit(folder: Path, *more: str) -> int:
    """A whole run, 12 batches in two epochs with two validations each, and its end; in a forked process."""
    sizes = {"vision.depth": 1, "vision.dim": 24, "vision.num_heads": 3}
    sizes |= {"decoder.depth": 1, "decoder.dim": 24, "decoder.num_heads": 3, "decoder.context_dim": 24}
    words = ["fit", "--config", "caption_scenes", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder}"]
    words += [f"--model.captioner.{name}={size}" for name, size in sizes.items()]
    words += ["--model.generation.max_new_tokens=3", "--model.image_ablation_batches=2", "--data.batch_size=4"]
    words += ["--data.source.train_size=22", "--data.source.val_size=11", "--data.source.compositional_size=7"]
    words += ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--trainer.precision=32-true"]
    words += ["--trainer.accumulate_grad_batches=4", "--trainer.val_check_interval=0.5"]
    words += ["--trainer.enable_progress_bar=false", *more]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny.in_child(lambda: sys.exit(main(words)))


def results(folder: Path) -> tuple[list[dict[str, str]], Any, bytes]:
    """What must be equal at a run's end: the log and the scores but for what is measured in seconds, and the model."""
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [{k: v for k, v in row.items() if not re.search("second|mfu|memory", k)} for row in csv.DictReader(file)]
    rows = [row for row in rows if any(value for k, value in row.items() if k not in ("epoch", "step"))]
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    metrics["training"] = {k: v for k, v in metrics["training"].items() if "second" not in k}
    return rows, metrics, (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("at", "number"), [(12, signal.SIGTERM), (9, signal.SIGTERM), (12, signal.SIGKILL)])
def test_the_end_of_a_resumed_run_is_that_of_the_unbroken_one(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, at: int, number: int
) -> None:
    """Stopped in its last validation or the one before, and resumed; and again when it has ended."""
    whole = tmp_path_factory.getbasetemp() / "whole"
    if not whole.exists():
        assert mmt_fit(whole) == 0
    arguments = f"path: {tmp_path / 'seen'}, at: {at}, number: {int(number)}, where: validation"
    killer = f"--trainer.callbacks=[{{class_path: support.tiny.Witness, init_args: {{{arguments}}}}}]"
    assert mmt_fit(tmp_path / "run", killer) in (128 + number, -number)
    for _ in range(2):
        assert mmt_fit(tmp_path / "run", "--resume") == 0
        assert results(tmp_path / "run") == results(whole)


def hanging(folder: Path, log: Path, calls: int, number: int, *, training: bool = True, **arguments: Any) -> int:
    """A run whose only worker stands still at its n-th sample, and which then gets a signal, or none (0); its code.

    With training=False the worker that stands still is that of the validation.
    """

    def job() -> None:
        load, done = CaptionDataset.__getitem__, []

        def slow(self: CaptionDataset, pick: Any) -> Any:
            done.extend([pick] if self.training == training else [])
            while multiprocessing.parent_process() is not None and len(done) > calls:
                time.sleep(0.1)
            return load(self, pick)

        def send() -> None:
            while len(tiny.lines(log)) < lines:
                time.sleep(0.05)
            time.sleep(1)
            os.kill(os.getpid(), number)

        lines = (5 if calls > 11 else calls // 4) if training else 3
        CaptionDataset.__getitem__ = slow
        if number:
            threading.Thread(target=send, daemon=True).start()
        tiny.fit(folder, tiny.Witness(log), workers=1, **arguments)

    return tiny.in_child(job)


@pytest.mark.parametrize(("calls", "number"), [(17, signal.SIGTERM), (5, signal.SIGINT)])
def test_a_run_that_waits_for_data_is_saved_and_ended(tmp_path: Path, unbroken: Any, calls: int, number: int) -> None:
    """In its second epoch, and in its first; and it goes on as the unbroken run did."""
    began = time.monotonic()
    assert hanging(tmp_path / "run", tmp_path / "before", calls, number, every_steps=100) == 128 + number
    assert time.monotonic() - began < 60
    before = tiny.lines(tmp_path / "before")
    steps = sum(line[0] != "validation" for line in before)
    assert read(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == steps
    assert tiny.run(tmp_path / "run", tmp_path / "after", resume=True) == 0
    assert before + tiny.lines(tmp_path / "after") == unbroken()[0]
    assert (tmp_path / "run/metrics.csv").read_text() == unbroken()[1]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_validation_that_waits_for_data_is_saved_and_ended(tmp_path: Path, unbroken: Any, ema: float) -> None:
    """Its average is not taken for the model, and the validation is done when the run goes on."""
    began = time.monotonic()
    run, log = tmp_path / "run", tmp_path / "before"
    assert hanging(run, log, 2, signal.SIGTERM, training=False, every_steps=100, ema=ema) == 143
    assert time.monotonic() - began < 60
    before = tiny.lines(log)
    assert len(before) == 3
    assert read(run / "checkpoints/last.ckpt")["global_step"] == 3
    assert tiny.run(run, tmp_path / "after", resume=True, ema=ema) == 0
    assert before + tiny.lines(tmp_path / "after") == unbroken(ema=ema)[0]
    assert (run / "metrics.csv").read_text() == unbroken(ema=ema)[1]


class Rescued(tiny.Witness):
    """Saves the last step in the middle of another, as a process does whose others are lost, and is killed then."""

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        last_checkpoint = next(callback for callback in trainer.callbacks if isinstance(callback, LastCheckpoint))
        if not in_a_step(trainer):
            last_checkpoint._place = place_of(trainer)
        super().on_train_batch_end(trainer, *rest)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.batches == self.at:
            last_checkpoint = next(callback for callback in trainer.callbacks if isinstance(callback, LastCheckpoint))
            last_checkpoint._listen(signal.SIGTERM, None)
            assert last_checkpoint.rescue()
            os._exit(7)


@pytest.mark.parametrize(
    ("name", "at", "done"),
    [("epochs", 4, 4), ("epochs", 6, 6), ("accumulation", 4, 3), ("validation in mid-epoch", 5, 5), ("steps", 6, 6)],
)
def test_rescued_in_the_middle_of_a_step_it_goes_on_as_the_unbroken_run(
    tmp_path: Path, unbroken: Any, name: str, at: int, done: int
) -> None:
    """Behind so many batches; of an accumulated step the first ones are computed again."""
    setting, run = SETTINGS[name] | {"every_steps": 100}, tmp_path / "run"
    assert tiny.in_child(lambda: tiny.fit(run, Rescued(tmp_path / "before", at, 0, ""), **setting)) == 7
    assert tiny.run(run, tmp_path / "after", resume=True, **setting) == 0
    seen, log = unbroken(**SETTINGS[name])
    before, after = tiny.lines(tmp_path / "before"), tiny.lines(tmp_path / "after")
    assert before == seen[: len(before)]
    assert after == seen[len(seen) - len(after) :]
    batches = [sum(isinstance(line[0], int) for line in lines) for lines in (seen, after)]
    assert batches[0] - batches[1] == done
    assert (run / "metrics.csv").read_text() == log


def test_what_changes_while_it_is_rescued_is_not_saved(tmp_path: Path) -> None:
    parts, trainer = object(), SimpleNamespace(global_step=4, lightning_module=SimpleNamespace(_parts=None))

    class Thawed:
        def dump_checkpoint(self, weights_only: bool) -> dict[str, Any]:
            trainer.lightning_module._parts = None  # The step's sums were read.
            return {}

    trainer._checkpoint_connector = Thawed()
    for now, step in ((parts, 4), (None, 4), (parts, 3)):
        trainer.lightning_module._parts = now
        assert checkpoint_of(trainer, Place(step, parts, {})) is None


@pytest.mark.slow
def test_killed_at_25_random_moments(tmp_path: Path, unbroken: Any) -> None:
    draw = random.Random(5)
    batches = {"steps": 8, "part of an epoch": 6}
    validated = {"validation in mid-epoch": 2, "part of an epoch": 2}  # batches before the first validation
    for i in range(25):
        name, where = draw.choice(list(SETTINGS)), draw.choice(["train", "train", "validation"])
        at = draw.randint(1, batches.get(name, 9)) if where == "train" else validated.get(name, 3)
        setting = SETTINGS[name]
        folder = tmp_path / str(i)
        folder.mkdir()
        check(folder, unbroken(**setting), setting, at=at, where=where)


@pytest.mark.parametrize(("workers", "mixture"), [(1, False), (2, False), (4, False), (4, True)])
def test_any_number_of_workers_sees_the_same_pixels_and_losses(unbroken: Any, workers: int, mixture: bool) -> None:
    """To the last bit, grouped by length and augmented; and the weights that come of it are the same."""
    setting = {"max_steps": 4, "max_epochs": -1, "ema": 0.0, "mixture": mixture}
    seen, log = unbroken(**setting, workers=workers)
    assert (seen, log) == unbroken(**setting, workers=0)
    assert len({line[3] for line in seen if line[0] != "validation" and line[0] != "end"}) == 4


def test_every_image_is_seen_once_an_epoch(unbroken: Any) -> None:
    seen, _ = unbroken()
    for epoch in range(3):
        names = [name for line in seen if line[0] == epoch for name in line[-1]]
        assert len(names) == len(set(names)) == 11


def test_in_the_middle_of_an_epoch_the_batch_may_change(tmp_path: Path) -> None:
    assert tiny.run(tmp_path / "run", tmp_path / "before", at=2, number=signal.SIGTERM) == 143
    assert tiny.run(tmp_path / "run", tmp_path / "after", resume=True, batch_size=2) == 0
    seen = tiny.lines(tmp_path / "before") + tiny.lines(tmp_path / "after")
    for epoch in range(3):
        names = [name for line in seen if line[0] == epoch for name in line[-1]]
        assert len(names) == len(set(names)) == 11


@pytest.mark.parametrize("length", [{"max_steps": 4, "max_epochs": -1}, {"max_epochs": 2}])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (2, 4)])
def test_a_step_may_be_cut_otherwise_in_mid_epoch(
    tmp_path: Path, unbroken: Any, batch_size: int, accumulate: int, length: dict[str, int]
) -> None:
    """Every step has the pictures that it had, and the epochs end where they ended."""

    def steps(lines: list[Any], last: int = 0) -> list[list[str]]:
        found, names = [], []
        for line in lines:
            if isinstance(line[0], int):
                names += line[-1]
                if line[2] > last:
                    found.append(sorted(names))
                    last, names = line[2], []
        return found

    setting = {"batch_size": 4, "accumulate_grad_batches": 2} | length
    assert tiny.run(tmp_path / "run", tmp_path / "log", at=2, number=signal.SIGTERM, **setting) == 143
    setting = {"batch_size": batch_size, "accumulate_grad_batches": accumulate} | length
    assert tiny.run(tmp_path / "run", tmp_path / "after", resume=True, **setting) == 0
    seen = steps(tiny.lines(tmp_path / "log")) + steps(tiny.lines(tmp_path / "after"), 1)
    whole, _ = unbroken(batch_size=8)
    assert [len(names) for names in seen] == [8, 3, 8, 3]
    assert seen == steps(whole)[:4]


def test_a_run_that_has_ended_goes_on_to_the_same_end(tmp_path: Path, unbroken: Any) -> None:
    """Also when it is resumed after its last step: the average is the model then too."""
    setting = {"max_steps": 8, "max_epochs": -1, "ema": 0.5}
    seen, _ = unbroken(**setting)
    assert tiny.run(tmp_path / "run", tmp_path / "log", **setting) == 0
    assert tiny.run(tmp_path / "run", tmp_path / "again", resume=True, **setting) == 0
    assert tiny.lines(tmp_path / "again")[-1] == seen[-1]


def test_what_a_step_draws_depends_on_seed_step_and_process() -> None:
    import numpy as np

    def draws(*words: int) -> tuple[float, ...]:
        seed_step(*words)
        return float(torch.rand(())), random.random(), float(np.random.random())  # noqa: NPY002

    first = draws(3, 5, 0)
    assert first == draws(3, 5, 0)
    others = [draws(4, 5, 0), draws(3, 6, 0), draws(3, 5, 1)]
    assert all(a != b for other in others for a, b in zip(first, other, strict=True))


# ----------------------------------------------------------------------------------------------- another model


def saved(**arguments: Any) -> dict[str, Any]:
    module = Captioning(tiny.captioner(**arguments), optim=OptimConfig())
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    strip_frozen(module, checkpoint, frozen_hashes(module))
    return checkpoint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab": 307}, "captioner.decoder.vocab_size was 300 and is now 307; captioner.decoder.tok_embed.weight was"),
        ({"dim": 26}, "captioner.decoder.dim was 24 and is now 26"),
        ({"depth": 2}, "captioner.decoder.depth was 1 and is now 2; 26 weights of captioner.decoder.blocks.1 are"),
        ({"freeze_vision": False}, "captioner.freeze_vision was True and is now False"),
        ({"seed": 4}, "the frozen weights of captioner.vision are not those of the run (first: captioner.vision."),
    ],
)  # fmt: skip
def test_another_model_is_one_clear_error(arguments: dict[str, Any], message: str) -> None:
    checkpoint = saved(freeze_vision=True)
    module = Captioning(tiny.captioner(**({"freeze_vision": True} | arguments)), optim=OptimConfig())
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(CheckpointError) as caught:
        restore_frozen(module, checkpoint, frozen_hashes(module))
    assert f"cannot resume with another model: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "without --resume" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_frozen_weights_are_left_out_and_put_back() -> None:
    checkpoint = saved(freeze_vision=True)
    assert not any(name.startswith("captioner.vision") for name in checkpoint["state_dict"])
    assert set(checkpoint["frozen"]) == {
        f"captioner.vision.{name}" for name, _ in tiny.captioner().vision.named_parameters()
    }
    same = Captioning(tiny.captioner(freeze_vision=True), optim=OptimConfig())
    with torch.no_grad():
        for parameter in same.captioner.decoder.parameters():
            parameter.zero_()
    restore_frozen(same, checkpoint, frozen_hashes(same))
    same.load_state_dict(checkpoint["state_dict"])
    fresh = tiny.captioner(freeze_vision=True)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), same.captioner.parameters(), strict=True))


def test_the_compilers_prefix_does_not_matter() -> None:
    plain, compiled = (Captioning(tiny.captioner(), optim=OptimConfig()) for _ in range(2))
    compiled.captioner.decoder = torch.compile(compiled.captioner.decoder, backend="eager")  # type: ignore[assignment]
    assert any("_orig_mod." in name for name in compiled.state_dict())
    for source, target in ((compiled, plain), (plain, compiled)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.normal_()
        checkpoint: dict[str, Any] = {"state_dict": source.state_dict()}
        strip_frozen(source, checkpoint, {})
        assert not any("_orig_mod." in name for name in checkpoint["state_dict"])
        restore_frozen(target, checkpoint, {})
        target.load_state_dict(checkpoint["state_dict"])
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    module = Captioning(tiny.captioner(), optim=OptimConfig(lr=0.01))
    checkpoint = saved() | {"optim": {"kind": "adamw", "lr": 0.02}, "optimizer_states": [{}]}
    state = type("State", (), {"fn": "fit"})
    module.trainer = type("Trainer", (), {"state": state, "precision_plugin": Precision()})()  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"optim\.lr was 0\.02 and is now 0\.01"):
        module.on_load_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match="holds nothing of the optimizer"):
        module.on_load_checkpoint(saved() | {"optimizer_states": []})


def test_a_run_keeps_the_seed_that_it_began_with() -> None:
    module = Captioning(tiny.captioner(), optim=OptimConfig(kind="adamw", lr=0.01))
    state = SimpleNamespace(fn="validate")
    module.trainer = SimpleNamespace(state=state, precision_plugin=Precision())  # type: ignore[assignment]
    module.on_load_checkpoint(saved() | {"seed": 41, "seen": {"samples": 5, "tokens": 70, "skipped": 2}})
    assert module._seed == 41
    assert (module.samples_seen, module.tokens_seen, module.skipped) == (5, 70, 2)


# --------------------------------------------------------------------------------------------- the command line


def test_mmt_fit_resumes_by_itself(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Captioning, "finish", lambda self, run: print(f"took {run.seconds:.3f} s"))
    words = ["fit", "--config", str(ROOT / "recipes/caption_scenes.yaml")]
    words += ["--config", str(ROOT / "recipes/tiny.yaml"), f"--trainer.default_root_dir={tmp_path}"]
    words += ["--data.source.train_size=12", "--data.source.val_size=3", "--data.source.compositional_size=2"]
    words += ["--trainer.enable_progress_bar=false", "--model.optim.ema_decay=0.9"]

    def mmt(*more: str) -> tuple[int, str]:
        def job() -> None:
            import warnings

            warnings.simplefilter("ignore")
            raise SystemExit(main([*words, *more]))

        code = tiny.in_child(job)
        return code, "".join(capfd.readouterr())

    code, text = mmt("--ckpt_path=last")
    assert (code, "no whole checkpoint to go on from" in text) == (2, True)
    code, text = mmt("--resume", "--trainer.max_steps=2")
    assert code == 0, text
    assert "the gradient is clipped at 1; a moving average of the weights (0.9) is validated, and kept" in text
    assert read(tmp_path / "checkpoints/last.ckpt")["global_step"] == 2
    path = tmp_path / "checkpoints/last.ckpt"
    AtomicCheckpointIO().save_checkpoint(read(path) | {"seconds": 7000.0}, path)
    reports = [tmp_path / "bad_images_train.jsonl", tmp_path / RECORD]
    for report in reports:
        report.write_text('{"name": "그림.png"}\n', encoding="utf-8")
    with monkeypatch.context() as patch:  # the second Ctrl+C ends a run at once
        patch.setattr(Captioning, "training_step", lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
        code, text = mmt("--resume")
        assert (code, "mmt: interrupted" in text) == (130, True), text
    code, text = mmt("--resume")
    assert code == 0, text
    assert 7000 < float(text.partition("took ")[2].split()[0]) < 7600  # with the time before it was resumed
    assert read(tmp_path / "checkpoints/last.ckpt")["global_step"] == 3
    assert "nothing was left to train" not in text
    for more, end in ((), "max_steps (3)"), (("--trainer.max_steps=9", "--trainer.max_epochs=1"), "max_epochs (1)"):
        code, text = mmt("--resume", *more)
        said = f"nothing was left to train, as the run had reached trainer.{end} at step 3: a larger one goes on"
        assert (code, said in text) == (0, True), text
    for report in reports:  # a run that goes on keeps what it has reported
        assert report.read_text("utf-8") == '{"name": "그림.png"}\n'
    code, text = mmt("--resume", "--model.captioner.decoder.depth=2")
    assert code == 2
    last = text.strip().splitlines()[-1]
    assert "mmt fit: error: cannot resume with another model: captioner.decoder.depth was 3 and is now 2" in last
    assert TextDecoder.__name__ not in last
    code, text = mmt("--trainer.max_steps=1")
    assert (code, [r.exists() for r in reports]) == (2, [True, True]), text  # another one is not written over it
