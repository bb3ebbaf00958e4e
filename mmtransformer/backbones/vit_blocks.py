"""The blocks that Vision Transformers are stacked from, and what a ViT's constructor says of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn

from mmtransformer.layers.attention import Attention, Mask, RotaryAngles
from mmtransformer.layers.blocks import MLP, EncoderBlock, SwiGLU, make_branch, make_norm
from mmtransformer.layers.config import Activation, Norm, known_fields
from mmtransformer.layers.linear import Linear


@known_fields
@dataclass(frozen=True)
class ViTBlockConfig:
    """What a ViT's blocks are made of; the paper's by default.

    Args:
        activation: of the MLPs; SigLIP uses "gelu_tanh", OpenAI's CLIP "quick_gelu"; "swiglu" gates them (DINOv2-g,
            AIMv2, arXiv:2002.05202).
        norm_eps: of the norms; 1e-6 as in the paper's code and timm.
        layer_scale: first value of LayerScale (DINOv2, CaiT); None = none.
        dropout: share of a branch's result dropped in training.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
        norm: "layer", or "rms" (AIMv2).
        order: where a block's norms stand: "pre", before attention and MLP (the paper); "res_post", on what they give,
            before it is added (Swin v2, arXiv:2111.09883); "parallel", one before both at once (ViT-22B,
            arXiv:2302.05442).
        qkv_bias: whether queries, keys and values have biases.
        bias: whether the other linear layers have (AIMv2: false).
        qk_norm: whether each head's queries and keys are normed (ViT-22B).
        attn_norm: a norm of what attention gathered, before its last layer (BEiT-3, arXiv:2210.06423).
        mlp_norm: a norm of the hidden values, before the MLP's last layer (BEiT-3, EVA-02).

    Raises:
        ValueError: for an unknown order.
    """

    activation: Activation | Literal["swiglu"] = "gelu"
    norm_eps: float = 1e-6
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    norm: Norm = "layer"
    order: Literal["pre", "res_post", "parallel"] = "pre"
    qkv_bias: bool = True
    bias: bool = True
    qk_norm: bool = False
    attn_norm: bool = False
    mlp_norm: bool = False

    def __post_init__(self) -> None:
        if self.order not in ("pre", "res_post", "parallel"):
            raise ValueError(f'order must be "pre", "res_post" or "parallel", not "{self.order}"')

    def make_norm(self, dim: int) -> nn.Module:
        """A norm of that width."""
        return make_norm(self.norm, dim, self.norm_eps)


@known_fields
@dataclass(frozen=True)
class ViTOutputConfig:
    """What stands behind a ViT's blocks.

    Args:
        norm: what the last norm is of: "tokens", each (the paper), or "pooled", only what they are pooled to (timm's
            `fc_norm`); "none" = there is none, and who reads the tokens norms them (Idefics, RADIO).
        pool_heads: heads of attention pooling; None = as the blocks (SigLIP). Perception Encoder: 8.
        pool_mlp_dim: hidden width of the MLP behind it; None = as the blocks'.
        pool_prefix: whether attention pooling also reads class token and registers (Perception Encoder).

    Raises:
        ValueError: for an unknown word.
    """

    norm: Literal["tokens", "pooled", "none"] = "tokens"
    pool_heads: int | None = None
    pool_mlp_dim: int | None = None
    pool_prefix: bool = False

    def __post_init__(self) -> None:
        if self.norm not in ("tokens", "pooled", "none"):
            raise ValueError(f'the last norm is of "tokens", "pooled" or "none", not "{self.norm}"')


class ResPostNormBlock(EncoderBlock):
    """Attention, then an MLP, whose results are normed before they are added (Swin v2, arXiv:2111.09883)."""

    def forward(self, x: Tensor, *, mask: Mask | None = None, rope: RotaryAngles | None = None) -> Tensor:
        """(b q d) -> (b q d)."""
        x = x + self.branch1(self.norm1(self.attn(x, mask=mask, rope=rope)))
        return x + self.branch2(self.norm2(self.mlp(x)))


class ParallelBlock(nn.Module):
    """Attention and an MLP that read the same normed tokens, and are added together (ViT-22B, arXiv:2302.05442).

    Args:
        dim: width of a token.
        attn: the attention.
        mlp: the MLP.
        norm: builds a norm of width dim.
        dropout: share of the branch's result dropped.
        drop_path: probability of skipping the branch.
        layer_scale: first value of LayerScale; None = no LayerScale.
    """

    def __init__(
        self,
        dim: int,
        attn: Attention,
        mlp: nn.Module,
        norm: Callable[[], nn.Module],
        *,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = norm(), attn, mlp
        self.branch = make_branch(dim, dropout, drop_path, layer_scale)

    def forward(self, x: Tensor, *, mask: Mask | None = None, rope: RotaryAngles | None = None) -> Tensor:
        """(b q d) -> (b q d)."""
        normed = self.norm(x)
        return x + self.branch(self.attn(normed, mask=mask, rope=rope) + self.mlp(normed))


class DistilledHead(nn.Module):
    """A classifier of the class token and one of the distillation token, averaged (DeiT, arXiv:2012.12877).

    Args:
        dim: width of a token.
        num_classes: classes.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.of_class, self.of_distilled = Linear(dim, num_classes), Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The two tokens (b 2 d) -> logits (b num_classes)."""
        return (self.of_class(x[:, 0]) + self.of_distilled(x[:, 1])) / 2


def make_block(dim: int, num_heads: int, mlp_dim: int, config: ViTBlockConfig, drop_path: float) -> nn.Module:
    """One block of width dim: tokens (b q d) -> (b q d).

    Args:
        dim: width d of a token.
        num_heads: attention heads.
        mlp_dim: hidden width of the MLP.
        config: what it is made of.
        drop_path: probability of skipping a branch.
    """
    attn = Attention(
        dim,
        num_heads,
        bias=config.qkv_bias,
        out_bias=config.bias,
        qk_norm=config.norm if config.qk_norm else None,
        norm_eps=config.norm_eps,
    )
    if config.activation == "swiglu":
        mlp = SwiGLU(dim, mlp_dim, bias=config.bias)
        last = "down_proj"
    else:
        mlp = MLP(dim, mlp_dim, activation=config.activation, bias=config.bias)
        last = "fc2"
    for module, name, width, normed in (
        (attn, "out_proj", dim, config.attn_norm),
        (mlp, last, mlp_dim, config.mlp_norm),
    ):
        if normed:
            module.add_module(name, nn.Sequential(config.make_norm(width), module.get_submodule(name)))
    kind = {"pre": EncoderBlock, "res_post": ResPostNormBlock, "parallel": ParallelBlock}[config.order]
    return kind(
        dim,
        attn,
        mlp,
        partial(config.make_norm, dim),
        dropout=config.dropout,
        drop_path=drop_path,
        layer_scale=config.layer_scale,
    )
