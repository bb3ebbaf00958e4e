"""TextDecoder: tokens -> logits, with caches, optional cross-attention, and one door for bridges.

Letters: b rows, q new tokens, k tokens so far, n rows of a context (n divides b), d width of a token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from mmtransformer import masks
from mmtransformer.attention import Attention, KeyValue, KVCache, Mask, Rope
from mmtransformer.blocks import MLP, Activation, DecoderBlock, Norm, SwiGLU, make_norm
from mmtransformer.positions import Rotary, sinusoidal
from mmtransformer.pretrained import Pretrained

Context = Tensor | Sequence[KeyValue]
"""What cross-attention reads: (n k d) tokens, or each block's keys and values from `TextDecoder.project_context`."""


class DecoderState:
    """What decoding remembers of the tokens so far: a cache a block, the padding, and each row's next position.

    Args:
        depth: number of blocks.
        max_len: most tokens, prompt included.
    """

    def __init__(self, depth: int, max_len: int) -> None:
        self.caches = [KVCache(max_len) for _ in range(depth)]
        self.valid: Tensor | None = None
        """(b k) bool; None as long as no token is padding."""
        self.positions: Tensor | None = None
        """(b) long: the position that a row's next token gets."""

    @property
    def length(self) -> int:
        """Tokens so far, padding included."""
        return self.caches[0].length

    def reorder(self, rows: Tensor) -> None:
        """Keeps the given rows (b) long, in their order; a row may be named more than once."""
        for cache in self.caches:
            cache.reorder(rows)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, rows)
        if self.positions is not None:
            self.positions = self.positions.index_select(0, rows)


