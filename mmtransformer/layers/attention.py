"""The one place where queries meet keys.

Every module of the library that attends (self-, masked, cross-, gated, latent) does it through `Attention`, and
`Attention` does it through `attend`. Which kernel runs, on which device and in which dtype, is kernels.py's.

Shapes: g key/value heads (g divides h), n rows of a shared context (n divides b).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmtransformer.layers import kernels
from mmtransformer.layers.cache import KeyValue, KVCache
from mmtransformer.layers.config import check_sizes
from mmtransformer.layers.linear import Linear
from mmtransformer.layers.masks import Mask, Segments
from mmtransformer.layers.positions import RotaryAngles


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, dropout: float = 0.0, *, softcap: float | None = None
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., arXiv:1706.03762, section 3.2.1).

    Keys may have fewer heads than queries (grouped-query attention, arXiv:2305.13245) and fewer rows: each row of
    keys then serves b / n consecutive rows of queries (beams, or captions of one image). Neither copies a key.
    A query that may look nowhere gets zeros.

    Args:
        q: queries (b h q c).
        k: keys (n g k c).
        v: values (n g k c).
        mask: where each query may look; "causal" aligns the last query with the last key.
        dropout: share of attention weights dropped; not with a BlockMask.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2); not with a BlockMask.

    Returns:
        (b h q c).

    Raises:
        ValueError: for an unknown mask word, a mask that is not bool, a BlockMask with dropout or softcap, or rows
            or heads that do not divide.
    """
    if q.shape[0] % k.shape[0] if k.shape[0] else q.shape[0]:
        raise ValueError(f"rows of queries ({q.shape[0]}) must be a multiple of rows of keys ({k.shape[0]})")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads ({q.shape[1]}) must be a multiple of key heads ({k.shape[1]})")
    if isinstance(mask, Segments):
        if not sum(mask.lengths) == q.shape[2] == k.shape[2]:
            raise ValueError(f"segments of {sum(mask.lengths)} tokens are not for {q.shape[2]} queries")
    elif mask is not None and not isinstance(mask, (Tensor, str)):  # a BlockMask: to ask for it would import sympy
        if dropout:
            raise ValueError(f"FlexAttention has no dropout ({dropout}): give a mask of masks.dense(), or dropout 0")
        if softcap is not None:
            raise ValueError(f"a softcap ({softcap}) is not for a BlockMask: give a mask of masks.dense()")
    elif isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f'unknown mask word "{mask}": the only one is "causal"')
        mask = None if q.shape[2] == 1 else mask
    elif mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"a mask is bool (True = may look), not {mask.dtype}")
    return kernels.scaled_dot_product(q, k, v, mask, dropout, softcap)


def split_heads(x: Tensor, count: int, norm: nn.Module | None = None) -> Tensor:
    """(b q (h c)) -> (b h q c), normed where there is a norm of width c."""
    # Not by rearrange: to read its words takes longer, and every token comes by here.
    x = x.unflatten(-1, (count, -1)).transpose(1, 2)
    # In the norm's own dtype: under autocast RMSNorm would otherwise fall back to a slow kernel, and say so.
    if norm is None or isinstance(norm, nn.Identity):
        return x
    return norm(x.to(next(norm.parameters()).dtype)).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention: self, masked or cross (Vaswani et al., arXiv:1706.03762, section 3.2.2).

    Whether it is self- or cross-attention is decided by whether a `context` is passed.

    Args:
        dim: width of the queries' tokens and of the result.
        num_heads: query heads.
        num_kv_heads: key/value heads; None = as many as query heads.
        head_dim: width of one head; None = dim / num_heads.
        context_dim: width of the context's tokens; None = dim.
        bias: whether the query, key and value projections have biases.
        out_bias: the same for the output projection; None = as `bias`.
        qk_norm: "rms" or "layer" normalises each head's queries and keys (arXiv:2302.05442; Qwen3); None does not.
        norm_eps: of these norms.
        dropout: share of attention weights dropped in training.
        softcap: see `attend`.
        scale_dim: scores are divided by the root of this; None = of head_dim.

    Raises:
        ValueError: if the numbers are no sizes, or do not divide.
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
        softcap: float | None = None,
        scale_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, context_dim=context_dim)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) must be divisible by num_kv_heads ({num_kv_heads})")
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(f"dim ({dim}) must be divisible by num_heads ({num_heads}), or give head_dim")
            head_dim = dim // num_heads
        context_dim = dim if context_dim is None else context_dim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dropout, self.softcap = dropout, softcap
        self.query_scale = 1.0 if scale_dim is None else (head_dim / scale_dim) ** 0.5
        self.q_proj = Linear(dim, num_heads * head_dim, bias=bias)
        self.k_proj = Linear(context_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(context_dim, num_kv_heads * head_dim, bias=bias)
        self.out_proj = Linear(num_heads * head_dim, dim, bias=bias if out_bias is None else out_bias)
        if qk_norm not in (None, "rms", "layer"):
            raise ValueError(f'qk_norm must be "rms", "layer" or None, not "{qk_norm}"')
        norm = {
            "rms": lambda: nn.RMSNorm(head_dim, eps=norm_eps),
            "layer": lambda: nn.LayerNorm(head_dim, eps=norm_eps),
        }
        self.q_norm = norm[qk_norm]() if qk_norm else nn.Identity()
        self.k_norm = norm[qk_norm]() if qk_norm else nn.Identity()

    def project_with(self, x: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
        """What each of these layers gives for tokens that all of them read."""
        x = kernels.autocast_input(x)
        return [layer(x) for layer in layers]

    def project_kv(self, context: Tensor) -> KeyValue:
        """Projects a context once: (n k d) -> keys and values (n g k c), to be passed as `context` many times."""
        k, v = self.project_with(context, self.k_proj, self.v_proj)
        return KeyValue(split_heads(k, self.num_kv_heads, self.k_norm), split_heads(v, self.num_kv_heads))

    def project(self, x: Tensor, context: Tensor | KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """Queries (b h q c), and the keys and values of the context, or of x itself where there is none."""
        if context is None:
            q, k, v = self.project_with(x, self.q_proj, self.k_proj, self.v_proj)
            kv = KeyValue(split_heads(k, self.num_kv_heads, self.k_norm), split_heads(v, self.num_kv_heads))
        else:
            q, kv = self.q_proj(x), context if isinstance(context, KeyValue) else self.project_kv(context)
        q = split_heads(q, self.num_heads, self.q_norm)
        return q if self.query_scale == 1 else q * self.query_scale, kv

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeyValue | None = None,
        *,
        mask: Mask | None = None,
        rope: RotaryAngles | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            x: the queries' tokens (b q d).
            context: the keys' tokens (n k d) or their `project_kv`, where n divides b; None = x itself.
            mask: where each query may look (see `masks.Mask`); None = everywhere.
            rope: rotary angles of x's positions (self-attention only).
            cache: keys and values of earlier tokens (self-attention only); x's are appended.

        Returns:
            (b q d), always.
        """
        q, kv = self.project(x, context)
        if rope is not None:
            q, kv = rope.rotate(q), KeyValue(rope.rotate(kv.k), kv.v)
        if cache is not None:
            kv = cache.append(kv)
        out = attend(q, kv.k, kv.v, mask, self.dropout if self.training else 0.0, softcap=self.softcap)
        return self.out_proj(out.transpose(1, 2).flatten(2))
