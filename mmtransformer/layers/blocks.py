"""The blocks that backbones are stacked from, on one page: norms, MLPs, encoder and decoder blocks.

Blocks are composed of built modules: a backbone's choices (norm, activation, heads) are made in one place, there.

Shapes: n rows of a context (n divides b).
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtransformer.layers.attention import Attention
from mmtransformer.layers.cache import KeyValue, KVCache
from mmtransformer.layers.config import Activation, Norm
from mmtransformer.layers.linear import Linear
from mmtransformer.layers.masks import Mask
from mmtransformer.layers.positions import RotaryAngles


def make_norm(kind: Norm | Literal["rms_offset"], dim: int, eps: float) -> nn.Module:
    """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last dimension."""
    if kind == "layer":
        return nn.LayerNorm(dim, eps=eps)
    if kind == "rms":
        return nn.RMSNorm(dim, eps=eps)
    if kind == "rms_offset":
        return OffsetRMSNorm(dim, eps=eps)
    raise ValueError(f'norm must be "layer", "rms" or "rms_offset", not "{kind}"')


class OffsetRMSNorm(nn.Module):
    """RMSNorm whose weights are kept without the 1 that they begin as; computed in float32 (Gemma, arXiv:2403.08295).

    Args:
        dim: width of a token.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(... d) -> (... d)."""
        exact = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(exact), self.weight.shape, 1 + self.weight.to(exact), self.eps).to(x.dtype)


def make_dropout(rate: float) -> nn.Module:
    """Dropout, where there is any: a layer that drops nothing still costs every token a call."""
    return nn.Dropout(rate) if rate else nn.Identity()


def activation_function(name: Activation) -> Callable[[Tensor], Tensor]:
    """The named activation; "gelu_tanh" is GPT-2's and SigLIP's, "quick_gelu" OpenAI CLIP's: they are not the same."""
    if name not in _ACTIVATIONS:
        raise ValueError(f'unknown activation "{name}": known are {", ".join(_ACTIVATIONS)}')
    return _ACTIVATIONS[name]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def real_places(attention_mask: Tensor | None) -> Tensor | None:
    """Where the real tokens of rows (b q) bool stand in (b * q): (t) long; None = all are to be computed.

    On the CPU only, where padding costs what tokens cost: elsewhere to count them would be to wait for the device.
    """
    if (
        attention_mask is None
        or attention_mask.device.type != "cpu"
        or torch.compiler.is_compiling()
        or bool(attention_mask.all())
    ):
        return None
    return attention_mask.flatten().nonzero()[:, 0]


def on_real(layer: Callable[[Tensor], Tensor], x: Tensor, real: Tensor | None) -> Tensor:
    """layer(x) for tokens (b q d) that are real, as `real_places` finds them; padding stays as it is."""
    if real is None:
        return layer(x)
    flat = x.flatten(0, 1)
    return flat.index_copy(0, real, layer(flat.index_select(0, real)).to(flat.dtype)).view_as(x)


class MLP(nn.Module):
    """Two linear layers with an activation between them.

    Args:
        dim: width of a token.
        hidden_dim: width between the layers.
        activation: see `activation_function`.
        bias: whether the layers have biases.
        dropout: share of hidden values dropped in training.
    """

    def __init__(
        self, dim: int, hidden_dim: int, *, activation: Activation = "gelu", bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, bias=bias)
        self.fc2 = Linear(hidden_dim, dim, bias=bias)
        self.activation: Activation = activation
        self.act = activation_function(activation)
        self.drop = make_dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(... d) -> (... d)."""
        return self.fc2(self.drop(self.act(self.fc1(x))))


class SwiGLU(nn.Module):
    """A gated MLP, down(act(gate) * up) (arXiv:2002.05202), without biases as in Llama.

    Args:
        dim: width of a token.
        hidden_dim: width of gate and up.
        bias: whether the layers have biases (DINOv2-g, EVA-02).
        activation: of the gate; SwiGLU's is "silu", GeGLU's (Gemma) "gelu_tanh".
    """

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = False, activation: Activation = "silu") -> None:
        super().__init__()
        self.act = activation_function(activation)
        self.gate_proj = Linear(dim, hidden_dim, bias=bias)
        self.up_proj = Linear(dim, hidden_dim, bias=bias)
        self.down_proj = Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(... d) -> (... d)."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class DropPath(nn.Module):
    """Stochastic depth: in training a sample skips the branch with probability `rate` (arXiv:1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"the rate of stochastic depth must be in [0, 1), not {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(b ... d) -> (b ... d)."""
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype)


