"""Transformer: the encoder-decoder of "Attention Is All You Need" (Vaswani et al., arXiv:1706.03762).

Shapes: n rows of sources (n divides b), k source tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmtransformer.backbones.base import DecoderState, repeat_rows
from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.batch import Seq2SeqBatch
from mmtransformer.layers.attention import Attention
from mmtransformer.layers.blocks import MLP, EncoderBlock, make_norm
from mmtransformer.layers.cache import KeyValue
from mmtransformer.layers.config import Activation, MLPConfig, NormConfig, PositionConfig
from mmtransformer.serialization.pretrained import Pretrained

# The paper's two sizes (its table 3), with its vocabularies of English and German.
_PRESETS: dict[str, dict[str, Any]] = {
    "base": {"vocab_size": 37000},
    "big": {"vocab_size": 37000, "dim": 1024, "num_heads": 16, "mlp_dim": 4096, "dropout": 0.3},
}


class EncodedSource(NamedTuple):
    """What the decoder reads of a source.

    Attributes:
        context: the encoder's tokens (n k d), or each decoder block's keys and values of them (`project`).
        attention_mask: (n k) bool, True = a real token; None = all are.
    """

    context: Tensor | Sequence[KeyValue]
    attention_mask: Tensor | None


def join_prefix(
    prefix_embeds: Tensor, prefix_attention_mask: Tensor | None, x: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Embeddings (n p d) in front of those of sources (n k d): (n (p k) d), and which are to be read, None = all.

    Raises:
        ValueError: if they are not as many rows of the same width.
    """
    n, _, d = x.shape
    if prefix_embeds.shape[::2] != (n, d):
        raise ValueError(f"what stands before {n} sources must be ({n}, any, {d}), not {tuple(prefix_embeds.shape)}")
    if attention_mask is not None or prefix_attention_mask is not None:
        parts = ((prefix_embeds, prefix_attention_mask), (x, attention_mask))
        every = [torch.ones_like(e[..., 0], dtype=torch.bool) if mask is None else mask for e, mask in parts]
        attention_mask = torch.cat(every, dim=1)
    return torch.cat((prefix_embeds.to(x.dtype), x), dim=1), attention_mask


class TransformerState:
    """What decoding remembers: the caches of the targets, and the keys and values of the sources."""

    def __init__(self, decoder: DecoderState, source: EncodedSource) -> None:
        self.decoder, self.source = decoder, source

    def reorder(self, rows: Tensor) -> None:
        """Reorders the targets; the sources' keys and values stay where they are, shared by their rows."""
        self.decoder.reorder(rows)


