"""ViT: pixels -> visual tokens (Dosovitskiy et al., arXiv:2010.11929).

Letters: b pictures, p visual tokens, d width of a token, gh gw rows and columns of patches.
"""

import math
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmtransformer.layers.attention import Attention
from mmtransformer.layers.blocks import MLP, Activation, AttentionPool, EncoderBlock, make_norm
from mmtransformer.layers.positions import resize_positions, sinusoidal_2d
from mmtransformer.serialization.pretrained import Pretrained

VIT_SIZES: dict[str, dict[str, int]] = {
    "Ti": {"dim": 192, "depth": 12, "num_heads": 3},
    "S": {"dim": 384, "depth": 12, "num_heads": 6},
    "B": {"dim": 768, "depth": 12, "num_heads": 12},
    "L": {"dim": 1024, "depth": 24, "num_heads": 16},
    "H": {"dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
}
"""The paper's sizes (arXiv:2010.11929, table 1; Ti and S from DeiT, arXiv:2012.12877): `ViT(**VIT_SIZES["B"])`."""


def drop_tokens(x: Tensor, rate: float) -> Tensor:
    """Leaves out a random share of each row's tokens, the rest stays in order: (b p d) -> (b fewer d)."""
    count = max(1, round(x.shape[1] * (1 - rate)))
    kept = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)[:, :count].sort(dim=1).values
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))


class PatchEmbed(nn.Module):
    """Cuts pictures into square patches and projects each; a picture's patches are one matrix product.

    Args:
        patch_size: side of a patch, px.
        in_channels: channels of a picture.
        dim: width d of a visual token.
        bias: whether the projection has a bias (OpenAI CLIP's has none).
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_channels * patch_size * patch_size, dim, bias=bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """(b channels height width) -> (b (gh gw) d)."""
        size = self.patch_size
        return self.proj(rearrange(pixels, "b c (gh y) (gw x) -> b (gh gw) (c y x)", y=size, x=size))


class ConvStem(nn.Module):
    """Patches by a few 3x3 convolutions that halve the picture: small Transformers learn sooner (arXiv:2106.14881).

    Args:
        patch_size: side of a patch, px; a power of 2.
        in_channels: channels of a picture.
        dim: width d of a visual token; it doubles from convolution to convolution up to this.

    Raises:
        ValueError: if patch_size is not a power of 2, or dim cannot be halved so often.
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        halvings = patch_size.bit_length() - 1
        if patch_size != 2**halvings or not halvings or dim % 2 ** (halvings - 1):
            raise ValueError(
                f"a convolutional stem needs a patch_size ({patch_size}) that is a power of 2, and a dim ({dim}) "
                f"divisible by half of it"
            )
        widths = [in_channels, *(dim // 2**i for i in reversed(range(halvings)))]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in widths[1:])
        self.proj = nn.Linear(dim, dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """(b channels height width) -> (b (gh gw) d)."""
        x = pixels.to(
            memory_format=torch.channels_last
        )  # The layout that CPUs and tensor cores convolve fast.
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x)))
        return self.proj(rearrange(x, "b d gh gw -> b (gh gw) d"))