class LayerScale(nn.Module):
    """A learned scale per channel on a branch, small at first (CaiT, arXiv:2103.17239)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        """(... d) -> (... d)."""
        return x * self.gamma


def make_branch(dim: int, dropout: float, drop_path: float, layer_scale: float | None) -> nn.Module:
    """What a branch's result passes before it is added: LayerScale, dropout, stochastic depth, where asked for."""
    steps: list[nn.Module] = []
    if layer_scale is not None:
        steps.append(LayerScale(dim, layer_scale))
    if dropout:
        steps.append(nn.Dropout(dropout))
    if drop_path:
        steps.append(DropPath(drop_path))
    return nn.Sequential(*steps)


class EncoderBlock(nn.Module):
    """Self-attention, then an MLP, each with a residual: what ViT and BERT are stacked from.

    Args:
        dim: width of a token.
        attn: the attention.
        mlp: the MLP.
        norm: builds a norm of width dim.
        norm_first: norm before each branch (ViT, GPT-2); False = after each sum (the 2017 Transformer, BERT).
        dropout: share of a branch's result dropped.
        drop_path: probability of skipping a branch.
        layer_scale: first value of LayerScale; None = no LayerScale.
    """

    def __init__(
        self,
        dim: int,
        attn: Attention,
        mlp: nn.Module,
        norm: Callable[[], nn.Module],
        *,
        norm_first: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1, self.attn, self.norm2, self.mlp = norm(), attn, norm(), mlp
        self.branch1 = make_branch(dim, dropout, drop_path, layer_scale)
        self.branch2 = make_branch(dim, dropout, drop_path, layer_scale)

    def forward(self, x: Tensor, *, mask: Mask | None = None, rope: RotaryAngles | None = None) -> Tensor:
        """(b q d) -> (b q d)."""
        if self.norm_first:
            x = x + self.branch1(self.attn(self.norm1(x), mask=mask, rope=rope))
            return x + self.branch2(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.branch1(self.attn(x, mask=mask, rope=rope)))
        return self.norm2(x + self.branch2(self.mlp(x)))


class DecoderBlock(nn.Module):
    """Masked self-attention, cross-attention to a context where there is one, then an MLP, each with a residual.

    Args:
        attn: the masked self-attention.
        mlp: the MLP.
        norm: builds a norm of a token's width.
        cross_attn: attention to the context; None = a block of a language model.
        norm_first: norm before each branch; False = after each sum.
        post_norm: with `norm_first`, whether what attention and MLP give is normed too (Gemma 2).
        dropout: share of a branch's result dropped.
    """

    def __init__(
        self,
        attn: Attention,
        mlp: nn.Module,
        norm: Callable[[], nn.Module],
        *,
        cross_attn: Attention | None = None,
        norm_first: bool = True,
        post_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.norm1, self.attn = norm(), attn
        if cross_attn is not None:
            self.norm_cross = norm()
        self.cross_attn = cross_attn
        self.norm2, self.mlp = norm(), mlp
        self.post_norm1, self.post_norm2 = (norm(), norm()) if post_norm else (nn.Identity(), nn.Identity())
        self.drop = make_dropout(dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeyValue | None = None,
        *,
        mask: Mask | None = None,
        context_mask: Mask | None = None,
        rope: RotaryAngles | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Adds what the tokens before and the context say.

        Args:
            x: tokens (b q d).
            context: (n k d) or its keys and values, n dividing b; None = cross-attention, where there is any, is passed
                over (BLIP's text encoder).
            mask: who may look at whom among the tokens.
            context_mask: who may look at which context token; None = all.
            rope: rotary angles of x's positions.
            cache: keys and values of earlier tokens.

        Returns:
            (b q d).
        """
        if self.norm_first:
            x = x + self.drop(self.post_norm1(self.attn(self.norm1(x), mask=mask, rope=rope, cache=cache)))
            if self.cross_attn is not None and context is not None:
                x = x + self.drop(self.cross_attn(self.norm_cross(x), context, mask=context_mask))
            return x + self.drop(self.post_norm2(self.mlp(self.norm2(x))))
        x = self.norm1(x + self.drop(self.attn(x, mask=mask, rope=rope, cache=cache)))
        if self.cross_attn is not None and context is not None:
            x = self.norm_cross(x + self.drop(self.cross_attn(x, context, mask=context_mask)))
        return self.norm2(x + self.drop(self.mlp(x)))


class AttentionPool(nn.Module):
    """Learned queries that gather a whole image: attention, then a residual MLP (SigLIP, arXiv:2303.15343; CoCa).

    Args:
        dim: width of a token.
        num_heads: heads of the attention.
        mlp_dim: hidden width of the MLP.
        num_queries: how many results; 1 = pooling.
        activation: of the MLP.
        eps: of the norm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        num_queries: int = 1,
        activation: Activation = "gelu",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, num_queries, dim) * dim**-0.5)
        self.attn = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, mlp_dim, activation=activation)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b k d) -> (b num_queries d); `mask` (b 1 k) bool: which tokens may be looked at, None = all."""
        pooled = self.attn(self.queries.expand(x.shape[0], -1, -1), x, mask=mask)
        return pooled + self.mlp(self.norm(pooled))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay spares, beside biases and norms (timm's protocol)."""
        return {"queries"}


