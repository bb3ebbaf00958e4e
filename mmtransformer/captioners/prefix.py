"""PrefixCaptioner: every patch, projected by an MLP, stands in front of the text of a language model (LLaVA).

Shapes: n rows of text, r of each of the b samples, side by side; l visual tokens of an image after the pixel shuffle, s
side of the squares of patches that it merges, e width of the decoder's embeddings, gh gw rows and columns of patches.
"""

import torch
from einops import repeat
from torch import Tensor

from mmtransformer.backbones.base import Decoder, DecoderState
from mmtransformer.backbones.vit import ViT
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.attribution import mean_weights, on_patches
from mmtransformer.captioners.base import NATIVE, Captioner
from mmtransformer.captioners.decoder_prefix import forward_with_prefix, in_image_order, prefill_with_prefix
from mmtransformer.connectors.projector import MLPProjector
from mmtransformer.layers.modes import evaluation_mode, freeze
from mmtransformer.layers.record import record_attention


class PrefixCaptioner(Captioner):
    """A vision encoder, an MLP and a language model: patches, projected, then prompt and caption (arXiv:2310.03744).

    Args:
        vision: the vision encoder; the patches of its `forward_features` are read, class and register tokens are not.
        decoder: a causal language model, ours or any of transformers'.
        hidden_dim: width inside the MLP (see `MLPProjector`); None = that of the decoder's embeddings, as in LLaVA-1.5.
        pixel_shuffle: side s of squares of patches that become one token, so that the decoder reads s * s times fewer.
        freeze_vision: see `Captioner`.
        freeze_decoder: whether the language model is taken out of training.

    Raises:
        ValueError: if the squares do not tile the grid of patches, or the decoder has no room for text.
    """

    unsupported_fields = NATIVE

    def __init__(
        self,
        vision: ViT,
        decoder: Decoder,
        *,
        hidden_dim: int | None = None,
        pixel_shuffle: int = 1,
        freeze_vision: bool = True,
        freeze_decoder: bool = True,
    ) -> None:
        super().__init__(vision, freeze_vision=freeze_vision)
        gh, gw = vision.grid_size
        if pixel_shuffle < 1 or gh % pixel_shuffle or gw % pixel_shuffle:
            raise ValueError(f"squares of {pixel_shuffle} x {pixel_shuffle} patches do not tile a grid of {gh} x {gw}")
        self.num_tokens = gh * gw // pixel_shuffle**2
        if self.num_tokens >= decoder.max_len:
            raise ValueError(
                f"the decoder's {decoder.max_len} positions leave no room for text after {self.num_tokens} visual "
                f"tokens; raise pixel_shuffle ({pixel_shuffle})"
            )
        self.decoder = freeze(decoder) if freeze_decoder else decoder
        self.hidden_dim, self.pixel_shuffle, self.freeze_decoder = hidden_dim, pixel_shuffle, freeze_decoder
        width = decoder.embedding_weights[0].shape[1]
        self.projector = MLPProjector(vision.dim, width, hidden_dim, pixel_shuffle=pixel_shuffle)

    @property
    def max_len(self) -> int:
        """Most text tokens of a row beside one image, prompt included; visual tokens are not counted."""
        return self.decoder.max_len - self.num_tokens

    def prefix_embeds(self, batch: CaptionBatch) -> Tensor:
        """What stands in front of the text: the patches of an image, projected, (b i l e).

        Raises:
            ValueError: if images of native size are to be merged in squares, which need not tile them.
        """
        if batch.patch_grids is not None and self.pixel_shuffle > 1:
            raise ValueError(
                f"images of native size are not tiled by squares of pixel_shuffle ({self.pixel_shuffle}): build with 1"
            )
        patches = self.visual_tokens(batch)[:, :, self.vision.num_prefix_tokens :]
        return self.projector(patches, self.grid(batch))

    def prefix_mask(self, batch: CaptionBatch, count: int) -> Tensor | None:
        """Which of the `count` embeddings of each image are real, (b i count); None = all of real images."""
        if batch.patch_grids is None:
            return None
        prefix = self.vision.num_prefix_tokens
        mask = self.visual_mask(batch, count + prefix)
        return None if mask is None else mask[..., prefix:]

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states (n q d); rows are padded on the right, so the causal mask alone hides their padding."""
        x = self.prefix_embeds(batch)
        return forward_with_prefix(self.decoder, x, batch, self.prefix_mask(batch, x.shape[2]))

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, DecoderState]:
        """Projects the patches once and reads the left-padded prompts; see `Captioner.prefill`."""
        x = self.prefix_embeds(batch)
        real = self.prefix_mask(batch, x.shape[2])
        return prefill_with_prefix(self.decoder, x, batch, real, expand_size=expand_size, max_new_tokens=max_new_tokens)

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """The text's attention to the visual tokens, the mean of all heads and layers: (n q i gh gw).

        Raises:
            ValueError: if the decoder's attention cannot be recorded, as that of a hub model.
        """
        with evaluation_mode(self), record_attention(self.decoder, keep=lambda name: name.endswith(".attn")) as record:
            self.hidden_states(batch)
        q, s, (gh, _) = batch.tokens.shape[1], self.pixel_shuffle, self.grid(batch)
        weights = mean_weights(record.values())[:, -q:, :-q]
        mask = self.prefix_mask(batch, weights.shape[2] // batch.visual.shape[1])
        weights = in_image_order(weights, batch, mask)
        if batch.patch_grids is not None:
            return on_patches(weights, self.grid(batch), grids=batch.patch_grids)
        return repeat(weights / s**2, "n q i (gh gw) -> n q i (gh s1) (gw s2)", gh=gh // s, s1=s, s2=s)
