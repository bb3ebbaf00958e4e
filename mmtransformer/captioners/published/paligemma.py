"""PaliGemma: patches, projected, and the prompt see each other both ways; the answer is causal (arXiv:2407.07726).

Shapes: n rows of text, r of each of the b samples, side by side; p patches of an image, e width of the decoder's
tokens, gh gw rows and columns of patches.
"""

import torch
from torch import Tensor

from mmtransformer.backbones.base import DecoderState, repeat_rows
from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.backbones.vit import ViT
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.attribution import mean_weights, on_patches
from mmtransformer.captioners.base import Captioner
from mmtransformer.captioners.decoder_prefix import in_image_order, read_behind_images
from mmtransformer.connectors.projector import LinearProjector
from mmtransformer.layers.modes import evaluation_mode, freeze
from mmtransformer.layers.record import record_attention


class PaliGemma(Captioner):
    """A vision encoder, one matrix and a prefix language model (arXiv:2407.07726, section 3.1; 2: arXiv:2412.03555).

    Images and prompt are one block without order of seeing. What is predicted, by the batch's `loss_mask`, and all
    behind it, is causal. The published ones go from SigLIP to Gemma, or in PaliGemma 2 to Gemma 2.

    Args:
        vision: the vision encoder; its patches are read, class and register tokens are not.
        decoder: the language model. Images enter behind its embedding: they are not scaled as words are.
        image_token_id: the id that marks a patch in transformers' `input_ids`; nothing here reads it.
        freeze_vision: see `Captioner`.
        freeze_decoder: whether the language model is taken out of training.

    Raises:
        ValueError: if the decoder reads a context, or has no room for text.
    """

    decoder: TextDecoder

    def __init__(
        self,
        vision: ViT,
        decoder: TextDecoder,
        *,
        image_token_id: int | None = None,
        freeze_vision: bool = True,
        freeze_decoder: bool = False,
    ) -> None:
        super().__init__(vision, freeze_vision=freeze_vision)
        patches = vision.grid_size[0] * vision.grid_size[1]
        if decoder.context_dim is not None or patches >= decoder.max_len:
            raise ValueError(
                f"PaliGemma's decoder has no context_dim ({decoder.context_dim}), and room for text behind {patches} "
                f"patches in {decoder.max_len} positions"
            )
        self.decoder = freeze(decoder) if freeze_decoder else decoder
        self.image_token_id, self.freeze_decoder = image_token_id, freeze_decoder
        self.projector = LinearProjector(vision.dim, decoder.dim)

    @property
    def max_len(self) -> int:
        """Most text tokens of a row beside one image, prompt included."""
        return self.decoder.max_len - self.vision.grid_size[0] * self.vision.grid_size[1]

    def prefix_embeds(self, batch: CaptionBatch) -> Tensor:
        """What stands before the text: the patches of an image, projected, (b i p e)."""
        return self.projector(self.visual_tokens(batch)[:, :, self.vision.num_prefix_tokens :], self.grid(batch))

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states (n q e) of right-padded rows, whose prompts end where the first token is predicted."""
        prompt = batch.attention_mask & (batch.loss_mask.cumsum(1) == 0)
        return read_behind_images(self.decoder, self.prefix_embeds(batch), batch, prompt, image_positions=True)

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, DecoderState]:
        """Reads images and left-padded prompts once; see `Captioner.prefill`."""
        images, prompt = self.prefix_embeds(batch), batch.attention_mask
        state = self.decoder.new_state(images.shape[1] * images.shape[2] + prompt.shape[1] + max_new_tokens)
        hidden = read_behind_images(self.decoder, images, batch, prompt, image_positions=True, state=state)
        return repeat_rows(self.decoder.head(hidden[:, -1]), state, expand_size)

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """The text's attention to the patches, the mean of all heads and layers: (n q i gh gw)."""
        with evaluation_mode(self), record_attention(self.decoder) as record:
            self.hidden_states(batch)
        q = batch.tokens.shape[1]
        return on_patches(in_image_order(mean_weights(record.values())[:, -q:, :-q], batch), self.grid(batch))