class GatedCrossAttentionBlock(nn.Module):
    """Attention to images, then an MLP, each behind a tanh gate that starts shut (Flamingo, arXiv:2204.14198, 3.1.2).

    With shut gates it changes no bit of the tokens, so a language model that it is put into is at first itself.

    Args:
        dim: width of a token.
        attn: attention to the images' latents; without an output bias, tokens that see none get nothing from it.
        mlp: the MLP.
        norm: builds a norm of width dim.
        per_channel: a gate for each channel; False = one for the branch.
        mlp_without_image: whether the MLP also works on tokens that see no image (OpenFlamingo, Idefics). False
            leaves such tokens as they are, so that text without images stays the language model's own.
        dropout: share of a branch's result dropped in training.
    """

    def __init__(
        self,
        dim: int,
        attn: Attention,
        mlp: nn.Module,
        norm: Callable[[], nn.Module],
        *,
        per_channel: bool = False,
        mlp_without_image: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mlp_without_image = mlp_without_image
        self.norm1, self.attn, self.norm2, self.mlp = norm(), attn, norm(), mlp
        self.attn_gate = nn.Parameter(torch.zeros(dim if per_channel else 1))
        self.mlp_gate = nn.Parameter(torch.zeros(dim if per_channel else 1))
        self.drop = make_dropout(dropout)

    def forward(
        self, x: Tensor, context: Tensor | KeyValue | None, *, mask: Mask | None = None, sees: Tensor | None = None
    ) -> Tensor:
        """Adds what the images say.

        Args:
            x: tokens (b q d).
            context: latents (n k d) or their keys and values, n dividing b; None = there is no image at all.
            mask: who may look at which latent; None = all at all.
            sees: (b q) bool, which tokens see any latent, as `mask` has it; None = all do.

        Returns:
            (b q d).
        """
        if context is not None:
            found = self.drop(self.attn(self.norm1(x), context, mask=mask))
            x = x + self.attn_gate.tanh() * self._where(sees, found)
        elif not self.mlp_without_image:
            return x
        more = self.drop(self.mlp(self.norm2(x)))
        return x + self.mlp_gate.tanh() * (more if self.mlp_without_image else self._where(sees, more))

    @staticmethod
    def _where(sees: Tensor | None, x: Tensor) -> Tensor:
        # A choice, not a product: 0 times what is not finite is not 0.
        return x if sees is None else torch.where(sees[..., None], x, 0.0)