class Transformer(Pretrained, nn.Module):
    """The 2017 encoder-decoder: post-norm, sinusoidal positions, one matrix for both embeddings and the head.

    As in its reference code, dropout also falls on self-attention weights; the paper names results of branches and
    sums of embeddings and positions only. `generate` decodes it (`prefill`, `decode_step`); the paper used 4 beams,
    `length_penalty=0.6` and `length_offset=5`.

    Args:
        vocab_size: number of token ids, of source and target together.
        dim: width d of a token.
        depth: encoder blocks.
        num_heads: attention heads.
        decoder_depth: decoder blocks; None = depth.
        mlp_dim: hidden width of the MLPs.
        max_len: most tokens of a source, and of a target; positions are computed, so it costs nothing.
        norm_first: norm before each branch and after the last block, which trains without warm-up (arXiv:2002.04745);
            False = after each sum, as in the paper.
        activation: of the MLPs.
        norm_eps: of the norms.
        tied: whether the head's weight is the embedding.
        dropout: share of embeddings, self-attention weights and branch results dropped in training.

    Raises:
        ValueError: if the numbers do not divide.
    """

    presets = _PRESETS

    def __init__(
        self,
        vocab_size: int,
        dim: int = 512,
        depth: int = 6,
        num_heads: int = 8,
        *,
        decoder_depth: int | None = None,
        mlp_dim: int = 2048,
        max_len: int = 1024,
        norm_first: bool = False,
        activation: Activation = "relu",
        norm_eps: float = 1e-5,
        tied: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim ({dim}) must be even for sinusoidal positions")
        self.vocab_size, self.dim, self.depth, self.num_heads = vocab_size, dim, depth, num_heads
        self.decoder_depth = decoder_depth = depth if decoder_depth is None else decoder_depth
        self.mlp_dim, self.max_len, self.norm_first = mlp_dim, max_len, norm_first
        self.activation, self.norm_eps, self.tied, self.dropout = activation, norm_eps, tied, dropout

        norm = partial(make_norm, "layer", dim, norm_eps)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            EncoderBlock(
                dim,
                Attention(dim, num_heads, dropout=dropout),
                MLP(dim, mlp_dim, activation=activation),
                norm,
                norm_first=norm_first,
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.last_norm = norm() if norm_first else nn.Identity()
        self.decoder = TextDecoder(
            vocab_size,
            dim,
            decoder_depth,
            num_heads,
            max_len=max_len,
            mlp_dim=mlp_dim,
            context_dim=dim,
            mlp=MLPConfig(activation),
            norm=NormConfig(eps=norm_eps, pre=norm_first),
            positions=PositionConfig("sinusoidal", embed_scale=dim**0.5),
            tied=tied,
            dropout=dropout,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Linear weights uniform by Xavier Glorot, biases 0, embeddings ~ N(0, 1 / dim), as the reference code."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.decoder.tok_embed.weight, std=self.dim**-0.5)  # Tied, so after the head.

    def embed(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Scaled embeddings and positions of source tokens (n k) -> (n k d); padding takes no position.

        Raises:
            ValueError: if there are more than `max_len` tokens, or (on a CPU) an id is outside the vocabulary.
        """
        if tokens.shape[1] > self.max_len:
            raise ValueError(
                f"a source of {tokens.shape[1]} tokens was given, but this model reads {self.max_len} at most"
            )
        return self.decoder.embed(tokens, self.decoder.position_ids(tokens, attention_mask))

    def encode(
        self,
        tokens: Tensor,
        *,
        attention_mask: Tensor | None = None,
        prefix_embeds: Tensor | None = None,
        prefix_attention_mask: Tensor | None = None,
    ) -> EncodedSource:
        """Reads sources.

        Args:
            tokens: (n k) long.
            attention_mask: (n k) bool, True = a real token; None = all are.
            prefix_embeds: (n p d), embeddings that stand in front of the tokens and take no position, such as a
                Q-Former's queries (as BLIP-2 feeds an encoder-decoder, arXiv:2301.12597, figure 3).
            prefix_attention_mask: (n p) bool, which of them are to be read; None = all.

        Returns:
            The encoder's tokens (n (p k) d), with their padding.
        """
        x = self.embed(tokens, attention_mask)
        if prefix_embeds is not None:
            x, attention_mask = join_prefix(prefix_embeds, prefix_attention_mask, x, attention_mask)
        mask = None if attention_mask is None else attention_mask[:, None, :]
        x = self.drop(x)
        for block in self.blocks:
            x = block(x, mask=mask)
        return EncodedSource(self.last_norm(x), attention_mask)

    def project(self, source: EncodedSource) -> EncodedSource:
        """The source as keys and values of every decoder block: once a source, not once a token."""
        context, attention_mask = source
        return (
            EncodedSource(self.decoder.project_context(context), attention_mask)
            if isinstance(context, Tensor)
            else source
        )

    def decode(
        self,
        tokens: Tensor,
        source: EncodedSource,
        *,
        attention_mask: Tensor | None = None,
        state: DecoderState | None = None,
    ) -> Tensor:
        """Hidden states of target tokens, to be given to `head`.

        Args:
            tokens: (b q) long, n dividing b: each source serves b / n consecutive rows.
            source: from `encode`, or from `project` where tokens come one by one.
            attention_mask: (b q) bool; needed only where targets are padded on the left.
            state: target tokens so far (`decoder.new_state`); these are appended.

        Returns:
            (b q d).
        """
        return self.decoder(
            tokens, source.context, attention_mask=attention_mask, context_mask=source.attention_mask, state=state
        )

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the next target token: (... d) -> (... vocab_size)."""
        return self.decoder.head(hidden)

    def hidden_states(self, batch: Seq2SeqBatch) -> Tensor:
        """Hidden states (n q d) of right-padded targets; the causal mask alone hides their padding."""
        return self.decode(batch.tokens, self.encode(batch.source, attention_mask=batch.source_attention_mask))

    def logits(self, batch: Seq2SeqBatch) -> Tensor:
        """Logits of every target token, each from the true tokens before it (teacher forcing): (n q vocab_size)."""
        return self.head(self.hidden_states(batch))

    def prefill(
        self, batch: Seq2SeqBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, TransformerState]:
        """Reads sources and left-padded prompts, once; then every row stands `expand_size` times, side by side.

        Returns:
            Logits of the first new token (n * expand_size, vocab_size), and the state to give to `decode_step`.
        """
        source_attention_mask = None if bool(batch.source_attention_mask.all()) else batch.source_attention_mask
        source = self.project(self.encode(batch.source, attention_mask=source_attention_mask))
        state = self.decoder.new_state(batch.tokens.shape[1] + max_new_tokens)
        attention_mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
        logits = self.head(self.decode(batch.tokens, source, attention_mask=attention_mask, state=state)[:, -1])
        return repeat_rows(logits, TransformerState(state, source), expand_size)

    def decode_step(self, tokens: Tensor, state: TransformerState) -> Tensor:
        """Adds a token to each row: (b) -> logits of the next (b vocab_size)."""
        return self.head(self.decode(tokens[:, None], state.source, state=state.decoder)[:, 0])
