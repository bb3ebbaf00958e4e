"""TransformerConnector: trainable encoder blocks between a frozen vision encoder and what reads its tokens."""

from einops import pack, unpack
from torch import Tensor, nn

from mmtransformer.batch.base import check_shape
from mmtransformer.connectors.base import Connector
from mmtransformer.layers.attention import Attention
from mmtransformer.layers.blocks import MLP, EncoderBlock
from mmtransformer.layers.linear import Linear
from mmtransformer.layers.masks import drop_tokens


class TransformerConnector(Connector):
    """Trainable encoder blocks over a frozen encoder's tokens: they learn what captions need and it does not say.

    Args:
        visual_dim: width of the vision encoder's tokens.
        dim: width of the result.
        depth: encoder blocks; 0 = a norm and a projection only.
        num_heads: heads of a block.
        dropout: share of branch results dropped in training.
        token_dropout: share of visual tokens left out in training: it regularises, and saves time.

    Raises:
        ValueError: if token_dropout is not in [0, 1).
    """

    keeps_tokens = True

    def __init__(
        self,
        visual_dim: int,
        dim: int,
        depth: int = 1,
        num_heads: int = 4,
        *,
        dropout: float = 0.0,
        token_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= token_dropout < 1:
            raise ValueError(f"token_dropout must be in [0, 1), not {token_dropout}")
        self.visual_dim, self.dim, self.depth, self.num_heads = visual_dim, dim, depth, num_heads
        self.dropout, self.token_dropout = dropout, token_dropout
        self.norm = nn.LayerNorm(visual_dim)
        self.proj = Linear(visual_dim, dim)
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, Attention(dim, num_heads), MLP(dim, 4 * dim), lambda: nn.LayerNorm(dim), dropout=dropout)
            for _ in range(depth)
        )
        self.last_norm = nn.LayerNorm(dim)

    def forward(self, visual_tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(... p visual_dim) -> (... p dim).

        Args:
            visual_tokens: of the images.
            mask: (... p) bool, which of them are real; None = all.

        Raises:
            ValueError: if tokens are to be left out at random, where images have different numbers of them, or for a
                mask of another shape.
        """
        check_shape(mask, "mask", visual_tokens.shape[:-1], "visual tokens")
        visual_tokens, leading = pack([visual_tokens], "* p d")
        if self.training and self.token_dropout:
            if mask is not None:
                raise ValueError(
                    f"token_dropout ({self.token_dropout}) is a share of one number of tokens, and images of native "
                    f"size have different ones: train them with 0"
                )
            visual_tokens = drop_tokens(visual_tokens, self.token_dropout)
        x = self.proj(self.norm(visual_tokens))
        seen = None if mask is None else mask.flatten(0, -2)[:, None]
        for block in self.blocks:
            x = block(x, mask=seen)
        return unpack(self.last_norm(x), leading, "* p d")[0]
