"""CLIP: a vision tower and a text tower whose vectors agree where image and text do (arXiv:2103.00020, 2303.15343).

Shapes: n texts, as many for each of the b images, side by side; e width of the vectors that are compared.
"""

import math
from typing import Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.backbones.encoder import TextEncoder
from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_variants.padded import image_features_of
from mmtransformer.batch import CaptionBatch, ModelOutput, SumAndCount
from mmtransformer.dual_encoders.text_encoder_tower import TextEncoderTower
from mmtransformer.dual_encoders.text_tower import TextTower
from mmtransformer.layers.blocks import AttentionPool
from mmtransformer.layers.linear import Linear
from mmtransformer.layers.modes import freeze, is_frozen
from mmtransformer.losses.contrastive import (
    MAX_LOGIT_SCALE,
    Similarity,
    compare,
    image_ids,
    refuse_empty,
    softmax_loss,
    text_keys,
)
from mmtransformer.losses.sigmoid import sigmoid_loss
from mmtransformer.serialization.pretrained import Pretrained

_UNREAD = ("image_mask", "image_index", "first_image_index", "document_ids")


class CLIP(Pretrained, nn.Module):
    """Two towers, trained so that of all images of a batch a text is nearest to its own, and the other way round.

    Captions of one image, images that stand twice in a batch, and images whose captions are the same text are not
    negatives of each other, in all processes that share the batch.

    Args:
        vision: the vision tower, without a classifier; what it pools an image to is compared.
        text: the text tower: a `TextTower`, a `TextEncoder`, of which the first token is read (Chinese-CLIP), or an
            `TextEncoderTower`, of which that is normed and projected (AltCLIP) or pooled.
        embed_dim: width e of the vectors; None = the vision tower's, whose images then need no projection (SigLIP).
        text_bias: whether the text's projection has a bias (SigLIP).
        pool_heads: heads of an attention that learns to pool the vision tower's tokens, in place of its own pooling:
            what a frozen tower was trained to gather is not what captions speak of. None = its own (CLIP, LiT).
        loss: "softmax", over all texts and over all images of the batch (CLIP), or "sigmoid", each pair by itself
            (SigLIP: better in batches below some 16,000).
        hardness: how much more the negatives count that are confused most: their weights are a softmax of their
            logits times it, 1 in the mean (arXiv:2010.04592, eq. 4; arXiv:2301.02280); 0 = all alike.
        freeze_vision: whether the vision tower is taken out of training (its tokens can then be cached; LiT,
            arXiv:2111.07991).

    Raises:
        ValueError: if the parts do not fit.
    """

    def __init__(
        self,
        vision: ViT,
        text: TextTower | TextEncoder | TextEncoderTower,
        *,
        embed_dim: int | None = 512,
        text_bias: bool = False,
        pool_heads: int | None = None,
        loss: Literal["softmax", "sigmoid"] = "softmax",
        hardness: float = 0.0,
        freeze_vision: bool = False,
    ) -> None:
        super().__init__()
        if loss not in ("softmax", "sigmoid"):
            raise ValueError(f'loss must be "softmax" or "sigmoid", not "{loss}"')
        if hardness < 0:
            raise ValueError(f"hardness ({hardness}) must be at least 0")
        if not hasattr(vision, "num_classes"):
            raise ValueError(f"vision must be a vision encoder, such as a ViT, not a {type(vision).__name__}")
        if not isinstance(text, (TextTower, TextEncoder, TextEncoderTower)):
            raise ValueError(
                f"text must be a TextTower, a TextEncoder or a TextEncoderTower, not a {type(text).__name__}"
            )
        if vision.num_classes:
            raise ValueError(f"the vision tower has a classifier of {vision.num_classes} classes, which none reads")
        self.vision, self.text, self.embed_dim, self.text_bias = vision, text, embed_dim, text_bias
        self.loss: Literal["softmax", "sigmoid"] = loss
        self.pool_heads, self.hardness, self.freeze_vision = pool_heads, hardness, freeze_vision
        width = vision.dim if embed_dim is None else embed_dim
        self.image_proj = nn.Identity() if embed_dim is None else Linear(vision.dim, width, bias=False)
        self.text_proj = Linear(text.dim, width, bias=text_bias)
        for layer in (self.image_proj, self.text_proj):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        if text_bias:
            nn.init.zeros_(self.text_proj.bias)
        self.image_pool = None
        if pool_heads is not None:
            self.image_pool = AttentionPool(vision.dim, pool_heads, 4 * vision.dim)
            if vision.attn_pool is not None:  # Read by none.
                vision.attn_pool.requires_grad_(False)
        softmax = loss == "softmax"
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07 if softmax else 10.0)))
        # Nearly all pairs are negatives: the first step need not learn that (SigLIP).
        self.logit_bias = None if softmax else nn.Parameter(torch.tensor(-10.0))
        if freeze_vision:
            freeze(vision)
        if isinstance(text, TextEncoder):
            for head in (text.pool_proj, text.mlm_proj, text.nsp_proj):
                if head is not None:
                    head.requires_grad_(False)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.text.vocab_size

    @property
    def max_len(self) -> int:
        """Most tokens of a text."""
        return self.text.max_len

    @property
    def dim(self) -> int:
        """Width e of the vectors, whatever `embed_dim` says."""
        return self.text_proj.out_features

    @property
    def add_bos_token(self) -> bool:
        """Whether a text begins with a token that opens it."""
        return not isinstance(self.text, TextTower) or self.text.add_bos_token

    def encode_image(self, pixels: Tensor, patch_grids: Tensor | None = None) -> Tensor:
        """Images as vectors of length 1: (b 3 height width) -> (b e).

        Args:
            pixels: of the images; with `patch_grids` their patches (b p c), as `pad_images` makes them.
            patch_grids: (b 2) long, rows and columns of patches, where images have sizes of their own.
        """
        if patch_grids is not None:
            return self._native_vectors(pixels, patch_grids)
        return self._image_vectors(self.forward_features(pixels[:, None])[:, 0])

    def encode_text(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Texts as vectors of length 1: (n q) long -> (n e).

        Args:
            tokens: what opens a text where one is opened, its words and what ends it, padded on the right.
            attention_mask: (n q) bool, True = a real token; None = all are.

        Raises:
            ValueError: if a text has no token at all, or more than `max_len`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(tokens, dtype=torch.bool)
        refuse_empty(attention_mask)
        if isinstance(self.text, TextEncoder):
            states = self.text(tokens, attention_mask=attention_mask)[:, 0]
        else:
            states = self.text(tokens, attention_mask)
        return F.normalize(self.text_proj(states), dim=-1)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """How well images (b e) and texts (n e) fit, as the loss reads it: (b n)."""
        scaled = self.scale * images @ texts.transpose(0, 1)
        return scaled if self.logit_bias is None else scaled + self.logit_bias

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by; of a softmax at most `MAX_LOGIT_SCALE`."""
        scale = self.logit_scale.exp()
        return scale.clamp(max=MAX_LOGIT_SCALE) if self.loss == "softmax" else scale

    def forward(self, batch: CaptionBatch, *, gather_grad: bool = True) -> ModelOutput:
        """The loss of a batch, a mean over the global batch of all processes.

        Of what stands before a caption only the token that opens a text is read: who searches does not say which
        language it is in. Images of one name are one, and those without a predicted token take no part.

        Args:
            batch: one image a sample, as pixels or as `forward_features` gives it, and right-padded texts.
            gather_grad: whether gradients reach the processes that candidates came from.

        Returns:
            The loss, with a count of 1; `terms` are the loss, and the shares of images and of texts whose nearest
            counterpart in the batch is right.

        Raises:
            ValueError: if a text is empty, or the batch has fields that are not supported.
        """
        vectors = self.image_features(batch), self.text_features(batch)
        return self.compare(batch, *vectors, gather_grad=gather_grad)

    def compare(self, batch: CaptionBatch, images: Tensor, texts: Tensor, *, gather_grad: bool = True) -> ModelOutput:
        """As `forward`, from the batch's vectors: images (b e) and texts (n e)."""
        similarity = compare(
            images,
            texts,
            image_ids(batch.names, batch.loss_mask),
            text_keys=text_keys(*self.text_inputs(batch)),
            gather_grad=gather_grad,
        )
        loss = self.loss_of(similarity)
        right_texts, right_images = similarity.right()
        one = torch.ones((), dtype=torch.long, device=loss.device)
        terms = {"contrast": loss.detach(), "image_accuracy": right_texts, "text_accuracy": right_images}
        return ModelOutput(SumAndCount(loss, one), None, terms)

    def loss_of(self, similarity: Similarity) -> Tensor:
        """The loss of similarities, a scalar."""
        if self.logit_bias is None:
            return softmax_loss(similarity, self.scale, hardness=self.hardness)
        return sigmoid_loss(similarity, self.scale, self.logit_bias, hardness=self.hardness)

    def image_features(self, batch: CaptionBatch) -> Tensor:
        """A batch's images as vectors of length 1: (b e).

        Raises:
            ValueError: if a sample has several images, or the batch has fields that are not supported.
        """
        for name in _UNREAD:
            if getattr(batch, name, None) is not None:
                raise ValueError(f"CLIP does not support the batch field {name}")
        visual = batch.visual
        if visual.shape[1] != 1:
            raise ValueError(f"a CLIP compares one image with its texts, and these samples have {visual.shape[1]}")
        if batch.patch_grids is not None:
            return self._native_vectors(visual[:, 0], batch.patch_grids[:, 0])
        visual_tokens = self.forward_features(visual) if batch.visual_tokens is None else visual
        return self._image_vectors(visual_tokens[:, 0])

    def text_features(self, batch: CaptionBatch) -> Tensor:
        """A batch's texts as vectors of length 1: (n e)."""
        return self.encode_text(*self.text_inputs(batch))

    def forward_features(self, pixels: Tensor) -> Tensor:
        """The vision tower's tokens, not pooled: what a cache keeps of a frozen one, (b i 3 h w) -> (b i p d)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
            features = self.vision.forward_features(rearrange(pixels, "b i c h w -> (b i) c h w"))
        return rearrange(features, "(b i) p d -> b i p d", b=pixels.shape[0])

    def _native_vectors(self, patches: Tensor, grids: Tensor) -> Tensor:
        """Images of native size, (b p c) and (b 2), as vectors of length 1: (b e)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
            found = image_features_of(self.vision, patches, grids)
        return torch.cat([self._image_vectors(tokens[None]) for tokens in found if tokens is not None])

    def _image_vectors(self, visual_tokens: Tensor) -> Tensor:
        if self.image_pool is None:
            pooled = self.vision.forward_head(visual_tokens.to(self.vision.dtype), pre_logits=True)
        else:
            pooled = self.image_pool(visual_tokens.to(self.text_proj.weight.dtype))[:, 0]
        return F.normalize(self.image_proj(pooled.to(self.text_proj.weight.dtype)), dim=-1)

    def text_inputs(self, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
        """The texts that are compared, without the rest of a prompt: tokens (n q) and attention mask (n q)."""
        kept = batch.loss_mask.clone()
        if self.add_bos_token:
            kept[:, 0] = batch.attention_mask[:, 0]
        else:  # Of a padding sample, which has no target, a token must be left.
            kept[:, 0] |= ~kept.any(1)
        order = (~kept).to(torch.int8).argsort(dim=1, stable=True)
        return batch.tokens.gather(1, order), kept.gather(1, order)

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but frozen parts."""
        super().train(mode)
        for part in (self.vision, self.text):
            if is_frozen(part):
                part.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay spares, beside biases and norms: those that its parts name."""
        parts = {"vision": self.vision, "text": self.text, "image_pool": self.image_pool}
        spared = {
            f"{path}.{n}" for path, p in parts.items() if hasattr(p, "no_weight_decay") for n in p.no_weight_decay()
        }
        return spared | {"logit_scale", "logit_bias"}
