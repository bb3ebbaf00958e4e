"""QFormer: learned queries that read an image, and a text that shares their self-attention (BLIP-2, arXiv:2301.12597).

    queries = QFormer()(visual_tokens)                      # (n 257 1408) -> (n 32 768)

Training needs several passes over the same images, and nothing is computed twice:

    visual = qformer.project_visual(visual_tokens)          # keys and values, once for all passes
    seen = qformer.encode_queries(visual)                          # the query pass: contrastive, and below
    text = qformer.encode_text(tokens, attention_mask)                  # text alone: contrastive
    caption = qformer.encode_text(tokens, attention_mask, seen)         # causal text over the queries: generation
    queries, text = qformer.encode_pair(visual, tokens, attention_mask) # queries and text see each other: matching

Shapes: n images, b rows of text (n divides b).
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from mmtransformer.batch.base import check_shape, vocabulary_error
from mmtransformer.connectors.qformer_block import Mode, QFormerBlock, mode_mask
from mmtransformer.layers.blocks import real_places
from mmtransformer.layers.cache import KeyValue
from mmtransformer.layers.config import check_sizes
from mmtransformer.layers.masks import Mask
from mmtransformer.serialization.pretrained import Pretrained

Visual = Tensor | Sequence[KeyValue]
"""What cross-attention reads: visual tokens (n p visual_dim), or their `QFormer.project_visual`."""


class QueryStates(NamedTuple):
    """What the query pass leaves: the queries (n l d), and each block's self-attention keys and values of them."""

    queries: Tensor
    memory: list[KeyValue]


