"""The one place where queries meet keys.

Every module of the library that attends (self-, masked, cross-, gated, latent) does it through
`Attention`, and `Attention` does it through `attend`.

Letters: b rows, q tokens that ask, k tokens that are asked, d width of a token, h query heads,
g key/value heads (g divides h), c width of one head, n rows of a shared context (n divides b).
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Mask = Tensor | BlockMask | Literal["causal"]
"""True = may look. A tensor is (q k), (b q k) or (b h q k), bool; its TYPE picks the kernel."""

# On the CPU plain matrix products beat SDPA's kernel where they run in bfloat16, and lose where they run in float32;
# beyond this many keys their scores take too much memory. Measured on Zen 5 with torch 2.15, CPU ms of forward and
# backward, (8 12 197 64): bf16 16 against 49, float32 at matmul precision "medium" 25 against 56, "highest" 44 against
# 41; the forward pass alone 7 : 13, 9 : 15, 16 : 13. The order is the same at 20, 50 and 577 keys.
_CPU_PLAIN_KEYS = 1024


class KeyValue(NamedTuple):
    """Keys and values, each (b g k c), already projected: what a cross-attention cache is."""

    k: Tensor
    v: Tensor

    def select(self, rows: Tensor) -> "KeyValue":
        """Returns the given rows, in their order; `rows` is (b) long."""
        return KeyValue(self.k.index_select(0, rows), self.v.index_select(0, rows))


class Rope(NamedTuple):
    """Rotary angles of one pass (RoFormer, arXiv:2104.09864): cos and sin, (q c), (b q c) or (b h q c), float32.

    Rotates the pairs (i, i + c/2), as Llama's "rotate half" does.
    """

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Rotates queries or keys (b h q c) by their positions."""
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        if cos.ndim == 3:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin


