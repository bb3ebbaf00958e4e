"""EncoderDecoder: every decoder block reads the visual tokens through cross-attention, all trained together.

Letters: b samples, i pictures of a sample, p visual tokens of a picture, n rows of text (b divides n), q text tokens,
d width of a token, h heads, gh gw rows and columns of patches.
"""

import torch
from einops import rearrange
from torch import Tensor

from mmtransformer.backbones.decoder import DecoderState, TextDecoder
from mmtransformer.backbones.vit import ViT
from mmtransformer.captioners.base import CaptionBatch, Captioner, freeze
from mmtransformer.connectors.adapter import VisualAdapter
from mmtransformer.layers.attention import KeyValue
from mmtransformer.layers.record import record_attention
from mmtransformer.serialization.pretrained import from_config, to_config


class EncoderDecoderState:
    """The decoder's caches, and each cross-attending block's keys and values of the pictures, shared by their rows."""

    def __init__(self, decoder: DecoderState, context: list[KeyValue]) -> None:
        self.decoder, self.context = decoder, context

    def reorder(self, rows: Tensor) -> None:
        """Reorders what belongs to rows of text; the pictures' keys and values stay where they are."""
        self.decoder.reorder(rows)


class EncoderDecoder(Captioner):
    """A vision tower and a text decoder with cross-attention (as Show, Attend and Tell, arXiv:1502.03044).

    Args:
        vision: the vision tower; its `forward_features` gives the visual tokens.
        decoder: a text decoder whose `cross_dim` is the width of the visual tokens (of the adapter's, if there is one).
        adapter: trainable layers between the two, (b p d) -> (b p cross_dim); None = the tower's tokens as they are.
        freeze_vision: whether the tower is taken out of training (its features can then be cached).
        freeze_decoder: the same for all of the decoder but its cross-attention (as SmallCap, arXiv:2209.15323).

    Raises:
        ValueError: if the widths of the parts do not fit.
    """

    def __init__(
        self,
        vision: ViT,
        decoder: TextDecoder,
        *,
        adapter: VisualAdapter | None = None,
        freeze_vision: bool = False,
        freeze_decoder: bool = False,
    ) -> None:
        super().__init__()
        given = vision.dim if adapter is None else adapter.dim
        if decoder.cross_dim != given:
            source = "vision tower's" if adapter is None else "adapter's"
            raise ValueError(
                f"the decoder's cross_dim ({decoder.cross_dim}) must be the {source} dim ({given})"
            )
        if adapter is not None and adapter.visual_dim != vision.dim:
            raise ValueError(
                f"the adapter's visual_dim ({adapter.visual_dim}) must be the vision tower's dim ({vision.dim})"
            )
        self.vision, self.decoder, self.adapter = vision, decoder, adapter
        self.freeze_vision, self.freeze_decoder = freeze_vision, freeze_decoder
        if freeze_vision:
            freeze(vision)
        if freeze_decoder:
            freeze(decoder)
            for name, parameter in decoder.named_parameters():
                parameter.requires_grad_(_crosses(name))

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the head scores."""
        return self.decoder.vocab_size

    @property
    def max_len(self) -> int:
        """Most text tokens of a row, prompt included."""
        return self.decoder.max_len

    def encode(self, pixels: Tensor) -> Tensor:
        """The vision tower's tokens: (b i 3 height width) -> (b i p d)."""
        b, i = pixels.shape[:2]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
            features = self.vision.forward_features(rearrange(pixels, "b i c h w -> (b i) c h w"))
        return rearrange(features, "(b i) p d -> b i p d", b=b, i=i)

    def context(self, batch: CaptionBatch) -> Tensor:
        """What cross-attention reads: all pictures' tokens of a sample in a row, (b (i p) cross_dim)."""
        visual_tokens = self.visual_tokens(batch)
        x = rearrange(visual_tokens, "b i p d -> (b i) p d").to(self.decoder.tok_embed.weight.dtype)
        x = x if self.adapter is None else self.adapter(x)
        return rearrange(x, "(b i) p d -> b (i p) d", b=visual_tokens.shape[0])

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states (n q d); rows are padded on the right, so the causal mask alone hides their padding."""
        return self.decoder(batch.tokens, self.context(batch))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits: (... d) -> (... vocab)."""
        return self.decoder.head(hidden)

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, EncoderDecoderState]:
        """Encodes the pictures once and reads the left-padded prompts; see `Captioner.prefill`."""
        n, q = batch.tokens.shape
        context = self.decoder.project_context(self.context(batch))
        state = self.decoder.new_state(q + max_new_tokens)
        attention_mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
        hidden = self.decoder(batch.tokens, context, attention_mask=attention_mask, state=state)
        logits = self.head(hidden[:, -1])
        if expand_size > 1:
            rows = torch.arange(n, device=logits.device).repeat_interleave(expand_size)
            state.reorder(rows)
            logits = logits.index_select(0, rows)
        return logits, EncoderDecoderState(state, context)

    def decode_step(self, tokens: Tensor, state: EncoderDecoderState) -> Tensor:
        """Adds a token to each row: (n) -> logits of the next (n vocab)."""
        hidden = self.decoder(tokens[:, None], state.context, state=state.decoder)
        return self.head(hidden[:, 0])

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """Cross-attention over the patches, the mean of all heads and layers, without dropout: (n q i gh gw)."""
        training = self.training
        self.eval()
        try:
            with record_attention(self.decoder, keep="cross_attn") as record:
                self.hidden_states(batch)
        finally:
            self.train(training)
        weights = torch.stack([w.mean(1) for w in record.values()]).mean(0)
        i = self.visual_tokens(batch).shape[1] if batch.pixels is None else batch.pixels.shape[1]
        grid = self.vision.grid if batch.pixels is None else self.vision.grid_size(*batch.pixels.shape[3:])
        weights = rearrange(weights, "n q (i p) -> n q i p", i=i)[..., self.vision.num_prefix_tokens :]
        return rearrange(weights, "n q i (gh gw) -> n q i gh gw", gh=grid[0])


def add_cross_attention(decoder: TextDecoder, cross_dim: int, cross_every: int = 1) -> TextDecoder:
    """A language model's copy that also reads a context; at first it says what the model says.

    Args:
        decoder: a decoder without cross-attention.
        cross_dim: width of the context's tokens.
        cross_every: the last of every so many blocks reads the context.

    Raises:
        ValueError: if it has cross-attention already.
    """
    if decoder.cross_dim is not None:
        raise ValueError(f"the decoder has cross-attention already, to tokens of width {decoder.cross_dim}")
    config = to_config(decoder)
    config["args"] |= {"cross_dim": cross_dim, "cross_every": cross_every}
    new = from_config(config)
    assert isinstance(new, TextDecoder)
    own = {name: x for name, x in new.state_dict().items() if _crosses(name)}
    own |= {name: torch.zeros_like(x) for name, x in own.items() if "out_proj" in name}
    new.load_state_dict(dict(decoder.state_dict()) | own)
    return new


def _crosses(name: str) -> bool:
    return ".cross_attn." in name or ".norm_cross." in name