class ViT(Pretrained, nn.Module):
    """A Vision Transformer: pre-norm encoder blocks over patches, for pictures of any size.

    The table of positions is made for `image_size` and is resized at run time to the picture's own grid. Positions
    belong to patches only; imported class tokens have theirs added in.

    Args:
        image_size: (height, width) of the pictures that positions are learned for, px; one number = square.
        patch_size: side of a patch, px.
        dim: width d of a visual token.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_dim: hidden width of the MLPs; None = 4 dim.
        in_channels: channels of a picture.
        class_token: whether a class token stands first.
        num_registers: register tokens after it (arXiv:2309.16588).
        pool: what `forward` returns of a picture: its class token, the mean of its patches, or attention pooling.
        num_classes: classes of the linear head; 0 = none.
        activation: of the MLPs; SigLIP uses "gelu_tanh", OpenAI's CLIP "quick_gelu".
        norm_eps: of the LayerNorms; 1e-6 as in the paper's code and timm.
        patch_bias: whether the patch projection has a bias.
        stem: "patch" cuts patches and projects them, as the paper; "conv" convolves (see `ConvStem`).
        positions: what the table of positions starts from: "learned" from noise (the paper), or from 2-D "sinusoids"
            (as MAE's, arXiv:2111.06377, but learned on), with which places are told apart from the first step.
        norm_pre: a LayerNorm before the first block (CLIP).
        layer_scale: first value of LayerScale (DINOv2, CaiT); None = none.
        dropout: share of a branch's result dropped in training.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
        patch_dropout: share of patches left out in training (arXiv:2212.00794).

    Raises:
        ValueError: if sizes do not divide, or the class token is pooled where there is none.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        mlp_dim: int | None = None,
        in_channels: int = 3,
        class_token: bool = True,
        num_registers: int = 0,
        pool: Literal["class", "mean", "attention"] = "class",
        num_classes: int = 0,
        activation: Activation = "gelu",
        norm_eps: float = 1e-6,
        patch_bias: bool = True,
        stem: Literal["patch", "conv"] = "patch",
        positions: Literal["learned", "sinusoids"] = "learned",
        norm_pre: bool = False,
        layer_scale: float | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        patch_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"image_size ({height} x {width}) must be divisible by patch_size ({patch_size})"
            )
        if pool not in ("class", "mean", "attention"):
            raise ValueError(f'pool must be "class", "mean" or "attention", not "{pool}"')
        if stem not in ("patch", "conv"):
            raise ValueError(f'stem must be "patch" or "conv", not "{stem}"')
        if positions not in ("learned", "sinusoids"):
            raise ValueError(f'positions must be "learned" or "sinusoids", not "{positions}"')
        if pool == "class" and not class_token:
            raise ValueError('pool="class" needs class_token=True; without one, pool "mean" or "attention"')
        if not 0 <= patch_dropout < 1:
            raise ValueError(f"patch_dropout must be in [0, 1), not {patch_dropout}")
        self.image_size, self.patch_size, self.in_channels = (height, width), patch_size, in_channels
        self.dim, self.depth, self.num_heads = dim, depth, num_heads
        self.mlp_dim = mlp_dim = 4 * dim if mlp_dim is None else mlp_dim
        self.class_token, self.num_registers = class_token, num_registers
        self.pool, self.num_classes, self.activation = pool, num_classes, activation
        self.norm_eps, self.patch_bias, self.stem = norm_eps, patch_bias, stem
        self.positions, self.norm_pre, self.layer_scale = positions, norm_pre, layer_scale
        self.dropout, self.drop_path, self.patch_dropout = dropout, drop_path, patch_dropout
        self.num_prefix_tokens = int(class_token) + num_registers
        self.grid = (height // patch_size, width // patch_size)
        self.grad_checkpointing = False

        norm = partial(make_norm, "layer", dim, norm_eps)
        patches = PatchEmbed(patch_size, in_channels, dim, bias=patch_bias)
        self.patch_embed = patches if stem == "patch" else ConvStem(patch_size, in_channels, dim)
        self.prefix_tokens = (
            nn.Parameter(torch.zeros(1, self.num_prefix_tokens, dim)) if self.num_prefix_tokens else None
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid), dim))
        self.first_norm = norm() if norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(
            EncoderBlock(
                dim,
                Attention(dim, num_heads),
                MLP(dim, mlp_dim, activation=activation),
                norm,
                dropout=dropout,
                drop_path=drop_path * i / max(depth - 1, 1),
                layer_scale=layer_scale,
            )
            for i in range(depth)
        )
        self.norm = norm()
        pools = pool == "attention"
        self.attn_pool = (
            AttentionPool(dim, num_heads, mlp_dim, activation=activation, eps=norm_eps) if pools else None
        )
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Positions, prefix tokens and linear weights ~ N(0, 0.02) cut at +-2, biases 0 (as DeiT and timm).

        A convolutional stem keeps torch's larger values: its patches would drown in their positions.
        """
        for parameter in (self.pos_embed, self.prefix_tokens):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        if self.positions == "sinusoids":
            self.pos_embed.data.copy_(
                0.5 * sinusoidal_2d(self.grid, self.dim)
            )  # As large as fresh patches are.
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not (self.stem == "conv" and name.startswith("patch_embed")):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def num_features(self) -> int:
        """Width of a visual token, by timm's name."""
        return self.dim

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of height x width px.

        Raises:
            ValueError: if the patches do not cover it exactly.
        """
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"a picture of {height} x {width} px is not divisible into {self.patch_size} px patches"
            )
        return height // self.patch_size, width // self.patch_size

    def embed(self, pixels: Tensor) -> Tensor:
        """What the first block reads: prefix tokens and patches with positions; (b channels h w) -> (b p d)."""
        if pixels.ndim != 4 or pixels.shape[1] != self.in_channels:
            raise ValueError(f"pixels are (b {self.in_channels} height width), not {tuple(pixels.shape)}")
        grid = self.grid_size(*pixels.shape[2:])
        x = self.patch_embed(pixels.to(self.pos_embed.dtype))
        x = x + resize_positions(self.pos_embed, self.grid, grid).to(x.dtype)
        if self.training and self.patch_dropout:
            x = drop_tokens(x, self.patch_dropout)
        if self.prefix_tokens is not None:
            x = torch.cat((self.prefix_tokens.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)
        return self.first_norm(x)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """All visual tokens after the last norm, prefix tokens first: (b channels height width) -> (b p d)."""
        return self._normed(self._run(self.embed(pixels)))

    def _normed(self, x: Tensor) -> Tensor:
        """The last norm, which may learn in float32 behind blocks that are kept in bfloat16."""
        own = next(self.norm.parameters()).dtype
        return self.norm(x if own == self.pos_embed.dtype else x.to(own))

    def _run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                x = block(x)
        return x

    def forward_intermediates(
        self, pixels: Tensor, indices: list[int], *, norm: bool = False
    ) -> list[Tensor]:
        """Visual tokens after the named blocks (negative = from the end), each (b p d); normed where asked for.

        Raises:
            ValueError: if there is no such block.
        """
        wanted = [i + self.depth if i < 0 else i for i in indices]
        if any(not 0 <= i < self.depth for i in wanted):
            raise ValueError(f"blocks {indices} were asked for, but there are {self.depth}")
        x, found = self.embed(pixels), {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = block(x)
            if i in wanted:
                found[i] = self._normed(x) if norm else x
        return [found[i] for i in wanted]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools visual tokens and classifies: (b p d) -> (b num_classes), or (b d) with `pre_logits` or no classes."""
        if self.attn_pool is not None:
            pooled = self.attn_pool(x)[:, 0]
        else:
            pooled = x[:, 0] if self.pool == "class" else x[:, self.num_prefix_tokens :].mean(1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, pixels: Tensor) -> Tensor:
        """Class logits, or the pooled feature where there are none: (b channels height width) -> (b classes | d)."""
        return self.forward_head(self.forward_features(pixels))

    def set_input_size(self, image_size: tuple[int, int] | int) -> None:
        """Makes the table of positions one for another picture size, so that no resizing happens at run time."""
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        grid = self.grid_size(height, width)
        table = resize_positions(self.pos_embed.data, self.grid, grid)
        self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self.image_size, self.grid = (height, width), grid

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes blocks again in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay spares, beside biases and norms (timm's protocol)."""
        return {"pos_embed", "prefix_tokens", "attn_pool.queries"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by name, for layer-wise learning rates (timm's protocol)."""
        stem = r"^(?:prefix_tokens|pos_embed|patch_embed|first_norm)"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}
