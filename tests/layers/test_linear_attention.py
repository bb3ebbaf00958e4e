"""FAVOR+ against its definition and against softmax attention; Longformer's pattern from masks on the usual core."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtransformer import Attention
from mmtransformer.layers import masks
from mmtransformer.layers.attention import attend
from mmtransformer.layers.blocks import MLP, EncoderBlock
from mmtransformer.layers.linear_attention import LinearAttention, linear_attend, positive_features, random_directions
from mmtransformer.layers.positions import RotaryEmbedding

ROWS, HEADS, LENGTH, WIDTH = 2, 3, 131, 7  # the length is two chunks and three tokens


def qkv(length: int = LENGTH, width: int = WIDTH, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    q, k, v = torch.randn(3, ROWS, HEADS, length, width).unbind()
    return spread * q, spread * k, v


def valid_keys(length: int = LENGTH) -> Tensor:
    return torch.arange(length) < torch.tensor([length, length - 37])[:, None]


# --- the definition


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_is_the_definition(causal: bool, padded: bool) -> None:
    """All pairs of queries and keys, in float64, with no trick for large numbers."""
    q, k, v = qkv()
    directions = random_directions(11, WIDTH)
    attention_mask = valid_keys() if padded else None
    found = linear_attend(q, k, v, directions, attention_mask=attention_mask, causal=causal)
    w = directions.double()
    feature = lambda x: torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2)  # noqa: E731
    pairs = feature(q.double() / WIDTH**0.25) @ feature(k.double() / WIDTH**0.25).transpose(-1, -2)
    if causal:
        pairs = pairs.tril()
    if attention_mask is not None:
        pairs = pairs * attention_mask[:, None, None]
    want = pairs / pairs.sum(-1, keepdim=True) @ v.double()
    torch.testing.assert_close(found.double(), want, atol=2e-5, rtol=2e-5)


def test_directions_are_orthogonal_with_gaussian_lengths() -> None:
    directions = random_directions(5000 * WIDTH + 3, WIDTH, generator=torch.Generator().manual_seed(1))
    assert directions.shape == (5000 * WIDTH + 3, WIDTH)
    blocks = torch.nn.functional.normalize(directions[:-3], dim=-1).view(5000, WIDTH, WIDTH)
    torch.testing.assert_close(blocks @ blocks.mT, torch.eye(WIDTH).expand(5000, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(directions.mean(0), torch.zeros(WIDTH), atol=0.02, rtol=0)
    torch.testing.assert_close(directions.T @ directions / 5000 / WIDTH, torch.eye(WIDTH), atol=0.04, rtol=0)
    lengths = directions.square().sum(-1)  # chi squared with c degrees of freedom
    assert abs(float(lengths.mean()) - WIDTH) < 0.1
    assert abs(float(lengths.var()) - 2 * WIDTH) < 0.5


def test_the_kernel_is_unbiased() -> None:
    q, k, _ = qkv(5, spread=0.5)
    directions = random_directions(400_000, WIDTH)
    logs = positive_features(q, directions)[..., :, None, :] + positive_features(k, directions)[..., None, :, :]
    want = (q @ k.transpose(-1, -2) / WIDTH**0.5).exp()
    torch.testing.assert_close(logs.exp().mean(-1), want, atol=0.0, rtol=0.03)


# --- against softmax attention


def error(num_features: int, causal: bool, draws: int = 12) -> float:
    """Root mean square of the error, in shares of that of a guess (the mean of the values)."""
    q, k, v = qkv(width=16, spread=0.4)
    want = attend(q, k, v, "causal" if causal else None)
    guess = linear_attend(q * 0, k * 0, v, torch.ones(1, 16), causal=causal)
    found = [linear_attend(q, k, v, random_directions(num_features, 16), causal=causal) for _ in range(draws)]
    wrong = torch.stack([(x - want).square().mean() for x in found]).mean()
    return float((wrong / (guess - want).square().mean()).sqrt())


@pytest.mark.parametrize("causal", [False, True])
def test_error_against_softmax_falls_with_the_root_of_the_features(causal: bool) -> None:
    errors = {count: error(count, causal) for count in (32, 128, 512, 2048)}
    assert errors[2048] < 0.25, errors
    for fewer, more in ((32, 128), (128, 512), (512, 2048)):
        assert 1.5 < errors[fewer] / errors[more] < 3.0, errors


def test_orthogonal_directions_err_less_than_independent_ones() -> None:
    q, k, v = qkv(width=16, spread=0.4)
    want = attend(q, k, v)
    wrong = lambda w: float((linear_attend(q, k, v, w) - want).square().mean())  # noqa: E731
    independent = sum(wrong(torch.randn(32, 16)) for _ in range(40))
    assert sum(wrong(random_directions(32, 16)) for _ in range(40)) < 0.95 * independent


def test_large_numbers_stay_finite() -> None:
    q, k, v = qkv(spread=40.0)
    for causal in (False, True):
        assert linear_attend(q, k, v, random_directions(64, WIDTH), causal=causal).isfinite().all()


# --- properties


def test_causal_sees_nothing_later_and_all_before() -> None:
    q, k, v = qkv()
    directions = random_directions(11, WIDTH)
    before = linear_attend(q, k, v, directions, causal=True)
    torch.testing.assert_close(before[:, :, 0], v[:, :, 0])
    for place in (0, 63, 64, 130):
        changed, values = k.clone(), v.clone()
        changed[:, :, place] = torch.randn(ROWS, HEADS, WIDTH)
        values[:, :, place] += 1.0
        after = linear_attend(q, changed, values, directions, causal=True)
        torch.testing.assert_close(after[:, :, :place], before[:, :, :place], atol=1e-5, rtol=1e-5)
        assert not torch.isclose(after[:, :, place:], before[:, :, place:], atol=1e-5).all(-1).any()


def test_padding_changes_no_bit_and_an_empty_row_gives_zeros() -> None:
    q, k, v = qkv()
    attention_mask, directions = valid_keys(), random_directions(11, WIDTH)
    before = linear_attend(q, k, v, directions, attention_mask=attention_mask)
    k[1, :, -37:], v[1, :, -37:] = 5.0, -9.0
    assert torch.equal(linear_attend(q, k, v, directions, attention_mask=attention_mask), before)
    attention_mask[0] = False
    for causal in (False, True):
        assert not linear_attend(q, k, v, directions, attention_mask=attention_mask, causal=causal)[0].any()


# --- the module


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_the_module_comes_close_to_the_attention_that_it_wraps(causal: bool, kv_heads: int) -> None:
    attn = Attention(24, 4, num_kv_heads=kv_heads, qk_norm="rms").eval()
    assert isinstance(attn.q_norm, torch.nn.RMSNorm)
    attn.q_norm.weight.fill_(0.5)
    linear, x = LinearAttention(attn, num_features=20_000), torch.randn(3, 11, 24)
    rope = RotaryEmbedding(6)(torch.arange(11))
    mask: Any = "causal" if causal else torch.arange(11) < torch.tensor([11, 7, 3])[:, None, None]
    want = attn(x, mask=mask, rope=rope)
    found = linear(x, mask=mask, rope=rope)
    assert float((found - want).norm() / want.norm()) < 0.05
    assert float((LinearAttention(attn, num_features=4)(x, mask=mask, rope=rope) - want).norm() / want.norm()) > 0.1


@torch.no_grad()
def test_cross_attention_with_shared_rows() -> None:
    attn = Attention(20, 4, context_dim=13).eval()
    linear, x, context = LinearAttention(attn, num_features=5), torch.randn(6, 5, 20), torch.randn(2, 11, 13)
    found = linear(x, attn.project_kv(context))
    each = torch.cat([linear(x[i : i + 1], context[i // 3 : i // 3 + 1]) for i in range(6)])
    torch.testing.assert_close(found, each)
    torch.testing.assert_close(linear(x, context), found)


def test_in_a_block_it_trains_is_saved_and_redrawn() -> None:
    make = lambda seed: EncoderBlock(20, LinearAttention(Attention(20, 4), num_features=9, seed=seed),  # noqa: E731  # pyright: ignore
                                     MLP(20, 30), lambda: torch.nn.LayerNorm(20))  # fmt: skip
    block, other, x = make(1), make(2), torch.randn(2, 11, 20)
    block(x).square().mean().backward()
    grads = {name: p.grad for name, p in block.named_parameters() if "k_proj.bias" not in name}
    assert all(grad is not None and grad.any() for grad in grads.values())
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x), block(x))
    before = block(x)
    block.attn.redraw()
    assert not torch.isclose(block(x), before).all(-1).any()


def test_half_precision() -> None:
    linear = LinearAttention(Attention(20, 4), num_features=64).bfloat16()
    x = torch.randn(2, 11, 20)
    found = linear(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), linear.float()(x), atol=0.03, rtol=0.1)


def test_errors_say_what_was_given() -> None:
    linear, x = LinearAttention(Attention(20, 4)), torch.randn(2, 11, 20)
    with pytest.raises(ValueError, match="num_features must be at least 1, not 0"):
        LinearAttention(Attention(20, 4), num_features=0)
    with pytest.raises(ValueError, match=r'"causal" or \(b 1 k\) bool, not \(2, 11, 11\)'):
        linear(x, mask=torch.ones(2, 11, 11, dtype=torch.bool))
    with pytest.raises(ValueError, match="not casual"):
        linear(x, mask="casual")
    with pytest.raises(ValueError, match="no use for a cache"):
        linear(x, cache=object())
    with pytest.raises(ValueError, match=r"as many queries \(11\) as keys \(5\)"):
        linear(x, x[:, :5], mask="causal")


# --- Longformer (arXiv:2004.05150): a mask, and the usual attention


@torch.no_grad()
def test_window_and_global_tokens_are_longformers() -> None:
    """Its own layer with the same weights; its global tokens have projections of their own, here equal."""
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    side, length = 4, 24
    config = SimpleNamespace(hidden_size=20, num_attention_heads=4, attention_probs_dropout_prob=0.0,
                             attention_window=[2 * side])  # fmt: skip
    theirs: Any = LongformerSelfAttention(config, layer_id=0).eval()
    ours = Attention(20, 4).eval()
    for name in ("query", "key", "value"):
        getattr(theirs, f"{name}_global").load_state_dict(getattr(theirs, name).state_dict())
        getattr(ours, f"{name[0]}_proj").load_state_dict(getattr(theirs, name).state_dict())
    ours.out_proj.weight.copy_(torch.eye(20))
    ours.out_proj.bias.zero_()
    x, attention_mask = torch.randn(2, length, 20), torch.arange(length) < torch.tensor([24, 17])[:, None]
    is_global = torch.zeros(2, length, dtype=torch.bool)
    is_global[0, [0, 9]] = is_global[1, 0] = True
    numbers = torch.where(is_global, 10000.0, torch.where(attention_mask, 0.0, -10000.0))
    want = theirs(x, attention_mask=numbers, is_index_masked=numbers < 0, is_index_global_attn=is_global,
                  is_global_attn=True)[0]  # fmt: skip
    pattern = masks.all_of(
        masks.any_of(masks.window(side + 1), masks.global_tokens(is_global)), masks.padding(attention_mask)
    )
    mask = masks.dense(pattern, 2, length, length)
    torch.testing.assert_close(ours(x, mask=mask)[attention_mask], want[attention_mask], atol=1e-5, rtol=1e-5)
    assert int(mask[0].sum()) < length * length // 2


@torch.no_grad()
def test_a_later_key_however_large_changes_no_earlier_place() -> None:
    torch.manual_seed(0)
    q, v = torch.randn(2, 3, 150, 16), torch.randn(2, 3, 150, 16)
    directions = random_directions(64, 16, generator=torch.Generator().manual_seed(1))
    for spread in (1.0, 8.0, 20.0):
        k = spread * torch.randn(2, 3, 150, 16)
        before = linear_attend(q, k, v, directions, causal=True)
        for place in (10, 63, 64, 140):
            for size in (0.01, 1.0, 100.0):
                changed = k.clone()
                changed[:, :, place] = size * torch.randn(2, 3, 16)
                after = linear_attend(q, changed, v, directions, causal=True)
                assert torch.equal(after[:, :, :place], before[:, :, :place])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1.0, 200.0, 2000.0])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_finite(causal: bool, size: float, padded: bool) -> None:
    """Of rows that are padding only, and of queries whose features are far apart."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 16) for _ in range(3))
    q = q / q.norm(dim=-1, keepdim=True) * size
    attention_mask = torch.ones(2, 9, dtype=torch.bool)
    if padded:
        attention_mask[0], attention_mask[1, 5:] = False, False
    inputs = [x.requires_grad_() for x in (q, k, v)]
    directions = random_directions(64, 16, generator=torch.Generator().manual_seed(1))
    out = linear_attend(*inputs, directions, attention_mask=attention_mask, causal=causal)
    assert out.isfinite().all()
    if padded:
        assert not out[0].any()
    for grad in torch.autograd.grad((out * torch.randn(out.shape)).sum(), inputs):
        assert grad.isfinite().all()


def test_gradients_are_finite_where_products_nearly_vanish() -> None:
    """Large queries and keys: what is left of some sums is no more than float32's smallest numbers."""
    for seed, width in ((0, 16), (1, 40)):
        torch.manual_seed(seed)
        directions = random_directions(37, width)
        inputs = [(30 * torch.randn(2, 2, 70, width)).requires_grad_() for _ in range(3)]
        out = linear_attend(*inputs, directions, causal=True)
        assert out.isfinite().all()
        for grad in torch.autograd.grad(out.square().sum(), inputs):
            assert grad.isfinite().all()
