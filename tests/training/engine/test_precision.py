"""The arithmetic that a machine is fast at."""

import os
import subprocess
import sys

import pytest
import torch

from mmtransformer.layers import kernels
from mmtransformer.training.engine.precision import asked_for, keep_freed_memory, pick_precision


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


FAULTS = """
import resource
import torch
from mmtransformer.training.engine.precision import keep_freed_memory

print(keep_freed_memory())
for i in range(30):  # 200 MB, above what malloc keeps by itself; what is freed first may be parted by what stays
    if i == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(50_000_000).add_(1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc is another one")
@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ({}, True),
        ({"MALLOC_ARENA_MAX": "2"}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "0"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, False),
    ],
)
def test_freed_memory_is_used_again(said: dict[str, str], kept: bool) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=clean | said, capture_output=True, text=True, check=True)
    answer, faults = done.stdout.split()
    if answer != str(kept) and kept:
        pytest.skip("this C library has no mallopt")
    assert answer == str(kept)
    assert (int(faults) < 1000) == kept  # of 48,829 pages


def test_another_system_keeps_its_own_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
