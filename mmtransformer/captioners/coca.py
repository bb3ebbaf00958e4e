"""CoCa: one pass that captions and contrasts, with a text decoder in two halves (arXiv:2205.01917).

Shapes: n rows of text, r of each of the b samples, side by side; l pooled queries, e width of the vectors that are
compared, gh gw rows and columns of patches.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.backbones.base import DecoderState, repeat_rows
from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.backbones.vit import ViT
from mmtransformer.batch import CaptionBatch, ModelOutput, SumAndCount
from mmtransformer.captioners.attribution import mean_weights, on_patches, through_latents
from mmtransformer.captioners.base import NATIVE, Captioner, check_rows
from mmtransformer.layers.blocks import AttentionPool
from mmtransformer.layers.linear import Linear
from mmtransformer.layers.modes import evaluation_mode
from mmtransformer.layers.record import record_attention
from mmtransformer.losses.contrastive import MAX_LOGIT_SCALE, clip_loss, image_ids, refuse_empty
from mmtransformer.losses.distributed import all_gather_rows
from mmtransformer.losses.next_token import next_token_loss


class CoCaState(NamedTuple):
    """What decoding remembers of both halves."""

    text: DecoderState
    decoder: DecoderState

    def reorder(self, rows: Tensor) -> None:
        """Reorders both."""
        self.text.reorder(rows)
        self.decoder.reorder(rows)


class CoCa(Captioner):
    """A vision encoder with attention pooling, a text decoder that sees no image, and above it one that does.

    Args:
        vision: the vision encoder.
        text: the lower half of the text decoder, without cross-attention; a learned token at the end of a text, which
            no other token sees, gathers it for the contrast.
        decoder: the upper half, which reads the pooled image; its `context_dim` is the vision encoder's dim, and its
            positions come from below: "rotary" or "sinusoidal", never a table of its own.
        num_queries: what an image is pooled to for captioning; one more query pools those for the contrast.
        num_heads: heads of the poolings.
        embed_dim: width e of the vectors that are compared.
        caption_weight: weight of the caption loss; the paper's 2.
        contrastive_weight: weight of the contrastive loss; the paper's 1. 0 = a captioner only, without the parts that
            compare.
        freeze_vision: see `Captioner`.

    Raises:
        ValueError: if the parts do not fit.
    """

    unsupported_fields = NATIVE

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
        super().__init__(vision, freeze_vision=freeze_vision)
        if text.dim != decoder.dim or text.context_dim is not None or not text.tied:
            raise ValueError(
                f"the lower half must be as wide as the upper ({decoder.dim}), without context_dim and tied; it has "
                f"dim {text.dim}, context_dim {text.context_dim}, tied {text.tied}"
            )
        if decoder.context_dim != vision.dim:
            raise ValueError(
                f"the decoder's context_dim ({decoder.context_dim}) must be the vision encoder's dim ({vision.dim})"
            )
        if decoder.positions.kind == "learned":
            raise ValueError(
                'the upper half reads placed tokens: its positions must be "rotary" or "sinusoidal", not "learned"'
            )
        self.text, self.decoder = text, decoder
        self.num_queries, self.num_heads, self.embed_dim = num_queries, num_heads, embed_dim
        self.caption_weight, self.contrastive_weight = caption_weight, contrastive_weight
        if not decoder.tied:  # The upper half reads no ids.
            decoder.tok_embed.requires_grad_(False)
        self.caption_pool = AttentionPool(vision.dim, num_heads, 4 * vision.dim, num_queries=num_queries)
        if contrastive_weight:
            self.contrast_pool = AttentionPool(vision.dim, num_heads, 4 * vision.dim)
            self.image_proj = Linear(vision.dim, embed_dim, bias=False)
            self.text_proj = Linear(text.dim, embed_dim, bias=False)
            self.end = nn.Parameter(0.02 * torch.randn(text.dim))
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def max_len(self) -> int:
        """Most text tokens of a row, prompt included; one position is the gathering token's."""
        return min(self.text.max_len - 1, self.decoder.max_len)

    def forward(self, batch: CaptionBatch, *, label_smoothing: float = 0.0, return_logits: bool = False) -> ModelOutput:
        """The captions' loss and the contrast, from one pass over images and texts (section 3.2).

        The contrast, a mean over the batch, is multiplied by the number of predicted tokens, so that it stays a mean.
        Images of one name are positives of each other, and those without a predicted token take no part.

        Raises:
            ValueError: if a text is empty (where there is a contrast), or as `Captioner.forward`.
        """
        if not self.contrastive_weight:
            output = super().forward(batch, label_smoothing=label_smoothing, return_logits=return_logits)
            return replace(output, sums=SumAndCount(self.caption_weight * output.sums.sum, output.sums.count))
        check_rows(self, batch)
        refuse_empty(batch.attention_mask)
        pooled = self.pooled(batch)
        lower, texts = self._read_text(batch)

        q = batch.tokens.shape[1] - (not return_logits)  # The last token predicts nothing.
        hidden = self._upper(lower[:, :q], pooled)
        captions = next_token_loss(hidden, batch.tokens, batch.loss_mask, self.head, label_smoothing=label_smoothing)

        ids = image_ids(batch.names, batch.loss_mask)
        scale = self.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        contrast = clip_loss(self._image_vectors(pooled), texts, scale, image_ids=ids)
        tokens = all_gather_rows(captions.count[None]).double().mean()  # Of a process, in the mean.

        total = self.caption_weight * captions.sum
        total = total + self.contrastive_weight * contrast * tokens.to(contrast.dtype)
        terms = {"caption": captions.sum.detach() / captions.count.clamp(min=1), "contrast": contrast.detach()}
        return ModelOutput(SumAndCount(total, captions.count), self.head(hidden) if return_logits else None, terms)

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states (n q d); rows are padded on the right, so the causal mask alone hides their padding."""
        return self._upper(self.text(batch.tokens), self.pooled(batch))

    def pooled(self, batch: CaptionBatch) -> Tensor:
        """What captions are written from: all images of a sample, pooled together, (b l d)."""
        visual_tokens = self.visual_tokens(batch).to(self.caption_pool.queries.dtype)
        real = self.visual_mask(batch, visual_tokens.shape[2])
        mask = None if real is None else rearrange(real, "b i p -> b 1 (i p)")
        return self.caption_pool(rearrange(visual_tokens, "b i p d -> b (i p) d"), mask)

    def image_features(self, batch: CaptionBatch) -> Tensor:
        """The images as vectors of length 1: (b e).

        Raises:
            ValueError: if `contrastive_weight` is 0.
        """
        self._check_contrast()
        return self._image_vectors(self.pooled(batch))

    def text_features(self, batch: CaptionBatch) -> Tensor:
        """Right-padded texts as vectors of length 1: (n e).

        Raises:
            ValueError: if `contrastive_weight` is 0.
        """
        self._check_contrast()
        return self._read_text(batch)[1]

    def _check_contrast(self) -> None:
        if not self.contrastive_weight:
            raise ValueError("a CoCa whose contrastive_weight is 0 compares no images and texts")

    def _image_vectors(self, pooled: Tensor) -> Tensor:
        return F.normalize(self.image_proj(self.contrast_pool(pooled)[:, 0]), dim=-1)

    def _read_text(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        """The lower half over each text and the gathering token behind it: (n q+1 d), and texts as vectors (n e)."""
        rows, length = (torch.arange(len(batch.tokens), device=batch.tokens.device), batch.attention_mask.sum(1))
        positions = torch.arange(batch.tokens.shape[1] + 1, device=batch.tokens.device)
        embedded = F.pad(self.text.embed_tokens(batch.tokens), (0, 0, 0, 1))
        # Right behind the text, not behind its padding: a window counts places.
        embedded = torch.where((positions == length[:, None])[..., None], self.end.to(embedded.dtype), embedded)
        lower = self.text.forward_embeds(self.text.add_positions(embedded, positions), positions)
        return lower, F.normalize(self.text_proj(lower[rows, length]), dim=-1)

    def _upper(self, lower: Tensor, pooled: Tensor) -> Tensor:
        positions = torch.arange(lower.shape[1], device=lower.device)
        return self.decoder.forward_embeds(lower, positions, pooled)

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, CoCaState]:
        """Pools the images once and reads the left-padded prompts; see `Captioner.prefill`."""
        length = batch.tokens.shape[1] + max_new_tokens
        state = CoCaState(self.text.new_state(length), self.decoder.new_state(length))
        attention_mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
        logits = self.head(self._append(batch.tokens, attention_mask, state, self.pooled(batch))[:, -1])
        return repeat_rows(logits, state, expand_size)

    def _append(
        self, tokens: Tensor, attention_mask: Tensor | None, state: CoCaState, pooled: Tensor | None = None
    ) -> Tensor:
        lower = self.text(tokens, attention_mask=attention_mask, state=state.text)
        positions = self.decoder.position_ids(lower, attention_mask, state=state.decoder)
        return self.decoder.forward_embeds(lower, positions, pooled, attention_mask=attention_mask, state=state.decoder)

    def decode_step(self, tokens: Tensor, state: CoCaState) -> Tensor:
        """Adds a token to each row: (n) -> logits of the next (n vocab)."""
        return self.decoder.head(self._append(tokens[:, None], None, state)[:, 0])

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """The text's attention to the pooled queries times theirs to the patches, means of heads: (n q i gh gw)."""
        with (
            evaluation_mode(self),
            record_attention(self.decoder, keep="cross_attn") as reads,
            record_attention(self.caption_pool) as sees,
        ):
            self.hidden_states(batch)
        weights = through_latents(mean_weights(reads.values()), mean_weights(sees.values()))
        weights = rearrange(weights, "n q (i p) -> n q i p", i=batch.visual.shape[1])
        return on_patches(weights, self.grid(batch), self.vision.num_prefix_tokens, batch.patch_grids)
