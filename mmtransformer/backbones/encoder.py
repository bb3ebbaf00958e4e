"""TextEncoder: tokens -> hidden states that see both ways, with BERT's heads (Devlin et al., arXiv:1810.04805).

Shapes: n rows of a context (n divides b).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mmtransformer.batch.base import vocabulary_error
from mmtransformer.layers import masks
from mmtransformer.layers.attention import Attention
from mmtransformer.layers.blocks import MLP, DecoderBlock, activation_function, make_norm
from mmtransformer.layers.cache import KeyValue
from mmtransformer.layers.config import Activation
from mmtransformer.layers.linear import Linear, linear
from mmtransformer.layers.masks import Mask
from mmtransformer.layers.positions import document_positions
from mmtransformer.serialization.pretrained import Pretrained


class MLMHead(nn.Module):
    """Hidden states -> logits of the words behind masks: dense, activation, norm, and the embedding as last matrix.

    Args:
        dim: width d of a token.
        vocab_size: number of token ids.
        activation: between dense layer and norm.
        norm_eps: of the norm.
    """

    def __init__(self, dim: int, vocab_size: int, activation: Activation, norm_eps: float) -> None:
        super().__init__()
        self.dense = Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.activation: Activation = activation

    def transform(self, hidden: Tensor) -> Tensor:
        """What the last matrix reads: (... d) -> (... d)."""
        return self.norm(activation_function(self.activation)(self.dense(hidden)))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """(... d) with the embedding (vocab d) -> (... vocab)."""
        return linear(self.transform(hidden), embedding, self.bias)


class TextEncoder(Pretrained, nn.Module):
    """A post-norm Transformer encoder over text: BERT-base with the defaults.

    Args:
        vocab_size: number of token ids.
        dim: width d of a token.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_dim: hidden width of the MLPs; None = 4 dim.
        max_len: most tokens of a row.
        num_types: token types (first and second sentence); 0 = none.
        context_dim: width of a context's tokens, which every block may read (BLIP, arXiv:2201.12086); None = none can.
        activation: of the MLPs and of the head for masked words.
        norm_eps: of the norms.
        pooler: whether there is a dense layer on the first token, for whole texts.
        mlm_head: whether there is a head for masked words (masked language modeling).
        nsp_head: whether there is a head that tells whether the second sentence follows the first (next sentence
            prediction).
        dropout: share of embeddings, attention weights and branch results dropped in training.

    Raises:
        ValueError: if the numbers do not divide, or sentences are to be judged without a pooler.
    """

    def __init__(
        self,
        vocab_size: int = 30522,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        mlp_dim: int | None = None,
        max_len: int = 512,
        num_types: int = 2,
        context_dim: int | None = None,
        activation: Activation = "gelu",
        norm_eps: float = 1e-12,
        pooler: bool = True,
        mlm_head: bool = False,
        nsp_head: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if nsp_head and not pooler:
            raise ValueError("nsp_head=True reads the pooled first token: it needs pooler=True")
        self.vocab_size, self.dim, self.depth, self.num_heads = vocab_size, dim, depth, num_heads
        self.mlp_dim = mlp_dim = 4 * dim if mlp_dim is None else mlp_dim
        self.max_len, self.num_types, self.context_dim = max_len, num_types, context_dim
        self.activation, self.norm_eps, self.dropout = activation, norm_eps, dropout
        self.pooler, self.mlm_head, self.nsp_head = pooler, mlm_head, nsp_head

        norm = partial(make_norm, "layer", dim, norm_eps)
        self.tok_embed = nn.Embedding(vocab_size, dim)
        self.pos_embed = nn.Embedding(max_len, dim)
        self.type_embed = nn.Embedding(num_types, dim) if num_types else None
        self.norm = norm()
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            DecoderBlock(
                Attention(dim, num_heads, dropout=dropout),
                MLP(dim, mlp_dim, activation=activation),
                norm,
                cross_attn=None if context_dim is None else Attention(dim, num_heads, context_dim=context_dim),
                norm_first=False,
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.pool_proj = Linear(dim, dim) if pooler else None
        self.mlm_proj = MLMHead(dim, vocab_size, activation, norm_eps) if mlm_head else None
        self.nsp_proj = Linear(dim, 2) if nsp_head else None
        self.init_weights()

    def init_weights(self) -> None:
        """Linear weights and embeddings ~ N(0, 0.02), biases 0, as the reference code."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)

    def embed(self, tokens: Tensor, types: Tensor | None = None, *, position_ids: Tensor | None = None) -> Tensor:
        """What the first block reads, without dropout: words, positions and types, normed.

        Args:
            tokens: (b q) long.
            types: (b q) long, 0 = first sentence; None = all 0.
            position_ids: (q) or (b q) long; None = in order from 0.

        Returns:
            (b q d).

        Raises:
            ValueError: if there are more than `max_len` tokens, types are given to an encoder that has none, or (on a
                CPU) an id is outside the vocabulary.
        """
        count = tokens.shape[1]
        if count > self.max_len:
            raise ValueError(f"{count} tokens were given, but this encoder has {self.max_len} positions")
        if types is not None and self.type_embed is None:
            raise ValueError("token types were given, but this encoder has none (num_types 0)")
        try:
            x = self.tok_embed(tokens)
        except IndexError as error:
            raise vocabulary_error(tokens, self.vocab_size, "an encoder") from error
        if position_ids is None:
            position_ids = torch.arange(count, device=tokens.device)
        if self.type_embed is not None:
            x = x + (self.type_embed.weight[0] if types is None else self.type_embed(types))
        return self.norm(x + self.pos_embed(position_ids))

    def project_context(self, context: Tensor) -> list[KeyValue]:
        """Each block's keys and values of a context (n k context_dim), for all the texts that read it."""
        return [block.cross_attn.project_kv(context) for block in self.blocks]  # pyright: ignore

    def forward_embeds(
        self, x: Tensor, *, mask: Mask | None = None, context: Tensor | Sequence[KeyValue] | None = None
    ) -> Tensor:
        """The blocks, from embeddings: (b q d) -> (b q d), each token looking where the mask lets it."""
        if isinstance(context, Tensor):
            context = self.project_context(context)
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            x = block(x, None if context is None else context[i], mask=mask)
        return x

    def forward(
        self,
        tokens: Tensor,
        types: Tensor | None = None,
        *,
        context: Tensor | Sequence[KeyValue] | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states.

        Args:
            tokens: (b q) long.
            types: (b q) long, 0 = first sentence, 1 = second; None = all 0.
            context: (n k context_dim), or each block's keys and values of it (`project_context`): what all tokens look
                at; None = the text alone, also where there is cross-attention.
            attention_mask: (b q) bool, True = a real token; None = all are. Padding may stand on either side.
            document_ids: (b q) long, the number of each token's document in a packed row: tokens see their own document
                only, and positions start again with each; None = one document a row.

        Returns:
            (b q d).

        Raises:
            ValueError: as `embed`, or for a context that no block can read.
        """
        if context is not None and self.context_dim is None:
            raise ValueError("a context was given, but this encoder has no cross-attention (context_dim None)")
        b, q = tokens.shape
        position_ids, mask = None, None
        if document_ids is not None:
            position_ids = document_positions(document_ids)
            allowed = [masks.documents(document_ids)]
            if attention_mask is not None:
                allowed.append(masks.padding(attention_mask))
            mask = masks.dense(masks.all_of(*allowed), b, q, q, tokens.device)
        elif attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            mask = attention_mask[:, None, :]
        return self.forward_embeds(self.embed(tokens, types, position_ids=position_ids), mask=mask, context=context)

    def pool(self, hidden: Tensor) -> Tensor:
        """A whole text from its first token: (b q d) -> (b d), in (-1, 1)."""
        return torch.tanh(_present(self.pool_proj, "pooler")(hidden[:, 0]))

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the words behind masks, for the masked places only, since they are many: (... d) -> (... vocab)."""
        return _present(self.mlm_proj, "mlm_head")(hidden, self.tok_embed.weight)

    def nsp_logits(self, hidden: Tensor) -> Tensor:
        """Logits of whether the second sentence follows the first (0) or not (1): (b q d) -> (b 2)."""
        return _present(self.nsp_proj, "nsp_head")(self.pool(hidden))


def _present(head: nn.Module | None, name: str) -> nn.Module:
    if head is None:
        raise ValueError(f"this encoder was built without its {name}: build it with {name}=True")
    return head
