import pytest
import torch

from mmtransformer.layers import kernels
from mmtransformer.layers.kernels import bfloat16_gain, fastest_dtype


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"neon": True, "bf16": True}, torch.float32),  # not measured
        ({}, torch.float32),
    ],
)
def test_a_cpu_without_instructions_for_bfloat16_keeps_float32(
    kinds: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: kinds, raising=False)
    monkeypatch.setattr(kernels, "bfloat16_gain", lambda: 1.9)
    assert fastest_dtype() == fastest_dtype(torch.device("cpu")) == expected


def test_a_gpu_multiplies_in_bfloat16_from_8_0_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 1 else (8, 0))
    assert fastest_dtype("cuda:0") == torch.bfloat16
    assert fastest_dtype("cuda:1") == torch.float32
    assert fastest_dtype("mps") == torch.float32


def test_a_cpu_that_is_slower_in_bfloat16_keeps_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(kernels, "bfloat16_gain", lambda: 0.52)
    found = kernels.bfloat16_hardware("cpu")
    assert (found.fast, found.words) == (False, "avx512_bf16 and multiplies by it at 0.5 times the rate of float32")
    assert fastest_dtype() == torch.float32


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_measuring_leaves_the_process_as_it_was(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            assert 0.01 < bfloat16_gain.__wrapped__() < 100
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
