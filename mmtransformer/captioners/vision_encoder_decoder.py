"""VisionEncoderDecoder: every decoder block reads the visual tokens through cross-attention, all trained together.

Shapes: n rows of text, r of each of the b samples, side by side; gh gw rows and columns of patches.
"""

import torch
from einops import rearrange
from torch import Tensor

from mmtransformer.backbones.base import DecoderState, repeat_rows
from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.backbones.vit import ViT
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.attribution import mean_weights, on_patches
from mmtransformer.captioners.base import NATIVE, Captioner
from mmtransformer.connectors.base import Connector, check_connector, heatmap_error
from mmtransformer.layers.modes import evaluation_mode, freeze
from mmtransformer.layers.record import record_attention
from mmtransformer.serialization.pretrained import from_config, to_config


class VisionEncoderDecoder(Captioner):
    """A vision encoder and a text decoder with cross-attention (as Show, Attend and Tell, arXiv:1502.03044).

    Args:
        vision: the vision encoder; its `forward_features` gives the visual tokens.
        decoder: a text decoder whose `context_dim` is the width of the visual tokens, or of the connector's.
        connector: what stands between the two, as a `TransformerConnector`; None = the encoder's tokens as they are.
        freeze_vision: see `Captioner`.
        freeze_decoder: the same for all of the decoder but its cross-attention (as SmallCap, arXiv:2209.15323).

    Raises:
        ValueError: if the widths of the parts do not fit.
    """

    unsupported_fields = NATIVE

    def __init__(
        self,
        vision: ViT,
        decoder: TextDecoder,
        *,
        connector: Connector | None = None,
        freeze_vision: bool = False,
        freeze_decoder: bool = False,
    ) -> None:
        super().__init__(vision, freeze_vision=freeze_vision)
        check_connector(connector, vision.dim)
        given = vision.dim if connector is None else connector.dim
        if decoder.context_dim != given:
            source = "vision encoder's" if connector is None else "connector's"
            raise ValueError(f"the decoder's context_dim ({decoder.context_dim}) must be the {source} dim ({given})")
        self.decoder, self.connector, self.freeze_decoder = decoder, connector, freeze_decoder
        if freeze_decoder:
            freeze(decoder)
            for name, parameter in decoder.named_parameters():
                parameter.requires_grad_(_crosses(name))

    def context(self, batch: CaptionBatch) -> tuple[Tensor, Tensor | None]:
        """What cross-attention reads, all images' tokens of a sample in a row (b (i p) context_dim); and which of them
        are of real images, (b (i p)) bool, None = all.
        """
        x = self.visual_tokens(batch).to(self.decoder.tok_embed.weight.dtype)
        real = self.visual_mask(batch, x.shape[2])
        if self.connector is not None and batch.patch_grids is not None:
            x, real = self.connector.forward_with_mask(x, real)
        elif self.connector is not None:
            x = self.connector(x)
            real = self.visual_mask(batch, x.shape[2])
        return rearrange(x, "b i p d -> b (i p) d"), None if real is None else rearrange(real, "b i p -> b (i p)")

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states (n q d); rows are padded on the right, so the causal mask alone hides their padding."""
        context, real = self.context(batch)
        return self.decoder(batch.tokens, context, context_mask=real)

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, DecoderState]:
        """Encodes the images once and reads the left-padded prompts; see `Captioner.prefill`."""
        context, real = self.context(batch)
        state = self.decoder.new_state(batch.tokens.shape[1] + max_new_tokens)
        attention_mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
        hidden = self.decoder(batch.tokens, context, attention_mask=attention_mask, context_mask=real, state=state)
        return repeat_rows(self.decoder.head(hidden[:, -1]), state, expand_size)

    @property
    def heatmap_error(self) -> str | None:
        """That the connector gives other tokens than the patches', where it does."""
        return heatmap_error(self.connector)

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """Cross-attention over the patches, the mean of all heads and layers: (n q i gh gw).

        Raises:
            ValueError: if the connector does not keep the patches' tokens.
        """
        if self.heatmap_error:
            raise ValueError(self.heatmap_error)
        with evaluation_mode(self), record_attention(self.decoder, keep="cross_attn") as record:
            self.hidden_states(batch)
        weights = rearrange(mean_weights(record.values()), "n q (i p) -> n q i p", i=batch.visual.shape[1])
        return on_patches(weights, self.grid(batch), self.vision.num_prefix_tokens, batch.patch_grids)


def add_cross_attention(decoder: TextDecoder, context_dim: int, cross_attn_every_n_layers: int = 1) -> TextDecoder:
    """A language model's copy that also reads a context; at first it says what the model says.

    Args:
        decoder: a decoder without cross-attention.
        context_dim: width of the context's tokens.
        cross_attn_every_n_layers: the last of every so many blocks reads the context.

    Raises:
        ValueError: if it has cross-attention already.
    """
    if decoder.context_dim is not None:
        raise ValueError(f"the decoder has cross-attention already, to tokens of width {decoder.context_dim}")
    config = to_config(decoder)
    config["args"] |= {"context_dim": context_dim, "cross_attn_every_n_layers": cross_attn_every_n_layers}
    new = from_config(config)
    assert isinstance(new, TextDecoder)
    own = {name: x for name, x in new.state_dict().items() if _crosses(name)}
    own |= {name: torch.zeros_like(x) for name, x in own.items() if "out_proj" in name}
    new.load_state_dict(dict(decoder.state_dict()) | own)
    return new


def _crosses(name: str) -> bool:
    return ".cross_attn." in name or ".norm_cross." in name
