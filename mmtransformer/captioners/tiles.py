"""Large pictures as tiles: which grid a picture is cut into, and how its tiles' tokens become one row (LLaVA-NeXT).

Shapes: t tiles of a picture, its whole view first; gh gw rows and columns of tokens of a tile, l = gh * gw; k tokens of
a picture, e width of a token.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mmtransformer.batch import CaptionBatch
from mmtransformer.images.pinpoints import best_pinpoint
from mmtransformer.layers.config import known_fields

Size = tuple[int, int]
"""Height and width."""


@dataclass
class TiledBatch(CaptionBatch):
    """Images that are tiles of pictures, with what the pictures' sizes were.

    Attributes:
        image_sizes: (b m 2) long, height and width of each of a sample's m pictures, px, before they were cut: the
            tiles of each stand side by side among the sample's images, its whole view first. 0 = no picture.
    """

    image_sizes: Tensor | None = None


@known_fields
@dataclass(frozen=True)
class TileConfig:
    """How pictures are cut into tiles, and what is read of them (LLaVA-NeXT).

    Args:
        pinpoints: the (height, width) that a picture may be fitted into, px: whole tiles; none = it is not cut.
        max_tiles: the tokens of the tiles are shrunk where they are far more than those of so many; None = never
            (LLaVA-NeXT). LLaVA-OneVision: 9.
        single_only: whether only a picture that is alone in its prompt is cut, and each of several is one tile
            (LLaVA-OneVision).
    """

    pinpoints: tuple[Size, ...] = ()
    max_tiles: int | None = None
    single_only: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "pinpoints", tuple((int(h), int(w)) for h, w in self.pinpoints))  # JSON has lists

    def tiles(self, size: Size, tile: Size, pictures: int = 1) -> Size:
        """Rows and columns of tiles that a picture is cut into; (0, 0) = it is one tile.

        Args:
            size: of the picture, px.
            tile: of a tile, px.
            pictures: how many stand in its prompt.
        """
        if self.single_only and pictures > 1:
            return 0, 0
        height, width = best_pinpoint(size, self.pinpoints)
        return height // tile[0], width // tile[1]

    def shape(self, size: Size, tiles: Size, grid: Size) -> Size:
        """Rows and columns of tokens that a picture's tiles give; each row ends with a newline.

        Args:
            size: of the picture, px.
            tiles: rows and columns of its tiles.
            grid: rows and columns of a tile's tokens.
        """
        return self._shrunk(self._inside(size, (tiles[0] * grid[0], tiles[1] * grid[1])), grid)

    def num_tokens(self, size: Size, tiles: Size, grid: Size) -> int:
        """How many tokens a picture becomes; arguments as of `shape`."""
        height, width = self.shape(size, tiles, grid) if all(tiles) else (1, 0)
        return math.prod(grid) + height * (width + 1)

    def join(self, x: Tensor, size: Size, tiles: Size, grid: Size, newline: Tensor) -> Tensor:
        """The tokens of a picture, its whole view and then row by row: (t l e) -> (k e).

        Args:
            x: tokens of its tiles, the whole view first.
            size: of the picture, px.
            tiles: rows and columns of its tiles.
            grid: rows and columns of a tile's tokens.
            newline: what ends a row (e).
        """
        if not all(tiles):
            return torch.cat((x[0], newline[None]))
        fine = rearrange(x[1:], "(r c) (gh gw) e -> e (r gh) (c gw)", r=tiles[0], gh=grid[0])
        full = (fine.shape[1], fine.shape[2])
        inside = self._inside(size, full)
        top, left = (full[0] - inside[0]) // 2, (full[1] - inside[1]) // 2
        fine = fine[:, top : top + inside[0], left : left + inside[1]]
        if (shape := self._shrunk(inside, grid)) != inside:
            fine = F.interpolate(fine[None], shape, mode="bilinear")[0]
        fine = torch.cat((fine, newline[:, None, None].expand(-1, shape[0], 1)), dim=2)
        return torch.cat((x[0], rearrange(fine, "e h w -> (h w) e")))

    def on_grid(self, weights: Tensor, size: Size, tiles: Size, grid: Size) -> Tensor:
        """Weights on a picture's tokens, all brought onto the grid of its whole view: (q k) -> (q gh gw).

        Arguments as of `join`; what lies on newlines is left out.
        """
        whole, fine = weights.split((math.prod(grid), weights.shape[1] - math.prod(grid)), dim=1)
        if all(tiles):
            (h, w), places = self.shape(size, tiles, grid), []
            for count, cells in ((h, grid[0]), (w, grid[1])):
                places.append((2 * torch.arange(count, device=weights.device) + 1) * cells // (2 * count))
            place = (places[0][:, None] * grid[1] + places[1]).flatten()
            whole = whole.index_add(1, place, fine.unflatten(1, (h, w + 1))[..., :w].flatten(1))
        return whole.unflatten(1, grid)

    @staticmethod
    def _inside(size: Size, full: Size) -> Size:
        """The rows and columns of the tokens of all tiles that show the picture, not what it was padded with."""
        (height, width), (rows, columns) = size, full
        if width / height > columns / rows:
            filled = int(round(height * (columns / width), 7))
            return rows - 2 * ((rows - filled) // 2), columns
        filled = int(round(width * (rows / height), 7))
        return rows, columns - 2 * ((columns - filled) // 2)

    def _shrunk(self, shape: Size, grid: Size) -> Size:
        if self.max_tiles is None:
            return shape
        ratio = math.sqrt(math.prod(shape) / (self.max_tiles * grid[0] ** 2))
        return (int(shape[0] // ratio), int(shape[1] // ratio)) if ratio > 1.1 else shape
