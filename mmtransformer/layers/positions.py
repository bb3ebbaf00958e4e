"""Where a token stands: sinusoidal (1-D and 2-D), learned (resized to any grid) and rotary positions.

Shapes: a grid is (height, width) in patches.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.layers.config import known_fields


def sinusoidal(positions: Tensor, dim: int, *, theta: float = 10_000.0) -> Tensor:
    """Sines and cosines of the positions (arXiv:1706.03762, section 3.5): even channels sine, odd ones cosine.

    Args:
        positions: any shape, in tokens.
        dim: width d; even.
        theta: the longest wave is 2 pi theta tokens.

    Returns:
        (... d) float32.
    """
    if dim % 2:
        raise ValueError(f"dim ({dim}) must be even for sinusoidal positions")
    rates = torch.exp(torch.arange(0, dim, 2, device=positions.device) * (-math.log(theta) / dim))
    angles = positions[..., None].float() * rates
    return rearrange(torch.stack((angles.sin(), angles.cos()), dim=-1), "... r two -> ... (r two)")


def sinusoidal_2d(grid: tuple[int, int], dim: int, *, theta: float = 10_000.0) -> Tensor:
    """Positions of a grid's patches, row by row: the first half of the channels says the row, the second the column.

    Returns:
        (height * width, d) float32.
    """
    if dim % 4:
        raise ValueError(f"dim ({dim}) must be divisible by 4 for 2-D sinusoidal positions")
    height, width = grid
    rows = sinusoidal(torch.arange(height), dim // 2, theta=theta)
    columns = sinusoidal(torch.arange(width), dim // 2, theta=theta)
    both = torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=-1)
    return rearrange(both, "h w d -> (h w) d")


@known_fields
@dataclass(frozen=True)
class ViTPosEmbedConfig:
    """How learned 2-D positions meet the grids of images; by default as in timm's Vision Transformers.

    Args:
        grid: rows and columns of the table, where images of every size are to be met from one (NaFlexViT: 16 x 16,
            arXiv:2502.14786, section 2.4.2); None = those of the images that a tower was made for.
        interpolation: "bicubic" or "bilinear".
        antialias: whether to smooth where the new grid is smaller (DINOv2 in transformers does not).
        align_corners: whether the corners of both grids are one place (C-RADIOv3).
        square: resize to a square of the longer side, and leave out what lies beyond the image: positions keep the
            image's shape (C-RADIO).

    Raises:
        ValueError: for another interpolation, or a grid that is none.
    """

    grid: tuple[int, int] | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = True
    align_corners: bool = False
    square: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.grid, list):  # YAML has lists only
            object.__setattr__(self, "grid", tuple(self.grid))
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f'interpolation must be "bicubic" or "bilinear", not "{self.interpolation}"')
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise ValueError(f"grid must be two positive numbers, not {self.grid}")


def resize_positions(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], config: ViTPosEmbedConfig = ViTPosEmbedConfig()
) -> Tensor:
    """Resizes learned 2-D positions to another grid, in float32.

    Args:
        table: (1, height * width, d) for the old grid.
        old: grid that the table was made for.
        new: grid wanted.
        config: how.

    Returns:
        (1, new height * new width, d) in the table's dtype; the table itself where the grid is the same.
    """
    if old == new:
        return table
    if table.shape[1] != old[0] * old[1]:
        raise ValueError(f"a table of {table.shape[1]} positions is not a grid of {old[0]} x {old[1]}")
    image = rearrange(table.float(), "one (h w) d -> one d h w", h=old[0])
    size = (max(new), max(new)) if config.square else new
    image = F.interpolate(
        image, size=size, mode=config.interpolation, antialias=config.antialias, align_corners=config.align_corners
    )
    return rearrange(image[:, :, : new[0], : new[1]], "one d h w -> one (h w) d").to(table.dtype)


def document_positions(document_ids: Tensor) -> Tensor:
    """Each token's position in its own document of a packed row, from 0: (b q) long -> (b q) long."""
    steps = torch.arange(document_ids.shape[1], device=document_ids.device)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return steps - torch.where(begins, steps, 0).cummax(1).values