class KVCache:
    """Keys and values of the tokens so far, for one self-attention layer.

    Room for `max_len` tokens is taken at the first append and never grows; beams are reordered in place of rows.

    Args:
        max_len: the most tokens that the cache will hold.
    """

    def __init__(self, max_len: int) -> None:
        self.max_len = max_len
        self.length = 0
        self.cache_position: Tensor | None = None
        """(1) long: where the next token goes, once the cache is fixed; `length` then counts no further."""
        self._kv: KeyValue | None = None
        self._spare: KeyValue | None = None

    def append(self, new: KeyValue) -> KeyValue:
        """Adds the keys and values of new tokens, returns those of all tokens so far (fixed: of all there is room for).

        Raises:
            ValueError: if the tokens do not fit.
        """
        if self.cache_position is not None:
            k, v = self.view()
            return KeyValue(
                k.index_copy_(2, self.cache_position, new.k), v.index_copy_(2, self.cache_position, new.v)
            )
        count = new.k.shape[2]
        end = self.length + count
        if end > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens, but {end} are needed: raise max_len")
        if self._kv is None:
            self._kv = KeyValue(*(x.new_empty(*x.shape[:2], self.max_len, x.shape[3]) for x in new))
        for held, x in zip(self._kv, new, strict=True):
            held.narrow(2, self.length, count).copy_(x)
        self.length = end
        return self.view()

    def view(self) -> KeyValue:
        """The keys and values of all tokens so far; of a fixed cache, of all that there is room for."""
        if self._kv is None:
            raise ValueError("the cache is empty")
        k, v = self._kv
        return (
            self._kv
            if self.cache_position is not None
            else KeyValue(k.narrow(2, 0, self.length), v.narrow(2, 0, self.length))
        )

    def make_static(self, cache_position: Tensor) -> None:
        """From now on tokens come one by one, and each costs the same operations on the same tensors.

        Args:
            cache_position: (1) long, where the next token goes; who calls moves it on.
        """
        assert self._kv is not None
        for x in self._kv:
            x[:, :, self.length :] = 0  # Weight 0 times what is not finite would not be 0.
        self.cache_position = cache_position

    @torch.no_grad()  # Decoding only; and what is written into given memory could have no gradient.
    def reorder(self, rows: Tensor) -> None:
        """Keeps the given rows (b), in their order; a row may be named more than once (beams)."""
        if self._kv is None:
            return
        held = self._kv
        shape = (rows.shape[0], *held.k.shape[1:])
        if self._spare is None or self._spare.k.shape != shape:
            self._spare = KeyValue(held.k.new_empty(shape), held.v.new_empty(shape))
        for x, kept in zip(self.view(), self._spare, strict=True):
            torch.index_select(x, 0, rows, out=kept.narrow(2, 0, x.shape[2]))
        if (
            self.cache_position is not None and shape == held.k.shape
        ):  # What is recorded knows this memory, no other.
            for x, kept in zip(held, self._spare, strict=True):
                x.copy_(kept)
            return
        self._kv, self._spare = self._spare, held if held.k.shape == shape else None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., arXiv:1706.03762, section 3.2.1).

    Keys may have fewer heads than queries (grouped-query attention, arXiv:2305.13245) and fewer rows: each row of
    keys then serves b / n consecutive rows of queries (beams, or captions of one picture). Neither copies a key.
    A query that may look nowhere gets zeros.

    Args:
        q: queries (b h q c).
        k: keys (n g k c).
        v: values (n g k c).
        mask: where each query may look; "causal" aligns the last query with the last key.
        dropout: share of attention weights dropped.

    Returns:
        (b h q c).

    Raises:
        ValueError: for an unknown mask word, a mask that is not bool, or rows or heads that do not divide.
    """
    if q.shape[0] % k.shape[0]:
        raise ValueError(f"rows of queries ({q.shape[0]}) must be a multiple of rows of keys ({k.shape[0]})")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads ({q.shape[1]}) must be a multiple of key heads ({k.shape[1]})")
    if isinstance(mask, BlockMask):
        k, v = _spread_rows(q, k), _spread_rows(q, v)
        return _compiled_flex(q.device.type)(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f'unknown mask word "{mask}": the only one is "causal"')
        if q.shape[2] == 1:
            mask = None
    elif mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"a mask is bool (True = may look), not {mask.dtype}")
    if q.device.type == "cpu" and k.shape[2] <= _CPU_PLAIN_KEYS and _plain_is_faster(q, k, mask, dropout):
        return _attend_plain(q, k, v, _dense(mask, q, k), dropout)
    return _attend_sdpa(q, k, v, mask, dropout)


def _plain_is_faster(q: Tensor, k: Tensor, mask: Mask | None, dropout: float) -> bool:
    # SDPA would copy shared keys under a mask, and has no CPU kernel for dropout.
    if dropout or q.shape[1] != k.shape[1] or (q.shape[0] != k.shape[0] and mask is not None):
        return True
    if q.dtype != torch.float32:
        return True
    # torch.compile cannot ask for the precision, and would break the graph here.
    return not torch.compiler.is_compiling() and torch.get_float32_matmul_precision() == "medium"


def attention_weights(q: Tensor, k: Tensor, mask: Mask | None = None) -> Tensor:
    """The weights that `attend` puts on the keys, in float32: (b h q k). For looking, not for speed."""
    k = _spread_rows(q, k).repeat_interleave(q.shape[1] // k.shape[1], dim=1).float()
    scores = (q.float() * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    allowed = _dense(mask, q, k)
    if allowed is None:
        return scores.softmax(-1)
    return _masked_softmax(scores, allowed)


def _dense(mask: Mask | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A bool mask that broadcasts to (b h q k), or None."""
    if mask is None:
        return None
    if isinstance(mask, str):
        asked, keys = q.shape[2], k.shape[2]
        return torch.ones(asked, keys, dtype=torch.bool, device=q.device).tril(keys - asked)[None, None]
    if isinstance(mask, BlockMask):
        raise ValueError("a BlockMask has no dense form here: build the mask with masks.dense()")
    if mask.ndim == 2:
        return mask[None, None]
    return mask.unsqueeze(1) if mask.ndim == 3 else mask


