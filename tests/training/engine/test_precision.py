"""The arithmetic that a machine is fast at."""

import pytest
import torch

from mmtransformer.layers import kernels
from mmtransformer.training.engine.precision import pick_precision


def test_precision_is_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(kernels, "bfloat16_gain", lambda: 1.9)
    assert pick_precision("cpu") == ("bf16-mixed", "the CPU has avx512_bf16")
    monkeypatch.setattr(kernels, "bfloat16_gain", lambda: 0.5)
    slower = "the CPU has avx512_bf16 and multiplies by it at 0.5 times the rate of float32"
    assert pick_precision("cpu") == ("32-true", slower)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    assert pick_precision("cpu").precision == "32-true"
