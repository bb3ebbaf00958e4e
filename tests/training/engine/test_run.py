"""A run's folder: one run writes there at a time, and none over another."""

import errno
import os
import re
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from mmtransformer.cli import main
from mmtransformer.training.engine import run
from mmtransformer.training.engine.run import locked
from support import tiny

ROOT = Path(__file__).parents[3]


def hold(folder: Path) -> int:
    """A process that holds a folder until it is killed; its number."""
    pid = os.fork()
    if pid == 0:
        with locked(folder):
            (folder / "held").touch()
            time.sleep(60)
        os._exit(0)
    while not (folder / "held").exists():
        time.sleep(0.01)
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_one_run_writes_at_a_time(tmp_path: Path) -> None:
    pid = hold(tmp_path)
    try:
        pattern = rf"{re.escape(str(tmp_path))}: another run is writing there \(process {pid} on .*, since .*--trainer"
        with pytest.raises(ValueError, match=pattern), locked(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()  # that of the other
    finally:
        end(pid)
    assert (tmp_path / ".lock").exists()
    for _ in range(2):
        with locked(tmp_path):  # What a killed run leaves locks nothing.
            assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()
        assert not (tmp_path / ".lock").exists()


def test_loading_workers_that_outlive_a_run_do_not_hold_its_folder(tmp_path: Path) -> None:
    def job() -> None:
        with locked(tmp_path):
            if os.fork() == 0:
                time.sleep(5)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    assert tiny.in_child(job) == -signal.SIGKILL
    with locked(tmp_path):
        pass


def test_a_disk_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run, "_lock", none)
    with pytest.warns(UserWarning, match=r"\.lock: no locks on this disk"), locked(tmp_path):
        pass


def mmt(command: str, folder: Path, *more: Any) -> int:
    words = [command, "--config", "caption_scenes", "--config", str(ROOT / "recipes/tiny.yaml")]
    words += ["--data.source.train_size=16", "--data.source.val_size=4", "--data.batch_size=8"]
    words += ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main([*words, f"--trainer.default_root_dir={folder}", *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert mmt("fit", folder) == 0
    before = contents(folder)
    assert ".lock" not in before
    capsys.readouterr()
    assert mmt("fit", folder, "--seed_everything=-5") == 2
    assert "error: seed_everything (-5) must be from 0 to 4294967295" in capsys.readouterr().err
    assert mmt("fit", folder, "--seed_everything=2") == 2
    told = capsys.readouterr().err
    assert "a run is there already" in told
    assert "--resume" in told
    assert "--trainer.default_root_dir=DIR" in told
    assert told.count("\n") == 1
    assert contents(folder) == before
    pid = hold(folder)
    try:
        assert mmt("fit", folder, "--resume") == 2
        assert f"another run is writing there (process {pid}" in capsys.readouterr().err
    finally:
        end(pid)
        (folder / "held").unlink()
    (folder / ".lock").unlink()
    assert contents(folder) == before
    capsys.readouterr()
    assert mmt("validate", folder, f"--ckpt_path={folder}/checkpoints/last.ckpt") == 0
    said = capsys.readouterr().out
    for metric in ("val/loss ", "val/perplexity ", "compositional/loss_blank_image "):  # each once, of all splits
        assert len(re.findall(rf"^{metric} +\d[\d.]*$", said, re.MULTILINE)) == said.count(metric) == 1, said
    assert contents(folder) == before  # the log of the training too
    assert mmt("validate", folder) == 0  # the run's own weights, unasked
    unasked = capsys.readouterr().out
    assert unasked.replace(f"the weights are of {folder}/checkpoints/last.ckpt\n", "") == said != unasked
