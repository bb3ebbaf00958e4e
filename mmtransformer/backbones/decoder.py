"""TextDecoder: tokens -> logits, with caches, optional cross-attention, and one door for bridges.

Letters: b rows, q new tokens, k tokens so far, n rows of a context (n divides b), d width of a token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmtransformer.backbones.base import Decoder, DecoderState, vocabulary_error
from mmtransformer.layers import masks
from mmtransformer.layers.attention import Attention, KeyValue, Mask
from mmtransformer.layers.blocks import MLP, DecoderBlock, SwiGLU, make_dropout, make_norm
from mmtransformer.layers.config import AttentionConfig, MLPConfig, NormConfig, PositionConfig
from mmtransformer.layers.positions import Rotary, sinusoidal
from mmtransformer.serialization.pretrained import Pretrained

Context = Tensor | Sequence[KeyValue]
"""What cross-attention reads: (n k d) tokens, or each block's keys and values from `TextDecoder.project_context`."""

_LLAMA: dict[str, Any] = {
    "attention": AttentionConfig(bias=False),
    "mlp": MLPConfig("swiglu", bias=False),
    "norm": NormConfig("rms"),
    "positions": PositionConfig("rotary"),
    "tied": False,
}
_OPT: dict[str, Any] = {"vocab_size": 50272, "max_len": 2048, "mlp": MLPConfig("relu")}
_PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 50257},
    "gpt2-medium": {"vocab_size": 50257, "dim": 1024, "depth": 24, "num_heads": 16},
    "gpt2-large": {"vocab_size": 50257, "dim": 1280, "depth": 36, "num_heads": 20},
    "gpt2-xl": {"vocab_size": 50257, "dim": 1600, "depth": 48, "num_heads": 25},
    "opt-125m": _OPT,
    "opt-1.3b": _OPT | {"dim": 2048, "depth": 24, "num_heads": 32},
    "opt-2.7b": _OPT | {"dim": 2560, "depth": 32, "num_heads": 32},
    "opt-6.7b": _OPT | {"dim": 4096, "depth": 32, "num_heads": 32},
    "llama-2-7b": _LLAMA
    | {"vocab_size": 32000, "dim": 4096, "depth": 32, "num_heads": 32, "max_len": 4096, "mlp_dim": 11008},
    "llama-3-8b": _LLAMA
    | {"vocab_size": 128256, "dim": 4096, "depth": 32, "num_heads": 32, "max_len": 8192, "mlp_dim": 14336}
    | {"attention": AttentionConfig(num_kv_heads=8, bias=False)}
    | {"positions": PositionConfig("rotary", theta=500_000.0)},
    "smollm-135m": _LLAMA
    | {"vocab_size": 49152, "dim": 576, "depth": 30, "num_heads": 9, "max_len": 2048, "mlp_dim": 1536}
    | {"attention": AttentionConfig(num_kv_heads=3, bias=False), "tied": True},
}


