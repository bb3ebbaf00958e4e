"""Where a token stands: sinusoidal (1-D and 2-D), learned (resized to any grid) and rotary positions.

Letters: q tokens, d width of a token, c width of a head, b rows; a grid is (height, width) in patches.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.attention import Rope


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


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resizes learned 2-D positions to another grid: bicubic, antialiased, in float32, as timm does.

    Args:
        table: (1, height * width, d) for the old grid.
        old: grid that the table was made for.
        new: grid wanted.

    Returns:
        (1, new height * new width, d) in the table's dtype; the table itself where the grid is the same.
    """
    if old == new:
        return table
    if table.shape[1] != old[0] * old[1]:
        raise ValueError(f"a table of {table.shape[1]} positions is not a grid of {old[0]} x {old[1]}")
    image = rearrange(table.float(), "one (h w) d -> one d h w", h=old[0])
    image = F.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    return rearrange(image, "one d h w -> one (h w) d").to(table.dtype)


class Rotary(nn.Module):
    """Rotary positions (RoFormer, arXiv:2104.09864); the angles of a pass are computed once and handed down.

    Args:
        head_dim: width c of one head; even.
        theta: base of the wave lengths: 10,000 in Llama 1 and 2, 500,000 in Llama 3.
        scaling: how longer contexts than trained on are reached: None, or a dictionary as hub configs spell it with
            `rope_type` "linear" (arXiv:2306.15595) or "llama3" and its numbers.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, *, theta: float = 10_000.0, scaling: dict | None = None) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim ({head_dim}) must be even for rotary positions")
        rates = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        self.register_buffer("inv_freq", _scale_rates(rates, scaling), persistent=False)

    def forward(self, positions: Tensor) -> Rope:
        """Angles for positions (q) or (b q), in tokens."""
        angles = positions[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        return Rope(angles.cos(), angles.sin())


def _scale_rates(rates: Tensor, scaling: dict | None) -> Tensor:
    kind = "default" if scaling is None else scaling.get("rope_type", scaling.get("type", "default"))
    if scaling is None or kind == "default":
        return rates
    if kind == "linear":
        return rates / scaling["factor"]
    if kind == "llama3":
        # Waves longer than the trained context are slowed by `factor`, short ones are kept, the rest is blended.
        low, high, old = (
            scaling["low_freq_factor"],
            scaling["high_freq_factor"],
            scaling["original_max_position_embeddings"],
        )
        turns = old * rates / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * rates + (1 - kept) * rates / scaling["factor"]
    raise ValueError(f'unknown rope_type "{kind}": known are default, linear, llama3')
