"""PrefixCaptioner: every patch, projected by an MLP, stands in front of the text of a language model (LLaVA).

Letters: b samples, i pictures of a sample, p visual tokens of a picture, l of them after the shuffle, n rows of text
(b divides n), q text tokens, d width of a token, e width of the decoder's embeddings, s side of the squares of patches
that are merged, gh gw rows and columns of patches.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor

from mmtransformer.backbones.base import Decoder, DecoderState
from mmtransformer.backbones.vit import ViT
from mmtransformer.captioners.base import CaptionBatch, Captioner, freeze
from mmtransformer.captioners.soft_prompt import forward_with_prefix, prefill_with_prefix, refuse_documents
from mmtransformer.connectors.projector import MLPProjector
from mmtransformer.layers.record import record_attention


class PrefixCaptioner(Captioner):
    """A vision tower, an MLP and a language model: patches, projected, then prompt and caption (arXiv:2310.03744).

    Args:
        vision: the vision tower; the patches of its `forward_features` are read, class and register tokens are not.
        decoder: a causal language model, ours or any of transformers'.
        hidden_dim: width inside the MLP (see `MLPProjector`); None = that of the decoder's embeddings, as in LLaVA-1.5.
        shuffle: side s of squares of patches that become one token, so that the decoder reads s * s times fewer.
        freeze_vision: whether the tower is taken out of training (its features can then be cached).
        freeze_decoder: whether the language model is taken out of training.

    Raises:
        ValueError: if the squares do not tile the grid of patches, or the decoder has no room for text.
    """

    def __init__(
        self,
        vision: ViT,
        decoder: Decoder,
        *,
        hidden_dim: int | None = None,
        shuffle: int = 1,
        freeze_vision: bool = True,
        freeze_decoder: bool = True,
    ) -> None:
        super().__init__()
        gh, gw = vision.grid
        if shuffle < 1 or gh % shuffle or gw % shuffle:
            raise ValueError(f"squares of {shuffle} x {shuffle} patches do not tile a grid of {gh} x {gw}")
        self.num_tokens = gh * gw // shuffle**2
        if self.num_tokens >= decoder.max_len:
            raise ValueError(
                f"the decoder's {decoder.max_len} positions leave no room for text after {self.num_tokens} visual "
                f"tokens; raise shuffle ({shuffle})"
            )
        self.vision, self.decoder = vision, decoder
        self.hidden_dim, self.shuffle = hidden_dim, shuffle
        self.freeze_vision, self.freeze_decoder = freeze_vision, freeze_decoder
        width = decoder.embedding_weights[0].shape[1]
        self.proj = MLPProjector(vision.dim, width, hidden_dim, shuffle=shuffle)
        if freeze_vision:
            freeze(vision)
        if freeze_decoder:
            freeze(decoder)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the head scores."""
        return self.decoder.vocab_size

    @property
    def max_len(self) -> int:
        """Most text tokens of a row beside one picture, prompt included; visual tokens are not counted."""
        return self.decoder.max_len - self.num_tokens

    def encode(self, pixels: Tensor) -> Tensor:
        """The vision tower's tokens: (b i 3 height width) -> (b i p d)."""
        b = pixels.shape[0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
            features = self.vision.forward_features(rearrange(pixels, "b i c h w -> (b i) c h w"))
        return rearrange(features, "(b i) p d -> b i p d", b=b)

    def prefix_embeds(self, batch: CaptionBatch) -> Tensor:
        """What stands in front of the text: (b (i l) e)."""
        refuse_documents(batch, "PrefixCaptioner")
        patches = self.visual_tokens(batch)[:, :, self.vision.num_prefix_tokens :]
        return rearrange(self.proj(patches, self._grid(batch)), "b i l e -> b (i l) e")

    def _grid(self, batch: CaptionBatch) -> tuple[int, int]:
        return self.vision.grid if batch.pixels is None else self.vision.grid_size(*batch.pixels.shape[3:])

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states (n q d); rows are padded on the right, so the causal mask alone hides their padding."""
        return forward_with_prefix(self.decoder, self.prefix_embeds(batch), batch)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits: (... d) -> (... vocab)."""
        return self.decoder.head(hidden)

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, DecoderState]:
        """Projects the patches once and reads the left-padded prompts; see `Captioner.prefill`."""
        prefix_embeds = self.prefix_embeds(batch)
        return prefill_with_prefix(
            self.decoder, prefix_embeds, batch, expand_size=expand_size, max_new_tokens=max_new_tokens
        )

    def decode_step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Adds a token to each row: (n) -> logits of the next (n vocab)."""
        return self.head(self.decoder(tokens[:, None], state=state)[:, 0])

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """The text's attention to the visual tokens, the mean of all heads and layers: (n q i gh gw).

        Raises:
            ValueError: if the decoder's attention cannot be recorded, as that of a hub model.
        """
        training = self.training
        self.eval()
        try:
            with record_attention(self.decoder, keep=lambda name: name.endswith(".attn")) as record:
                self.hidden_states(batch)
        finally:
            self.train(training)
        (gh, _), i, q = self._grid(batch), batch.visual.shape[1], batch.tokens.shape[1]
        weights = torch.stack([w.mean(1) for w in record.values()]).mean(0)[:, -q:, :-q]
        weights = rearrange(weights, "n q (i gh gw) -> n q i gh gw", i=i, gh=gh // self.shuffle)
        s = self.shuffle
        return repeat(weights / s**2, "n q i gh gw -> n q i (gh s1) (gw s2)", s1=s, s2=s)
