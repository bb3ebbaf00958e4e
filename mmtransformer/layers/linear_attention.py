"""Attention whose cost grows with the length, not with its square: FAVOR+ (Performer, arXiv:2009.14794).

Softmax attention weighs a key by exp(q.k / sqrt(c)). That is the mean, over random directions w, of
exp(w.q' - q'^2 / 2) exp(w.k' - k'^2 / 2) with q' = q c^-1/4 and k' = k c^-1/4: a product of something of the query and
something of the key. With m directions drawn once, sums over keys are taken before any query is asked.

Shapes: m random features, s tokens of a chunk.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.layers.attention import Attention
from mmtransformer.layers.cache import KeyValue, KVCache
from mmtransformer.layers.masks import Mask
from mmtransformer.layers.positions import RotaryAngles

_CHUNK = 64  # Causal: within so many tokens queries meet keys one by one, across chunks through sums.


def random_directions(num_features: int, head_dim: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian vectors (m c), orthogonal in blocks of c, which estimates better than independent ones (its theorem 2).

    Args:
        num_features: m.
        head_dim: c.
        generator: source of randomness.
    """
    blocks = []
    for start in range(0, num_features, head_dim):
        square = torch.randn(head_dim, head_dim, generator=generator)
        q, r = torch.linalg.qr(square)
        # LAPACK chooses signs; with those of r's diagonal taken back, every direction is as likely as its opposite.
        blocks.append((q * r.diagonal().sign()).T[: num_features - start])
    lengths = torch.randn(num_features, head_dim, generator=generator).norm(dim=1, keepdim=True)
    return torch.cat(blocks) * lengths


