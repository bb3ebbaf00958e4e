"""MLPProjector: patches -> what a language model reads in front of its text (LLaVA, arXiv:2310.03744)."""

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu

from mmtransformer.serialization.pretrained import Pretrained


class MLPProjector(Pretrained, nn.Module):
    """Squares of patches become one token each (pixel shuffle, arXiv:2404.16821, section 3.1), then a norm and an MLP.

    The norm is as in arXiv:2404.16821; LLaVA has none.

    Args:
        visual_dim: width d of a patch's token.
        dim: width e of the result.
        hidden_dim: width inside the MLP; None = dim, as in LLaVA-1.5.
        shuffle: side s of the squares of patches that become one token of s * s times the width: s * s times fewer
            tokens for a language model to read.

    Raises:
        ValueError: if shuffle is not positive.
    """

    def __init__(self, visual_dim: int, dim: int, hidden_dim: int | None = None, *, shuffle: int = 1) -> None:
        super().__init__()
        if shuffle < 1:
            raise ValueError(f"shuffle must be at least 1, not {shuffle}")
        self.visual_dim, self.dim, self.shuffle = visual_dim, dim, shuffle
        self.hidden_dim = hidden_dim = dim if hidden_dim is None else hidden_dim
        self.norm = nn.LayerNorm(visual_dim * shuffle**2)
        self.fc1 = nn.Linear(visual_dim * shuffle**2, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(... (gh gw) d) of a grid of gh x gw patches -> (... l e), l = gh gw / s^2, row by row."""
        s, (gh, gw) = self.shuffle, grid
        x = rearrange(
            patches.to(self.norm.weight.dtype),
            "... (gh s1 gw s2) d -> ... (gh gw) (s1 s2 d)",
            gh=gh // s,
            gw=gw // s,
            s1=s,
            s2=s,
        )
        return self.fc2(gelu(self.fc1(self.norm(x))))
