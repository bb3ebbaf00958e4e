"""What a run prints of its data obeys nobody: escapes in captions and names are written out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtransformer.training.callbacks.progress import Progress
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.run import Run
from mmtransformer.training.tasks.captioning import Captioning
from support import tiny

ESCAPE = "\x1b[31mred\x9b2J\u202ederutrot"
SHOWN = r"\x1b[31mred\x9b2J\u202ederutrot"


def test_progress_prints_no_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().print(ESCAPE, "and", ESCAPE)
    assert capsys.readouterr().out == f"{SHOWN} and {SHOWN}\n"


def test_the_end_of_a_run_prints_no_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtransformer.training.engine.task.plot_curves", lambda folder: None)
    task: Any = Captioning(tiny.captioner(), optim=OptimConfig())
    task.trainer = SimpleNamespace(global_step=3, precision="32-true", callbacks=[])
    task.conclude(Run(tmp_path, 1.0, torch.device("cpu")), {}, f"table of {ESCAPE}", shown=[ESCAPE])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count(SHOWN) == 2
