"""A process that is killed or frozen beside another: the other ends in a line that names it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmtransformer.training.callbacks.heartbeats import Heartbeats
from mmtransformer.training.engine.checkpoints import read
from support.recipes import RECIPES


def test_who_gives_no_sign_is_named_and_who_is_slow_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    signs = [Heartbeats(tmp_path / "s", rank, 3) for rank in range(3)]
    for _ in range(4):
        now[0] += 2
        signs[1].beat()  # 2 is frozen
        signs[0].look()
    (said,) = signs[0].silent(5)
    assert re.match(rf"process 2 \(number {os.getpid()} on .+\), silent for 6 s", said)
    signs[2].beat()
    signs[0].look()
    assert signs[0].silent(5) == []
    for one in signs:
        one.forget()
    assert not (tmp_path / "s").exists()


RUN = """
import os, sys, time, warnings
import lightning.pytorch as pl
import torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
from mmtransformer.cli import main
from mmtransformer.training.tasks.captioning import Captioning
step = Captioning.on_train_batch_start
def slow(self, batch, batch_idx):
    time.sleep(0.1)
    print("step", self.trainer.global_step, file=sys.stderr, flush=True)
    return step(self, batch, batch_idx)
Captioning.on_train_batch_start = slow
from mmtransformer.data.loading.dataset import CaptionDataset
load = CaptionDataset.__getitem__
def waits(self, pick):
    while os.path.exists(os.environ["DEAD_DISK"]):
        time.sleep(0.1)
    return load(self, pick)
CaptionDataset.__getitem__ = waits
sys.exit(main(sys.argv[1:]))
"""


def start(folder: Path, *more: str) -> list[subprocess.Popen[str]]:
    """Two processes of a long run of little work."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = {"vision.dim": 48, "vision.depth": 1, "decoder.dim": 48, "decoder.depth": 1, "decoder.context_dim": 48}
    words = ["fit", f"--config={RECIPES / 'caption_scenes.yaml'}", f"--config={RECIPES / 'tiny.yaml'}"]
    words += [f"--model.captioner.{key}={value}" for key, value in small.items()]
    words += [f"--data.source.{key}" for key in ("train_size=400", "val_size=5", "compositional_size=1")]
    words += ["--data.batch_size=2", "--model.optim.kind=adamw", "--trainer.max_epochs=50", "--trainer.max_steps=-1"]
    words += ["--trainer.strategy=ddp", "--trainer.devices=2", f"--trainer.default_root_dir={folder}", *more]
    found = []
    for rank in range(2):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        variables |= {"DEAD_DISK": folder.parent / f"dead{rank}"}
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        with (folder.parent / f"{rank}.txt").open("w") as said:
            found.append(
                subprocess.Popen(
                    [sys.executable, "-c", RUN, *words], env=environment, stdout=said, stderr=said, text=True
                )
            )
    late = time.monotonic() + 240
    while "step 5" not in (folder.parent / "0.txt").read_text():
        assert time.monotonic() < late, (folder.parent / "0.txt").read_text()
        time.sleep(0.2)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("how", ["killed", "frozen", "frozen, and the other is told to stop"])
def test_the_other_process_ends_in_a_line(tmp_path: Path, how: str, lost: int) -> None:
    processes = start(tmp_path / "run", "--process_timeout=15" if how == "frozen" else "--process_timeout=600")
    try:
        processes[lost].send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        other = processes[1 - lost]
        if "told" in how:
            time.sleep(1)
            other.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code = other.wait(120)
        took = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = (tmp_path / f"{1 - lost}.txt").read_text()
    line = said.strip().splitlines()[-1]
    assert re.search(
        rf"process {lost} \(number {processes[lost].pid} on .*\), silent for \d+ s: killed, frozen, ", line
    ), said
    assert "Traceback" not in said
    assert code == (143 if "told" in how else 2)
    steps = [int(text) for text in re.findall(r"^step (\d+)$", said, re.MULTILINE)]
    assert f"--resume goes on ({tmp_path / 'run/checkpoints/last.ckpt'})" in line
    saved = read(tmp_path / "run/checkpoints/last.ckpt")["global_step"]
    assert saved in (steps[-1], steps[-1] + 1)  # no step is lost; it may wait behind one, too
    assert took < (60 if how == "frozen" else 40)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_where_one_waits_for_data_a_signal_saves_the_last_step(tmp_path: Path, lost: int) -> None:
    """The other waits for it, in a sum of both; the scheduler tells both to stop."""
    processes = start(tmp_path / "run")
    try:
        (tmp_path / f"dead{lost}").touch()
        time.sleep(3)
        began = time.monotonic()
        for process in processes:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(120) for process in processes]
        took = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = (tmp_path / f"{lost}.txt").read_text()
    assert f"no batch comes; this process ends. --resume goes on ({tmp_path / 'run/checkpoints/last.ckpt'})" in said
    assert codes[lost] == 143
    assert took < 60
    steps = [int(text) for text in re.findall(r"^step (\d+)$", said, re.MULTILINE)]
    assert read(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == steps[-1] + 1  # done, and no other was begun
    assert "Traceback" not in said