def _masked_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    # The lowest finite number, not -inf: a row that may look nowhere stays finite in the backward pass, and the
    # product then makes it exactly zero whatever its keys are.
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return weights * allowed.any(-1, keepdim=True)


def _attend_plain(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, dropout: float) -> Tensor:
    rows, heads = q.shape[:2]
    shared, groups = k.shape[:2]
    m, r = rows // shared, heads // groups
    # Rows that share keys, and heads that share a group, are only more queries on the same keys.
    q = rearrange(q * q.shape[-1] ** -0.5, "(n m) (g r) q c -> n g (m r q) c", m=m, r=r)
    scores = q @ k.transpose(-1, -2)
    if allowed is None:
        weights = scores.softmax(-1)
    else:
        scores = rearrange(scores, "n g (m r q) k -> (n m) (g r) q k", m=m, r=r)
        weights = _masked_softmax(scores, allowed)
        weights = rearrange(weights, "(n m) (g r) q k -> n g (m r q) k", m=m, r=r)
    if dropout:
        weights = F.dropout(weights, dropout)
    return rearrange(weights.to(v.dtype) @ v, "n g (m r q) c -> (n m) (g r) q c", m=m, r=r)


def _attend_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Literal["causal"] | None, dropout: float
) -> Tensor:
    rows, shared = q.shape[0], k.shape[0]
    grouped = q.shape[1] != k.shape[1]
    if mask is None and rows != shared:
        asked = q.shape[2]  # "(n m) h q c -> n h (m q) c", and back: not by rearrange, see `_heads`.
        q = q.unflatten(0, (shared, -1)).transpose(1, 2).flatten(2, 3)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, enable_gqa=grouped)
        return out.unflatten(2, (-1, asked)).transpose(1, 2).flatten(0, 1)
    k, v = _spread_rows(q, k), _spread_rows(q, v)
    if mask is None or (isinstance(mask, str) and q.shape[2] == k.shape[2]):
        # SDPA's is_causal aligns the FIRST query with the first key: right only where the lengths are equal.
        causal = mask is not None
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
        )
    allowed = _dense(mask, q, k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout, enable_gqa=grouped)


@cache
def _compiled_flex(device: str) -> Callable[..., Tensor]:
    """FlexAttention compiled, since uncompiled it holds all scores."""
    # On a CPU torch 2.15 writes C++ that does not compile where lengths vary: there each length is compiled by itself,
    # as far as torch's limit goes (torch._dynamo.config.recompile_limit); more run uncompiled, with torch's warning.
    dynamic = False if device == "cpu" else None
    return torch.compile(flex_attention, dynamic=dynamic)  # pyright: ignore[reportReturnType]


