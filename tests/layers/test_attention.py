"""Attention against its definition, against torch's own module with the same weights, and by its properties."""

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmtransformer.layers import kernels, masks
from mmtransformer.layers.attention import Attention, attend
from mmtransformer.layers.cache import KeyValue, KVCache
from mmtransformer.layers.positions import RotaryEmbedding
from mmtransformer.layers.record import attention_weights


def definition(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(c)) v, one query at a time, in float64; zeros where nothing may be looked at."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b in range(q.shape[0]):
        source = b // (q.shape[0] // k.shape[0])
        for h in range(q.shape[1]):
            group = h // (q.shape[1] // k.shape[1])
            for i in range(q.shape[2]):
                seen = torch.ones(k.shape[2], dtype=torch.bool) if allowed is None else allowed[b, i]
                if not seen.any():
                    continue
                scores = k[source, group, seen] @ q[b, h, i] / q.shape[3] ** 0.5
                out[b, h, i] = scores.softmax(0) @ v[source, group, seen]
    return out


def by_way(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Float32 on a CPU by plain products, those of one head after the other, or by SDPA."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest" if way == "heads" else "medium")
    monkeypatch.setattr(kernels, "_CPU_PLAIN_KEYS", 0 if way == "sdpa" else 1024)
    if way == "heads":  # which are for long rows, and where no gradient is asked for
        monkeypatch.setattr(kernels, "_HEAD", 0)
        monkeypatch.setattr(kernels, "onednn_gain", lambda: 2.1)
        monkeypatch.setattr(torch, "is_grad_enabled", lambda: False)


HEADS = pytest.param(
    "heads", marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
)


