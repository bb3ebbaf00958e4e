import pytest
import torch

from mmtransformer.layers import kernels
from mmtransformer.layers.kernels import bfloat16_gain, bfloat16_hardware


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, (True, "avx512_bf16")),
        ({"avx512_bf16": False, "amx_bf16": True}, (True, "amx_bf16")),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, (False, "no bfloat16 kernels")),
        ({"neon": True, "bf16": True}, (False, "no bfloat16 kernels")),  # not measured
        ({}, (False, "no bfloat16 kernels")),
    ],
)
def test_a_cpu_without_instructions_for_bfloat16_keeps_float32(
    kinds: dict[str, bool], expected: tuple[bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: kinds, raising=False)
    monkeypatch.setattr(kernels, "bfloat16_gain", lambda: 1.9)
    assert bfloat16_hardware("cpu") == bfloat16_hardware(torch.device("cpu")) == expected


def test_a_gpu_multiplies_in_bfloat16_from_8_0_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 1 else (8, 0))
    assert bfloat16_hardware("cuda:0") == (True, "compute capability 8.0")
    assert bfloat16_hardware("cuda:1") == (False, "compute capability 7.5")
    assert not bfloat16_hardware("mps").fast


def test_a_cpu_that_is_slower_in_bfloat16_keeps_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(kernels, "bfloat16_gain", lambda: 0.52)
    found = bfloat16_hardware("cpu")
    assert (found.fast, found.words) == (False, "avx512_bf16 and multiplies by it at 0.5 times the rate of float32")


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_measuring_leaves_the_process_as_it_was(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            assert 0.001 < bfloat16_gain.__wrapped__() < 100  # Zen 3: 0.008
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
