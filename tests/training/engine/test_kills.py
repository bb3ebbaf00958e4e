"""`mmt fit` killed at random moments of its time, its end too, leaves the same folder as the run that was not."""

import csv
import json
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from mmtransformer.cli import main
from support import tiny

TIMED = re.compile("second|mfu|memory")


def fit(folder: Path, delay: float | None, *more: str) -> int:
    """A whole run, 12 batches in two epochs with two validations each, and its end; killed after so many seconds."""
    sizes = {"vision.depth": 1, "vision.dim": 24, "vision.num_heads": 3}
    sizes |= {"decoder.depth": 1, "decoder.dim": 24, "decoder.num_heads": 3, "decoder.context_dim": 24}
    words = ["fit", "--config", "caption_scenes", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder}"]
    words += [f"--model.captioner.{name}={size}" for name, size in sizes.items()]
    words += ["--model.generation.max_new_tokens=12", "--model.image_ablation_batches=2", "--data.batch_size=4"]
    words += ["--data.source.train_size=22", "--data.source.val_size=11", "--data.source.compositional_size=7"]
    words += ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--trainer.precision=32-true"]
    words += ["--trainer.val_check_interval=0.5", "--trainer.enable_progress_bar=false", "--model.optim.lr=3e-3"]
    words += ["--trainer.callbacks=[{class_path: LastCheckpoint, init_args: {every_n_train_steps: 2}}]", *more]

    def job() -> None:
        if delay is not None:
            timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        sys.exit(main(words))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny.in_child(job)


def results(folder: Path) -> dict[str, Any]:
    """What must be equal: the log and the scores but for seconds, the captions, the weights, the files' names."""
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [{k: v for k, v in row.items() if not TIMED.search(k)} for row in csv.DictReader(file)]
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    metrics["training"] = {k: v for k, v in metrics["training"].items() if not TIMED.search(k)}
    texts = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.json*") if p.name != "metrics.json"}
    return {
        "log": [row for row in rows if any(value for k, value in row.items() if k not in ("epoch", "step"))],
        "metrics": metrics,
        "texts": texts,
        "weights": (folder / "model/model.safetensors").read_bytes(),
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_killed_at_random_moments_is_the_unbroken_run(tmp_path: Path, part: int) -> None:
    """Five runs a part; each is killed until it has ended, at later moments of its time again and again."""
    began = time.monotonic()
    assert fit(tmp_path / "whole", None) == 0
    seconds, draw = time.monotonic() - began, random.Random(part)
    whole = results(tmp_path / "whole")
    assert any("predictions" in name for name in whole["texts"])
    for i in range(5):
        folder, kills, code = tmp_path / str(i), 0, -9
        workers = ["--data.loader.num_workers=2"] if i % 2 else []
        while code == -9:
            late = draw.uniform(0, seconds) if kills < 2 else None
            code = fit(folder, late, *workers, *["--resume"] * folder.exists())
            kills += code == -9
        assert code == 0
        for name, found in results(folder).items():
            assert found == whole[name], (name, i, kills)
