"""DiT: a ViT that removes noise from images, steered by a time, a class and, through cross-attention, by a text.

DiT is of arXiv:2212.09748; cross-attention to text and one modulation for all blocks of PixArt, arXiv:2310.00426.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.backbones.patch_convs import PatchConvs
from mmtransformer.layers.attention import Attention
from mmtransformer.layers.blocks import MLP
from mmtransformer.layers.cache import KeyValue
from mmtransformer.layers.linear import Linear
from mmtransformer.serialization.pretrained import Pretrained

Modulation = Literal["shared", "block"]

NUM_FREQUENCIES = 128
"""Waves by which a time is told (DiT's 256 channels: a sine and a cosine each)."""


class TextContext(NamedTuple):
    """A text as the transformer reads it: made once a text, not once a step of sampling.

    Attributes:
        keys: each block's keys and values.
        pooled: (b d) what the whole text adds to the time; None = nothing.
    """

    keys: list[KeyValue]
    pooled: Tensor | None = None

    def select(self, rows: Tensor) -> "TextContext":
        """Returns the given rows, in their order; `rows` is (b) long."""
        pooled = None if self.pooled is None else self.pooled.index_select(0, rows)
        return TextContext([kv.select(rows) for kv in self.keys], pooled)


class TimeEmbedding(nn.Module):
    """A time in [0, 1], 0 = clean image and 1 = noise, as a vector (arXiv:2212.09748, section 3.1).

    Args:
        dim: width d.
        last: the longest wave is 2 pi 10,000 ** ((NUM_FREQUENCIES - 1) / last) thousandths: DiT divides by
            NUM_FREQUENCIES - 1, PixArt by NUM_FREQUENCIES.
    """

    def __init__(self, dim: int, last: int = NUM_FREQUENCIES) -> None:
        super().__init__()
        self.last = last
        self.fc1, self.fc2 = Linear(2 * NUM_FREQUENCIES, dim), Linear(dim, dim)

    def forward(self, times: Tensor) -> Tensor:
        """(b) -> (b d)."""
        kind = self.fc1.weight.dtype
        fine = torch.promote_types(kind, torch.float32)
        steps = torch.arange(NUM_FREQUENCIES, device=times.device, dtype=fine)
        angles = (1000 * times)[:, None].to(fine) * torch.exp(-math.log(10_000.0) * steps / self.last)
        waves = torch.cat((angles.cos(), angles.sin()), dim=1).to(kind)
        return self.fc2(F.silu(self.fc1(waves)))


class OwnModulation(nn.Module):
    """DiT's adaptive norm: each block reads its shifts, scales and gates from the condition by a layer of its own."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.proj = Linear(dim, count * dim)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """(b d) -> `count` tensors (b 1 d)."""
        return self.proj(F.silu(condition))[:, None].chunk(self.count, dim=-1)


class TableModulation(nn.Module):
    """PixArt's adaptive norm: what all blocks share, plus a learned row a block (arXiv:2310.00426, section 2.3)."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(count, dim))

    def forward(self, shared: Tensor) -> tuple[Tensor, ...]:
        """(b count d), or one row (b 1 d) for all, -> `count` tensors (b 1 d)."""
        return (self.table + shared).split(1, dim=1)


class DiffusionBlock(nn.Module):
    """Self-attention, cross-attention to the text where there is one, and an MLP, steered by the time.

    Args:
        dim: width of a token.
        attn: the self-attention.
        mlp: the MLP.
        modulation: gives shift, scale and gate of both branches.
        cross_attn: attention to the text; None = steered by time and class only.
        norm_eps: of the MLP's norm.
    """

    def __init__(
        self,
        dim: int,
        attn: Attention,
        mlp: MLP,
        modulation: nn.Module,
        *,
        cross_attn: Attention | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.modulation = modulation
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.attn, self.cross_attn, self.mlp = attn, cross_attn, mlp

    def forward(
        self, x: Tensor, steer: Tensor, context: KeyValue | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """(b q d) -> (b q d); `steer` is what `modulation` reads, `context_mask` (b 1 k) bool."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(steer)
        x = x + gate * self.attn(torch.addcmul(shift, self.norm1(x), 1 + scale))
        if self.cross_attn is not None:
            x = x + self.cross_attn(x, context, mask=context_mask)
        return x + mlp_gate * self.mlp(torch.addcmul(mlp_shift, self.norm2(x), 1 + mlp_scale))


class DiffusionTransformer(Pretrained, nn.Module):
    """What an image without its noise (or the noise, or the velocity) looks like, from the noisy one.

    At first each block is the identity and the result is zero (adaLN-Zero): the last layer of every branch's gate, of
    cross-attention and of the head begins at zero.

    Args:
        patch_size: side of a patch in pixels, or in an autoencoder's latents. Large patches of pixels do where the
            clean image is predicted ("Just image Transformers", arXiv:2511.13720).
        in_channels: channels of the image.
        dim: width d of a token; divisible by 4 for the positions.
        depth: number of blocks.
        num_heads: heads of both attentions.
        mlp_dim: width inside the MLP; None = 4 dim.
        out_channels: channels of the result; None = in_channels (DiT's older ones learn a variance too: twice as many).
        context_dim: width of the text's tokens; None = no cross-attention.
        num_classes: classes that an image can be asked for; one more stands for "any". 0 = none.
        modulation: "shared", PixArt's table, or "block", DiT's layer a block (a third of all parameters).
        bottleneck_dim: width that a patch is first brought down to, for patches of many pixels; None = none.
        base_grid: patches a side that positions are counted in, so that larger images have finer steps; None = in
            patches, whatever the size.
        pooled_context: add the mean of the text's tokens to the time, so that adaptive norms know what the image is of
            (arXiv:2403.03206, section 4, does so with CLIP's pooled texts).
        qk_norm: "rms" or "layer" normalises each head's queries and keys in both attentions (arXiv:2403.03206, section
            5.3.2; arXiv:2511.13720); None does not, as DiT and PixArt.
        conv_width: channels of convolutions before and behind the blocks, and past them (`PatchConvs`): small models
            learn from fewer images what hangs together; None = linear patches.

    Raises:
        ValueError: if the numbers do not divide.
    """

    def __init__(
        self,
        patch_size: int = 8,
        in_channels: int = 3,
        dim: int = 384,
        depth: int = 8,
        num_heads: int = 6,
        *,
        mlp_dim: int | None = None,
        out_channels: int | None = None,
        context_dim: int | None = None,
        num_classes: int = 0,
        modulation: Modulation = "shared",
        bottleneck_dim: int | None = None,
        base_grid: int | None = None,
        pooled_context: bool = False,
        qk_norm: Literal["rms", "layer"] | None = None,
        conv_width: int | None = None,
    ) -> None:
        super().__init__()
        if pooled_context and context_dim is None:
            raise ValueError("pooled_context=True pools the text's tokens: it needs context_dim")
        if modulation not in ("shared", "block"):
            raise ValueError(f'modulation must be "shared" or "block", not "{modulation}"')
        if dim % 4:
            raise ValueError(f"dim ({dim}) must be divisible by 4 for the positions of a grid")
        self.patch_size, self.in_channels, self.dim, self.depth = patch_size, in_channels, dim, depth
        self.num_heads, self.mlp_dim = num_heads, 4 * dim if mlp_dim is None else mlp_dim
        self.out_channels = in_channels if out_channels is None else out_channels
        self.context_dim, self.num_classes, self.modulation = context_dim, num_classes, modulation
        self.bottleneck_dim, self.base_grid = bottleneck_dim, base_grid
        self.pooled_context, self.qk_norm, self.conv_width = pooled_context, qk_norm, conv_width

        shared, pixels = modulation == "shared", in_channels * patch_size**2
        kind = TableModulation if shared else OwnModulation
        self.convs = None
        if conv_width is not None:
            if bottleneck_dim is not None:
                raise ValueError("bottleneck_dim is for linear patches: leave it out with conv_width")
            self.convs = PatchConvs(in_channels, self.out_channels, dim, patch_size, conv_width)
        self.patch_embed = (
            None
            if conv_width is not None
            else Linear(pixels, dim)
            if bottleneck_dim is None
            else nn.Sequential(Linear(pixels, bottleneck_dim, bias=False), Linear(bottleneck_dim, dim))
        )
        self.time_embed = TimeEmbedding(dim, NUM_FREQUENCIES if shared else NUM_FREQUENCIES - 1)
        self.class_embed = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.shared_modulation = OwnModulation(dim, 6) if shared else None
        self.context_proj = None if context_dim is None else MLP(context_dim, dim, activation="gelu_tanh")
        if self.context_proj is not None:
            self.context_proj.fc2 = Linear(dim, dim)
        self.pool_proj = Linear(dim, dim) if pooled_context else None
        self.blocks = nn.ModuleList(
            DiffusionBlock(
                dim,
                Attention(dim, num_heads, qk_norm=qk_norm),
                MLP(dim, self.mlp_dim, activation="gelu_tanh"),
                kind(dim, 6),
                cross_attn=None if context_dim is None else Attention(dim, num_heads, qk_norm=qk_norm),
                norm_eps=1e-6 if shared else 1e-5,
            )
            for _ in range(depth)
        )
        self.last_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.last_modulation = kind(dim, 2)
        self.head = None if conv_width is not None else Linear(dim, self.out_channels * patch_size**2)
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier for linear layers (DiT, appendix A), N(0, 0.02) for embeddings; zero as the class says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for layer in (self.time_embed.fc1, self.time_embed.fc2):
            nn.init.normal_(layer.weight, std=0.02)
        zero = [module.proj for module in self.modules() if isinstance(module, OwnModulation)]
        crossing = [block.cross_attn for block in self.blocks]
        zero += [attn.out_proj for attn in crossing if isinstance(attn, Attention)]
        for layer in [*zero, *([] if self.head is None else [self.head])]:
            nn.init.zeros_(layer.weight)
        if self.convs is not None:
            self.convs.init_weights()

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed: the tables of modulations, and classes."""
        return {n for n, _ in self.named_parameters() if n.endswith(".table") or n.startswith("class_embed")}

    def project_context(self, context: Tensor, context_mask: Tensor | None = None) -> TextContext:
        """A text (b k context_dim) as the blocks read it: once a text, not once a step of sampling.

        `context_mask` (b k) bool, True = a real token, matters with `pooled_context` only: a text without real tokens
        adds nothing.
        """
        if self.context_proj is None:
            raise ValueError("a text was given to a transformer that reads none: build it with context_dim")
        tokens, pooled = self.context_proj(context), None
        if self.pool_proj is not None:
            real = tokens.new_ones(tokens.shape[:2]) if context_mask is None else context_mask.to(tokens.dtype)
            mean = (real[..., None] * tokens).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
            pooled = self.pool_proj(mean) * real.amax(1, keepdim=True)
        layers = (block.cross_attn for block in self.blocks)
        return TextContext([layer.project_kv(tokens) for layer in layers if isinstance(layer, Attention)], pooled)

    def forward(
        self,
        images: Tensor,
        times: Tensor,
        context: Tensor | TextContext | None = None,
        *,
        context_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """What the network predicts of noisy images.

        Args:
            images: (b c height width), any size that the patch divides.
            times: (b) in [0, 1]; 0 = clean, 1 = noise.
            context: the text's tokens (b k context_dim), or their `project_context`.
            context_mask: (b k) bool, True = a real token; None = all are.
            labels: (b) long, the class; `num_classes` = any, which None means too.

        Returns:
            (b out_channels height width).

        Raises:
            ValueError: if the patch does not divide the image, or the text is missing.
        """
        height, width = images.shape[-2:]
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(f"images of {height} x {width} are not divided by the patch of {p}")
        if (context is None) != (self.context_dim is None):
            raise ValueError("a text is needed exactly where the transformer has cross-attention (context_dim)")
        text = self.project_context(context, context_mask) if isinstance(context, Tensor) else context
        mask = None if context_mask is None else context_mask[:, None]

        condition = self.time_embed(times)
        if self.class_embed is not None:
            anything = torch.full_like(times, self.num_classes, dtype=torch.long)
            condition = condition + self.class_embed(anything if labels is None else labels)
        if text is not None and text.pooled is not None:
            condition = condition + text.pooled
        steer = condition
        if self.shared_modulation is not None:
            steer = torch.cat(self.shared_modulation(condition), dim=1)

        skips: list[Tensor] = []
        if self.convs is not None:
            x, skips = self.convs.encode(images)
        else:
            assert self.patch_embed is not None
            x = self.patch_embed(rearrange(images, "b c (y p) (x q) -> b (y x) (c p q)", p=p, q=p))
        x = x + grid_positions((height // p, width // p), self.dim, self.base_grid).to(x)
        for i, block in enumerate(self.blocks):
            x = block(x, steer, None if text is None else text.keys[i], mask)
        last = condition if self.shared_modulation is None else condition[:, None]
        shift, scale = self.last_modulation(last)
        x = torch.addcmul(shift, self.last_norm(x), 1 + scale)
        if self.convs is not None:
            return self.convs.decode(x, skips, condition)
        assert self.head is not None
        return rearrange(self.head(x), "b (y x) (p q c) -> b c (y p) (x q)", y=height // p, p=p, q=p)


def grid_positions(grid: tuple[int, int], dim: int, base: int | None = None) -> Tensor:
    """Sines and cosines of a grid's columns, then of its rows, as DiT lays them: (height * width, d) float64.

    Args:
        grid: rows and columns of patches.
        dim: width d; divisible by 4.
        base: how many steps a side has, whatever the grid; None = one a patch.
    """
    rates = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    height, width = (torch.arange(side, dtype=torch.float64) * (1 if base is None else base / side) for side in grid)
    rows, columns = (
        torch.cat((angles.sin(), angles.cos()), dim=1) for angles in (height[:, None] * rates, width[:, None] * rates)
    )
    both = torch.cat((columns[None].expand(grid[0], -1, -1), rows[:, None].expand(-1, grid[1], -1)), dim=-1)
    return both.flatten(0, 1)
