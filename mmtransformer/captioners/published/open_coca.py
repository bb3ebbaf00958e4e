"""OpenCoCa: CoCa as open_clip built and trained it (arXiv:2205.01917; it differs from the paper in where norms stand).

Shapes: n rows of text, r of each of the b samples, side by side; l pooled queries, e width of pooled queries and text,
gh gw rows and columns of patches.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.backbones.base import DecoderState, repeat_rows
from mmtransformer.backbones.vit import ViT
from mmtransformer.batch import CaptionBatch
from mmtransformer.batch.base import vocabulary_error
from mmtransformer.captioners.attribution import mean_weights, on_patches, through_latents
from mmtransformer.captioners.base import Captioner
from mmtransformer.layers import masks
from mmtransformer.layers.attention import Attention
from mmtransformer.layers.blocks import MLP, DecoderBlock
from mmtransformer.layers.cache import KeyValue
from mmtransformer.layers.config import Activation
from mmtransformer.layers.linear import Linear
from mmtransformer.layers.masks import Mask
from mmtransformer.layers.modes import evaluation_mode
from mmtransformer.layers.record import record_attention

_TEXT = ("tok_embed", "pos_embed", "text_blocks", "blocks", "last_norm", "lm_head")


class CrossBlock(nn.Module):
    """Attention to a normed context, then an MLP, each with a residual.

    Args:
        dim: width of a token, and of the context's.
        num_heads: attention heads.
        activation: of the MLP.
        norm_eps: of the norms.
    """

    def __init__(self, dim: int, num_heads: int, activation: Activation, norm_eps: float) -> None:
        super().__init__()
        self.norm1, self.norm_context, self.norm2 = (nn.LayerNorm(dim, eps=norm_eps) for _ in range(3))
        self.attn, self.mlp = Attention(dim, num_heads), MLP(dim, 4 * dim, activation=activation)

    def project_context(self, context: Tensor) -> KeyValue:
        """Keys and values of a context (n k d): once an image."""
        return self.attn.project_kv(self.norm_context(context))

    def forward(self, x: Tensor, context: KeyValue) -> Tensor:
        """(b q d) -> (b q d)."""
        x = x + self.attn(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))


class OpenCoCa(Captioner):
    """A vision encoder with attention pooling, a text Transformer, and above it one that reads the image.

    Query 0 of the pool is the image's vector for contrast, the others are what captions read. It trains on the caption
    loss; its vectors of images and texts are there for search, and what only they need is frozen.

    open_clip hides from a text the token behind each "!" (id 0, its padding): here padding is what the batch says it
    is, so that texts with "!" have other logits.

    Args:
        vision: the vision encoder; its tokens are pooled as they leave the last block.
        vocab_size: number of token ids.
        dim: width e of text and pooled queries.
        depth: blocks of the text Transformer.
        decoder_depth: blocks of the upper one, each followed by one that reads the image.
        num_heads: heads of both.
        max_len: most tokens of a text.
        num_queries: queries of the pool, the contrast's included.
        pool_heads: heads of the pool.
        activation: of the text's MLPs.
        norm_eps: of all norms behind the vision encoder.
        freeze_vision: see `Captioner`.

    Raises:
        ValueError: if there is no query for captions.
    """

    def __init__(
        self,
        vision: ViT,
        vocab_size: int = 49408,
        dim: int = 512,
        depth: int = 12,
        decoder_depth: int = 12,
        num_heads: int = 8,
        *,
        max_len: int = 76,
        num_queries: int = 256,
        pool_heads: int = 8,
        activation: Activation = "gelu",
        norm_eps: float = 1e-5,
        freeze_vision: bool = False,
    ) -> None:
        super().__init__(vision, freeze_vision=freeze_vision)
        if num_queries < 2:
            raise ValueError(f"num_queries ({num_queries}) must be at least 2: the first is the contrast's")
        self._vocab_size, self.dim, self.depth, self.decoder_depth = vocab_size, dim, depth, decoder_depth
        self.num_heads, self._max_len, self.num_queries, self.pool_heads = num_heads, max_len, num_queries, pool_heads
        self.activation: Activation = activation
        self.norm_eps = norm_eps
        norm = partial(nn.LayerNorm, dim, eps=norm_eps)

        def block() -> DecoderBlock:
            return DecoderBlock(Attention(dim, num_heads), MLP(dim, 4 * dim, activation=activation), norm)

        self.queries = nn.Parameter(torch.randn(num_queries, dim) * dim**-0.5)
        self.norm_queries, self.norm_visual = norm(), nn.LayerNorm(vision.dim, eps=norm_eps)
        self.pool, self.norm_pooled = Attention(dim, pool_heads, context_dim=vision.dim), norm()
        self.image_proj = Linear(dim, dim, bias=False)
        self.tok_embed = nn.Embedding(vocab_size, dim)
        self.pos_embed = nn.Parameter(0.01 * torch.randn(max_len + 1, dim))
        self.end = nn.Parameter(0.01 * torch.randn(dim))
        self.text_blocks = nn.ModuleList(block() for _ in range(depth))
        self.text_norm, self.text_proj = norm(), Linear(dim, dim, bias=False)
        self.blocks = nn.ModuleList(block() for _ in range(decoder_depth))
        self.cross_blocks = nn.ModuleList(
            CrossBlock(dim, num_heads, activation, norm_eps) for _ in range(decoder_depth)
        )
        self.last_norm, self.lm_head = norm(), Linear(dim, vocab_size, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(0.07).log().neg())
        for parameter in self.contrastive_parameters():
            parameter.requires_grad_(False)

    def contrastive_parameters(self) -> list[nn.Parameter]:
        """What no caption depends on: it is read for vectors of images and texts."""
        parts = (self.image_proj, self.text_norm, self.text_proj)
        return [self.end, self.logit_scale, *(parameter for part in parts for parameter in part.parameters())]

    @property
    def decoder(self) -> nn.ModuleList:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The text's blocks, those below and those above."""
        return nn.ModuleList([self.text_blocks, self.blocks])

    def part_of(self, name: str) -> str:
        """The part that a parameter belongs to: "vision", "connector" or "decoder"; see `weights.adapters.part_of`."""
        first = name.partition(".")[0]
        return first if first == "vision" else "decoder" if first in _TEXT else "connector"

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._vocab_size

    @property
    def max_len(self) -> int:
        """Most text tokens of a row, prompt included."""
        return self._max_len

    def head(self, hidden: Tensor) -> Tensor:
        """Logits: (... e) -> (... vocab)."""
        return self.lm_head(hidden)

    def pooled(self, batch: CaptionBatch) -> Tensor:
        """The queries after they have read all images of a sample: (b l e)."""
        visual_tokens = self.visual_tokens(batch).to(self.queries.dtype)
        mask = None
        if batch.image_mask is not None:
            mask = batch.image_mask.repeat_interleave(visual_tokens.shape[2], 1)[:, None]
        context = self.norm_visual(rearrange(visual_tokens, "b i p d -> b (i p) d"))
        queries = self.norm_queries(self.queries).expand(len(context), -1, -1)
        return self.norm_pooled(self.pool(queries, context, mask=mask))

    def image_features(self, batch: CaptionBatch) -> Tensor:
        """The images as vectors of length 1: (b e)."""
        return F.normalize(self.image_proj(self.pooled(batch)[:, 0]), dim=-1)

    def text_features(self, batch: CaptionBatch) -> Tensor:
        """Right-padded texts as vectors of length 1 (n e): what a learned token at the end of each gathers.

        As open_clip trained it, it stands at the last place, reads the first token of padding (id 0) too, and itself
        only where there is no padding.
        """
        more = (0, self.max_len - batch.tokens.shape[1])
        real = F.pad(batch.attention_mask, more)
        tokens = F.pad(batch.tokens, more).masked_fill(~real, 0)
        positions = torch.arange(self.max_len, device=tokens.device)
        last = self.end.expand(len(tokens), 1, -1) + self.pos_embed[self.max_len]
        x = torch.cat((self._embed(tokens, positions), last), dim=1)
        seen = F.pad(real, (1, 0), value=True)
        allowed = masks.all_of(masks.causal(), masks.padding(seen))
        mask = masks.dense(allowed, len(x), x.shape[1], x.shape[1], x.device)
        for block in self.text_blocks:
            x = block(x, mask=mask)
        return F.normalize(self.text_proj(self.text_norm(x[:, -1])), dim=-1)

    def project_context(self, pooled: Tensor) -> list[KeyValue]:
        """Each cross block's keys and values of the pooled image, the contrast's query left out."""
        blocks = (block for block in self.cross_blocks if isinstance(block, CrossBlock))
        return [block.project_context(pooled[:, 1:]) for block in blocks]

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        try:
            return self.tok_embed(tokens) + self.pos_embed[positions]
        except IndexError as error:
            raise vocabulary_error(tokens, self.vocab_size) from error

    def _read(self, x: Tensor, context: list[KeyValue], mask: Mask | None, state: DecoderState | None = None) -> Tensor:
        caches = iter([None] * (self.depth + self.decoder_depth) if state is None else state.caches)
        for block in self.text_blocks:
            x = block(x, mask=mask, cache=next(caches))
        for block, cross, kv in zip(self.blocks, self.cross_blocks, context, strict=True):
            x = cross(block(x, mask=mask, cache=next(caches)), kv)
        return self.last_norm(x)

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states (n q e); rows are padded on the right, so the causal mask alone hides their padding."""
        positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        context = self.project_context(self.pooled(batch))
        return self._read(self._embed(batch.tokens, positions), context, "causal")

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, DecoderState]:
        """Pools the images once and reads the left-padded prompts; see `Captioner.prefill`.

        Raises:
            ValueError: if prompts and new tokens are more than there are positions.
        """
        if (length := batch.tokens.shape[1] + max_new_tokens) > self.max_len:
            raise ValueError(f"{length} tokens were asked for, but this CoCa has {self.max_len} positions")
        state = DecoderState(self.depth + self.decoder_depth, length)
        state.context = self.project_context(self.pooled(batch))
        logits = self._append(batch.tokens, batch.attention_mask, state)
        return repeat_rows(logits, state, expand_size)

    def _append(self, tokens: Tensor, attention_mask: Tensor | None, state: DecoderState) -> Tensor:
        n, q = tokens.shape
        if state.next_positions is None:
            assert attention_mask is not None
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            state.advance(n, positions, attention_mask)
            allowed = masks.all_of(masks.causal(), masks.padding(attention_mask))
            mask: Mask = masks.dense(allowed, n, q, q, tokens.device)
        else:
            positions = state.next_positions[:, None]
            state.advance(n, positions, None)
            assert state.attention_mask is not None
            mask = state.attention_mask[:, None]
        assert state.context is not None
        return self.head(self._read(self._embed(tokens, positions), state.context, mask, state)[:, -1])

    def decode_step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Adds a token to each row: (n) -> logits of the next (n vocab)."""
        return self._append(tokens[:, None], None, state)

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """The text's attention to the pooled queries times theirs to the patches, means of heads: (n q i gh gw)."""
        with (
            evaluation_mode(self),
            record_attention(self.cross_blocks) as reads,
            record_attention(self, keep=lambda name: name == "pool") as sees,
        ):
            self.hidden_states(batch)
        weights = through_latents(mean_weights(reads.values()), mean_weights(sees.values())[:, 1:])
        weights = rearrange(weights, "n q (i p) -> n q i p", i=batch.visual.shape[1])
        return on_patches(weights, self.grid(batch), self.vision.num_prefix_tokens)
