"""CoCa: one pass that captions and contrasts, with a text tower in two halves (arXiv:2205.01917).

Letters: b samples, i pictures of a sample, p visual tokens of a picture, l pooled queries, n rows of text (b divides
n), q text tokens, d width of a token, e width of the vectors that are compared, gh gw rows and columns of patches.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from mmtransformer.backbones.decoder import DecoderState, TextDecoder
from mmtransformer.backbones.vit import ViT
from mmtransformer.captioners.base import CaptionBatch, Captioner, check_rows, freeze
from mmtransformer.captioners.soft_prompt import refuse_documents
from mmtransformer.layers import masks
from mmtransformer.layers.attention import KeyValue
from mmtransformer.layers.blocks import AttentionPool
from mmtransformer.layers.record import record_attention
from mmtransformer.losses.contrastive import clip_loss, image_ids, refuse_empty
from mmtransformer.losses.distributed import gather
from mmtransformer.losses.next_token import Loss, next_token_loss


class CoCaState:
    """The caches of both halves of the text tower; keys and values of the pictures, shared by the rows of a sample."""

    def __init__(self, text: DecoderState, decoder: DecoderState, context: list[KeyValue]) -> None:
        self.text, self.decoder, self.context = text, decoder, context

    def reorder(self, rows: Tensor) -> None:
        """Reorders what belongs to rows of text; the pictures' keys and values stay where they are."""
        self.text.reorder(rows)
        self.decoder.reorder(rows)


