"""Patches -> what a language model reads in front of its text: by an MLP (LLaVA, arXiv:2310.03744) or linearly.

It is the `projector` of captioners whose visual tokens stand amid the text, and needs to know their grid.

Shapes: gh gw rows and columns of patches, s side of the squares of them that become one token, l = gh gw / s^2 tokens.
"""

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu

from mmtransformer.layers.linear import Linear
from mmtransformer.serialization.pretrained import Pretrained


class MLPProjector(Pretrained, nn.Module):
    """Squares of patches become one token each (pixel shuffle, arXiv:2404.16821, section 3.1), then a norm and an MLP.

    The norm is as in arXiv:2404.16821; LLaVA has none, and where it is left out, squares of one patch may stand in any
    order and number.

    Args:
        visual_dim: width d of a patch's token.
        dim: width e of the result.
        hidden_dim: width inside the MLP; None = dim, as in LLaVA-1.5.
        pixel_shuffle: side s of the squares of patches that become one token of s * s times the width: s * s times
            fewer tokens for a language model to read.
        input_norm: whether a LayerNorm stands before the MLP.
        bias: whether its layers have biases.

    Raises:
        ValueError: if pixel_shuffle is not positive.
    """

    def __init__(
        self,
        visual_dim: int,
        dim: int,
        hidden_dim: int | None = None,
        *,
        pixel_shuffle: int = 1,
        input_norm: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        _check(pixel_shuffle)
        self.visual_dim, self.dim, self.pixel_shuffle = visual_dim, dim, pixel_shuffle
        self.input_norm, self.bias = input_norm, bias
        self.hidden_dim = hidden_dim = dim if hidden_dim is None else hidden_dim
        self.norm = nn.LayerNorm(visual_dim * pixel_shuffle**2) if input_norm else nn.Identity()
        self.fc1 = Linear(visual_dim * pixel_shuffle**2, hidden_dim, bias=bias)
        self.fc2 = Linear(hidden_dim, dim, bias=bias)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(... (gh gw) d) of a grid of gh x gw patches -> (... l e), row by row."""
        x = merge_squares(patches.to(self.fc1.weight.dtype), grid, self.pixel_shuffle)
        return self.fc2(gelu(self.fc1(self.norm(x))))


class LinearProjector(Pretrained, nn.Module):
    """Squares of patches become one token each, by one matrix: Idefics3's (arXiv:2408.12637, section 3), PaliGemma's.

    Args:
        visual_dim: width d of a patch's token.
        dim: width e of the result.
        pixel_shuffle: see `MLPProjector`.
        bias: whether it adds one.

    Raises:
        ValueError: if pixel_shuffle is not positive.
    """

    def __init__(self, visual_dim: int, dim: int, *, pixel_shuffle: int = 1, bias: bool = True) -> None:
        super().__init__()
        _check(pixel_shuffle)
        self.visual_dim, self.dim, self.pixel_shuffle, self.bias = visual_dim, dim, pixel_shuffle, bias
        self.fc = Linear(visual_dim * pixel_shuffle**2, dim, bias=bias)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(... (gh gw) d) of a grid of gh x gw patches -> (... l e), row by row."""
        return self.fc(merge_squares(patches.to(self.fc.weight.dtype), grid, self.pixel_shuffle))


def merge_squares(patches: Tensor, grid: tuple[int, int], s: int) -> Tensor:
    """The channels of every square of s x s patches side by side, row by row: (... (gh gw) d) -> (... l (s s d))."""
    if s == 1:
        return patches
    (gh, gw), pattern = grid, "... (gh s1 gw s2) d -> ... (gh gw) (s1 s2 d)"
    return rearrange(patches, pattern, gh=gh // s, gw=gw // s, s1=s, s2=s)


def _check(pixel_shuffle: int) -> None:
    if pixel_shuffle < 1:
        raise ValueError(f"pixel_shuffle must be at least 1, not {pixel_shuffle}")
