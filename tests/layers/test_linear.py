"""Linear layers: the same numbers by every product, gradients of gradients, and whoever looks at the operations."""

import copy
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmtransformer import ViT
from mmtransformer.layers import kernels
from mmtransformer.layers import linear as module
from mmtransformer.layers.attention import attend
from mmtransformer.layers.kernels import onednn_gain
from mmtransformer.layers.linear import Linear, linear, upcast_products
from tests.support.products import Products, slow_in_bfloat16

NEEDS_ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Takes oneDNN's product for any size; the shapes that it made."""
    made: list[tuple[int, ...]] = []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        assert weight.is_contiguous() or weight.T.is_contiguous()  # All else is a thousand times slower.
        made.append((*x.shape[:-1], len(weight)))
        return inner(x, weight, bias)

    inner = module.onednn_linear
    monkeypatch.setattr(module, "onednn_linear", product)
    monkeypatch.setattr(kernels, "onednn_gain", lambda: 2.1)
    monkeypatch.setattr(module, "_LEAST", 0)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield made
    torch.set_float32_matmul_precision(precision)


def strided(*shape: int) -> Tensor:
    """Of these numbers neither the rows nor the columns lie one behind the other."""
    whole = torch.randn(*shape[:-1], 3, shape[-1] * 2)
    return whole[..., 1, ::2]


# ------------------------------------------------------------------------------------------- float32 by oneDNN


@NEEDS_ONEDNN
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 1, 4)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make", [torch.randn, strided])
@pytest.mark.parametrize("learns", ["both", "tokens", "weights"])
def test_onednn_gives_the_product_and_the_gradients_of_the_definition(
    shape: tuple[int, ...], bias: bool, make: Callable[..., Tensor], learns: str, calls: list
) -> None:
    layer, exact = Linear(37, 23, bias=bias), nn.Linear(37, 23, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    x = make(*shape, 37).requires_grad_(learns != "weights")
    y = x.detach().double().requires_grad_()
    layer.requires_grad_(learns != "tokens")
    found, want = layer(x), exact(y)
    direction = make(*shape, 23)
    found.backward(direction)
    want.backward(direction.double())
    assert len(calls) == (3 if learns == "both" else 2)
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.double(), want, **near)
    if learns != "weights":
        torch.testing.assert_close(x.grad.double(), y.grad, **near)
    if learns != "tokens":
        for mine, theirs in zip(layer.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.double(), theirs.grad, **near)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), found, rtol=0, atol=0)


@NEEDS_ONEDNN
def test_a_gradient_that_is_one_number_everywhere_is_multiplied_rightly(calls: list) -> None:
    layer, x = Linear(16, 8), torch.randn(5, 4, 16, requires_grad=True)
    layer(x).sum().backward()  # Its gradient has strides of zero.
    assert len(calls) == 3
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, 4, 16))
    torch.testing.assert_close(layer.weight.grad, x.detach().sum((0, 1)).expand(8, 16))
    torch.testing.assert_close(layer.bias.grad, torch.full((8,), 20.0))


@NEEDS_ONEDNN
def test_of_a_frozen_weight_no_tokens_are_kept(calls: list) -> None:
    kept: list[tuple[int, ...]] = []
    layer, x = Linear(16, 8).requires_grad_(False), torch.randn(5, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer(x)
    assert (len(calls), kept) == (1, [(8, 16)])


@NEEDS_ONEDNN
def test_a_gradient_has_a_gradient(calls: list) -> None:
    layer, plain = Linear(6, 5), nn.Linear(6, 5)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(7, 6)
    for one in (layer, plain):
        y = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(one(y).square().sum(), y, create_graph=True)
        slope.square().sum().backward()
    assert calls
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_who_looks_at_the_operations_sees_those_of_torch(calls: list) -> None:
    layer, x = Linear(6, 5), torch.randn(7, 6)
    want = F.linear(x, layer.weight, layer.bias)
    weights = dict(layer.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x[:, None].expand(7, 4, 6))
    torch.testing.assert_close(per_sample["weight"].sum(0), 4 * 2 * want.detach().T @ x, rtol=1e-4, atol=1e-4)
    out, moved = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(moved, x @ layer.weight.T)
    with forward_ad.dual_level():
        assert torch.equal(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent, moved)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 7 * 6 * 5
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert torch.equal(traced(x), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch.set_float32_matmul_precision("medium")
    layer(x)
    assert torch.export.export(layer, (x,)).module()(x).shape == want.shape
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(7, 5))
    assert not calls
    torch.testing.assert_close(out, want)


@NEEDS_ONEDNN
def test_a_vit_learns_the_same_and_its_blocks_can_be_computed_again(calls: list) -> None:
    model = ViT(image_size=16, dim=24, depth=2, num_heads=2).float()
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        if type(layer) is Linear:
            layer.__class__ = nn.Linear
    pixels = torch.randn(2, 3, 16, 16)
    plain(pixels).square().mean().backward()
    assert not calls
    checkpoint(model, pixels, use_reentrant=False).square().mean().backward()
    assert len(calls) >= 2 * (6 + 6 + 12)  # forward, forward again, and two products for each gradient
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_small_products_and_slow_cpus_keep_torch_s_own(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(64, 64), torch.randn(8, 64)
    layer(x[:3])  # A few rows read the weight, and no product is faster than that.
    linear(x, torch.randn(64, 128)[:, ::2])
    monkeypatch.setattr(module, "_LEAST", 1 << 23)
    layer(x)
    monkeypatch.setattr(module, "_LEAST", 0)
    monkeypatch.setattr(kernels, "onednn_gain", lambda: 1.1)
    layer(x)
    assert not calls


def test_the_gain_is_the_rate_of_one_over_that_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        assert 0.01 < onednn_gain.__wrapped__() < 100 or not torch.backends.mkldnn.is_available()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "onednn_linear", lambda x, weight: time.sleep(0.02))
    assert onednn_gain.__wrapped__() < 1
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert onednn_gain.__wrapped__() == 0


# --------------------------------------------------------------------------------------- 16 bits without kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_of_16_bits_and_its_gradients_are_the_exact_ones_rounded(
    dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_in_bfloat16(monkeypatch)
    layer, x = nn.Linear(37, 23, bias=bias).to(dtype), torch.randn(3, 5, 37).to(dtype).requires_grad_()
    upcast_products(layer)
    assert type(layer) is Linear
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