class CoCa(Captioner):
    """A vision tower with attention pooling, a text tower that sees no picture, and above it one that does.

    Args:
        vision: the vision tower.
        text: the lower half of the text tower, without cross-attention; a learned token at the end of a text, which no
            other token sees, gathers it for the contrast.
        decoder: the upper half, which reads the pooled picture; its `cross_dim` is the vision tower's dim, and its
            positions come from below: "rotary" or "sinusoidal", never a table of its own.
        num_queries: what a picture is pooled to for captioning; one more query pools those for the contrast.
        num_heads: heads of the poolings.
        embed_dim: width e of the vectors that are compared.
        caption_weight: weight of the caption loss; the paper's 2.
        contrastive_weight: weight of the contrastive loss; the paper's 1. 0 = a captioner only.
        freeze_vision: whether the tower is taken out of training (its features can then be cached).

    Raises:
        ValueError: if the parts do not fit.
    """

    def __init__(
        self,
        vision: ViT,
        text: TextDecoder,
        decoder: TextDecoder,
        *,
        num_queries: int = 256,
        num_heads: int = 8,
        embed_dim: int = 512,
        caption_weight: float = 2.0,
        contrastive_weight: float = 1.0,
        freeze_vision: bool = False,
    ) -> None:
        super().__init__()
        if text.dim != decoder.dim or text.cross_dim is not None or not text.tied:
            raise ValueError(
                f"the lower half must be as wide as the upper ({decoder.dim}), without cross_dim and tied; it has dim "
                f"{text.dim}, cross_dim {text.cross_dim}, tied {text.tied}"
            )
        if decoder.cross_dim != vision.dim:
            raise ValueError(
                f"the decoder's cross_dim ({decoder.cross_dim}) must be the vision tower's dim ({vision.dim})"
            )
        if decoder.positions.kind == "learned":
            raise ValueError(
                'the upper half reads placed tokens: its positions must be "rotary" or "sinusoidal", not "learned"'
            )
        self.vision, self.text, self.decoder = vision, text, decoder
        self.num_queries, self.num_heads, self.embed_dim = num_queries, num_heads, embed_dim
        self.caption_weight, self.contrastive_weight = caption_weight, contrastive_weight
        self.freeze_vision = freeze_vision
        self.caption_pool = AttentionPool(vision.dim, num_heads, 4 * vision.dim, num_queries=num_queries)
        self.contrast_pool = AttentionPool(vision.dim, num_heads, 4 * vision.dim)
        self.image_proj = nn.Linear(vision.dim, embed_dim, bias=False)
        self.text_proj = nn.Linear(text.dim, embed_dim, bias=False)
        self.end = nn.Parameter(0.02 * torch.randn(text.dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if freeze_vision:
            freeze(vision)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the head scores."""
        return self.decoder.vocab_size

    @property
    def max_len(self) -> int:
        """Most text tokens of a row, prompt included; one position is the gathering token's."""
        return min(self.text.max_len - 1, self.decoder.max_len)

    def encode(self, pixels: Tensor) -> Tensor:
        """The vision tower's tokens: (b i 3 height width) -> (b i p d)."""
        b = pixels.shape[0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
            features = self.vision.forward_features(rearrange(pixels, "b i c h w -> (b i) c h w"))
        return rearrange(features, "(b i) p d -> b i p d", b=b)

    def pooled(self, batch: CaptionBatch) -> Tensor:
        """What captions are written from: all pictures of a sample, pooled together, (b l d)."""
        refuse_documents(batch, "CoCa")
        visual_tokens = self.visual_tokens(batch).to(self.end.dtype)
        return self.caption_pool(rearrange(visual_tokens, "b i p d -> b (i p) d"))

    def embed_images(self, batch: CaptionBatch) -> Tensor:
        """The pictures as vectors of length 1: (b e)."""
        return self._image_vectors(self.pooled(batch))

    def embed_texts(self, batch: CaptionBatch) -> Tensor:
        """Right-padded texts as vectors of length 1: (n e)."""
        return self._text_vectors(self._gathered(batch))

    def _image_vectors(self, pooled: Tensor) -> Tensor:
        return F.normalize(self.image_proj(self.contrast_pool(pooled)[:, 0]), dim=-1)

    def _text_vectors(self, gathered: Tensor) -> Tensor:
        return F.normalize(self.text_proj(gathered[:, -1]), dim=-1)

    def _gathered(self, batch: CaptionBatch) -> Tensor:
        """The lower half over the text and the gathering token behind it: (n q+1 d)."""
        n, q = batch.tokens.shape
        attention_mask = F.pad(batch.attention_mask, (0, 1), value=True)
        embedded = torch.cat(
            (
                self.text.embed_tokens(batch.tokens),
                self.end.to(self.text.tok_embed.weight.dtype).expand(n, 1, -1),
            ),
            1,
        )
        positions, _ = self.text.position_ids(embedded, attention_mask, None, None, None)
        allowed = masks.all_of(masks.causal(), masks.padding(attention_mask))
        mask = masks.dense(allowed, n, q + 1, q + 1, attention_mask.device)
        return self.text.forward_embeds(self.text.add_positions(embedded, positions), positions, mask=mask)

    def _above(self, lower: Tensor, pooled: Tensor) -> Tensor:
        positions = torch.arange(lower.shape[1], device=lower.device)
        return self.decoder.forward_embeds(lower, positions, pooled)

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states (n q d); rows are padded on the right, so the causal mask alone hides their padding."""
        return self._above(self.text(batch.tokens), self.pooled(batch))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits: (... d) -> (... vocab)."""
        return self.decoder.head(hidden)

    def loss(self, batch: CaptionBatch, *, label_smoothing: float = 0.0) -> Loss:
        """The captions' loss and the contrast, from one pass over pictures and texts (section 3.2).

        The contrast, a mean over the batch, is multiplied by the number of target tokens, so that it stays a mean.
        Pictures of one name are positives of each other, and those without a target token take no part.

        Raises:
            ValueError: if a text is empty, or a row is longer than can be read.
        """
        check_rows(self, batch)
        if self.contrastive_weight:
            refuse_empty(batch.attention_mask)
        pooled, lower = self.pooled(batch), self._gathered(batch)
        hidden = self._above(lower[:, : batch.tokens.shape[1] - 1], pooled)
        said = next_token_loss(
            hidden, batch.tokens, batch.loss_mask, self.head, label_smoothing=label_smoothing
        )
        total = self.caption_weight * said.sum
        if self.contrastive_weight:
            vectors = self._image_vectors(pooled), self._text_vectors(lower)
            ids = image_ids(batch.names, batch.loss_mask)
            contrast = clip_loss(*vectors, self.log_scale, image_ids=ids)
            tokens = gather(said.count[None]).double().mean()  # Of a process, in the mean.
            total = total + self.contrastive_weight * contrast * tokens.to(contrast.dtype)
        return Loss(total, said.count)

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, CoCaState]:
        """Pools the pictures once and reads the left-padded prompts; see `Captioner.prefill`."""
        n, q = batch.tokens.shape
        context = self.decoder.project_context(self.pooled(batch))
        text, above = self.text.new_state(q + max_new_tokens), self.decoder.new_state(q + max_new_tokens)
        attention_mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
        state = CoCaState(text, above, context)
        logits = self.head(self._advance(batch.tokens, attention_mask, state)[:, -1])
        if expand_size > 1:
            rows = torch.arange(n, device=logits.device).repeat_interleave(expand_size)
            state.reorder(rows)
            logits = logits.index_select(0, rows)
        return logits, state

    def _advance(self, tokens: Tensor, attention_mask: Tensor | None, state: CoCaState) -> Tensor:
        lower = self.text(tokens, attention_mask=attention_mask, state=state.text)
        positions, _ = self.decoder.position_ids(lower, attention_mask, None, None, state.decoder)
        return self.decoder.forward_embeds(
            lower, positions, state.context, attention_mask=attention_mask, state=state.decoder
        )

    def decode_step(self, tokens: Tensor, state: CoCaState) -> Tensor:
        """Adds a token to each row: (n) -> logits of the next (n vocab)."""
        return self.head(self._advance(tokens[:, None], None, state)[:, 0])

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """The text's attention to the pooled queries times theirs to the patches, means of heads: (n q i gh gw)."""
        training = self.training
        self.eval()
        try:
            with (
                record_attention(self.decoder, keep="cross_attn") as reads,
                record_attention(self.caption_pool) as sees,
            ):
                self.hidden_states(batch)
        finally:
            self.train(training)
        grid = self.vision.grid if batch.pixels is None else self.vision.grid_size(*batch.pixels.shape[3:])
        to_queries = torch.stack([w.mean(1) for w in reads.values()]).mean(0)
        (to_patches,) = (w.mean(1) for w in sees.values())
        to_patches = rearrange(to_patches, "b l (i p) -> b l i p", i=batch.visual.shape[1])
        to_patches = to_patches[..., self.vision.num_prefix_tokens :]
        to_patches = repeat(
            to_patches, "b l i p -> (b r) l i p", r=to_queries.shape[0] // to_patches.shape[0]
        )
        weights = torch.einsum("nql,nlip->nqip", to_queries, to_patches)
        return rearrange(weights, "n q i (gh gw) -> n q i gh gw", gh=grid[0])
