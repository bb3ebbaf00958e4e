"""PerceiverResampler: any number of visual tokens -> a fixed number of latents.

Shapes: t frames of an image, p visual tokens of a frame.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.batch.base import check_shape
from mmtransformer.connectors.base import Connector
from mmtransformer.layers.attention import Attention
from mmtransformer.layers.blocks import MLP
from mmtransformer.layers.config import Activation, check_sizes


class ResamplerBlock(nn.Module):
    """Latents look at the visual tokens and at each other in one attention, then pass an MLP (arXiv:2204.14198, 3.1.1).

    Args:
        attn: the attention.
        mlp: the MLP.
        norm: builds a norm of the latents' width.
    """

    def __init__(self, attn: Attention, mlp: nn.Module, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm_context, self.norm1, self.attn, self.norm2, self.mlp = norm(), norm(), attn, norm(), mlp

    def forward(self, latents: Tensor, visual_tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b l d) and (b p d) -> (b l d); `mask` (b 1 p+l) bool: which of both may be looked at, None = all."""
        asking = self.norm1(latents)
        asked = torch.cat((self.norm_context(visual_tokens), asking), dim=1)
        latents = latents + self.attn(asking, asked, mask=mask)
        return latents + self.mlp(self.norm2(latents))


class PerceiverResampler(Connector):
    """Learned latents that gather an image, or the frames of a video (Flamingo, arXiv:2204.14198, 3.1.1).

    The defaults are OpenFlamingo's; Idefics has 16 heads of 96 and `activation="relu"`. There are no biases.

    Args:
        dim: width of visual tokens and latents.
        depth: number of blocks.
        num_heads: attention heads.
        head_dim: width of one head.
        num_latents: latents of an image.
        mlp_dim: hidden width of the MLPs; None = 4 dim.
        activation: of the MLPs.
        qk_norm: "layer" normalises each head's queries and keys, as Idefics can; None does not.
        max_frames: most frames of an image, each with a learned time embedding; None = images have one frame.
        max_images: most images of a row, where each number has a learned embedding too; None = they have none.
        norm_eps: of all norms.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(
        self,
        dim: int,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        num_latents: int = 64,
        *,
        mlp_dim: int | None = None,
        activation: Activation = "gelu",
        qk_norm: Literal["rms", "layer"] | None = None,
        max_frames: int | None = None,
        max_images: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, depth=depth, num_heads=num_heads, head_dim=head_dim, mlp_dim=mlp_dim)
        check_sizes(num_latents=num_latents, max_frames=max_frames, max_images=max_images)
        self.visual_dim = self.dim = dim
        self.depth, self.num_heads, self.head_dim = depth, num_heads, head_dim
        self.num_latents, self.qk_norm, self.norm_eps = num_latents, qk_norm, norm_eps
        self.mlp_dim = mlp_dim = 4 * dim if mlp_dim is None else mlp_dim
        self.activation: Activation = activation
        self.max_frames, self.max_images = max_frames, max_images

        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embed = None if max_frames is None else nn.Parameter(torch.randn(max_frames, dim))
        self.image_embed = None if max_images is None else nn.Parameter(torch.randn(max_images, dim))
        self.blocks = nn.ModuleList(
            ResamplerBlock(
                Attention(dim, num_heads, head_dim=head_dim, bias=False, qk_norm=qk_norm, norm_eps=norm_eps),
                MLP(dim, mlp_dim, activation=activation, bias=False),
                lambda: nn.LayerNorm(dim, eps=norm_eps),
            )
            for _ in range(depth)
        )
        self.last_norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, visual_tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Gathers each image by itself.

        Args:
            visual_tokens: (b i p d), or with frames (b i t p d).
            mask: (b i p) bool, which of them are real, for images without frames; None = all.

        Returns:
            (b i l d), normed.

        Raises:
            ValueError: for another width or number of dimensions, more frames or images than there are embeddings
                for, or a mask of another shape.
        """
        if visual_tokens.ndim not in (4, 5) or visual_tokens.shape[-1] != self.dim:
            raise ValueError(
                f"visual tokens are (b i p {self.dim}) or (b i t p {self.dim}), not {tuple(visual_tokens.shape)}"
            )
        if visual_tokens.ndim == 4:
            check_shape(mask, "mask", visual_tokens.shape[:3], "visual tokens")
        x = visual_tokens if visual_tokens.ndim == 5 else visual_tokens.unsqueeze(2)
        b, i, t = x.shape[:3]
        if t > (self.max_frames or 1):
            raise ValueError(f"{t} frames of an image were given, but max_frames is {self.max_frames}")
        if self.max_images is not None and i > self.max_images:
            raise ValueError(f"{i} images of a row were given, but max_images is {self.max_images}")
        if self.frame_embed is not None:
            x = x + self.frame_embed[:t, None]
        if self.image_embed is not None:
            x = x + self.image_embed[:i, None, None]
        x = rearrange(x, "b i t p d -> (b i) (t p) d")
        latents = self.latents.expand(x.shape[0], -1, -1)
        seen = None if mask is None else F.pad(mask.flatten(0, 1), (0, self.num_latents), value=True)[:, None]
        for block in self.blocks:
            latents = block(latents, x, seen)
        return self.last_norm(latents).unflatten(0, (b, i))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay spares, beside biases and norms (timm's protocol)."""
        return {"latents", "frame_embed", "image_embed"}
