"""TextEncoderTower: a text that an encoder reads both ways -> one vector, from its first token."""

from torch import Tensor, nn

from mmtransformer.backbones.encoder import TextEncoder
from mmtransformer.layers.linear import Linear
from mmtransformer.serialization.pretrained import Pretrained


class TextEncoderTower(Pretrained, nn.Module):
    """A `TextEncoder` whose first token stands for the text, behind a norm and a linear layer, or BERT's pooler.

    With a norm and a linear layer it is the text tower of AltCLIP (arXiv:2211.06679), whose encoder is an XLM-R; with
    the pooler that of transformers' VisionTextDualEncoder (KoCLIP).

    Args:
        encoder: reads the texts; with its pooler if that is what is read.
        embed_dim: width d of the vector, behind a norm and a linear layer; None = the encoder's, by its pooler.

    Raises:
        ValueError: if the encoder lacks the pooler that is read.
    """

    add_bos_token = True
    """A text begins with the token that is read."""

    def __init__(self, encoder: TextEncoder, *, embed_dim: int | None = None) -> None:
        super().__init__()
        if embed_dim is None and not encoder.pooler:
            raise ValueError("without an embed_dim the encoder's pooler is read: build it with pooler=True")
        self.encoder, self.embed_dim = encoder, embed_dim
        self.dim = encoder.dim if embed_dim is None else embed_dim
        self.vocab_size, self.max_len = encoder.vocab_size, encoder.max_len
        self.norm = self.proj = None
        if embed_dim is not None:
            self.norm = nn.LayerNorm(encoder.dim, eps=encoder.norm_eps)
            self.proj = Linear(encoder.dim, embed_dim)
            nn.init.normal_(self.proj.weight, std=encoder.dim**-0.5)
            nn.init.zeros_(self.proj.bias)
        for part in (encoder.mlm_proj, encoder.nsp_proj, None if embed_dim is None else encoder.pool_proj):
            if part is not None:
                part.requires_grad_(False)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Texts as one vector each: (n q) long and (n q) bool, padded on the right -> (n d)."""
        hidden = self.encoder(tokens, attention_mask=attention_mask)
        if self.norm is None or self.proj is None:
            return self.encoder.pool(hidden)
        return self.proj(self.norm(hidden[:, 0]))
