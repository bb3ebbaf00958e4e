"""TextDecoder: tokens -> logits, with caches, optional cross-attention, and a hook before each block.

Shapes: n rows of a context (n divides b).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmtransformer.backbones.base import Decoder, DecoderState, check_tokens
from mmtransformer.backbones.encoder import MLMHead
from mmtransformer.batch.base import check_shape, vocabulary_error
from mmtransformer.layers import masks
from mmtransformer.layers.attention import Attention
from mmtransformer.layers.blocks import MLP, DecoderBlock, SwiGLU, make_dropout, make_norm
from mmtransformer.layers.cache import KeyValue
from mmtransformer.layers.config import (
    AttentionConfig,
    MLPConfig,
    NormConfig,
    PositionConfig,
    check_configs,
    check_sizes,
)
from mmtransformer.layers.kernels import capped
from mmtransformer.layers.linear import Linear, linear
from mmtransformer.layers.masks import Mask
from mmtransformer.layers.positions import RotaryEmbedding, sinusoidal
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
        context_dim: width of the context's tokens; None = a language model without cross-attention.
        cross_attn_every_n_layers: the last of every so many blocks reads the context.
        attention: heads, biases, window.
        mlp: activation and biases of the MLPs.
        norm: which norms, and where.
        positions: how tokens know where they stand.
        tied: whether the head's weight is the embedding.
        logit_softcap: logits s become logit_softcap * tanh(s / logit_softcap) (Gemma 2: 30); None = they stay.
        mlm_head: whether the head is that of BERT's MLM: a dense layer, the MLPs' activation and a norm before its
            weight, and a bias after it (BLIP's text decoder).
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
        context_dim: int | None = None,
        cross_attn_every_n_layers: int = 1,
        attention: AttentionConfig = AttentionConfig(),
        mlp: MLPConfig = MLPConfig(),
        norm: NormConfig = NormConfig(),
        positions: PositionConfig = PositionConfig(),
        tied: bool = True,
        logit_softcap: float | None = None,
        mlm_head: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(
            vocab_size=vocab_size,
            dim=dim,
            num_heads=num_heads,
            max_len=max_len,
            mlp_dim=mlp_dim,
            context_dim=context_dim,
        )
        check_sizes(0, depth=depth)
        check_configs(attention=(attention, AttentionConfig), mlp=(mlp, MLPConfig), norm=(norm, NormConfig),
                      positions=(positions, PositionConfig))  # fmt: skip
        if not 1 <= (every := cross_attn_every_n_layers) <= max(depth, 1):
            raise ValueError(f"cross_attn_every_n_layers ({every}) must be between 1 and depth ({depth})")
        self.vocab_size, self.dim, self.depth, self.num_heads = vocab_size, dim, depth, num_heads
        self.max_len, self.mlp_dim = max_len, (mlp_dim := 4 * dim if mlp_dim is None else mlp_dim)
        if mlm_head and logit_softcap is not None:
            raise ValueError(f"logit_softcap ({logit_softcap}) is for a head of one layer: mlm_head must be false")
        if mlm_head and mlp.activation in ("swiglu", "geglu_tanh"):
            raise ValueError(f'mlm_head=True has the activation of the MLPs, which cannot be "{mlp.activation}"')
        self.context_dim, self.cross_attn_every_n_layers = context_dim, every
        self.tied, self.logit_softcap, self.mlm_head, self.dropout = tied, logit_softcap, mlm_head, dropout
        self.attention, self.mlp, self.norm, self.positions = attention, mlp, norm, positions

        make = partial(make_norm, norm.kind, dim, norm.eps)
        self.tok_embed = nn.Embedding(vocab_size, dim)
        self.pos_embed = nn.Embedding(max_len, dim) if positions.kind == "learned" else None
        head_dim = attention.head_dim or dim // num_heads
        turns = positions.kind == "rotary"
        self.embed_norm = make() if norm.embed else nn.Identity()
        self.rotary = RotaryEmbedding(head_dim, theta=positions.theta, scaling=positions.scaling) if turns else None
        self.drop = make_dropout(dropout)
        self.blocks = nn.ModuleList(
            DecoderBlock(
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
                    softcap=attention.softcap,
                    scale_dim=attention.scale_dim,
                ),
                self._mlp(),
                make,
                cross_attn=self._cross_attention(i),
                norm_first=norm.pre,
                post_norm=norm.post,
                dropout=dropout,
            )
            for i in range(depth)
        )
        self.last_norm = make() if norm.pre else nn.Identity()
        self.mlm_proj = None
        if mlm_head:
            assert mlp.activation not in ("swiglu", "geglu_tanh")
            self.mlm_proj = MLMHead(dim, vocab_size, mlp.activation, norm.eps)
        self.lm_head = Linear(dim, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.tok_embed.weight
        self.init_weights()

    def _mlp(self) -> nn.Module:
        kind = self.mlp.activation
        if kind == "swiglu" or kind == "geglu_tanh":
            return SwiGLU(self.dim, self.mlp_dim, activation="silu" if kind == "swiglu" else "gelu_tanh")
        return MLP(self.dim, self.mlp_dim, activation=kind, bias=self.mlp.bias)

    def _cross_attention(self, i: int) -> Attention | None:
        if self.context_dim is None or (i + 1) % self.cross_attn_every_n_layers:
            return None
        # No dropout here: its mask is as large as the weights over a whole image; drop visual tokens instead.
        return Attention(self.dim, self.num_heads, context_dim=self.context_dim)

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
        """Each cross-attending block's keys and values of a context (n k d): once an image, not once a token."""
        layers = (block.cross_attn for block in self.blocks)
        return [layer.project_kv(context) for layer in layers if isinstance(layer, Attention)]

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """The embeddings of tokens (b q), as they stand in the table but for their scale: (b q d)."""
        try:
            x = self.tok_embed(tokens)
        except IndexError as error:
            raise vocabulary_error(tokens, self.vocab_size) from error
        # Rounded as the weights are: Gemma was trained so.
        scale = self.positions.embed_scale
        return x if scale == 1 else x * x.new_full((), scale)

    @property
    def embedding_scale(self) -> float:
        """What `embed_tokens` multiplies the table's rows by."""
        return self.positions.embed_scale

    def add_positions(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """What the first block reads of embeddings (b q d), whose position ids are (q) or (b q): (b q d)."""
        if self.positions.kind == "sinusoidal":
            x = x + sinusoidal(position_ids, self.dim).to(x.dtype)
        elif self.pos_embed is not None:
            x = x + self.pos_embed(position_ids)
        return self.embed_norm(x)

    def forward(
        self,
        tokens: Tensor,
        context: Context | None = None,
        *,
        attention_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        mask: Mask | None = None,
        state: DecoderState | None = None,
        before_block: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Hidden states of tokens, to be given to `head`: as `Decoder.forward`, and with a context.

        `context` is what cross-attention reads, its n rows dividing b; `context_mask` (n k) bool, True = a
        real token of it, None = all are. A state remembers the context of its first tokens, which later ones read.

        Returns:
            (b q d), normed.

        Raises:
            ValueError: as `Decoder.forward`, or if a context is missing, or given to a decoder that cannot read it.
        """
        if attention_mask is not None or tokens.ndim != 2 or tokens.dtype != torch.long:
            attention_mask = check_tokens(tokens, attention_mask)
        position_ids = self.position_ids(tokens, attention_mask, document_ids=document_ids, state=state)
        if document_ids is not None:
            mask = self.document_mask(document_ids, attention_mask, mask)
        return self.forward_embeds(
            self.add_positions(self.embed_tokens(tokens), position_ids),
            position_ids,
            context,
            attention_mask=attention_mask,
            context_mask=context_mask,
            mask=mask,
            state=state,
            before_block=before_block,
        )

    def forward_embeds(
        self,
        x: Tensor,
        position_ids: Tensor,
        context: Context | None = None,
        *,
        attention_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        mask: Mask | None = None,
        bidirectional: Tensor | None = None,
        state: DecoderState | None = None,
        before_block: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """As `forward`, from embeddings (b q d) with position ids (q) or (b q): for connectors with tokens in front.

        `bidirectional` (b q) bool are tokens that see each other in both directions, in place of a `mask`: images, a
        prompt. None = there are none. Not with tokens in the state already.
        """
        if state is not None and state.context is not None and context is None:
            context, context_mask = state.context, state.context_mask
        if (context is None) != (self.context_dim is None):
            has, given = ("has no", "a context was") if self.context_dim is None else ("has", "no context was")
            raise ValueError(f"this decoder {has} cross-attention, but {given} given")
        if isinstance(context, Tensor):
            if context.ndim != 3 or context.shape[-1] != self.context_dim:
                raise ValueError(f"a context is (n k {self.context_dim}), not {tuple(context.shape)}")
            context = self.project_context(context)
        if context is not None and len(context) != (count := self.depth // self.cross_attn_every_n_layers):
            raise ValueError(f"keys and values for {len(context)} blocks were given, but {count} read a context")
        contexts, seen = iter(context or ()), None
        if context is not None and context_mask is not None:
            check_shape(context_mask, "context_mask", context[0].k.shape[::2], "context")
            seen = context_mask.repeat_interleave(x.shape[0] // context_mask.shape[0], 0)[:, None]
        if state is not None:
            if not state.length and context is not None:
                state.context, state.context_mask = list(context), context_mask
            state.advance(x.shape[0], position_ids, attention_mask)
        full = self.make_mask(x, attention_mask, mask, state, None, bidirectional)
        window, interval = self.attention.window, self.attention.full_interval
        narrow = full if window is None else self.make_mask(x, attention_mask, mask, state, window, bidirectional)
        rope = None if self.rotary is None else self.rotary(position_ids)
        nope_interval = self.positions.nope_interval
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            if before_block is not None:
                x = before_block(i, x)
            x = block(
                x,
                None if block.cross_attn is None else next(contexts),
                mask=full if interval and (i + 1) % interval == 0 else narrow,
                context_mask=seen,
                rope=None if nope_interval and (i + 1) % nope_interval == 0 else rope,
                cache=None if state is None else state.caches[i],
            )
        return self.last_norm(x)

    def make_mask(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        mask: Mask | None,
        state: DecoderState | None,
        window: int | None,
        bidirectional: Tensor | None = None,
    ) -> Mask | None:
        """Which keys the new tokens' queries may look at.

        Args:
            x: the new tokens (b q d).
            attention_mask: which of them are real (b q); None = all.
            mask: in place of the causal mask.
            state: all tokens so far, the new ones among them.
            window: how many tokens a token looks at, up to itself; None = all.
            bidirectional: (b q) bool, tokens that see each other in both directions, whatever the window.

        Returns:
            The mask given, or causal and without padding; within the window where there is one.

        Raises:
            ValueError: if there is a window, and a mask that is not a tensor.
        """
        rows, count = x.shape[:2]
        past: int | Tensor = 0
        if state is not None:
            attention_mask = state.attention_mask
            past = state.length - count if state.cache_position is None else state.cache_position
        total = attention_mask.shape[1] if attention_mask is not None else count + int(past)
        narrow = window if window is not None and total > window else None
        if narrow is None and mask is not None:
            return mask
        if narrow is None and attention_mask is None and bidirectional is None:
            return "causal"
        if narrow is None and count == 1 and attention_mask is not None:
            return attention_mask[:, None, :]
        allowed = []
        if narrow is not None:
            allowed.append(masks.window(narrow, past))
        if mask is None:
            allowed.append(masks.causal(past))
        if bidirectional is not None:
            allowed = [masks.any_of(masks.all_of(*allowed), masks.bidirectional(bidirectional))]
        if mask is None and attention_mask is not None:
            allowed.append(masks.padding(attention_mask))
        found = masks.dense(masks.all_of(*allowed), rows, count, total, x.device)
        if mask is None:
            return found
        if not isinstance(mask, Tensor):
            raise ValueError(f"a decoder with a window ({window}) takes a mask as a tensor only")
        return found & mask

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the next token: (... d) -> (... vocab_size)."""
        if self.mlm_proj is not None:
            return self.lm_head(self.mlm_proj.transform(hidden)) + self.mlm_proj.bias
        logits = self.lm_head(hidden)
        return logits if self.logit_softcap is None else capped(logits, self.logit_softcap)

    def logits(self, hidden: Tensor, table: Tensor) -> Tensor:
        """Logits of other tokens, whose rows of the head are given: (... d), (n d) -> (... n)."""
        hidden = hidden if self.mlm_proj is None else self.mlm_proj.transform(hidden)
        return capped(linear(hidden, table), self.logit_softcap)

    @property
    def embedding_weights(self) -> tuple[Tensor, Tensor]:
        """The weights of the embedding and of the head, each (vocab_size d): the same tensor where they are tied."""
        return self.tok_embed.weight, self.lm_head.weight