def qkv(
    b: int = 6, h: int = 6, q: int = 5, k: int = 7, c: int = 11, n: int = 6, g: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(b, h, q, c), torch.randn(n, g, k, c), torch.randn(n, g, k, 13 if c == 0 else c)


@pytest.mark.parametrize("way", ["plain", HEADS, "sdpa"])
@pytest.mark.parametrize(("n", "g"), [(6, 6), (6, 2), (3, 6), (2, 3), (1, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_the_definition(monkeypatch: pytest.MonkeyPatch, way: str, n: int, g: int, masked: bool) -> None:
    by_way(monkeypatch, way)
    q, k, v = qkv(n=n, g=g)
    allowed = None
    if masked:
        allowed = torch.rand(6, 5, 7) > 0.4
        allowed[2, 3] = False  # A query that may look nowhere.
    out = attend(q, k, v, allowed)
    torch.testing.assert_close(out.double(), definition(q, k, v, allowed), atol=2e-6, rtol=2e-6)
    if masked:
        assert (out[2, :, 3] == 0).all()


@pytest.mark.parametrize("way", ["plain", HEADS, "sdpa"])
@pytest.mark.parametrize(("n", "g"), [(6, 6), (3, 2)])
def test_heads_may_have_masks_of_their_own(monkeypatch: pytest.MonkeyPatch, way: str, n: int, g: int) -> None:
    by_way(monkeypatch, way)
    q, k, v = qkv(n=n, g=g)
    allowed = torch.rand(6, 6, 5, 7) > 0.4
    out = attend(q, k, v, allowed).double()
    for h in range(6):
        group = slice(h * g // 6, h * g // 6 + 1)
        want = definition(q[:, h : h + 1], k[:, group], v[:, group], allowed[:, h])
        torch.testing.assert_close(out[:, h : h + 1], want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("way", ["plain", HEADS, "sdpa"])
@pytest.mark.parametrize(("asked", "keys"), [(7, 7), (3, 7), (2, 7), (1, 7)])
def test_causal_aligns_the_last_query_with_the_last_key(
    monkeypatch: pytest.MonkeyPatch, way: str, asked: int, keys: int
) -> None:
    by_way(monkeypatch, way)
    q, k, v = qkv(q=asked, k=keys)
    allowed = masks.dense(masks.causal(keys - asked), 6, asked, keys)
    torch.testing.assert_close(attend(q, k, v, "causal").double(), definition(q, k, v, allowed), atol=2e-6, rtol=2e-6)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_heads_go_one_after_the_other_where_rows_are_long_and_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, each_head = [], kernels._each_head
    monkeypatch.setattr(kernels, "onednn_gain", lambda: 2.1)
    monkeypatch.setattr(kernels, "_each_head", lambda *args: (taken.append(args[0].dtype), each_head(*args)))
    long, short = qkv(b=1, h=2, q=257, k=257, n=1, g=2), qkv(b=1, h=2, q=255, k=255, n=1, g=2)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            with torch.no_grad():
                for kind in (torch.float32, torch.bfloat16, torch.float64):
                    attend(*(x.to(kind) for x in long))
                attend(*short)
                attend(*long, dropout=0.5)
                attend(*long, softcap=3.0)
                with FlopCounterMode(display=False) as counter:
                    attend(*long)
                assert counter.get_total_flops() == 4 * 2 * 257 * 257 * 11
                torch.func.vmap(attend)(*(x[None] for x in long))
            attend(*long)
    finally:
        torch.set_float32_matmul_precision(before)
    assert taken == [torch.float32, torch.bfloat16 if kernels.fast_in_bfloat16() else torch.float32]


def test_gradients_are_finite_where_a_query_may_look_nowhere() -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    allowed = torch.ones(5, 7, dtype=torch.bool)
    allowed[2] = False
    attend(q, k, v, allowed).square().sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    assert (q.grad[:, :, 2] == 0).all()


def test_gradients_are_those_of_the_definition() -> None:
    q, k, v = (x[:2, :2].double().requires_grad_() for x in qkv())
    allowed = torch.rand(2, 5, 7) > 0.3
    weight = torch.randn(2, 2, 5, 11, dtype=torch.float64)
    ours = torch.autograd.grad((attend(q, k, v, allowed) * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((definition(q, k, v, allowed) * weight).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("way", ["plain", HEADS, "sdpa"])
def test_a_masked_key_changes_no_bit(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    by_way(monkeypatch, way)
    q, k, v = qkv()
    allowed = torch.rand(6, 5, 7) > 0.4
    allowed[:, :, 4] = False
    allowed[1, 2] = False
    before = attend(q, k, v, allowed)
    k[:, :, 4], v[:, :, 4] = 1e4, -1e4
    assert torch.equal(before, attend(q, k, v, allowed))


def test_order_of_keys_does_not_matter() -> None:
    q, k, v = qkv()
    order = torch.randperm(7)
    torch.testing.assert_close(attend(q, k, v), attend(q, k[:, :, order], v[:, :, order]))


def test_errors_name_the_numbers() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match='unknown mask word "casual"'):
        attend(q, k, v, "casual")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"bool.*float32"):
        attend(q, k, v, torch.zeros(5, 7))
    with pytest.raises(ValueError, match=r"\(6\).*\(4\)"):
        attend(q, k[:4], v[:4])
    with pytest.raises(ValueError, match=r"query heads \(6\).*\(4\)"):
        attend(q, k[:, :4], v[:, :4])
    with pytest.raises(ValueError, match=r"num_heads \(6\).*num_kv_heads \(4\)"):
        Attention(24, 6, num_kv_heads=4)
    with pytest.raises(ValueError, match=r"dim \(25\).*num_heads \(6\)"):
        Attention(25, 6)
    with pytest.raises(ValueError, match='not "batch"'):
        Attention(24, 6, qk_norm="batch")  # pyright: ignore[reportArgumentType]


def test_attention_equals_torch_with_the_same_weights() -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 6, kdim=19, vdim=19, batch_first=True)
    ours = Attention(24, 6, context_dim=19)
    with torch.no_grad():
        for name, weight in zip("qkv", (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight), strict=True):
            getattr(ours, f"{name}_proj").weight.copy_(weight)
        theirs.in_proj_bias.copy_(torch.randn(72))
        for name, bias in zip("qkv", theirs.in_proj_bias.chunk(3), strict=True):
            getattr(ours, f"{name}_proj").bias.copy_(bias)
        ours.out_proj.load_state_dict(theirs.out_proj.state_dict())
    x, context = torch.randn(3, 5, 24), torch.randn(3, 7, 19)
    allowed = torch.rand(5, 7) > 0.3
    allowed[:, 0] = True
    want, weights = theirs(x, context, context, attn_mask=~allowed, average_attn_weights=False)
    torch.testing.assert_close(ours(x, context, mask=allowed), want, atol=1e-6, rtol=1e-5)
    q, kv = ours.project(x, context)
    torch.testing.assert_close(attention_weights(q, kv.k, allowed), weights, atol=1e-6, rtol=1e-5)


def test_a_projected_context_is_the_context() -> None:
    torch.manual_seed(0)
    layer = Attention(24, 6, num_kv_heads=2, context_dim=19, qk_norm="rms")
    x, context = torch.randn(6, 5, 24), torch.randn(3, 7, 19)
    kv = layer.project_kv(context)
    assert kv.k.shape == (3, 2, 7, 4)
    assert torch.equal(layer(x, kv), layer(x, context))
    torch.testing.assert_close(layer(x, context), layer(x, context.repeat_interleave(2, 0)), atol=1e-6, rtol=1e-5)
    # The norm of queries and keys, written out; of a context and of the tokens themselves.
    alone = Attention(24, 6, qk_norm="rms", norm_eps=1e-6)
    q, k, v = (alone.get_submodule(f"{name}_proj")(x).unflatten(-1, (6, 4)).transpose(1, 2) for name in "qkv")
    q, k = (t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
    want = alone.out_proj(((q @ k.transpose(2, 3) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
    for given in (None, alone.project_kv(x)):
        torch.testing.assert_close(alone(x, given), want, atol=1e-6, rtol=1e-5)
    angles = RotaryEmbedding(4)(torch.arange(5))  # Queries and keys are turned, values are not.
    turned = (angles.rotate(q) @ angles.rotate(k).transpose(2, 3) / 2).softmax(-1) @ v
    want = alone.out_proj(turned.transpose(1, 2).flatten(2))
    torch.testing.assert_close(alone(x, rope=angles), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rotary", [False, True])
def test_cached_equals_uncached(rotary: bool) -> None:
    torch.manual_seed(0)
    layer, rope = Attention(24, 6, num_kv_heads=2), RotaryEmbedding(4)
    x = torch.randn(3, 7, 24)
    full = layer(x, mask="causal", rope=rope(torch.arange(7)) if rotary else None)
    cache, parts = KVCache(11), []
    for start, end in ((0, 3), (3, 4), (4, 7)):
        angles = rope(torch.arange(start, end)) if rotary else None
        parts.append(layer(x[:, start:end], mask="causal", rope=angles, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-6, rtol=1e-5)


def test_cache_reorders_repeats_and_refuses() -> None:
    cache = KVCache(5)
    cache.reorder(torch.tensor([0]))  # An empty cache has no rows to reorder.
    with pytest.raises(ValueError, match="empty"):
        cache.view()
    k = torch.randn(2, 3, 4, 7)
    cache.append(KeyValue(k, -k))
    cache.reorder(torch.tensor([1, 1, 0]))
    assert torch.equal(cache.view().k, k[[1, 1, 0]])
    assert torch.equal(cache.view().v, -k[[1, 1, 0]])
    new = torch.randn(3, 3, 1, 7)
    assert torch.equal(cache.append(KeyValue(new, new)).k, torch.cat((k[[1, 1, 0]], new), 2))
    with pytest.raises(ValueError, match=r"holds 5 tokens, but 6"):
        cache.append(KeyValue(new, new))


def test_autocast_gives_the_same_within_bfloat16() -> None:
    torch.manual_seed(0)
    layer, x = Attention(24, 6), torch.randn(3, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x, mask="causal")
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), layer(x, mask="causal"), atol=2e-2, rtol=2e-2)


def test_dropout_of_more_keys_than_plain_products_take() -> None:
    torch.manual_seed(0)
    k = torch.ones(1, 1, kernels._CPU_PLAIN_KEYS + 1, 4)
    said = {float(attend(torch.zeros(1, 1, 1, 4), k, k, dropout=0.5).mean()) for _ in range(4)}
    assert len(said) == 4
    assert all(abs(mean - 1) < 0.2 for mean in said)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    layer, x = Attention(24, 6, dropout=0.5), torch.randn(3, 5, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    ones = rearrange(torch.ones(64, 1, 16, 1), "b h k c -> b h k c")
    layer_mean = attend(torch.zeros(64, 1, 16, 1), ones, ones, dropout=0.5).mean()
    assert abs(layer_mean.item() - 1) < 0.1  # Weights are dropped, and the rest is scaled up.


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("way", ["plain", HEADS, "autocast"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "c"), [(torch.bfloat16, 64), (torch.bfloat16, 48), (torch.float16, 64)], ids=str)
@pytest.mark.parametrize("largest", [3, 20, 200, 1800, 180_000])
def test_scores_in_16_bits_are_as_exact_as_sdpas(
    monkeypatch: pytest.MonkeyPatch, largest: float, dtype: torch.dtype, c: int, masked: bool, way: str
) -> None:
    """On a CPU plain products are faster; a score of 200 rounded to bfloat16 would be off by up to 0.5."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 3, n, c) for n in (41, 53, 53))
    scale = (largest * c**0.5 / (q @ k.transpose(-1, -2)).abs().max()) ** 0.5
    q, k = q * scale, k * scale
    q, k, v = (x.to(dtype) for x in (q, k, v))
    allowed = torch.rand(2, 41, 53) > 0.4 if masked else None
    want = definition(q, k, v, allowed)
    dense = None if allowed is None else allowed[:, None]
    sdpa = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    if way == "heads":
        by_way(monkeypatch, way)
    for grad in (False, True)[: 1 if way == "heads" else 2]:
        with torch.autocast("cpu", dtype, enabled=way == "autocast"):
            got = attend(q.requires_grad_(grad), k, v, allowed)
        assert got.dtype == dtype
        assert rms(got.detach() - want) < 1.5 * rms(sdpa - want) + 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "g"), [(6, 6), (3, 2)])
def test_gradients_in_16_bits_are_those_of_the_definition(n: int, g: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    allowed, sent = torch.rand(6, 5, 7) > 0.4, torch.randn(6, 6, 5, 48)
    allowed[2, 3] = False
    grads = []
    for kind in (dtype, torch.float64):
        inputs = [x.to(dtype).to(kind).requires_grad_() for x in qkv(c=48, n=n, g=g)]
        out = attend(*inputs, allowed)  # pyright: ignore
        grads.append(torch.autograd.grad(out, inputs, sent.to(kind)))
    for got, want in zip(*grads, strict=True):
        assert rms(got.detach() - want) < 0.01 * rms(want)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("asked", ["all", "causal", "some", "segments"])
def test_derivatives_in_forward_mode_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, asked: str, dtype: torch.dtype
) -> None:
    """Of torch's kernels of attention none has any."""
    monkeypatch.setattr(kernels, "_CPU_PLAIN_KEYS", 0)
    allowed = {
        "causal": torch.ones(7, 7).tril().bool(),
        "some": (torch.rand(6, 1, 7, 7) > 0.4) | torch.eye(7).bool(),
    }.get(asked)
    if asked == "segments":
        allowed = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).bool()
    mask = {"causal": "causal", "segments": masks.Segments((3, 4))}.get(asked, allowed)
    inputs = tuple(x.to(dtype) for x in qkv(q=7, c=8))
    moves = tuple(torch.randn_like(x) for x in inputs)

    def exact(*inputs: Tensor) -> Tensor:
        q, k, v = (x.double() for x in inputs)
        scores = q @ k.transpose(2, 3) / 8**0.5
        return (scores if allowed is None else scores.where(allowed, -torch.inf)).softmax(-1) @ v

    got = torch.func.jvp(lambda *x: attend(*x, mask), inputs, moves)
    want = torch.func.jvp(exact, inputs, moves)
    for mine, right in zip(got, want, strict=True):
        assert mine.dtype == dtype
        assert rms(mine - right) < (1e-6 if dtype == torch.float32 else 0.01) * rms(right)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(inputs, moves, strict=True)]
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(attend(*duals, mask)).tangent, got[1])  # pyright: ignore


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("slow", [False, True])
def test_a_layer_in_16_bits_has_gradients_by_sample_and_derivatives_in_forward_mode(
    monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    monkeypatch.setattr(kernels, "fast_in_bfloat16", lambda: not slow)
    torch.manual_seed(3)
    layer, x = Attention(16, 2).bfloat16().requires_grad_(False), torch.randn(3, 5, 16).bfloat16()
    by_sample = torch.func.vmap(torch.func.grad(lambda x: layer(x[None]).float().sum()))(x)
    (want,) = torch.autograd.grad(layer(x.requires_grad_()).float().sum(), x)
    assert rms(by_sample - want) < 0.02 * rms(want)
    x = x.detach()
    _, moved = torch.func.jvp(layer, (x,), (x,))
    assert float((moved.double() * torch.ones_like(moved)).sum()) == pytest.approx(
        float((want.double() * x).sum()), rel=0.02, abs=0.05
    )