class TextDecoder(Pretrained, Decoder):
    """A causal decoder: GPT-2's shape by default (Radford et al. 2019), others by `TextDecoder.preset("llama-3-8b")`.

    Args:
        vocab_size: number of token ids.
        dim: width d of a token.
        depth: number of blocks.
        num_heads: attention heads.
        max_len: most tokens of a row, prompt included; the size of the table where positions are learned.
        mlp_dim: hidden width of the MLPs; None = 4 dim.
        cross_dim: width of the context's tokens; None = a language model without cross-attention.
        cross_every: the last of every so many blocks reads the context.
        attention: heads, biases, window.
        mlp: activation and biases of the MLPs.
        norm: which norms, and where.
        positions: how tokens know where they stand.
        tied: whether the head's weight is the embedding.
        dropout: share of embeddings, self-attention weights and branch results dropped in training.

    Raises:
        ValueError: if the numbers do not fit.
    """

    presets = _PRESETS

    def __init__(
        self,
        vocab_size: int,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        max_len: int = 1024,
        mlp_dim: int | None = None,
        cross_dim: int | None = None,
        cross_every: int = 1,
        attention: AttentionConfig = AttentionConfig(),
        mlp: MLPConfig = MLPConfig(),
        norm: NormConfig = NormConfig(),
        positions: PositionConfig = PositionConfig(),
        tied: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 1 <= cross_every <= max(depth, 1):
            raise ValueError(f"cross_every ({cross_every}) must be between 1 and depth ({depth})")
        self.vocab_size, self.dim, self.depth, self.num_heads = vocab_size, dim, depth, num_heads
        self.max_len, self.mlp_dim = max_len, (mlp_dim := 4 * dim if mlp_dim is None else mlp_dim)
        self.cross_dim, self.cross_every, self.tied, self.dropout = cross_dim, cross_every, tied, dropout
        self.attention, self.mlp, self.norm, self.positions = attention, mlp, norm, positions

        make = partial(make_norm, norm.kind, dim, norm.eps)
        self.tok_embed = nn.Embedding(vocab_size, dim)
        self.pos_embed = nn.Embedding(max_len, dim) if positions.kind == "learned" else None
        head_dim = attention.head_dim or dim // num_heads
        turns = positions.kind == "rotary"
        self.rotary = Rotary(head_dim, theta=positions.theta, scaling=positions.scaling) if turns else None
        self.drop = make_dropout(dropout)
        self.blocks = nn.ModuleList(
            DecoderBlock(
                dim,
                Attention(
                    dim,
                    num_heads,
                    num_kv_heads=attention.num_kv_heads,
                    head_dim=attention.head_dim,
                    bias=attention.bias,
                    out_bias=attention.out_bias,
                    qk_norm=attention.qk_norm,
                    norm_eps=norm.eps,
                    dropout=dropout,
                ),
                SwiGLU(dim, mlp_dim)
                if mlp.activation == "swiglu"
                else MLP(dim, mlp_dim, activation=mlp.activation, bias=mlp.bias),
                make,
                cross_attn=self._cross_attention(i),
                pre_norm=norm.pre,
                dropout=dropout,
            )
            for i in range(depth)
        )
        self.last_norm = make() if norm.pre else nn.Identity()
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.tok_embed.weight
        self.init_weights()

    def _cross_attention(self, i: int) -> Attention | None:
        if self.cross_dim is None or (i + 1) % self.cross_every:
            return None
        # No dropout here: its mask is as large as the weights over a whole picture; drop visual tokens instead.
        return Attention(self.dim, self.num_heads, context_dim=self.cross_dim)

    def init_weights(self) -> None:
        """Everything ~ N(0, 0.02), biases 0; the last layer of each branch is smaller by sqrt(branches) (GPT-2)."""
        branches = 2 * self.depth + len(self.cross_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                last = name.endswith(("out_proj", "fc2", "down_proj"))
                nn.init.normal_(module.weight, std=0.02 / branches**0.5 if last else 0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def cross_layers(self) -> list[int]:
        """Numbers of the blocks that read the context."""
        return [i for i, block in enumerate(self.blocks) if block.cross_attn is not None]

    def project_context(self, context: Tensor) -> list[KeyValue]:
        """Each cross-attending block's keys and values of a context (n k d): once a picture, not once a token."""
        layers = (self.blocks[i].cross_attn for i in self.cross_layers)
        return [layer.project_kv(context) for layer in layers if isinstance(layer, Attention)]

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """The embeddings of tokens (b q), as they stand in the table: (b q d)."""
        try:
            return self.tok_embed(tokens)
        except IndexError as error:  # From CPUs only: on a GPU the look at the ids would cost a wait.
            raise vocabulary_error(tokens, self.vocab_size) from error

    def add_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads of embeddings (b q d) at positions (q) or (b q): (b q d)."""
        x = x if self.positions.embed_scale == 1 else x * self.positions.embed_scale
        if self.positions.kind == "sinusoidal":
            return x + sinusoidal(positions, self.dim).to(x.dtype)
        return x if self.pos_embed is None else x + self.pos_embed(positions)

    def forward(
        self,
        tokens: Tensor,
        context: Context | None = None,
        *,
        attention_mask: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        mask: Mask | None = None,
        state: DecoderState | None = None,
        before_block: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Hidden states of tokens, to be given to `head`.

        Args:
            tokens: (b q) long.
            context: what cross-attention reads, its rows dividing b.
            attention_mask: (b q) bool, True = a real token; None = all are. Padding may stand on either side.
            context_attention_mask: (n k) bool, True = a real token of the context; None = all are.
            document_ids: (b q) long, the number of each token's document in a packed row: tokens see their own document
                only, whose positions begin at 0; not with a state. None = a row is one document.
            mask: (b q k) who may look at whom, in place of the causal mask; not with a state.
            state: tokens decoded so far, from `new_state`; these tokens are appended to it.
            before_block: called as x = before_block(i, x) before block i: the door for bridges.

        Returns:
            (b q d), normed.

        Raises:
            ValueError: if a document has more tokens than `max_len` (on a CPU only, where it is packed), (on a CPU) a
                token id is outside the vocabulary, or a context is missing, or given to a decoder that cannot read it.
        """
        positions, mask = self.position_ids(tokens, attention_mask, document_ids, mask, state)
        return self.forward_embeds(
            self.embed(tokens, positions),
            positions,
            context,
            attention_mask=attention_mask,
            context_attention_mask=context_attention_mask,
            mask=mask,
            state=state,
            before_block=before_block,
        )

    def forward_embeds(
        self,
        x: Tensor,
        positions: Tensor,
        context: Context | None = None,
        *,
        attention_mask: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        mask: Mask | None = None,
        state: DecoderState | None = None,
        before_block: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """As `forward`, from embeddings (b q d) at positions (q) or (b q): for bridges with other tokens in front."""
        mask = self._mask(x, attention_mask, mask, state)
        rope = self.rotary(positions) if self.rotary is not None else None
        contexts, context_mask, nope_interval = self._contexts(context), None, self.positions.nope_interval
        if context_attention_mask is not None:
            context_mask = context_attention_mask.repeat_interleave(
                x.shape[0] // context_attention_mask.shape[0], 0
            )[:, None]
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            if before_block is not None:
                x = before_block(i, x)
            cache = None if state is None else state.caches[i]
            rotated = None if nope_interval and (i + 1) % nope_interval == 0 else rope
            x = block(x, contexts.get(i), mask=mask, context_mask=context_mask, rope=rotated, cache=cache)
        if state is not None:
            state.advance(positions, attention_mask, *x.shape[:2])
        return self.last_norm(x)

    def _contexts(self, context: Context | None) -> dict[int, KeyValue]:
        layers = self.cross_layers
        if layers and context is None:
            raise ValueError("this decoder has cross-attention, but no context was given")
        if not layers and context is not None:
            raise ValueError("this decoder has no cross-attention, but a context was given")
        if isinstance(context, Tensor):
            context = self.project_context(context)
        context = () if context is None else context
        if len(context) != len(layers):
            raise ValueError(
                f"keys and values for {len(context)} blocks were given, but {len(layers)} read a context"
            )
        return dict(zip(layers, context, strict=True))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the next token: (... d) -> (... vocab_size)."""
        return self.lm_head(hidden)

    def logits(self, hidden: Tensor, table: Tensor) -> Tensor:
        """Logits of other tokens, whose rows of the head are given: (... d), (n d) -> (... n)."""
        return F.linear(hidden, table)

    @property
    def embedding_weights(self) -> tuple[Tensor, Tensor]:
        """The weights of the embedding and of the head, each (vocab_size d): the same tensor where they are tied."""
        return self.tok_embed.weight, self.lm_head.weight

    def _mask(
        self, x: Tensor, attention_mask: Tensor | None, given: Mask | None, state: DecoderState | None
    ) -> Mask | None:
        """Who may look at whom: the mask given, or causal and without padding; within the window where there is one."""
        rows, count = x.shape[:2]
        past = 0 if state is None else state.past
        real = attention_mask if state is None else state.keys(rows, count, attention_mask, x.device)
        total = past + count if isinstance(past, int) else real.shape[1]  # pyright: ignore[reportOptionalMemberAccess]
        narrow = self.attention.window is not None and total > self.attention.window
        if given is None and not narrow:
            if real is None:
                return "causal"
            if count == 1:
                return real[:, None, :]
            allowed = masks.all_of(masks.causal(past), masks.padding(real))
            return masks.dense(allowed, rows, count, total, x.device)
        if given is not None and not narrow:
            return given
        assert self.attention.window is not None
        parts = [masks.window(self.attention.window, past)]
        if given is None:
            parts += [masks.causal(past)] + ([] if real is None else [masks.padding(real)])
        near = masks.dense(masks.all_of(*parts), rows, count, total, x.device)
        if isinstance(given, Tensor):
            return near & given
        if given is not None:
            raise ValueError(
                f"a decoder with a window ({self.attention.window}) takes a mask as a tensor only"
            )
        return near