class TextDecoder(Pretrained, nn.Module):
    """A causal decoder: GPT-2's shape by default (Radford et al. 2019), Llama's with other arguments.

    Args:
        vocab_size: number of token ids.
        dim: width d of a token.
        depth: number of blocks.
        num_heads: attention heads.
        max_len: most tokens of a row, prompt included; the size of the table where positions are learned.
        mlp_dim: hidden width of the MLPs; None = 4 dim.
        cross_dim: width of the context's tokens; None = a language model without cross-attention.
        cross_every: the last of every so many blocks reads the context.
        num_kv_heads: key/value heads (grouped-query attention); None = num_heads.
        head_dim: width of one head; None = dim / num_heads.
        norm: "layer" (GPT-2, OPT) or "rms" (Llama).
        norm_eps: of the norms; GPT-2's 1e-5.
        mlp: "swiglu" (Llama) or the activation of a plain MLP; "gelu_tanh" is GPT-2's, "relu" OPT's.
        positions: "learned" (GPT-2, OPT), "rotary" (Llama) or "sinusoidal" (the 2017 Transformer).
        rope_theta: base of the rotary wave lengths.
        rope_scaling: see `positions.Rotary`.
        bias: biases in attention and MLP: "all" (GPT-2, OPT), "qkv" (Qwen2) or "none" (Llama).
        qk_norm: norm of each head's queries and keys (Qwen3: "rms").
        tied: whether the head's weight is the embedding.
        embed_scale: what embeddings are multiplied by; sqrt(dim) in the 2017 Transformer.
        pre_norm: norm before each branch, and a last one; False = after each sum, and no last one (2017, OPT-350m).
        dropout: share of embeddings, self-attention weights and branch results dropped in training.

    Raises:
        ValueError: if the numbers do not fit.
    """

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
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        norm: Norm = "layer",
        norm_eps: float = 1e-5,
        mlp: Activation | Literal["swiglu"] = "gelu_tanh",
        positions: Literal["learned", "rotary", "sinusoidal"] = "learned",
        rope_theta: float = 10_000.0,
        rope_scaling: dict | None = None,
        bias: Literal["all", "qkv", "none"] = "all",
        qk_norm: Literal["rms", "layer"] | None = None,
        tied: bool = True,
        embed_scale: float = 1.0,
        pre_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if positions not in ("learned", "rotary", "sinusoidal"):
            raise ValueError(f'positions must be "learned", "rotary" or "sinusoidal", not "{positions}"')
        if bias not in ("all", "qkv", "none"):
            raise ValueError(f'bias must be "all", "qkv" or "none", not "{bias}"')
        if not 1 <= cross_every <= max(depth, 1):
            raise ValueError(f"cross_every ({cross_every}) must be between 1 and depth ({depth})")
        self.vocab_size, self.dim, self.depth, self.num_heads, self.max_len = (
            vocab_size,
            dim,
            depth,
            num_heads,
            max_len,
        )
        self.mlp_dim = mlp_dim = 4 * dim if mlp_dim is None else mlp_dim
        self.cross_dim, self.cross_every = cross_dim, cross_every
        self.num_kv_heads, self.head_dim, self.qk_norm = num_kv_heads, head_dim, qk_norm
        self.norm, self.norm_eps, self.mlp, self.bias = norm, norm_eps, mlp, bias
        self.positions, self.rope_theta, self.rope_scaling = positions, rope_theta, rope_scaling
        self.tied, self.embed_scale, self.pre_norm, self.dropout = tied, embed_scale, pre_norm, dropout

        make = partial(make_norm, norm, dim, norm_eps)
        self.tok_embed = nn.Embedding(vocab_size, dim)
        self.pos_embed = nn.Embedding(max_len, dim) if positions == "learned" else None
        width = dim // num_heads if head_dim is None else head_dim
        self.rotary = Rotary(width, theta=rope_theta, scaling=rope_scaling) if positions == "rotary" else None
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            DecoderBlock(
                dim,
                Attention(
                    dim,
                    num_heads,
                    num_kv_heads=num_kv_heads,
                    head_dim=head_dim,
                    bias=bias != "none",
                    out_bias=bias == "all",
                    qk_norm=qk_norm,
                    dropout=dropout,
                ),
                SwiGLU(dim, mlp_dim)
                if mlp == "swiglu"
                else MLP(dim, mlp_dim, activation=mlp, bias=bias == "all"),
                make,
                cross_attn=self._cross_attention(i),
                pre_norm=pre_norm,
                dropout=dropout,
            )
            for i in range(depth)
        )
        self.last_norm = make() if pre_norm else nn.Identity()
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

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads: tokens (b q) at positions (q) or (b q) -> (b q d)."""
        try:
            x = self.tok_embed(tokens)
        except IndexError as error:  # From CPUs only: on a GPU the look at the ids would cost a wait.
            raise ValueError(
                f"token ids from {int(tokens.min())} to {int(tokens.max())} were given to a decoder with a "
                f"vocabulary of {self.vocab_size}: model and tokenizer do not belong together"
            ) from error
        x = x if self.embed_scale == 1 else x * self.embed_scale
        if self.positions == "sinusoidal":
            return x + sinusoidal(positions, self.dim).to(x.dtype)
        return x if self.pos_embed is None else x + self.pos_embed(positions)

    def forward(
        self,
        tokens: Tensor,
        context: Context | None = None,
        *,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        segments: Tensor | None = None,
        mask: Mask | None = None,
        state: DecoderState | None = None,
        before_block: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Hidden states of tokens, to be given to `head`.

        Args:
            tokens: (b q) long.
            context: what cross-attention reads, its rows dividing b.
            valid: (b q) bool, True = a real token; None = all are. Padding may stand on either side.
            context_valid: (n k) bool, True = a real token of the context; None = all are.
            segments: (b q) long, the number of each token's document in a packed row: tokens see their own document
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
        if segments is None:
            positions = self._positions(tokens, valid, state)
        else:
            positions, mask = self._packed(segments, valid, mask, state)
        return self.run(
            self.embed(tokens, positions),
            positions,
            context,
            valid=valid,
            context_valid=context_valid,
            mask=mask,
            state=state,
            before_block=before_block,
        )

    def run(
        self,
        x: Tensor,
        positions: Tensor,
        context: Context | None = None,
        *,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
        mask: Mask | None = None,
        state: DecoderState | None = None,
        before_block: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """As `forward`, from embeddings (b q d) at positions (q) or (b q): for bridges with other tokens in front."""
        if mask is None:
            mask = self._mask(x, valid, state)
        rope: Rope | None = self.rotary(positions) if self.rotary is not None else None
        contexts, context_mask = self._contexts(context), None
        if context_valid is not None:
            context_mask = context_valid.repeat_interleave(x.shape[0] // context_valid.shape[0], 0)[:, None]
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            if before_block is not None:
                x = before_block(i, x)
            cache = None if state is None else state.caches[i]
            x = block(x, contexts.get(i), mask=mask, context_mask=context_mask, rope=rope, cache=cache)
        if state is not None:
            self._remember(state, positions, valid, x)
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

    def new_state(self, max_len: int | None = None) -> DecoderState:
        """An empty state for decoding up to `max_len` tokens.

        Raises:
            ValueError: if the decoder has fewer positions.
        """
        max_len = self.max_len if max_len is None else max_len
        if max_len > self.max_len:
            raise ValueError(
                f"{max_len} tokens were asked for, but this decoder has {self.max_len} positions"
            )
        return DecoderState(self.depth, max_len)

    def _positions(self, tokens: Tensor, valid: Tensor | None, state: DecoderState | None) -> Tensor:
        past = 0 if state is None else state.length
        if past + tokens.shape[1] > self.max_len:
            raise ValueError(
                f"{past + tokens.shape[1]} tokens were given, but this decoder has {self.max_len} positions"
            )
        if valid is not None:
            counted = (valid.long().cumsum(1) - 1).clamp(min=0)
            return counted if state is None or state.positions is None else counted + state.positions[:, None]
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        if state is None or state.positions is None:
            return steps
        return state.positions[:, None] + steps

    def _packed(
        self, segments: Tensor, valid: Tensor | None, mask: Mask | None, state: DecoderState | None
    ) -> tuple[Tensor, Tensor]:
        if mask is not None or state is not None:
            raise ValueError("segments make their own mask: give neither a mask nor a state with them")
        positions = masks.places(segments)
        if segments.device.type == "cpu" and (longest := int(positions.max()) + 1) > self.max_len:
            raise ValueError(
                f"a packed document has {longest} tokens, but this decoder has {self.max_len} positions"
            )
        allowed = masks.all_of(masks.causal(), masks.segments(segments))
        if valid is not None:
            allowed = masks.all_of(allowed, masks.padding(valid))
        rows, count = segments.shape
        return positions, masks.dense(allowed, rows, count, count, segments.device)

    def _mask(self, x: Tensor, valid: Tensor | None, state: DecoderState | None) -> Mask | None:
        past = 0 if state is None else state.length
        known = None if state is None else state.valid
        if valid is None and known is None:
            return "causal"
        rows, count = x.shape[:2]
        if valid is None:
            valid = torch.ones(rows, count, dtype=torch.bool, device=x.device)
        if past:
            if known is None:
                known = torch.ones(rows, past, dtype=torch.bool, device=x.device)
            valid = torch.cat((known, valid), dim=1)
        if count == 1:
            return valid[:, None, :]
        allowed = masks.all_of(masks.causal(past), masks.padding(valid))
        return masks.dense(allowed, rows, count, past + count, x.device)

    @staticmethod
    def _remember(state: DecoderState, positions: Tensor, valid: Tensor | None, x: Tensor) -> None:
        rows, count = x.shape[:2]
        if valid is not None or state.valid is not None:
            new = torch.ones(rows, count, dtype=torch.bool, device=x.device) if valid is None else valid
            past = state.length - count
            known = state.valid
            if known is None:
                known = torch.ones(rows, past, dtype=torch.bool, device=x.device)
            state.valid = torch.cat((known, new), dim=1)
        following = (positions + 1).expand(rows, count)
        if valid is not None:  # Padding takes no position, also where all of a row's new tokens are padding.
            following = following.masked_fill(~valid, 0)
        last = following.max(dim=-1).values
        state.positions = last if state.positions is None else last.maximum(state.positions)
