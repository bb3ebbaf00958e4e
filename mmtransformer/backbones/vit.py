"""ViT: pixels -> visual tokens (Dosovitskiy et al., arXiv:2010.11929).

Shapes: b images.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmtransformer.backbones.grid_rope import GridRotary, ViTRopeConfig, keep_angles
from mmtransformer.backbones.patches import ConvStem, PatchEmbed, ViTPatchConfig
from mmtransformer.backbones.vit_blocks import DistilledHead, ViTBlockConfig, ViTOutputConfig, make_block
from mmtransformer.images import ImageTransform
from mmtransformer.layers.blocks import AttentionPool
from mmtransformer.layers.config import check_configs, check_sizes
from mmtransformer.layers.linear import Linear, trunc_normal_
from mmtransformer.layers.masks import Mask, keep_tokens, kept_tokens
from mmtransformer.layers.positions import RotaryAngles, resize_positions, sinusoidal_2d
from mmtransformer.serialization.pretrained import Pretrained

# The paper's sizes (arXiv:2010.11929, table 1); tiny and small from DeiT (arXiv:2012.12877).
_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 192, "depth": 12, "num_heads": 3},
    "small": {"dim": 384, "depth": 12, "num_heads": 6},
    "base": {"dim": 768, "depth": 12, "num_heads": 12},
    "large": {"dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
}


class ViT(Pretrained, nn.Module):
    """A Vision Transformer: pre-norm encoder blocks over patches, for images of any size.

    The table of positions is made for `image_size` and is resized at run time to the image's own grid. Positions
    belong to patches only; imported class tokens have theirs added in.

    Args:
        image_size: (height, width) of the images that positions are learned for, px; one number = square.
        patch_size: side of a patch, px.
        dim: width d of a visual token.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_dim: hidden width of the MLPs; None = 4 dim.
        class_token: whether a class token stands first.
        num_registers: register tokens after it (arXiv:2309.16588).
        pool: what `forward` returns of an image: its class token, the mean of its patches, attention to them, or
            "distilled", the mean of the class and the distillation token (the first register; DeiT, arXiv:2012.12877).
        num_classes: classes of the linear head; 0 = none.
        patches: how patches are made of pixels.
        block: what the blocks are made of.
        rope: how blocks turn queries and keys of patches (EVA-02, DINOv3); not at all in the paper.
        output: what stands behind the blocks: the last norm, attention pooling.
        transform: how pictures become its pixels, as of a public tower; saved with it; None = it does not say.

    Raises:
        ValueError: if sizes do not divide, or the class token is pooled where there is none.
    """

    presets = _PRESETS

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        mlp_dim: int | None = None,
        class_token: bool = True,
        num_registers: int = 0,
        pool: Literal["class", "mean", "attention", "distilled"] = "class",
        num_classes: int = 0,
        patches: ViTPatchConfig = ViTPatchConfig(),
        block: ViTBlockConfig = ViTBlockConfig(),
        rope: ViTRopeConfig = ViTRopeConfig(),
        output: ViTOutputConfig = ViTOutputConfig(),
        transform: ImageTransform | None = None,
    ) -> None:
        super().__init__()
        height, width = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
        check_sizes(image_size=height, patch_size=patch_size, dim=dim, num_heads=num_heads, mlp_dim=mlp_dim)
        check_sizes(image_size=width)
        check_sizes(0, depth=depth, num_registers=num_registers, num_classes=num_classes)
        check_configs(patches=(patches, ViTPatchConfig), block=(block, ViTBlockConfig), rope=(rope, ViTRopeConfig),
                      output=(output, ViTOutputConfig))  # fmt: skip
        if transform is not None:
            check_configs(transform=(transform, ImageTransform))
        if height % patch_size or width % patch_size:
            raise ValueError(f"image_size ({height} x {width}) must be divisible by patch_size ({patch_size})")
        if pool not in ("class", "mean", "attention", "distilled"):
            raise ValueError(f'pool must be "class", "mean", "attention" or "distilled", not "{pool}"')
        if pool == "class" and not class_token:
            raise ValueError('pool="class" needs class_token=True; without one, pool "mean" or "attention"')
        if pool == "distilled" and not (class_token and num_registers):
            raise ValueError('pool="distilled" reads a class token and the first register: it needs both')
        self.image_size, self.patch_size = (height, width), patch_size
        self.dim, self.depth, self.num_heads = dim, depth, num_heads
        self.mlp_dim = mlp_dim = 4 * dim if mlp_dim is None else mlp_dim
        self.class_token, self.num_registers = class_token, num_registers
        self.pool, self.num_classes, self.patches, self.block = pool, num_classes, patches, block
        self.rope, self.output = rope, output
        self.num_prefix_tokens = int(class_token) + num_registers
        self.grid_size = (height // patch_size, width // patch_size)
        self.table_grid = patches.pos_embed.grid or self.grid_size
        self.grad_checkpointing = False
        self.transform = transform

        norm = partial(block.make_norm, dim)
        self.patch_embed = (
            PatchEmbed(patch_size, patches.in_channels, dim, bias=patches.bias)
            if patches.stem == "patch"
            else ConvStem(patch_size, patches.in_channels, dim)
        )
        self.prefix_tokens = (
            nn.Parameter(torch.zeros(1, self.num_prefix_tokens, dim)) if self.num_prefix_tokens else None
        )
        table = patches.positions != "none"
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.table_grid), dim)) if table else None
        turns = rope.kind != "none"
        self.rotary = GridRotary(dim // num_heads, num_heads, depth, rope) if turns else None
        self.embed_norm = norm() if patches.embed_norm else nn.Identity()
        self.first_norm = norm() if patches.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            make_block(dim, num_heads, mlp_dim, block, block.drop_path * i / max(depth - 1, 1)) for i in range(depth)
        )
        self.norm = norm() if output.norm == "tokens" else nn.Identity()
        self.pool_norm = norm() if output.norm == "pooled" else nn.Identity()
        pool_activation = "gelu" if block.activation == "swiglu" else block.activation
        self.attn_pool = None
        if pool == "attention":
            heads, width = output.pool_heads or num_heads, output.pool_mlp_dim or mlp_dim
            self.attn_pool = AttentionPool(dim, heads, width, activation=pool_activation, eps=block.norm_eps)
        self.head = self._new_head(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Positions, prefix tokens and linear weights ~ N(0, 0.02) cut at +-2, biases 0 (as DeiT and timm).

        A convolutional stem keeps torch's larger values: its patches would drown in their positions.
        """
        for parameter in (self.pos_embed, self.prefix_tokens):
            if parameter is not None:
                trunc_normal_(parameter, 0.02)
        if self.patches.positions == "sinusoidal":
            assert self.pos_embed is not None
            self.pos_embed.data.copy_(0.5 * sinusoidal_2d(self.table_grid, self.dim))  # As large as fresh patches are.
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not (self.patches.stem == "conv" and name.startswith("patch_embed")):
                trunc_normal_(module.weight, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def num_features(self) -> int:
        """Width of a visual token, by timm's name."""
        return self.dim

    embed_dim = num_features

    def get_classifier(self) -> nn.Module:
        """The head, by timm's name."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for so many classes, 0 = none; its weights are drawn as those of a new model are.

        Raises:
            ValueError: if there are fewer than 0 classes.
        """
        check_sizes(0, num_classes=num_classes)
        head = self._new_head(num_classes)
        for linear in head.modules():
            if isinstance(linear, nn.Linear):
                trunc_normal_(linear.weight, 0.02)
                nn.init.zeros_(linear.bias)
        weight = next(self.patch_embed.parameters())
        self.head, self.num_classes = head.to(weight.device, weight.dtype).train(self.training), num_classes

    def _new_head(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        return (DistilledHead if self.pool == "distilled" else Linear)(self.dim, num_classes)

    def dynamic_feat_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of height x width px.

        Raises:
            ValueError: if the patches do not cover it exactly.
        """
        if height % self.patch_size or width % self.patch_size:
            size = self.patch_size
            near = f"{max(1, round(height / size)) * size} x {max(1, round(width / size)) * size}"
            raise ValueError(
                f"an image of {height} x {width} px is not divisible into {size} px patches: give {near} px"
            )
        return height // self.patch_size, width // self.patch_size

    @property
    def dtype(self) -> torch.dtype:
        """What the blocks' weights are kept in."""
        return next(self.patch_embed.parameters()).dtype

    def embed(self, pixels: Tensor) -> tuple[Tensor, Sequence[RotaryAngles | None]]:
        """What the first block reads, prefix tokens and patches (b p d), and each block's angles.

        Args:
            pixels: (b channels height width).
        """
        if not isinstance(pixels, Tensor):
            raise ValueError(f"pixels are a tensor, as ImageTransform makes it, not {type(pixels).__name__}")
        if pixels.ndim != 4 or pixels.shape[1] != self.patches.in_channels:
            raise ValueError(f"pixels are (b {self.patches.in_channels} height width), not {tuple(pixels.shape)}")
        if not pixels.is_floating_point():
            raise ValueError(f"pixels are floats, as ImageTransform makes them, not whole numbers ({pixels.dtype})")
        grid, prefix = self.dynamic_feat_size(*pixels.shape[2:]), self.num_prefix_tokens
        x = self.embed_norm(self.patch_embed(pixels.to(self.dtype)))
        ropes = [None] * self.depth if self.rotary is None else self.rotary(grid, prefix, x.device)
        if self.pos_embed is not None:
            table = self.pos_embed
            if grid != self.table_grid:
                table = resize_positions(table, self.table_grid, grid, self.patches.pos_embed)
            x = x + table.to(x.dtype)
        if self.training and self.patches.patch_dropout:
            kept = kept_tokens(x, self.patches.patch_dropout)
            x, ropes = keep_tokens(x, kept), [r and keep_angles(r, kept, prefix) for r in ropes]
        if self.prefix_tokens is not None:
            x = torch.cat((self.prefix_tokens.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)
        return self.first_norm(x), ropes

    def forward_features(self, pixels: Tensor) -> Tensor:
        """All visual tokens after the last norm, prefix tokens first: (b channels height width) -> (b p d)."""
        x, ropes = self.embed(pixels)
        for block, rope in zip(self.blocks, ropes, strict=True):
            x = self.forward_block(block, x, rope)
        return self.forward_norm(x)

    def forward_block(self, block: nn.Module, x: Tensor, rope: RotaryAngles | None, mask: Mask | None = None) -> Tensor:
        """A block's tokens (b p d), computed again in the backward pass where that was asked for."""
        if self.grad_checkpointing and self.training:
            return checkpoint(block, x, mask=mask, rope=rope, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return block(x, mask=mask, rope=rope)

    def forward_norm(self, x: Tensor) -> Tensor:
        """The last norm, which may learn in float32 behind blocks that are kept in bfloat16."""
        own = next((parameter.dtype for parameter in self.norm.parameters()), self.dtype)
        return self.norm(x if own == self.dtype else x.to(own))

    def tokens_after(self, pixels: Tensor, blocks: Sequence[int], *, norm: bool = False) -> list[Tensor]:
        """Visual tokens after the named blocks (negative = from the end), each (b p d); normed where asked for.

        Raises:
            ValueError: if there is no such block.
        """
        (x, ropes), wanted, found = self.embed(pixels), self._numbered(blocks), {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = self.forward_block(block, x, ropes[i])
            if i in wanted:
                found[i] = self.forward_norm(x) if norm else x
        return [found[i] for i in wanted]

    def _numbered(self, blocks: Sequence[int]) -> list[int]:
        wanted = [i + self.depth if i < 0 else i for i in blocks]
        if not wanted or any(not 0 <= i < self.depth for i in wanted):
            last = self.depth - 1
            raise ValueError(f"blocks {list(blocks)} were asked for, but there are {self.depth}: 0 to {last}")
        return wanted

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What blocks give, as timm's method of this name: the last tokens (b p d), and the patches after each block.

        Args:
            x: pixels (b channels height width).
            indices: the last so many blocks, or the blocks by number (negative = from the end); None = all. What they
                give comes in the order of the blocks.
            return_prefix_tokens: whether each is a pair, patches and prefix tokens (b prefix d), where there are any.
            norm: whether the last norm is put on each.
            stop_early: leaves out the blocks behind the last named one, where `intermediates_only`.
            output_fmt: patches as a grid (b d rows columns), or as tokens (b rows*columns d).
            intermediates_only: leaves out the last tokens.

        Raises:
            ValueError: if there is no such block, or no grid as patches were dropped.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f'output_fmt must be "NCHW" or "NLC", not "{output_fmt}"')
        if output_fmt == "NCHW" and self.training and self.patches.patch_dropout:
            raise ValueError("patches are dropped in training, which leaves no grid: output_fmt NLC, or eval()")
        if isinstance(indices, int) and not 0 < indices <= self.depth:
            raise ValueError(f"the last {indices} blocks were asked for, but there are {self.depth}")
        count = self.depth if indices is None else indices
        wanted = sorted(set(self._numbered(range(-count, 0) if isinstance(count, int) else count)))
        ends = intermediates_only and stop_early
        tokens = self.tokens_after(x, wanted if ends else [*wanted, self.depth - 1])
        final, found = tokens[-1], [self.forward_norm(y) if norm else y for y in tokens[: len(wanted)]]
        prefix = [y[:, : self.num_prefix_tokens] for y in found]
        found = [y[:, self.num_prefix_tokens :] for y in found]
        if output_fmt == "NCHW":
            found = [y.mT.unflatten(2, self.dynamic_feat_size(*x.shape[2:])).contiguous() for y in found]
        given = list(zip(found, prefix, strict=True)) if return_prefix_tokens and self.num_prefix_tokens else found
        return given if intermediates_only else (self.forward_norm(final), given)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """The patches after the last n blocks, or the named ones, as timm's method of this name (DINO's).

        Args:
            x: pixels (b channels height width).
            n: the last so many blocks, or the blocks by number.
            reshape: whether patches are a grid (b d rows columns) in place of tokens (b rows*columns d).
            return_prefix_tokens: see `forward_intermediates`.
            norm: whether the last norm is put on each.

        Raises:
            ValueError: as `forward_intermediates`.
        """
        fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, output_fmt=fmt, intermediates_only=True)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools visual tokens and classifies: (b p d) -> (b num_classes), or (b d) with `pre_logits` or no classes."""
        patches = x[:, self.num_prefix_tokens :]
        if self.attn_pool is not None:
            pooled = self.attn_pool(x if self.output.pool_prefix else patches)[:, 0]
        else:
            pooled = {"class": x[:, :1], "distilled": x[:, :2]}.get(self.pool, patches).mean(1)
        pooled = self.pool_norm(pooled)
        if pre_logits:
            return pooled
        return self.head(x[:, :2] if isinstance(self.head, DistilledHead) else pooled)

    def forward(self, pixels: Tensor) -> Tensor:
        """Class logits, or the pooled feature where there are none: (b channels height width) -> (b classes | d)."""
        return self.forward_head(self.forward_features(pixels))

    def set_input_size(self, image_size: tuple[int, int] | int) -> None:
        """Makes the table of positions one for another image size, so that no resizing happens at run time.

        A table with a grid of its own (`ViTPosEmbedConfig`) stays as it is.
        """
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        grid = self.dynamic_feat_size(height, width)
        if self.pos_embed is not None and self.patches.pos_embed.grid is None:
            table = resize_positions(self.pos_embed.data, self.table_grid, grid, self.patches.pos_embed)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
            self.table_grid = grid
        self.image_size, self.grid_size = (height, width), grid
        if self.transform is not None:
            self.transform = replace(self.transform, image_size=height if height == width else (height, width))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes blocks again in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay spares, beside biases and norms (timm's protocol)."""
        learned = {"rotary.freqs"} if self.rope.kind == "mixed" else set()
        return {"pos_embed", "prefix_tokens", "attn_pool.queries"} | learned

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by name, for layer-wise learning rates (timm's protocol)."""
        stem = r"^(?:prefix_tokens|pos_embed|rotary|patch_embed|embed_norm|first_norm)"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^(?:pool_)?norm", (99999,))]}