class RotaryAngles(NamedTuple):
    """Rotary angles of one pass (RoFormer, arXiv:2104.09864): cos and sin, (q c), (b q c) or (b h q c), float32.

    Rotates the pairs (i, i + c/2), as Llama's "rotate half" does.
    """

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Turns queries or keys (b h q c) by their positions."""
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        if cos.ndim == 3:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin


class RotaryEmbedding(nn.Module):
    """Rotary positions (RoFormer, arXiv:2104.09864); the angles of a pass are computed once and handed down.

    Where rates depend on the length ("longrope"), each row takes those of its own: no row depends on those beside it.
    Packed documents share their row's.

    Args:
        head_dim: width c of one head; even.
        theta: base of the wave lengths: 10,000 in Llama 1 and 2, 500,000 in Llama 3.
        scaling: how longer contexts than trained on are reached, see `scaled_rates`.
    """

    inv_freq: Tensor
    long_freq: Tensor | None

    def __init__(self, head_dim: int, *, theta: float = 10_000.0, scaling: dict | None = None) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim ({head_dim}) must be even for rotary positions")
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling
        rates, self.gain, long = scaled_rates(head_dim, theta, scaling)
        self.old_len = 0 if long is None or scaling is None else scaling["original_max_position_embeddings"]
        self.register_buffer("inv_freq", rates, persistent=False)
        self.register_buffer("long_freq", long, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._compute(self.inv_freq.device)
        return self

    def _compute(self, device: torch.device) -> None:
        """Rates anew, in float32: a state dict does not hold them, and `to_empty` leaves them undefined.

        In bfloat16 a rate has 8 bits: at position 1000 the angle would be off by whole turns.
        """
        with torch.device("cpu"):
            rates, _, long = scaled_rates(self.head_dim, self.theta, self.scaling)
        self.inv_freq = rates.to(device)
        self.long_freq = None if long is None else long.to(device)

    def forward(self, position_ids: Tensor) -> RotaryAngles:
        """Angles for position ids (q) or (b q), in tokens."""
        if self.inv_freq.is_meta and not position_ids.is_meta:  # filled by load_state_dict(assign=True)
            self._compute(position_ids.device)
        rates = self.inv_freq
        if self.long_freq is not None:
            is_long = position_ids.amax(-1, keepdim=True)[..., None] >= self.old_len
            rates = torch.where(is_long, self.long_freq, rates)
        angles = position_ids[..., None].float() * rates
        angles = torch.cat((angles, angles), dim=-1)
        return RotaryAngles(angles.cos() * self.gain, angles.sin() * self.gain)


def scaled_rates(
    head_dim: int, theta: float = 10_000.0, scaling: dict | None = None
) -> tuple[Tensor, float, Tensor | None]:
    """How fast each pair of channels turns, after scaling for longer contexts than trained on.

    Args:
        head_dim: width c of one head.
        theta: base of the wave lengths.
        scaling: None, or a dictionary as hub configs spell it, with `rope_type` and its numbers: "linear"
            (arXiv:2306.15595), "llama3" (arXiv:2407.21783), "yarn" (arXiv:2309.00071), "longrope" (arXiv:2402.13753),
            "proportional" (Gemma: only the first share of a head's pairs turns) or "dynamic", which changes nothing
            up to the length that the model was trained on.

    Returns:
        The rates (c/2) in radians a token, what cosines and sines are multiplied by, and the rates of passes that are
        longer than the trained length, where they are others ("longrope").

    Raises:
        ValueError: for an unknown type, or one that lacks a number.
    """
    steps = torch.arange(0, head_dim, 2).float() / head_dim
    rates = 1.0 / theta**steps
    kind = "default" if scaling is None else scaling.get("rope_type", scaling.get("type", "default"))
    if scaling is None or kind in ("default", "dynamic"):
        return rates, 1.0, None
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor", "original_max_position_embeddings"),
        "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
        "proportional": (),
    }
    if kind not in needed:
        raise ValueError(f'unknown rope_type "{kind}": known are default, dynamic, {", ".join(needed)}')
    if missing := [name for name in needed[kind] if scaling.get(name) is None]:
        raise ValueError(f'rope scaling of type "{kind}" needs {", ".join(missing)}')
    factor = scaling.get("factor", 1.0)
    if kind == "linear":
        return rates / factor, 1.0, None
    if kind == "proportional":
        turning = int(scaling.get("partial_rotary_factor", 1.0) * head_dim // 2)
        return rates * (torch.arange(head_dim // 2) < turning) / factor, 1.0, None
    old = scaling["original_max_position_embeddings"]
    if kind == "longrope":
        gain = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))
        short, long = (torch.tensor(scaling[f"{name}_factor"]).float() for name in ("short", "long"))
        if not len(short) == len(long) == len(rates):
            raise ValueError(f"short_factor ({len(short)}) and long_factor ({len(long)}) need {len(rates)} numbers")
        return rates / short, scaling.get("attention_factor") or gain, rates / long
    if kind == "llama3":
        # Waves longer than the trained context are slowed by `factor`, short ones are kept, the rest is blended.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = old * rates / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * rates + (1 - kept) * rates / factor, 1.0, None
    # YaRN: pairs that turn often in the trained context are kept, those that hardly turn are slowed by `factor`.
    fast, slow = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
    ends = [head_dim * math.log(old / (2 * math.pi * n)) / (2 * math.log(theta)) for n in (fast, slow)]
    if scaling.get("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], head_dim - 1)
    slowed = ((torch.arange(head_dim // 2) - first) / max(last - first, 0.001)).clamp(0, 1)
    return slowed * rates / factor + (1 - slowed) * rates, _yarn_gain(scaling), None


def _yarn_gain(scaling: dict) -> float:
    def gain(scale: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * scale * math.log(scaling["factor"]) + 1

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return gain(above) / gain(below) if above and below else gain(1)
