"""TextTower: a text -> one vector, as CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343) read it."""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtransformer.batch.base import vocabulary_error
from mmtransformer.layers.attention import Attention
from mmtransformer.layers.blocks import MLP, AttentionPool, EncoderBlock, make_norm
from mmtransformer.layers.config import Activation
from mmtransformer.layers.masks import Mask
from mmtransformer.serialization.pretrained import Pretrained


class TextTower(Pretrained, nn.Module):
    """A pre-norm Transformer over tokens, and what a text is gathered from: CLIP's with the defaults.

    Args:
        vocab_size: number of token ids.
        dim: width d of a token.
        depth: number of blocks.
        num_heads: attention heads.
        max_len: most tokens of a text, what opens and ends it included.
        mlp_dim: hidden width of the MLPs; None = 4 dim.
        causal: whether a token sees only those before it (CLIP), or all (SigLIP).
        pool: what stands for the text: "eos", its last token (CLIP); "last", the last of `max_len` places, padding
            included, which is read as text (SigLIP); "attention", one query to all tokens; "argmax", the token with
            the largest id (CLIPs that were trained so with a vocabulary whose end is not the largest).
        pad_id: with "last", the token that the places behind a text are filled with.
        add_bos_token: whether a text begins with a token that opens it (bos); SigLIP's do not.
        activation: of the MLPs; OpenAI's CLIP "quick_gelu", SigLIP "gelu_tanh".
        norm_eps: of the norms.
        dropout: share of embeddings and branch results dropped in training.

    Raises:
        ValueError: for an unknown pooling, or a padding token where none is read.
    """

    def __init__(
        self,
        vocab_size: int = 49408,
        dim: int = 512,
        depth: int = 12,
        num_heads: int = 8,
        *,
        max_len: int = 77,
        mlp_dim: int | None = None,
        causal: bool = True,
        pool: Literal["eos", "last", "attention", "argmax"] = "eos",
        pad_id: int | None = None,
        add_bos_token: bool = True,
        activation: Activation = "gelu",
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if pool not in ("eos", "last", "attention", "argmax"):
            raise ValueError(f'pool must be "eos", "last", "attention" or "argmax", not "{pool}"')
        if (pool == "last") != (pad_id is not None):
            raise ValueError(f'pad_id ({pad_id}) is what pool="last" fills texts up with, and pool is "{pool}"')
        if pad_id is not None and not 0 <= pad_id < vocab_size:
            raise ValueError(f"pad_id ({pad_id}) must be one of the {vocab_size} ids")
        self.vocab_size, self.dim, self.depth, self.num_heads = vocab_size, dim, depth, num_heads
        self.max_len, self.mlp_dim = max_len, (mlp_dim := 4 * dim if mlp_dim is None else mlp_dim)
        self.causal, self.pool, self.pad_id, self.add_bos_token = causal, pool, pad_id, add_bos_token
        self.activation: Activation = activation
        self.norm_eps, self.dropout = norm_eps, dropout

        norm = partial(make_norm, "layer", dim, norm_eps)
        self.tok_embed = nn.Embedding(vocab_size, dim)
        self.pos_embed = nn.Embedding(max_len, dim)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            EncoderBlock(
                dim, Attention(dim, num_heads), MLP(dim, mlp_dim, activation=activation), norm, dropout=dropout
            )
            for _ in range(depth)
        )
        self.norm = norm()
        pooling = AttentionPool(dim, num_heads, mlp_dim, activation=activation, eps=norm_eps)
        self.attn_pool = pooling if pool == "attention" else None
        self.init_weights()

    def init_weights(self) -> None:
        """Linear weights and words ~ N(0, 0.02), positions N(0, 0.01), biases 0; a branch's last layer is smaller."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                last = name.endswith(("out_proj", "fc2"))
                nn.init.normal_(module.weight, std=0.02 / (2 * max(self.depth, 1)) ** 0.5 if last else 0.02)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.tok_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed.weight, std=0.01)

    def forward_features(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """All tokens after the last norm: (n q) long and (n q) bool, padded on the right -> (n q d).

        Raises:
            ValueError: if there are more than `max_len` tokens, or (on a CPU) an id is outside the vocabulary.
        """
        count = tokens.shape[1]
        if count > self.max_len:
            raise ValueError(f"texts of {count} tokens, but this tower reads {self.max_len} at most")
        mask: Mask | None = "causal" if self.causal else None if self.pool == "last" else attention_mask[:, None]
        try:
            x = self.tok_embed(tokens)
        except IndexError as error:
            raise vocabulary_error(tokens, self.vocab_size, "a text tower") from error
        x = self.drop(x + self.pos_embed.weight[:count])
        for block in self.blocks:  # Padding is on the right: a causal mask alone hides it.
            x = block(x, mask=mask)
        return self.norm(x)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Texts as one vector each: (n q) long and (n q) bool, padded on the right -> (n d)."""
        if self.pool == "last":
            assert self.pad_id is not None
            tokens = tokens.masked_fill(~attention_mask, self.pad_id)
            tokens = F.pad(tokens, (0, self.max_len - tokens.shape[1]), value=self.pad_id)
            return self.forward_features(tokens, attention_mask)[:, -1]
        hidden = self.forward_features(tokens, attention_mask)
        if self.attn_pool is not None:
            return self.attn_pool(hidden, attention_mask[:, None])[:, 0]
        rows = torch.arange(len(tokens), device=tokens.device)
        if self.pool == "argmax":
            return hidden[rows, tokens.masked_fill(~attention_mask, -1).argmax(1)]
        return hidden[rows, (attention_mask.sum(1) - 1).clamp(min=0)]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay spares, beside biases and norms (timm's protocol)."""
        return {"pos_embed.weight"}
