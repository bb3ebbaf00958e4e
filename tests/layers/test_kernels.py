import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmtransformer.layers import kernels
from mmtransformer.layers.attention import attend
from mmtransformer.layers.kernels import UpcastLinear, bfloat16_gain, bfloat16_hardware, linear, upcast_products
from tests.support.products import Products, slow_in_bfloat16


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


# --------------------------------------------------------------------------------------- 16 bits without kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_of_16_bits_and_its_gradients_are_the_exact_ones_rounded(
    dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_in_bfloat16(monkeypatch)
    layer, x = nn.Linear(37, 23, bias=bias).to(dtype), torch.randn(3, 5, 37).to(dtype).requires_grad_()
    upcast_products(layer)
    assert type(layer) is UpcastLinear
    exact, y = nn.Linear(37, 23, bias=bias).double(), x.detach().double().requires_grad_()
    exact.load_state_dict(layer.state_dict())
    kept: list[torch.dtype] = []
    with Products() as made, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        found = layer(x)
        direction = torch.randn_like(found)
        found.backward(direction)
    assert made.dtypes == {torch.float32}
    assert set(kept) == {dtype}  # A copy in float32 of each weight would take twice what 16 bits save.
    want = exact(y)
    want.backward(direction.double())
    near = {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    torch.testing.assert_close(found.double(), want, **near)
    torch.testing.assert_close(x.grad.double(), y.grad, **near)
    for (name, mine), theirs in zip(layer.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, msg=name, rtol=0.02, atol=0.02)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), found, **near)
        torch.testing.assert_close(layer(x[0, 0]), found[0, 0], **near)
        with torch.autocast("cpu", torch.bfloat16), Products() as made:
            assert layer(x.float()).dtype == torch.bfloat16
        assert made.dtypes == {torch.float32}


def test_convolutions_and_attention_of_16_bits_are_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_in_bfloat16(monkeypatch)
    model, x = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Conv2d(5, 7, 3)), torch.randn(2, 3, 11, 13)
    want = model(x)
    upcast_products(model)
    assert type(model[0]) is nn.Conv2d  # in float32 there is nothing to do
    model.bfloat16()
    upcast_products(model)
    q = torch.randn(2, 4, 17, 8, requires_grad=True)
    with Products() as made:
        found = model(x.bfloat16())
        mixed = attend(*[q.bfloat16()] * 3)
        mixed.sum().backward()
    assert made.dtypes == {torch.float32}
    assert (found.dtype, mixed.dtype) == (torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(found.float(), want, atol=0.03, rtol=0.03)
    torch.testing.assert_close(mixed.float(), F.scaled_dot_product_attention(q, q, q), atol=0.03, rtol=0.03)


def test_where_16_bits_are_fast_they_are_multiplied_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "fast_in_bfloat16", lambda: True)
    weight, x = torch.randn(23, 37, dtype=torch.bfloat16), torch.randn(5, 37, dtype=torch.bfloat16)
    with Products() as made:
        found = linear(x, weight)
    assert made.dtypes == {torch.bfloat16}
    assert torch.equal(found, F.linear(x, weight))