def _spread_rows(q: Tensor, x: Tensor) -> Tensor:
    return x if q.shape[0] == x.shape[0] else x.repeat_interleave(q.shape[0] // x.shape[0], dim=0)


def cast_once(x: Tensor) -> Tensor:
    """What several linear layers will read, in autocast's type where autocast is on; else each would cast it again."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _heads(x: Tensor, count: int, norm: nn.RMSNorm | nn.LayerNorm | nn.Identity | None = None) -> Tensor:
    # (b q (h c)) -> (b h q c). Not by rearrange: to read its words takes longer, and every token comes by here.
    x = x.unflatten(-1, (count, -1)).transpose(1, 2)
    # In the norm's own type: under autocast RMSNorm would otherwise fall back to a slow kernel, and say so.
    return x if norm is None or isinstance(norm, nn.Identity) else norm(x.to(norm.weight.dtype)).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention: self, masked or cross (Vaswani et al., arXiv:1706.03762, section 3.2.2).

    Whether it is self- or cross-attention is decided by whether a `context` is passed.

    Args:
        dim: width of the tokens that ask and of the result.
        num_heads: query heads.
        num_kv_heads: key/value heads; None = as many as query heads.
        head_dim: width of one head; None = dim / num_heads.
        context_dim: width of the context's tokens; None = dim.
        bias: whether the query, key and value projections have biases.
        out_bias: the same for the output projection; None = as `bias`.
        qk_norm: "rms" or "layer" normalises each head's queries and keys (arXiv:2302.05442; Qwen3); None does not.
        norm_eps: of these norms.
        dropout: share of attention weights dropped in training.

    Raises:
        ValueError: if the numbers do not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        qk_norm: Literal["rms", "layer"] | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) must be divisible by num_kv_heads ({num_kv_heads})")
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(
                    f"dim ({dim}) must be divisible by num_heads ({num_heads}), or give head_dim"
                )
            head_dim = dim // num_heads
        context_dim = dim if context_dim is None else context_dim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dropout = dropout
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(context_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(context_dim, num_kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * head_dim, dim, bias=bias if out_bias is None else out_bias)
        if qk_norm not in (None, "rms", "layer"):
            raise ValueError(f'qk_norm must be "rms", "layer" or None, not "{qk_norm}"')
        norm = {
            "rms": lambda: nn.RMSNorm(head_dim, eps=norm_eps),
            "layer": lambda: nn.LayerNorm(head_dim, eps=norm_eps),
        }
        self.q_norm = norm[qk_norm]() if qk_norm else nn.Identity()
        self.k_norm = norm[qk_norm]() if qk_norm else nn.Identity()

    def read(self, x: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
        """What each of these layers says of tokens that all of them read."""
        return [layer(x) for layer in layers]

    def project_q(self, x: Tensor) -> Tensor:
        """Projects the tokens that ask: (b q d) -> (b h q c)."""
        return _heads(self.q_proj(x), self.num_heads, self.q_norm)

    def project_kv(self, context: Tensor) -> KeyValue:
        """Projects a context once: (n k d) -> keys and values (n g k c), to be passed as `context` many times."""
        return self._key_value(*self.read(cast_once(context), self.k_proj, self.v_proj))

    def _key_value(self, k: Tensor, v: Tensor) -> KeyValue:
        return KeyValue(_heads(k, self.num_kv_heads, self.k_norm), _heads(v, self.num_kv_heads))

    def project(
        self, x: Tensor, context: Tensor | KeyValue | None, rope: Rope | None, cache: KVCache | None
    ) -> tuple[Tensor, KeyValue]:
        """Queries (b h q c), and the keys and values they meet; new tokens are appended to the cache."""
        x = cast_once(x)
        if isinstance(context, KeyValue):
            return self.project_q(x), context
        if context is None:
            q, k, v = self.read(x, self.q_proj, self.k_proj, self.v_proj)
            q, kv = _heads(q, self.num_heads, self.q_norm), self._key_value(k, v)
        else:
            q, kv = self.project_q(x), self.project_kv(context)
        if rope is not None:
            q, kv = rope.rotate(q), KeyValue(rope.rotate(kv.k), kv.v)
        return q, kv if cache is None else cache.append(kv)

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeyValue | None = None,
        *,
        mask: Mask | None = None,
        rope: Rope | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            x: tokens that ask (b q d).
            context: tokens that are asked (n k d) or their `project_kv`, where n divides b; None = x itself.
            mask: where each query may look (see `Mask`); None = everywhere.
            rope: rotary angles of x's positions (self-attention only).
            cache: keys and values of earlier tokens (self-attention only); x's are appended.

        Returns:
            (b q d), always.
        """
        q, kv = self.project(x, context, rope, cache)
        out = attend(q, kv.k, kv.v, mask, self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).flatten(2))
