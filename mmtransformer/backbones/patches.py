"""Pixels -> patches: cut and projected, or convolved; and what a ViT's constructor says of them.

Shapes: gh gw rows and columns of patches.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.layers.config import known_fields
from mmtransformer.layers.linear import Linear
from mmtransformer.layers.positions import ViTPosEmbedConfig


@known_fields
@dataclass(frozen=True)
class ViTPatchConfig:
    """How a ViT makes patches.

    Args:
        in_channels: channels of an image.
        stem: "patch" cuts patches and projects them, as the paper; "conv" convolves (see `ConvStem`).
        bias: whether the projection has a bias (OpenAI CLIP's has none).
        positions: what the table of positions starts from: "learned" from noise (the paper), "sinusoidal" from waves
            (as MAE's, arXiv:2111.06377, but learned on), with which places are told apart from the first step; "none" =
            there is no table (DINOv3, whose patches are turned, see `ViTRopeConfig`).
        pre_norm: a LayerNorm before the first block (CLIP).
        patch_dropout: share of patches left out in training (arXiv:2212.00794).
        embed_norm: a norm of the projected patches, before positions are added (AIMv2, arXiv:2411.14402).
        pos_embed: how the table of positions is resized to an image's grid.

    Raises:
        ValueError: for unknown words, or a share that is none.
    """

    in_channels: int = 3
    stem: Literal["patch", "conv"] = "patch"
    bias: bool = True
    positions: Literal["learned", "sinusoidal", "none"] = "learned"
    pre_norm: bool = False
    patch_dropout: float = 0.0
    embed_norm: bool = False
    pos_embed: ViTPosEmbedConfig = ViTPosEmbedConfig()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        if self.stem not in ("patch", "conv"):
            raise ValueError(f'stem must be "patch" or "conv", not "{self.stem}"')
        if self.positions not in ("learned", "sinusoidal", "none"):
            raise ValueError(f'positions must be "learned", "sinusoidal" or "none", not "{self.positions}"')
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"the share of patches left out must be in [0, 1), not {self.patch_dropout}")


class PatchEmbed(nn.Module):
    """Cuts images into square patches and projects each; an image's patches are one matrix product.

    Args:
        patch_size: side of a patch, px.
        in_channels: channels of an image.
        dim: width d of a visual token.
        bias: whether the projection has a bias (OpenAI CLIP's has none).
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = Linear(in_channels * patch_size * patch_size, dim, bias=bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """(b channels height width) -> (b (gh gw) d)."""
        size = self.patch_size
        return self.proj(rearrange(pixels, "b c (gh y) (gw x) -> b (gh gw) (c y x)", y=size, x=size))


class ConvStem(nn.Module):
    """Patches by a few 3x3 convolutions that halve the image: small Transformers learn sooner (arXiv:2106.14881).

    Args:
        patch_size: side of a patch, px; a power of 2.
        in_channels: channels of an image.
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
        self.proj = Linear(dim, dim)

    def forward(self, pixels: Tensor) -> Tensor:
        """(b channels height width) -> (b (gh gw) d)."""
        x = pixels.to(memory_format=torch.channels_last)  # The layout that CPUs and tensor cores convolve fast.
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x)))
        return self.proj(rearrange(x, "b d gh gw -> b (gh gw) d"))
