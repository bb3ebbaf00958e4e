"""Masks: who may look at whom. True = may look, always.

A mask is a predicate `(b, q, k) -> bool` over index tensors that broadcast. Predicates are combined with `all_of`
and `any_of`, then realised once a pass: `dense()` for SDPA and the CPU, `block()` for FlexAttention. At the end: tokens
that are left out at random.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_
from typing import TYPE_CHECKING, Literal, Union

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Segments:
    """A row in parts that see themselves alone, both ways: packed pictures. Each part is computed by itself.

    Attributes:
        lengths: tokens of each part, in their order; all of a row.
    """

    lengths: tuple[int, ...]


# By its name: FlexAttention imports sympy, which takes 0.6 s that few need.
Mask = Union[Tensor, "BlockMask", Segments, Literal["causal"]]
"""True = may look. A tensor is (q k), (b q k) or (b h q k), bool; "causal" aligns the last query with the last key;
`Segments` are parts that see themselves alone."""

Predicate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Row, query and key indices (long, broadcastable) -> bool: may this query of this row look at this key?"""


def causal(offset: int | Tensor = 0) -> Predicate:
    """Each token looks at itself and at those before it; `offset` keys stand before the first query (a cache)."""
    return lambda b, q, k: q + offset >= k


def padding(attention_mask: Tensor) -> Predicate:
    """No token looks at padding; `attention_mask` is (b k) bool, True = a real token."""
    return lambda b, q, k: attention_mask[b, k]


def prefix(lengths: Tensor, offset: int = 0) -> Predicate:
    """The first `lengths[b]` tokens see each other, the rest is causal (UniLM's prefix LM); `lengths` is (b) long."""
    return lambda b, q, k: (k < lengths[b]) | (q + offset >= k)


def bidirectional(inside: Tensor) -> Predicate:
    """The tokens of a block see each other both ways (an image, a prompt); `inside` is (b k) bool: who is in it."""
    return lambda b, q, k: inside[b, q] & inside[b, k]


def window(size: int, offset: int | Tensor = 0) -> Predicate:
    """A token looks at those at most `size` - 1 places away, on both sides; with `causal` it is Mistral's window."""
    if size < 1:
        raise ValueError(f"window size must be at least 1, not {size}")
    return lambda b, q, k: (q + offset - k).abs() < size


def global_tokens(is_global: Tensor) -> Predicate:
    """Global tokens look everywhere and are seen by all (Longformer, arXiv:2004.05150); `is_global` is (b k) bool."""
    return lambda b, q, k: is_global[b, q] | is_global[b, k]


def documents(ids: Tensor) -> Predicate:
    """Tokens look only inside their own document of a packed row; `ids` is (b k) long."""
    return lambda b, q, k: ids[b, q] == ids[b, k]


def images(text_time: Tensor, image_time: Tensor, *, last_only: bool = True) -> Predicate:
    """Text looks at images that came before it, and at none that come later (Flamingo, arXiv:2204.14198, 3.1.3).

    Args:
        text_time: (b q) long, how many images have come up to and including this token; 0 = none yet.
        image_time: (b k) long, the number (from 1) of the image that a visual token belongs to; 0 = padding.
        last_only: look at the last image only, as Flamingo does; else at all previous ones.
    """

    def may_look(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        asked, seen = text_time[b, q], image_time[b, k]
        return (seen > 0) & ((seen == asked) if last_only else (seen <= asked))

    return may_look


def all_of(*predicates: Predicate) -> Predicate:
    """True where every predicate is."""
    return lambda b, q, k: reduce(and_, (may_look(b, q, k) for may_look in predicates))


def any_of(*predicates: Predicate) -> Predicate:
    """True where any predicate is."""
    return lambda b, q, k: reduce(or_, (may_look(b, q, k) for may_look in predicates))


def dense(predicate: Predicate, b: int, q: int, k: int, device: torch.device | str = "cpu") -> Tensor:
    """Realises a predicate as a bool tensor (b q k)."""
    rows = torch.arange(b, device=device)[:, None, None]
    asked = torch.arange(q, device=device)[None, :, None]
    keys = torch.arange(k, device=device)[None, None, :]
    return predicate(rows, asked, keys).expand(b, q, k)


def broadcast(mask: Mask | None, q: int, k: int, device: torch.device) -> Tensor | None:
    """A mask as a bool tensor that broadcasts to (b h q k), or None; `q` queries and `k` keys."""
    if mask is None:
        return None
    if isinstance(mask, Segments):
        parts = torch.arange(len(mask.lengths), device=device)
        ids = torch.repeat_interleave(parts, torch.tensor(mask.lengths, device=device))
        return (ids[:, None] == ids)[None, None]
    if not isinstance(mask, (str, Tensor)):
        raise ValueError("a BlockMask has no dense form here: build the mask with masks.dense()")
    if isinstance(mask, str):
        return torch.ones(q, k, dtype=torch.bool, device=device).tril(k - q)[None, None]
    if mask.ndim == 2:
        return mask[None, None]
    return mask.unsqueeze(1) if mask.ndim == 3 else mask


def block(predicate: Predicate, b: int, q: int, k: int, device: torch.device | str = "cuda") -> "BlockMask":
    """Realises a predicate as a BlockMask, which sends `attend` to FlexAttention: empty blocks cost nothing.

    FlexAttention has no backward pass on a CPU; use `dense` there.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: predicate(b, q, k), b, None, q, k, device=str(device))


def show(mask: Tensor, rows: list[str] | None = None, columns: list[str] | None = None) -> str:
    """A mask (q k) as text, one line a query: "#" may look, "." may not; with labels if given."""
    if mask.ndim != 2:
        raise ValueError(f"show() takes one sample's mask (q k), not a tensor of {mask.ndim} dimensions")
    labels = rows or [str(i) for i in range(mask.shape[0])]
    width = max(map(len, labels), default=0)
    lines = [
        f"{label:>{width}} {''.join('#' if seen else '.' for seen in row)}"
        for label, row in zip(labels, mask.tolist(), strict=True)
    ]
    if columns:
        tallest = max(map(len, columns))
        head = ["".join(name.ljust(tallest)[i] for name in columns) for i in range(tallest)]
        lines = [f"{'':>{width}} {line}" for line in head] + lines
    return "\n".join(lines)


def kept_tokens(x: Tensor, rate: float) -> Tensor:
    """Which tokens stay where a random share of each row's are left out, in order: (b p d) -> (b fewer) long."""
    count = max(1, round(x.shape[1] * (1 - rate)))
    return torch.rand(x.shape[:2], device=x.device).argsort(dim=1)[:, :count].sort(dim=1).values


def keep_tokens(x: Tensor, kept: Tensor) -> Tensor:
    """The tokens of those numbers: (b p d), (b fewer) -> (b fewer d)."""
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))


def drop_tokens(x: Tensor, rate: float) -> Tensor:
    """Leaves out a random share of each row's tokens, the rest stays in order: (b p d) -> (b fewer d)."""
    return keep_tokens(x, kept_tokens(x, rate))
