"""A block of the Q-Former, and the three masks of its passes (BLIP-2, arXiv:2301.12597, figure 2).

Shapes: g c heads of keys and their width.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mmtransformer.layers import masks
from mmtransformer.layers.attention import Attention
from mmtransformer.layers.blocks import MLP, on_real
from mmtransformer.layers.cache import KeyValue
from mmtransformer.layers.masks import Mask

Mode = Literal["bidirectional", "multimodal_causal", "unimodal"]
"""Who sees whom: all see all (image-text matching); text sees the queries and the text before it, queries see no text
(text generation); queries see queries and text sees text (contrastive)."""


def mode_mask(mode: Mode, num_queries: int, attention_mask: Tensor) -> Tensor:
    """The mask of one pass over [queries; text], for `masks.show` and as the definition of the three modes.

    Args:
        mode: who sees whom.
        num_queries: l.
        attention_mask: (b q) bool, True = a real text token.

    Returns:
        (b l+q l+q) bool, True = may look.

    Raises:
        ValueError: for an unknown mode.
    """
    b, q = attention_mask.shape
    total = num_queries + q
    known = torch.cat((attention_mask.new_ones(b, num_queries), attention_mask), dim=1)
    is_text = (torch.arange(total, device=attention_mask.device) >= num_queries).long().expand(b, -1)
    if mode == "bidirectional":
        allowed = masks.padding(known)
    elif mode == "unimodal":
        allowed = masks.all_of(masks.padding(known), masks.documents(is_text))
    elif mode == "multimodal_causal":
        lengths = torch.full((b,), num_queries, device=attention_mask.device)
        allowed = masks.all_of(masks.padding(known), masks.prefix(lengths))
    else:
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode}")
    return masks.dense(allowed, b, total, total, attention_mask.device)


class QFormerBlock(nn.Module):
    """Self-attention that queries and text share, cross-attention for the queries, then an MLP for each of the two.

    Post-norm throughout, as BERT.

    Args:
        dim: width d of a token.
        num_heads: attention heads.
        mlp_dim: hidden width of both MLPs.
        visual_dim: width of the visual tokens; None = a block without cross-attention.
        text: whether there is an MLP for text.
        dropout: share of attention weights and branch results dropped in training.
        norm_eps: of the norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        visual_dim: int | None,
        text: bool,
        dropout: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.cross_attn = None
        if visual_dim is not None:
            self.cross_attn = Attention(dim, num_heads, context_dim=visual_dim, dropout=dropout)
            self.norm_cross = nn.LayerNorm(dim, eps=norm_eps)
        self.query_mlp = MLP(dim, mlp_dim)
        self.query_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = None
        if text:
            self.mlp = MLP(dim, mlp_dim)
            self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.drop = nn.Dropout(dropout)

    def attend(self, x: Tensor, kv: KeyValue, mask: Mask | None) -> Tensor:
        """Self-attention of queries, text or both: (b q d) over the keys and values (b g k c) -> (b q d)."""
        return self.norm1(x + self.drop(self.attn(x, kv, mask=mask)))

    def finish_queries(self, x: Tensor, visual: KeyValue | None, mask: Mask | None = None) -> Tensor:
        """What follows for queries: cross-attention where the block has it, then their MLP; (b l d) -> (b l d).

        `mask` (b 1 k) bool: which of the visual keys are real, None = all.
        """
        if self.cross_attn is not None:
            x = self.norm_cross(x + self.drop(self.cross_attn(x, visual, mask=mask)))
        return self.query_norm(x + self.drop(self.query_mlp(x)))

    def finish_text(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """What follows for text: its MLP, of `real_places` only; (b q d) -> (b q d)."""
        mlp = self.mlp
        assert mlp is not None
        return on_real(lambda some: self.norm2(some + self.drop(mlp(some))), x, real)
