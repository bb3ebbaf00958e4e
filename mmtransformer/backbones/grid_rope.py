"""Rotary positions of an image's patches: each turns by its row and its column (RoFormer in two dimensions).

Shapes: gh gw rows and columns of patches, q prefix tokens and patches, s patches that are kept.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmtransformer.layers.config import known_fields
from mmtransformer.layers.positions import RotaryAngles


@known_fields
@dataclass(frozen=True)
class ViTRopeConfig:
    """How queries and keys of patches are turned.

    Args:
        kind: "none"; "axial", half of the channels by the row and half by the column, counted in patches (EVA-02,
            arXiv:2303.11331, Perception Encoder); "centered", the same from -1 to 1 over the image (DINOv3,
            arXiv:2508.10104); "mixed", by both at rates that each head of each block learns (arXiv:2403.13298).
        theta: base of the wave lengths: 10,000 in EVA-02, 100 in DINOv3, 10 where rates are learned.
        offset: added to the numbers of rows and columns; 1 in Perception Encoder.
        order: which comes first in a head's channels, the row ("yx") or the column ("xy").
        reference: (gh, gw) that "axial" positions of any grid are stretched to; None = they are not. EVA-02: (16, 16).

    Raises:
        ValueError: for an unknown word.
    """

    kind: Literal["none", "axial", "centered", "mixed"] = "none"
    theta: float = 10_000.0
    offset: float = 0.0
    order: Literal["yx", "xy"] = "yx"
    reference: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("none", "axial", "centered", "mixed"):
            raise ValueError(f'rope must be "none", "axial", "centered" or "mixed", not "{self.kind}"')
        if self.order not in ("yx", "xy"):
            raise ValueError(f'order must be "yx" or "xy", not "{self.order}"')


class GridRotary(nn.Module):
    """The angles of a grid of patches, once a pass for all blocks; tokens in front of the patches do not turn.

    Args:
        head_dim: width c of one head; divisible by 4.
        num_heads: attention heads.
        depth: number of blocks.
        config: how patches are turned.

    Raises:
        ValueError: if the heads' width cannot be halved for rows and columns.
    """

    def __init__(self, head_dim: int, num_heads: int, depth: int, config: ViTRopeConfig) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"rotary positions of rows and columns need heads of 4 n channels, not {head_dim}")
        self.head_dim, self.depth, self.config = head_dim, depth, config
        if config.kind == "mixed":
            rates, turn = self._rates(), 2 * math.pi * torch.rand(depth, num_heads, 1)
            turns = torch.cat((turn.expand(-1, -1, len(rates)), turn.expand(-1, -1, len(rates)) + math.pi / 2), -1)
            self.freqs = nn.Parameter(torch.stack((turns.cos(), turns.sin())) * rates.repeat(2))
            """(2 depth h c/2): what a step along the first coordinate, and along the second, turns each pair by."""

    def _rates(self, device: torch.device | None = None) -> Tensor:
        """How far a step turns each of the c/4 pairs, in float32 whatever the weights are kept in."""
        quarter = self.head_dim // 4
        rates = self.config.theta ** -(torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
        return rates * 2 * math.pi if self.config.kind == "centered" else rates

    def _coordinates(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Of every patch, row by row: its first and its second coordinate, each (gh gw)."""
        axes = []
        for axis, size in enumerate(grid):
            steps = torch.arange(size, device=device, dtype=torch.float32) + self.config.offset
            if self.config.kind == "centered":
                steps = 2 * (steps + 0.5) / size - 1
            elif self.config.reference is not None:
                steps = steps / size * self.config.reference[axis]
            axes.append(steps)
        rows, columns = (x.flatten() for x in torch.meshgrid(*axes, indexing="ij"))
        return (rows, columns) if self.config.order == "yx" else (columns, rows)

    def forward(self, grid: tuple[int, int], prefix: int, device: torch.device) -> list[RotaryAngles]:
        """Each block's angles for `prefix` tokens and the patches of a grid."""
        first, second = self._coordinates(grid, device)
        if self.config.kind == "mixed":
            freqs = self.freqs.float()[..., None, :]
            angles = first[:, None] * freqs[0] + second[:, None] * freqs[1]
            every = angles[:, None]  # (depth 1 h q c/2)
        else:
            rates = self._rates(device)
            every = torch.cat((first[:, None] * rates, second[:, None] * rates), dim=-1)[None]
        every = torch.cat((every.new_zeros(*every.shape[:-2], prefix, every.shape[-1]), every), dim=-2)
        every = torch.cat((every, every), dim=-1)
        ropes = [RotaryAngles(cos, sin) for cos, sin in zip(every.cos(), every.sin(), strict=True)]
        return ropes if len(ropes) == self.depth else ropes * self.depth


def keep_angles(rope: RotaryAngles, kept: Tensor, prefix: int) -> RotaryAngles:
    """The angles of the prefix tokens and of the patches that are kept, (b s) long, in each row."""
    front = torch.arange(prefix, device=kept.device).expand(kept.shape[0], -1)
    index = torch.cat((front, kept + prefix), dim=1)
    if rope.cos.ndim == 2:
        return RotaryAngles(rope.cos[index], rope.sin[index])
    return RotaryAngles(*(x[0][:, index].transpose(0, 1) for x in rope))
