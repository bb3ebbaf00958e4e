"""Git: every visual token, projected, stands before the text in one post-norm Transformer (GIT, arXiv:2205.14100).

Shapes: n rows of text, r of each of the b samples, side by side; e width of the decoder's tokens, k = i * p visual
tokens of a sample, gh gw rows and columns of patches.
"""

import torch
from torch import Tensor, nn

from mmtransformer.backbones.base import DecoderState, repeat_rows
from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.backbones.vit import ViT
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.attribution import mean_weights, on_patches
from mmtransformer.captioners.base import Captioner
from mmtransformer.captioners.decoder_prefix import in_image_order, read_behind_images
from mmtransformer.layers.linear import Linear
from mmtransformer.layers.modes import evaluation_mode, freeze
from mmtransformer.layers.record import record_attention


class Git(Captioner):
    """A vision encoder and a text Transformer over image and text at once (GIT, arXiv:2205.14100, section 3.1).

    Visual tokens see each other both ways and no text; text sees all of them, and the text before it. Positions of the
    decoder's table, and its norm of embeddings, are the text's alone.

    Args:
        vision: the vision encoder; all its tokens are read, class token and registers too.
        decoder: the text Transformer, of any kind; published ones have norms after each sum and of embeddings
            (`NormConfig(pre=False, embed=True)`), learned positions and an untied head.
        num_frames: most images of a sample that get a vector which says when, as frames of a video do (section 3.3);
            one image alone gets none. None = images have no order.
        freeze_vision: see `Captioner`.
        freeze_decoder: whether the text Transformer is taken out of training.

    Raises:
        ValueError: if the decoder reads a context, or there are too few frames for an order.
    """

    decoder: TextDecoder

    def __init__(
        self,
        vision: ViT,
        decoder: TextDecoder,
        *,
        num_frames: int | None = None,
        freeze_vision: bool = False,
        freeze_decoder: bool = False,
    ) -> None:
        super().__init__(vision, freeze_vision=freeze_vision)
        if decoder.context_dim is not None:
            raise ValueError(
                f"GIT's decoder reads images as tokens: its context_dim is None, not {decoder.context_dim}"
            )
        if num_frames is not None and num_frames < 2:
            raise ValueError(f"num_frames ({num_frames}) must be at least 2: one image alone has no order")
        self.decoder = freeze(decoder) if freeze_decoder else decoder
        self.num_frames, self.freeze_decoder = num_frames, freeze_decoder
        self.proj = Linear(vision.dim, decoder.dim)
        self.proj_norm = nn.LayerNorm(decoder.dim, eps=vision.block.norm_eps)
        self.head_bias = nn.Parameter(torch.zeros(decoder.vocab_size))
        frames = (nn.Parameter(torch.zeros(1, 1, vision.dim)) for _ in range(num_frames or 0))
        self.frame_embeds = nn.ParameterList(frames)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits: (... e) -> (... vocab)."""
        return self.decoder.head(hidden) + self.head_bias

    def prefix_embeds(self, batch: CaptionBatch) -> Tensor:
        """What stands before the text: all visual tokens of an image, projected, (b i p e).

        Raises:
            ValueError: if there are more images than `num_frames`.
        """
        visual_tokens = self.visual_tokens(batch).to(self.proj.weight.dtype)
        count = visual_tokens.shape[1]
        if self.num_frames is not None and count > 1:
            if count > self.num_frames:
                raise ValueError(f"{count} images of a sample, but this GIT knows the order of {self.num_frames}")
            visual_tokens = visual_tokens + torch.stack(list(self.frame_embeds[:count]), dim=1)
        return self.proj_norm(self.proj(visual_tokens))

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states (n q e); rows are padded on the right, so the causal mask alone hides their padding."""
        return self._read(self.prefix_embeds(batch), batch)

    def _read(self, prefix_embeds: Tensor, batch: CaptionBatch, state: DecoderState | None = None) -> Tensor:
        none = torch.zeros_like(batch.attention_mask)
        return read_behind_images(self.decoder, prefix_embeds, batch, none, image_positions=False, state=state)

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, DecoderState]:
        """Reads images and left-padded prompts once; see `Captioner.prefill`.

        transformers goes on from prompts that are padded on the right at position 1; padded on the left, each row here
        gets the words that it gets alone.

        Raises:
            ValueError: if prompts and new tokens are more than the decoder has positions.
        """
        if (text := batch.tokens.shape[1] + max_new_tokens) > self.max_len:
            raise ValueError(f"{text} tokens were asked for, but this decoder has {self.max_len} positions")
        prefix_embeds = self.prefix_embeds(batch)
        state = DecoderState(self.decoder.depth, text + prefix_embeds.shape[1] * prefix_embeds.shape[2])
        return repeat_rows(self.head(self._read(prefix_embeds, batch, state)[:, -1]), state, expand_size)

    def decode_step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Adds a token to each row: (n) -> logits of the next (n vocab)."""
        assert state.next_positions is not None
        positions = state.next_positions[:, None]
        hidden = self.decoder.forward_embeds(self.decoder.embed(tokens[:, None], positions), positions, state=state)
        return self.head(hidden[:, 0])

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """The text's attention to the patches, the mean of all heads and layers: (n q i gh gw)."""
        with evaluation_mode(self), record_attention(self.decoder) as record:
            self.hidden_states(batch)
        q = batch.tokens.shape[1]
        weights = in_image_order(mean_weights(record.values())[:, -q:, :-q], batch)
        return on_patches(weights, self.grid(batch), self.vision.num_prefix_tokens)
