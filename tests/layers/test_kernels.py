import pytest
import torch

from mmtransformer.layers.kernels import fastest_dtype


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
    assert fastest_dtype() == fastest_dtype(torch.device("cpu")) == expected


def test_a_gpu_multiplies_in_bfloat16_from_8_0_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 1 else (8, 0))
    assert fastest_dtype("cuda:0") == torch.bfloat16
    assert fastest_dtype("cuda:1") == torch.float32
    assert fastest_dtype("mps") == torch.float32
