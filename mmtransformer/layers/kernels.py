"""What a CPU or a GPU makes special: which kernel meets queries and keys, and in which dtype.

Nothing here changes what attention is: every way gives the same numbers, but for rounding.
"""

import itertools
import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from mmtransformer.layers.masks import Mask, Segments, broadcast

# On the CPU plain matrix products beat SDPA's kernel where they run in bfloat16, and lose where they run in float32;
# beyond this many keys their scores take too much memory. Measured on Zen 5 with torch 2.15, CPU ms of forward and
# backward, (8 12 197 64): bf16 16 against 49, float32 at matmul precision "medium" 25 against 56, "highest" 44 against
# 41; the forward pass alone 7 : 13, 9 : 15, 16 : 13. The order is the same at 20, 50 and 577 keys. Where a CPU has no
# kernels for "medium" it is "highest": Zen 3 takes 86 against 77, under a mask 121 against 77.
_CPU_PLAIN_KEYS = 1024
_CHUNK = 1 << 20  # scores in float32 at a time
_HEAD = 1 << 16  # scores of a head from which on heads go one after the other
HALVES = (torch.bfloat16, torch.float16)
_GAIN = 1.2  # rate of bfloat16 over float32 from which on it is taken: weights and activations are cast too
_ONEDNN_GAIN = 1.4  # rate of oneDNN's products in float32 over torch's own from which on they are taken; Zen 5: 2.1


def autocast_input(x: Tensor) -> Tensor:
    """What several linear layers will read, in autocast's dtype where autocast is on; else each would cast it again."""
    kind = x.device.type
    if kind == "meta":  # which torch knows no autocast of
        return x
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, dropout: float, softcap: float | None = None
) -> Tensor:
    """`attention.attend`, by the kernel that is fastest on this device, in this dtype, at this length.

    Derivatives in forward mode (`torch.func.jvp`, `jacfwd`), of which torch's kernels have none, go by plain products.

    Args:
        q: queries (b h q c).
        k: keys (n g k c).
        v: values (n g k c).
        mask: a BlockMask, "causal", or bool that broadcasts to (b h q k); None = everything.
        dropout: share of attention weights dropped; not with a BlockMask.
        softcap: see `attention.attend`; SDPA has none, so that all scores are held.

    Returns:
        (b h q c).
    """
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):  # It would round scores to 16 bits.
        q, k, v = (autocast_input(x) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            return scaled_dot_product(q, k, v, mask, dropout, softcap)
    if q.dtype in HALVES and emulated(q):
        return scaled_dot_product(q.float(), k.float(), v.float(), mask, dropout, softcap).to(q.dtype)
    if isinstance(mask, Segments):
        return _each_segment(q, k, v, mask.lengths, dropout, softcap)
    flex = mask is not None and not isinstance(mask, (Tensor, str))  # a BlockMask
    if softcap is not None or (forward_ad._current_level >= 0 and not flex):
        assert mask is None or isinstance(mask, (Tensor, str))
        return _plain_products(q, k, v, broadcast(mask, q.shape[2], k.shape[2], q.device), dropout, softcap)
    grouped, shared = bool(q.shape[1] != k.shape[1]), bool(q.shape[0] != k.shape[0])  # Tracers compare tensors.
    if not flex and q.is_cpu and k.shape[2] <= _CPU_PLAIN_KEYS:
        # SDPA would copy shared keys under a mask, and has no CPU kernel for dropout or `vmap`. torch.compile can't ask
        # for the process's precision of float32 products, and would break the graph here.
        eager = not torch.compiler.is_compiling()
        taken_apart = eager and torch._C._are_functorch_transforms_active()  # see `transformed`
        plain = dropout or grouped or (shared and mask is not None) or q.dtype != torch.float32 or taken_apart
        plain = plain or (eager and q.shape[2] * k.shape[2] >= _HEAD and head_by_head(q))
        # "medium" is "highest" on a CPU that has no kernels for it.
        medium = plain or (eager and torch.get_float32_matmul_precision() == "medium")
        if plain or (medium and fast_in_bfloat16()):
            return _plain_products(q, k, v, broadcast(mask, q.shape[2], k.shape[2], q.device), dropout)
    if shared and mask is None:  # Rows that share keys are only more queries on the same keys.
        count = q.shape[2]  # "(n m) h q c -> n h (m q) c", and back: not by rearrange, see `Attention`.
        q = q.unflatten(0, (k.shape[0], -1)).transpose(1, 2).flatten(2, 3)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, enable_gqa=grouped)
        return out.unflatten(2, (-1, count)).transpose(1, 2).flatten(0, 1)
    if shared:
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
    if flex:
        return _compiled_flex(q.device.type)(q, k, v, block_mask=mask, enable_gqa=grouped)
    # SDPA's is_causal aligns the FIRST query with the first key: right only where the lengths are equal.
    causal = isinstance(mask, str) and q.shape[2] == k.shape[2]
    allowed = None if causal or mask is None else broadcast(mask, q.shape[2], k.shape[2], q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
    )