class QFormer(Pretrained, nn.Module):
    """Learned queries that gather from an image what text is about; the width of BERT-base by default.

    Args:
        num_queries: l, how many.
        dim: width d of queries and text.
        depth: number of blocks.
        num_heads: attention heads.
        visual_dim: width of the visual tokens; 1408 is EVA-ViT-g's.
        cross_attention_frequency: the first of every so many blocks reads the image.
        mlp_dim: hidden width of the MLPs; None = 4 dim.
        vocab_size: number of token ids of the text stream; None = queries alone.
        max_len: most text tokens of a row.
        dropout: share of embeddings, attention weights and branch results dropped in training.
        norm_eps: of the norms; BERT's 1e-12.

    Raises:
        ValueError: if the numbers make no sense.
    """

    def __init__(
        self,
        num_queries: int = 32,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        visual_dim: int = 1408,
        *,
        cross_attention_frequency: int = 2,
        mlp_dim: int | None = None,
        vocab_size: int | None = None,
        max_len: int = 512,
        dropout: float = 0.1,
        norm_eps: float = 1e-12,
    ) -> None:
        super().__init__()
        if num_queries < 1 or depth < 1 or cross_attention_frequency < 1:
            raise ValueError(
                f"num_queries ({num_queries}), depth ({depth}) and cross_attention_frequency "
                f"({cross_attention_frequency}) must be at least 1"
            )
        check_sizes(dim=dim, visual_dim=visual_dim, mlp_dim=mlp_dim, vocab_size=vocab_size, max_len=max_len)
        self.num_queries, self.dim, self.depth, self.num_heads = num_queries, dim, depth, num_heads
        self.visual_dim, self.cross_attention_frequency = visual_dim, cross_attention_frequency
        self.mlp_dim = mlp_dim = 4 * dim if mlp_dim is None else mlp_dim
        self.vocab_size, self.max_len, self.dropout, self.norm_eps = vocab_size, max_len, dropout, norm_eps

        text = vocab_size is not None
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, dim))
        self.tok_embed = nn.Embedding(vocab_size, dim) if vocab_size is not None else None
        self.pos_embed = nn.Embedding(max_len, dim) if text else None
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            QFormerBlock(
                dim,
                num_heads,
                mlp_dim,
                visual_dim=visual_dim if i % cross_attention_frequency == 0 else None,
                text=text,
                dropout=dropout,
                norm_eps=norm_eps,
            )
            for i in range(depth)
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Queries and embeddings ~ N(0, 0.02), linear weights ~ N(0, 1 / their inputs), biases 0.

        BERT's 0.02 for linear weights too is about half of that at its width of 768, and too little at smaller ones:
        what images add to the queries is lost at first. On sixteen scenes to be learnt by heart, 32 wide, the
        contrastive loss was 0.1 after 20 steps; with 0.02 it was that of chance, 2.8. Queries that start equal, at zero
        say, get equal gradients and stay equal for ever.
        """
        nn.init.normal_(self.query_tokens, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)

    @property
    def cross_layers(self) -> list[int]:
        """Numbers of the blocks that read the image."""
        return list(range(0, self.depth, self.cross_attention_frequency))

    def without_text(self) -> "QFormer":
        """The queries' part alone, with copies of its weights: what stage 2 keeps of stage 1."""
        args: dict[str, Any] = {name: getattr(self, name) for name in inspect.signature(QFormer).parameters}
        args["vocab_size"] = None
        alone = QFormer(**args).to(self.query_tokens)
        own = self.state_dict()
        alone.load_state_dict({name: own[name] for name in alone.state_dict()})
        return alone.train(self.training)

    def freeze_last_text(self) -> None:
        """Freezes the last block's text MLP, whose result nobody reads where a text is an instruction only."""
        for part in (self.blocks[-1].mlp, self.blocks[-1].norm2):
            part.requires_grad_(False)  # pyright: ignore[reportCallIssue, reportOptionalMemberAccess]

    def project_visual(self, visual_tokens: Tensor) -> list[KeyValue]:
        """Each cross-attending block's keys and values of visual tokens (n p visual_dim): once, for all passes.

        Raises:
            ValueError: if the visual tokens have another width.
        """
        if visual_tokens.ndim != 3 or visual_tokens.shape[-1] != self.visual_dim:
            raise ValueError(
                f"visual tokens are (n p {self.visual_dim}) for this Q-Former, not {tuple(visual_tokens.shape)}"
            )
        visual_tokens = visual_tokens.to(self.query_tokens.dtype)
        layers = (block.cross_attn for _, block in self._each())
        return [layer.project_kv(visual_tokens) for layer in layers if layer is not None]

    def forward(
        self,
        visual: Visual,
        tokens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        visual_mask: Tensor | None = None,
    ) -> Tensor:
        """The queries after they have read the image, and an instruction if there is one (arXiv:2305.06500).

        Args:
            visual: visual tokens (n p visual_dim), or their `project_visual`.
            tokens: an instruction (b q) long that the queries see, padded on the right; None = the image alone.
            attention_mask: (b q) bool, True = a real token; None = all are.
            visual_mask: (n p) bool, which visual tokens are real; None = all.

        Returns:
            (n l d); with an instruction (b l d).
        """
        if tokens is None:
            return self.encode_queries(visual, visual_mask).queries
        found = self._visual(visual, visual_mask)
        each = _copies(tokens.shape[0], found[0].k.shape[0])
        seen = None if visual_mask is None else visual_mask.repeat_interleave(each, 0)[:, None]
        return self._joint(found, tokens, attention_mask, keep_text=False, visual_mask=seen)[0]

    def encode_queries(self, visual: Visual, visual_mask: Tensor | None = None) -> QueryStates:
        """The query pass: the queries (n l d), and their self-attention keys and values for `encode_text`.

        Args:
            visual: visual tokens (n p visual_dim), or their `project_visual`.
            visual_mask: (n p) bool, which visual tokens are real; None = all.
        """
        found, real = self._visual(visual, visual_mask), None if visual_mask is None else visual_mask[:, None]
        n, memory = found[0].k.shape[0], []
        x = self.norm(self.query_tokens)
        if self.training and self.dropout:
            x = self.drop(x.expand(n, -1, -1))
        for i, block in self._each():
            kv = block.attn.project_kv(x)
            memory.append(kv)
            # Until they read the first image, queries are the same for all: the first block attends once.
            x = block.attend(x, kv, None).expand(n, -1, -1)
            x = block.finish_queries(x, found.get(i), real)
        return QueryStates(x, memory)

    def encode_text(
        self, tokens: Tensor, attention_mask: Tensor | None = None, seen: QueryStates | None = None
    ) -> Tensor:
        """The text pass: each token sees the whole text ("unimodal"), or with `seen` queries and earlier tokens.

        Args:
            tokens: (b q) long, padded on the right.
            attention_mask: (b q) bool, True = a real token; None = all are.
            seen: the query pass of n images, n dividing b: it makes the text causal ("multimodal_causal").

        Returns:
            (b q d); what stands at padding means nothing.

        Raises:
            ValueError: if the text is too long, or this Q-Former has no text stream.
        """
        x = self.drop(self.norm(self._embed(tokens, attention_mask)))
        mask: Mask | None = (
            None if attention_mask is None else attention_mask[:, None, :].expand(-1, tokens.shape[1], -1)
        )
        if seen is not None:  # Every token then sees all queries, and padding stands behind what may be seen.
            mask = "causal"
        real = real_places(attention_mask)
        for i, block in self._each():
            kv = block.attn.project_kv(x)
            if seen is not None:
                kv = _in_front(seen.memory[i], kv)
            x = block.finish_text(block.attend(x, kv, mask), real)
        return x

    def encode_pair(
        self, visual: Visual, tokens: Tensor, attention_mask: Tensor | None = None, mode: Mode = "bidirectional"
    ) -> tuple[Tensor, Tensor]:
        """Queries and text of b rows in one of the three modes.

        Args:
            visual: of n images, n dividing b: visual tokens, or their `project_visual`.
            tokens: (b q) long, padded on the right.
            attention_mask: (b q) bool, True = a real token; None = all are.
            mode: who sees whom; see `mode_mask`.

        Returns:
            Queries (b l d) and text (b q d).

        Raises:
            ValueError: for an unknown mode, a text that is too long, or rows that do not divide.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode}")
        found = self._visual(visual)
        expand_size = _copies(tokens.shape[0], found[0].k.shape[0])
        if mode == "bidirectional":
            return self._joint(found, tokens, attention_mask, keep_text=True)
        seen = self.encode_queries(
            [*found.values()]
        )  # The queries see no text here, so rows that share an image share them.
        text = self.encode_text(tokens, attention_mask, seen if mode == "multimodal_causal" else None)
        return seen.queries.repeat_interleave(expand_size, 0), text

    def _joint(
        self,
        found: dict[int, KeyValue],
        tokens: Tensor,
        attention_mask: Tensor | None,
        *,
        keep_text: bool,
        visual_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        b, l = tokens.shape[0], self.num_queries
        x = torch.cat((self.query_tokens.expand(b, -1, -1), self._embed(tokens, attention_mask)), dim=1)
        x = self.drop(self.norm(x))
        mask, real = (
            None if attention_mask is None else mode_mask("bidirectional", l, attention_mask),
            real_places(attention_mask),
        )
        for i, block in self._each():
            kv = block.attn.project_kv(x)
            if i + 1 == self.depth and not keep_text:  # Nobody reads the text's last state.
                mask = None if mask is None else mask[:, :l]
                queries = block.attend(x[:, :l], kv, mask)
                return block.finish_queries(queries, found.get(i), visual_mask), x[:, l:]
            queries, text = block.attend(x, kv, mask).split((l, tokens.shape[1]), dim=1)
            queries = block.finish_queries(queries, found.get(i), visual_mask)
            x = torch.cat((queries, block.finish_text(text, real)), dim=1)
        return x[:, :l], x[:, l:]

    def attention_map(self, record: dict[str, Tensor]) -> Tensor:
        """What each query holds of each visual token, at most 1 in sum: (b l p), of any query or joint pass.

        It is followed from block to block as in attention rollout (arXiv:2005.00928): half of a query is what it was
        before, half is what it takes in.

        Args:
            record: the weights of all its attention layers, from `record_attention`.
        """
        l, crossing = self.num_queries, record["blocks.0.cross_attn"].mean(1)
        held = torch.zeros_like(crossing)
        for i in range(self.depth):
            among = record[f"blocks.{i}.attn"].mean(1)[:, :l, :l]
            held = (held + among @ held) / 2
            if i in self.cross_layers:
                held = (held + record[f"blocks.{i}.cross_attn"].mean(1)) / 2
        return held

    def _each(self) -> Iterator[tuple[int, QFormerBlock]]:
        return enumerate(cast(Iterable[QFormerBlock], self.blocks))

    def _visual(self, visual: Visual, visual_mask: Tensor | None = None) -> dict[int, KeyValue]:
        projected = self.project_visual(visual) if isinstance(visual, Tensor) else visual
        layers = self.cross_layers
        if len(projected) != len(layers):
            raise ValueError(
                f"keys and values for {len(projected)} blocks were given, but {len(layers)} read the image"
            )
        check_shape(visual_mask, "visual_mask", projected[0].k.shape[::2], "visual tokens")
        return dict(zip(layers, projected, strict=True))

    def _embed(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        check_shape(attention_mask, "attention_mask", tokens.shape, "text")
        if self.tok_embed is None or self.pos_embed is None:
            raise ValueError("this Q-Former has no text stream: build it with vocab_size")
        if tokens.shape[1] > self.max_len:
            raise ValueError(f"a text of {tokens.shape[1]} tokens, but this Q-Former has {self.max_len} positions")
        try:
            return self.tok_embed(tokens) + self.pos_embed.weight[: tokens.shape[1]]
        except IndexError as error:
            assert self.vocab_size is not None
            raise vocabulary_error(tokens, self.vocab_size, "a Q-Former") from error


def _copies(rows: int, images: int) -> int:
    if rows % images:
        raise ValueError(f"rows of text ({rows}) must be a multiple of images ({images})")
    return rows // images


def _in_front(memory: KeyValue, kv: KeyValue) -> KeyValue:
    expand_size = _copies(kv.k.shape[0], memory.k.shape[0])
    if expand_size > 1:
        memory = KeyValue(memory.k.repeat_interleave(expand_size, 0), memory.v.repeat_interleave(expand_size, 0))
    return KeyValue(torch.cat((memory.k, kv.k), dim=2), torch.cat((memory.v, kv.v), dim=2))
