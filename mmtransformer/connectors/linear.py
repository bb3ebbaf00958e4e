"""LinearConnector: visual tokens -> the width that cross-attention reads."""

from torch import Tensor

from mmtransformer.connectors.base import Connector
from mmtransformer.layers.linear import Linear


class LinearConnector(Connector):
    """One linear layer to another width (transformers' vision-encoder-decoders).

    Args:
        visual_dim: width of the vision encoder's tokens.
        dim: width of the result.
    """

    keeps_tokens = True

    def __init__(self, visual_dim: int, dim: int) -> None:
        super().__init__()
        self.visual_dim, self.dim = visual_dim, dim
        self.proj = Linear(visual_dim, dim)

    def forward(self, visual_tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(... p visual_dim) -> (... p dim), each token by itself."""
        return self.proj(visual_tokens)