def _each_segment(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], dropout: float, softcap: float | None
) -> Tensor:
    """Attention within each part of a row; parts of one length together, as rows of a batch."""
    starts = dict(enumerate(itertools.accumulate(lengths, initial=0)))
    alike: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        alike.setdefault(length, []).append(i)
    found: list[Tensor] = [q] * len(lengths)
    for length, members in alike.items():
        some = [torch.cat([x.narrow(2, starts[i], length) for i in members]) for x in (q, k, v)]
        out = scaled_dot_product(some[0], some[1], some[2], None, dropout, softcap)
        for i, part in zip(members, out.chunk(len(members)), strict=True):
            found[i] = part
    return torch.cat(found, dim=2)


@cache
def _compiled_flex(device: str) -> Callable[..., Tensor]:
    """FlexAttention compiled, since uncompiled it holds all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    # On a CPU torch 2.15 writes C++ that does not compile where lengths vary: there each length is compiled by itself,
    # as far as torch's limit goes (torch._dynamo.config.recompile_limit); more run uncompiled, with torch's warning.
    dynamic = False if device == "cpu" else None
    return torch.compile(flex_attention, dynamic=dynamic)  # pyright: ignore[reportReturnType]


def _plain_products(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, dropout: float, softcap: float | None = None
) -> Tensor:
    (b, h, count, c), (n, g, keys, _) = q.shape, k.shape
    m, r = b // max(n, 1), h // g
    # Rows that share keys, and heads that share a group, are only more queries on the same keys.
    q = q.view(n, m, g, r, count, c).permute(0, 2, 1, 3, 4, 5)
    if allowed is not None:  # (b h q k), any of them 1 -> (n g m r q k)
        rows, heads = allowed.shape[:2]
        split = ((n, m) if rows == b else (1, 1)) + ((g, r) if heads == h else (1, 1))
        allowed = allowed.view(*split, *allowed.shape[2:]).permute(0, 2, 1, 3, 4, 5)
    shape = (n, g, m, r, count, keys)
    eager = not torch.compiler.is_compiling()  # which would look at lengths anew for each
    if eager and softcap is None and not dropout and m * r * count * keys >= _HEAD and head_by_head(q):
        out = q.new_empty(b, count, h, c).transpose(1, 2)  # as an output projection reads it
        _each_head(q, out.view(n, m, g, r, count, c).permute(0, 2, 1, 3, 4, 5), k, v, allowed)
        return out
    q = q.reshape(n * g, m * r * count, c)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    if softcap is not None or (q.dtype.itemsize == 2 and transformed()):
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(exact) * c**-0.5 @ k.to(exact).transpose(1, 2)
        weights = softmax(capped(scores, softcap).view(shape), allowed).view(n * g, m * r * count, keys).to(v.dtype)
    elif q.dtype.itemsize > 2:
        weights = softmax((q * c**-0.5 @ k.transpose(1, 2)).view(shape), allowed).view(n * g, m * r * count, keys)
    elif torch.is_grad_enabled():
        weights = _ExactWeights.apply(q, k, allowed, shape)
    else:
        weights = _exact_weights(q, k, allowed, shape)
    if dropout:
        weights = F.dropout(weights, dropout)
    out = (weights @ v).view(n, g, m, r, count, c).permute(0, 2, 1, 3, 4, 5)
    return out.reshape(b, h, count, c)


def head_by_head(q: Tensor) -> bool:
    """Whether `_each_head` is the fastest for many scores: where no product by oneDNN helps, it is not."""
    return q.is_cpu and q.dtype.itemsize <= 4 and not torch.is_grad_enabled() and not watched() and fast_by_onednn()


def _each_head(q: Tensor, out: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> None:
    """Attention, one head after the other, whose scores so stay in the cache.

    Measured on a Zen 5 core with torch 2.15, 12 heads of 64, in ms: 577 tokens in bfloat16 11.3 all at once, 6.8 so, of
    eight pictures 123 and 55; in float32 12.2 by SDPA and 7.8, 99 and 61. At 197 tokens there is nothing to win.

    Args:
        q: (n g m r q c).
        out: written, as q.
        k: (n g k c).
        v: (n g k c).
        allowed: bool that broadcasts to (n g m r q k); None = everything.
    """
    scale = q.shape[-1] ** -0.5
    allowed = None if allowed is None else allowed.expand(*q.shape[:2], *allowed.shape[2:])
    for i, j in itertools.product(range(q.shape[0]), range(q.shape[1])):
        scores = onednn_linear(q[i, j].float().flatten(0, 2) * scale, k[i, j].float().contiguous())
        weights = softmax(scores.view(*q.shape[2:5], -1), None if allowed is None else allowed[i, j]).flatten(0, 2)
        exact = v.dtype == torch.float32
        found = onednn_linear(weights, v[i, j].T.contiguous()) if exact else weights.to(v.dtype) @ v[i, j]
        out[i, j] = found.view(q.shape[2:])


def watched() -> bool:
    """Whether somebody looks at each operation and knows torch's own alone: torch.compile, a tracer, a counter."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or transformed()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def transformed() -> bool:
    """Whether `torch.func` or forward mode takes operations apart now, which can do that with torch's own alone."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Softcap * tanh(s / softcap), which stays below it (Gemma 2, arXiv:2408.00118); None = scores as they are."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Weights (... k) from scores (... k); zeros where a query may look nowhere.

    Args:
        scores: float32 or more.
        allowed: bool that broadcasts to them; None = everything.
    """
    if allowed is None:
        return scores.softmax(-1)
    # The lowest finite number, not -inf: a row that may look nowhere stays finite in the backward pass, and the
    # product then makes it exactly zero whatever its keys are.
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return weights * allowed.any(-1, keepdim=True)


