"""TextDecoder: tokens -> logits, with caches, optional cross-attention, and one door for bridges.

Letters: b rows, q new tokens, k tokens so far, n rows of a context (n divides b), d width of a token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mmtransformer.backbones.base import Decoder, DecoderState, vocabulary_error
from mmtransformer.layers import masks
from mmtransformer.layers.attention import Attention, KeyValue, Mask
from mmtransformer.layers.blocks import MLP, Activation, DecoderBlock, Norm, SwiGLU, make_dropout, make_norm
from mmtransformer.layers.positions import Rotary, sinusoidal
from mmtransformer.serialization.pretrained import Pretrained

Context = Tensor | Sequence[KeyValue]
"""What cross-attention reads: (n k d) tokens, or each block's keys and values from `TextDecoder.project_context`."""


class TextDecoder(Pretrained, Decoder):
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
        window: a token looks at so many tokens up to itself (Mistral); None = at all.
        nope_interval: the last of every so many blocks does not turn queries and keys (SmolLM3: 4); None = all do.
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
        window: int | None = None,
        nope_interval: int | None = None,
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
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 token, not {window}")
        if nope_interval is not None and (nope_interval < 1 or positions != "rotary"):
            raise ValueError(
                f'unrotated_every ({nope_interval}) must be at least 1, with positions "rotary", not "{positions}"'
            )
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
        self.window, self.nope_interval = window, nope_interval
        self.tied, self.embed_scale, self.pre_norm, self.dropout = tied, embed_scale, pre_norm, dropout

        make = partial(make_norm, norm, dim, norm_eps)
        self.tok_embed = nn.Embedding(vocab_size, dim)
        self.pos_embed = nn.Embedding(max_len, dim) if positions == "learned" else None
        width = dim // num_heads if head_dim is None else head_dim
        self.rotary = Rotary(width, theta=rope_theta, scaling=rope_scaling) if positions == "rotary" else None
        self.drop = make_dropout(dropout)
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
                    norm_eps=norm_eps,
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

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """The embeddings of tokens (b q), as they stand in the table: (b q d)."""
        try:
            return self.tok_embed(tokens)
        except IndexError as error:  # From CPUs only: on a GPU the look at the ids would cost a wait.
            raise vocabulary_error(tokens, self.vocab_size) from error

    def add_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads of embeddings (b q d) at positions (q) or (b q): (b q d)."""
        x = x if self.embed_scale == 1 else x * self.embed_scale
        if self.positions == "sinusoidal":
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
        contexts, context_mask = self._contexts(context), None
        if context_attention_mask is not None:
            context_mask = context_attention_mask.repeat_interleave(
                x.shape[0] // context_attention_mask.shape[0], 0
            )[:, None]
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            if before_block is not None:
                x = before_block(i, x)
            cache = None if state is None else state.caches[i]
            rotated = None if self.nope_interval and (i + 1) % self.nope_interval == 0 else rope
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
        narrow = self.window is not None and total > self.window
        if given is None and not narrow:
            if real is None:
                return "causal"
            if count == 1:
                return real[:, None, :]
            allowed = masks.all_of(masks.causal(past), masks.padding(real))
            return masks.dense(allowed, rows, count, total, x.device)
        if given is not None and not narrow:
            return given
        assert self.window is not None
        parts = [masks.window(self.window, past)]
        if given is None:
            parts += [masks.causal(past)] + ([] if real is None else [masks.padding(real)])
        near = masks.dense(masks.all_of(*parts), rows, count, total, x.device)
        if isinstance(given, Tensor):
            return near & given
        if given is not None:
            raise ValueError(f"a decoder with a window ({self.window}) takes a mask as a tensor only")
        return near
