"""Blocks against their definitions, against torch's own layers with the same weights, and by their properties."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtransformer.layers.attention import Attention
from mmtransformer.layers.blocks import (
    MLP,
    AttentionPool,
    DecoderBlock,
    DropPath,
    EncoderBlock,
    LayerScale,
    OffsetRMSNorm,
    SwiGLU,
    activation_function,
    make_norm,
    on_real,
    real_places,
)

DIM, HIDDEN, HEADS = 24, 37, 4

ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def shake(module: nn.Module) -> Any:
    """Random biases, norms and scales: what starts as 0 or 1 hides mistakes."""
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return module.eval()


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    y = x @ layer.weight.double().T
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_mlp_is_the_definition(name: str, bias: bool) -> None:
    x = 2 * torch.randn(3, 5, DIM)
    layer = shake(MLP(DIM, HIDDEN, activation=name, bias=bias))  # pyright: ignore[reportArgumentType]
    want = linear(layer.fc2, ACTIVATIONS[name](linear(layer.fc1, x.double())))
    torch.testing.assert_close(layer(x).double(), want, atol=1e-5, rtol=1e-5)


def test_padding_is_not_computed() -> None:
    attention_mask = torch.tensor([[True, True, False], [True, False, False]])
    real, layer = real_places(attention_mask), MLP(7, 11)
    assert real is not None
    assert real.tolist() == [0, 1, 3]
    x = torch.randn(2, 3, 7, requires_grad=True)
    rows: list[int] = []
    layer.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[0]))
    out = on_real(layer, x, real)
    assert rows == [3]
    torch.testing.assert_close(out[attention_mask], layer(x)[attention_mask])
    assert torch.equal(out[~attention_mask], x[~attention_mask])
    (found,) = torch.autograd.grad(out[attention_mask].square().sum(), x)
    (want,) = torch.autograd.grad(layer(x)[attention_mask].square().sum(), x)
    torch.testing.assert_close(found, want)
    assert real_places(None) is None
    assert real_places(torch.ones(2, 3, dtype=torch.bool)) is None
    assert real_places(attention_mask.to("meta")) is None


def test_swiglu_is_the_definition() -> None:
    x = torch.randn(3, 5, DIM)
    layer = shake(SwiGLU(DIM, HIDDEN))
    gate, up = linear(layer.gate_proj, x.double()), linear(layer.up_proj, x.double())
    want = linear(layer.down_proj, gate / (1 + torch.exp(-gate)) * up)
    torch.testing.assert_close(layer(x).double(), want, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in layer.parameters()) == 3 * DIM * HIDDEN


def test_norms_are_the_definition() -> None:
    x = 3 + 2 * torch.randn(3, 5, DIM)
    layer, rms = (shake(make_norm(kind, DIM, 1e-3)) for kind in ("layer", "rms"))
    y = x.double()
    centred = y - y.mean(-1, keepdim=True)
    want = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    want = want * layer.weight.double() + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), want, atol=1e-5, rtol=1e-5)
    want = y / (y.square().mean(-1, keepdim=True) + 1e-3).sqrt() * rms.weight.double()
    torch.testing.assert_close(rms(x).double(), want, atol=1e-5, rtol=1e-5)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean() -> None:
    x = torch.randn(4001, 3, 5)
    layer = DropPath(0.3)
    out = layer(x)
    kept = (out != 0).any(dim=(1, 2))
    assert abs(kept.float().mean().item() - 0.7) < 0.03
    torch.testing.assert_close(out[kept], x[kept] / 0.7)
    assert (out[~kept] == 0).all()
    assert torch.equal(layer.eval()(x), x)


def test_layer_scale_scales_each_channel() -> None:
    layer = LayerScale(5, 0.01)
    assert (layer.gamma == 0.01).all()
    layer.gamma.data = torch.arange(5.0)
    assert torch.equal(layer(torch.ones(2, 3, 5))[1, 2], torch.arange(5.0))


def copy_attention(ours: Attention, theirs: nn.MultiheadAttention) -> None:
    assert theirs.in_proj_weight is not None
    for name, weight, bias in zip("qkv", theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)):
        ours.get_submodule(f"{name}_proj").load_state_dict({"weight": weight, "bias": bias})
    ours.out_proj.load_state_dict(theirs.out_proj.state_dict())


def copy(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    for here, there in names.items():
        ours.get_submodule(here).load_state_dict(theirs.get_submodule(there).state_dict())


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_block_equals_torch(norm_first: bool) -> None:
    theirs = shake(
        nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, "gelu", 1e-5, batch_first=True, norm_first=norm_first)
    )
    norm = partial(make_norm, "layer", DIM, 1e-5)
    ours = EncoderBlock(DIM, Attention(DIM, HEADS), MLP(DIM, HIDDEN), norm, norm_first=norm_first).eval()
    copy(ours, theirs, {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "linear1", "mlp.fc2": "linear2"})
    copy_attention(ours.attn, theirs.self_attn)
    x, allowed = torch.randn(3, 7, DIM), torch.rand(7, 7) > 0.4
    allowed[:, 2] = True
    for mask in (None, allowed):
        want = theirs(x, src_mask=None if mask is None else ~mask)
        torch.testing.assert_close(ours(x, mask=mask), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
def test_decoder_block_equals_torch(norm_first: bool) -> None:
    theirs = shake(
        nn.TransformerDecoderLayer(DIM, HEADS, HIDDEN, 0.0, "relu", 1e-5, batch_first=True, norm_first=norm_first)
    )
    norm = partial(make_norm, "layer", DIM, 1e-5)
    ours = DecoderBlock(
        Attention(DIM, HEADS),
        MLP(DIM, HIDDEN, activation="relu"),
        norm,
        cross_attn=Attention(DIM, HEADS),
        norm_first=norm_first,
    ).eval()
    names = {"norm1": "norm1", "norm_cross": "norm2", "norm2": "norm3", "mlp.fc1": "linear1", "mlp.fc2": "linear2"}
    copy(ours, theirs, names)
    copy_attention(ours.attn, theirs.self_attn)
    assert ours.cross_attn is not None
    copy_attention(ours.cross_attn, theirs.multihead_attn)
    x, context = torch.randn(6, 5, DIM), torch.randn(3, 7, DIM)
    seen = torch.rand(5, 7) > 0.4
    seen[:, 2] = True
    causal = torch.ones(5, 5).tril() > 0
    want = theirs(x, context.repeat_interleave(2, 0), tgt_mask=~causal, memory_mask=~seen)
    got = ours(x, context, mask="causal", context_mask=seen)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    kv = ours.cross_attn.project_kv(context)
    assert torch.equal(ours(x, kv, mask="causal", context_mask=seen), got)


def test_layer_scale_stands_on_both_branches() -> None:
    norm = partial(make_norm, "layer", DIM, 1e-5)
    x = torch.randn(3, 5, DIM)
    plain = EncoderBlock(DIM, Attention(DIM, HEADS), MLP(DIM, HIDDEN), norm).eval()
    scaled = EncoderBlock(DIM, plain.attn, plain.mlp, norm, layer_scale=0.5).eval()
    middle = x + 0.5 * plain.attn(plain.norm1(x))
    torch.testing.assert_close(scaled(x), middle + 0.5 * plain.mlp(plain.norm2(middle)))


@pytest.mark.parametrize("options", [{"dropout": 0.9999}, {"drop_path": 0.9999}])
def test_dropped_branches_leave_the_residual(options: dict[str, Any]) -> None:
    norm = partial(make_norm, "layer", DIM, 1e-5)
    block = EncoderBlock(DIM, Attention(DIM, HEADS), MLP(DIM, HIDDEN), norm, **options)
    x = torch.randn(3, 5, DIM)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


def test_dropped_branches_of_a_decoder_block_leave_the_residual() -> None:
    norm = partial(make_norm, "rms", DIM, 1e-5)
    attn, cross, mlp = Attention(DIM, HEADS), Attention(DIM, HEADS), MLP(DIM, HIDDEN)
    block = DecoderBlock(attn, mlp, norm, cross_attn=cross, dropout=0.9999)
    x, context = torch.randn(3, 5, DIM), torch.randn(3, 7, DIM)
    assert torch.equal(block(x, context), x)
    assert not torch.equal(block.eval()(x, context), x)


def test_attention_pool_is_the_definition() -> None:
    pool = shake(AttentionPool(DIM, HEADS, HIDDEN, num_queries=3, eps=1e-5))
    x, y = torch.randn(2, 7, DIM), torch.randn(2, 3, DIM, dtype=torch.float64)
    q = linear(pool.attn.q_proj, pool.queries.double())[0]
    width = DIM // HEADS
    for row in range(2):
        k, v = (linear(layer, x[row].double()) for layer in (pool.attn.k_proj, pool.attn.v_proj))
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            weights = (q[:, part] @ k[:, part].T / width**0.5).softmax(-1)
            y[row, :, part] = weights @ v[:, part]
    y = linear(pool.attn.out_proj, y)
    centred = y - y.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = normed * pool.norm.weight.double() + pool.norm.bias.double()
    want = y + linear(pool.mlp.fc2, ACTIVATIONS["gelu"](linear(pool.mlp.fc1, normed)))
    torch.testing.assert_close(pool(x).double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pool(x[:, torch.randperm(7)]), pool(x), atol=1e-6, rtol=1e-5)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match='not "batch"'):
        make_norm("batch", 7, 1e-5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r'"swish".*gelu_tanh'):
        activation_function("swish")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match='"swish"'):
        MLP(7, 11, activation="swish")  # pyright: ignore[reportArgumentType]
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=str(rate)):
            DropPath(rate)


def test_offset_norm_is_the_definition() -> None:
    norm, x = OffsetRMSNorm(5, eps=1e-6), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight))
