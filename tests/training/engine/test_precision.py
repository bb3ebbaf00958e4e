"""The arithmetic that a machine is fast at."""

import pytest
import torch

from mmtransformer.layers import kernels
from mmtransformer.training.engine.precision import asked_for, pick_precision


def test_precision_is_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(kernels, "bfloat16_gain", lambda: 1.9)
    assert pick_precision("cpu") == ("bf16-mixed", "the CPU has avx512_bf16")
    monkeypatch.setattr(kernels, "bfloat16_gain", lambda: 0.5)
    slower = "the CPU has avx512_bf16 and multiplies by it at 0.5 times the rate of float32"
    assert pick_precision("cpu") == ("32-true", slower)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    assert pick_precision("cpu").precision == "32-true"


def test_a_precision_that_is_slow_here_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the recipe that a run on another machine left."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    said = "bf16-mixed was asked for; but the CPU has no bfloat16 kernels: --trainer.precision=32-true is faster"
    assert asked_for("bf16-mixed", "cpu") == said
    assert asked_for("32-true", "cpu") == "32-true was asked for"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert asked_for("16-mixed", "auto") == "16-mixed was asked for"
    assert asked_for(16, "cpu").startswith("16 was asked for; but the CPU has no bfloat16 kernels")