def positive_features(x: Tensor, directions: Tensor) -> Tensor:
    """Logarithms of the features of queries or keys, (b h q c) with (m c) -> (b h q m), in float32 at least.

    The sum over m of exp(features of q + features of k), divided by m, estimates exp(q.k / sqrt(c)) without bias.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)) * x.shape[-1] ** -0.25
    return x @ directions.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2


def linear_attend(
    q: Tensor, k: Tensor, v: Tensor, directions: Tensor, *, attention_mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """An estimate of softmax attention, in time and memory linear in the length.

    Args:
        q: queries (b h q c).
        k: keys (b h k c).
        v: values (b h k c).
        directions: from `random_directions`, (m c).
        attention_mask: (b k) bool, True = a real key; None = all are.
        causal: whether a query sees the keys up to its own place only; then q = k.

    Returns:
        (b h q c); zeros where a query may look nowhere.

    Raises:
        ValueError: if causal queries and keys are not as many.
    """
    queries, keys = positive_features(q, directions), positive_features(k, directions)
    if attention_mask is not None:
        keys = keys.masked_fill(~attention_mask[:, None, :, None], float("-inf"))
    values = F.pad(v.to(keys.dtype), (0, 1), value=1.0)  # The column of ones gathers the denominator.
    if causal:
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"causal linear attention needs as many queries ({q.shape[2]}) as keys ({k.shape[2]})")
        sums = _causal_sums(_shifted(queries), keys, values)
    else:  # The largest key of a feature goes over to the queries: so each query's largest product is near 1.
        largest = _finite(keys.amax(-2, keepdim=True))
        sums = _shifted(queries + largest) @ ((keys - largest).exp().transpose(-1, -2) @ values)
    above, below = sums[..., :-1], sums[..., -1:]
    # A query that may look nowhere, or whose products nearly vanish: the quotient's gradient would not be finite there.
    least = torch.finfo(below.dtype).tiny
    weak = below < least ** (2 / 3)
    learns = above / below.masked_fill(weak, 1.0)
    return torch.where(weak, (above / below.clamp(min=least)).detach(), learns).to(v.dtype)


def _shifted(queries: Tensor) -> Tensor:
    """Features from their logarithms; what is common to all features of a query falls out of the quotient."""
    return (queries - queries.detach().amax(-1, keepdim=True)).exp()


def _finite(largest: Tensor) -> Tensor:
    """A maximum as what exponents are shifted by: without gradient, and 0 where nothing was real."""
    return largest.detach().masked_fill(largest.isinf(), 0.0)


def _causal_sums(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """For each query the sum over the keys up to its place of (feature product) times value: (b h q c+1).

    Shifts run along: a chunk's exponents are relative to the largest of the chunks so far, and within the chunk to the
    largest up to each place, so that no later key, however large, makes an earlier sum vanish.
    """
    b, h, length, m = queries.shape
    state = values.new_zeros(b, h, m, values.shape[-1])
    shift = keys.new_full((b, h, 1, 1), float("-inf"))
    found = []
    for first in range(0, length, _CHUNK):
        asking, some, said = (x[:, :, first : first + _CHUNK] for x in (queries, keys, values))
        # Of each place: the largest exponent of any key up to it.
        running = torch.maximum(some.detach().amax(-1, keepdim=True).cummax(2).values, shift)  # (b h s 1)
        reach = _finite(running)
        before = (shift - reach).exp() * (asking @ state)
        # Keys are shifted by the reach of their own place, and products by the difference to the query's, which is at
        # most 0 where a query may look.
        near = (asking @ (some - reach).exp().transpose(-1, -2)).tril()
        near = near * (reach.transpose(-1, -2) - reach).clamp(max=0.0).exp()
        found.append(before + near @ said)
        last = running[:, :, -1:]
        kept = (some - _finite(last)).exp()
        state = (shift - _finite(last)).exp() * state + kept.transpose(-1, -2) @ said
        shift = last
    return torch.cat(found, dim=2)


class LinearAttention(nn.Module):
    """An `Attention` whose softmax is estimated by FAVOR+; put it where an `Attention` is, with the same weights.

        block.attn = LinearAttention(block.attn)

    The estimate of a weight has the relative variance exp(|q + k|^2 / sqrt(c)) / m: it is good where heads look around,
    and poor where they look at one token with large scores.

    Args:
        attn: the projections, and the heads.
        num_features: m, random features; the error falls with their square root, and the cost grows with them.
        seed: of the directions, which are saved with the weights.

    Raises:
        ValueError: if there are no features.
    """

    directions: Tensor

    def __init__(self, attn: Attention, *, num_features: int = 256, seed: int = 0) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, not {num_features}")
        self.attn, self.num_features = attn, num_features
        drawn = random_directions(num_features, attn.head_dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("directions", drawn)

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draws other directions, which in training keeps the model from leaning on one draw (its section 4.2)."""
        drawn = random_directions(self.num_features, self.attn.head_dim, generator=generator)
        self.directions.copy_(drawn)

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeyValue | None = None,
        *,
        mask: Mask | None = None,
        rope: RotaryAngles | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attends, roughly as `Attention.forward`.

        Args:
            x: the queries' tokens (b q d).
            context: the keys' tokens (n k d) or their `project_kv`, n dividing b; None = x itself.
            mask: None, "causal", or which keys are real, (b 1 k) bool; a sum over keys knows no other mask.
            rope: rotary angles of x's positions.
            cache: must be None.

        Returns:
            (b q d).

        Raises:
            ValueError: for a mask that differs from query to query, or a cache.
        """
        if cache is not None:
            raise ValueError("linear attention has no use for a cache of keys: decode without one")
        attention_mask = None
        if isinstance(mask, Tensor) and mask.ndim == 3 and mask.shape[1] == 1 and mask.dtype == torch.bool:
            attention_mask = mask[:, 0]
        elif mask is not None and not (isinstance(mask, str) and mask == "causal"):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else mask
            raise ValueError(f'linear attention takes the mask None, "causal" or (b 1 k) bool, not {shape}')
        q, kv = self.attn.project(x, context)
        if rope is not None:
            q, kv = rope.rotate(q), KeyValue(rope.rotate(kv.k), kv.v)
        repeats = (q.shape[0] // kv.k.shape[0], q.shape[1] // kv.k.shape[1])
        k, v = (t.repeat_interleave(repeats[0], 0).repeat_interleave(repeats[1], 1) for t in kv)
        out = linear_attend(q, k, v, self.directions, attention_mask=attention_mask, causal=isinstance(mask, str))
        return self.attn.out_proj(rearrange(out, "b h q c -> b q (h c)"))