def _exact_weights(q: Tensor, k: Tensor, allowed: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Weights (n q k) in 16 bits, from scores in float32: in bfloat16 a score of 200 would be off by up to 0.5."""
    n, g = shape[:2]
    rows = max(1, _CHUNK // math.prod(shape[1:]))
    weights, q, k = q.new_empty(len(q), q.shape[1], k.shape[1]), q.float() * q.shape[-1] ** -0.5, k.float()
    for i in range(0, n, rows):
        some = slice(i * g, (i + rows) * g)
        mask = allowed if allowed is None or len(allowed) == 1 else allowed[i : i + rows]
        scores = torch.bmm(q[some], k[some].transpose(1, 2)).view(-1, *shape[1:])
        weights[some] = softmax(scores, mask).flatten(0, 1).view(-1, *weights.shape[1:])
    return weights


class _ExactWeights(torch.autograd.Function):
    """`_exact_weights`, which keeps only the weights in 16 bits for its gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, allowed: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        weights = _exact_weights(q, k, allowed, shape)
        ctx.save_for_backward(q, k, weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, weights = ctx.saved_tensors
        grad = torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)
        nothing, scale = q.new_empty(1, 1, 1), q.shape[-1] ** -0.5
        return (
            torch.baddbmm(nothing, grad, k, beta=0, alpha=scale),
            torch.baddbmm(nothing, grad.transpose(1, 2), q, beta=0, alpha=scale),
            None,
            None,
        )


class Bfloat16Hardware(NamedTuple):
    """Whether a device is faster in bfloat16 than in float32, and what it has for it, in words that follow "has"."""

    fast: bool
    words: str


def bfloat16_hardware(device: torch.device | str) -> Bfloat16Hardware:
    """What a device has for bfloat16: a GPU of compute capability 8.0 on, an x86 CPU with AVX512-BF16 or AMX.

    A CPU must also be seen to be faster in it, since instructions alone do not tell (`bfloat16_gain`). Where there are
    none, bfloat16 is emulated and slower; other CPUs and devices were not measured and keep float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return Bfloat16Hardware(major >= 8, f"compute capability {major}.{minor}")
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        kinds: dict[str, Any] = dict(getattr(torch.cpu, "get_capabilities", dict)())  # older ones of torch don't tell
        if found := ", ".join(name for name in ("amx_bf16", "avx512_bf16") if kinds.get(name)):
            gain = bfloat16_gain()
            slow = "" if gain >= _GAIN else f" and multiplies by it at {gain:.1f} times the rate of float32"
            return Bfloat16Hardware(not slow, found + slow)
    return Bfloat16Hardware(fast=False, words="no bfloat16 kernels")


@cache
def bfloat16_gain() -> float:
    """The rate of this CPU's matrix products in bfloat16 over that in float32, measured once a process, in 20 to 50 ms.

    Zen 4 and Zen 5 come to about 2. An Intel Xeon (family 6, model 207) has AVX512-BF16 too, but where a virtual
    machine hides its AMX it multiplies at half the rate of float32.
    """
    before = torch.get_float32_matmul_precision()
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        exact = torch.ones(512, 512, device="cpu", dtype=torch.float32)
        half = exact.bfloat16()
        torch.set_float32_matmul_precision("highest")  # "medium" would multiply in bfloat16.
        try:
            slow, fast = seconds_of(lambda: torch.mm(exact, exact), lambda: torch.mm(half, half))
        finally:
            torch.set_float32_matmul_precision(before)
    return slow / fast


def fast_by_onednn() -> bool:
    """Whether products in float32 are oneDNN's: it is faster here, and nobody asked for less than float32."""
    return torch.get_float32_matmul_precision() == "highest" and onednn_gain() >= _ONEDNN_GAIN


@cache
def onednn_gain() -> float:
    """The rate of oneDNN's matrix products in float32 over torch's own, measured once a process, in 20 to 50 ms."""
    if not torch.backends.mkldnn.is_available():
        return 0.0
    with torch.inference_mode():
        side = torch.ones(512, 512, device="cpu")
        own, onednn = seconds_of(lambda: F.linear(side, side), lambda: onednn_linear(side, side))
    return own / onednn


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by oneDNN, of a weight dense as it is or transposed: any other takes a thousand times as long."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def seconds_of(*calls: Callable[[], object]) -> list[float]:
    """The fastest of five goes of each of these, taken in turns."""
    seconds = [math.inf] * len(calls)
    for _ in range(5):
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            seconds[i] = min(seconds[i], time.perf_counter() - begin)
    return seconds


@cache
def fast_in_bfloat16() -> bool:
    """What `bfloat16_hardware` says of this CPU, asked once: torch takes 0.1 ms to tell what it can."""
    return bfloat16_hardware("cpu").fast


def emulated(x: Tensor) -> bool:
    """Whether this CPU is slow at products of such a tensor, being of 16 bits: they are then made in float32.

    Without kernels torch multiplies one number after the other: Zen 3 does 0.9 GFLOP/s in bfloat16, 72 in float32. No
    CPU was measured that is fast in float16.
    """
    if not x.is_cpu or x.dtype not in HALVES:
        return False
    return x.dtype == torch.float16 or not fast_in_bfloat16()
