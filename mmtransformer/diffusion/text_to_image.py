"""A text encoder and a diffusion transformer that it steers, trained as one: the mirror of a captioner.

Shapes beyond the legend: n rows of text, r = n / b texts of an image.
"""

import torch
from torch import Tensor, nn

from mmtransformer.backbones.diffusion_transformer import DiffusionTransformer, TextContext
from mmtransformer.backbones.encoder import TextEncoder
from mmtransformer.backbones.hf.autoencoder import HFAutoencoder
from mmtransformer.batch import CaptionBatch, SumAndCount
from mmtransformer.diffusion.paths import DiffusionConfig
from mmtransformer.dual_encoders.text_tower import TextTower
from mmtransformer.layers.modes import freeze, is_frozen
from mmtransformer.serialization.pretrained import Pretrained


class TextToImageModel(Pretrained, nn.Module):
    """Draws what a text says.

    Args:
        text: reads the text, BERT's way or CLIP's (whose blocks have their norms in front, so it can be trained from
            nothing at high rates; Stable Diffusion reads with a trained one); its width is the transformer's
            `context_dim`.
        transformer: takes the noise away.
        diffusion: the path from images to noise, what is predicted on it, and the times that are trained on.
        text_dropout_prob: share of texts that are hidden in training (no token may be looked at), so that the model
            also knows images without a text (classifier-free guidance, arXiv:2207.12598, which takes 0.1 to 0.2).
        freeze_text: leave the text encoder as it is.
        autoencoder: makes images small before noise comes to them, and is frozen; None = noise on pixels.

    Raises:
        ValueError: if the widths or channels differ, or a share is none.
    """

    def __init__(
        self,
        text: TextEncoder | TextTower,
        transformer: DiffusionTransformer,
        *,
        diffusion: DiffusionConfig = DiffusionConfig(),  # noqa: B008 (frozen)
        text_dropout_prob: float = 0.1,
        freeze_text: bool = False,
        autoencoder: HFAutoencoder | None = None,
    ) -> None:
        super().__init__()
        if autoencoder is not None and autoencoder.latent_channels != transformer.in_channels:
            raise ValueError(
                f"the transformer draws {transformer.in_channels} channels (in_channels), but the autoencoder's "
                f"latents have {autoencoder.latent_channels}"
            )
        if transformer.context_dim != text.dim:
            raise ValueError(
                f"the transformer reads texts of width {transformer.context_dim} (context_dim), but the text encoder "
                f"writes {text.dim}"
            )
        if transformer.out_channels != transformer.in_channels:
            raise ValueError(
                f"the transformer gives {transformer.out_channels} channels for {transformer.in_channels}: a predicted "
                "variance is not trained here"
            )
        if not 0 <= text_dropout_prob < 1:
            raise ValueError(f"text_dropout_prob ({text_dropout_prob}) must be at least 0 and below 1")
        self.text = freeze(text) if freeze_text else text
        self.transformer, self.diffusion = transformer, diffusion
        self.text_dropout_prob, self.freeze_text = text_dropout_prob, freeze_text
        self.autoencoder = autoencoder

    @property
    def patch_side(self) -> int:
        """Side of what one token of the transformer stands for, in pixels."""
        return self.transformer.patch_size * (1 if self.autoencoder is None else self.autoencoder.factor)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, px, that its positions are counted in; where they are one a patch, 32 patches (DiT's)."""
        side = (self.transformer.base_grid or 32) * self.patch_side
        return side, side

    def encode(self, images: Tensor) -> Tensor:
        """Images (b 3 height width) as what noise is added to: their latents, or as they are."""
        return images if self.autoencoder is None else self.autoencoder.encode(images)

    def decode(self, drawn: Tensor) -> Tensor:
        """What was drawn as images (b 3 height width)."""
        return drawn if self.autoencoder is None else self.autoencoder.decode(drawn)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the text encoder reads."""
        return self.text.vocab_size

    @property
    def max_len(self) -> int:
        """Most tokens of a text."""
        return self.text.max_len

    def train(self, mode: bool = True) -> "TextToImageModel":
        """Training mode for all but a frozen text encoder."""
        super().train(mode)
        if is_frozen(self.text):
            self.text.eval()
        return self

    def encode_prompt(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Texts as the transformer attends to them: (n q) long and (n q) bool -> (n q d)."""
        read = self.text.forward_features if isinstance(self.text, TextTower) else self.text
        return read(tokens, attention_mask=attention_mask)

    def forward(self, batch: CaptionBatch, *, generator: torch.Generator | None = None) -> SumAndCount:
        """The loss of every text's image at a time drawn by lot.

        Args:
            batch: images with their texts; each text is drawn by itself, with noise of its own.
            generator: source of times, noise and hidden texts, on the CPU; None = torch's own.

        Returns:
            Sum over the n texts, and n.
        """
        assert batch.pixels is not None
        n, b = batch.tokens.shape[0], batch.pixels.shape[0]
        images = self.encode(batch.pixels[:, -1]).repeat_interleave(n // b, 0)
        device = images.device
        times = self.diffusion.times(n, generator).to(device)
        noise = torch.randn(images.shape, generator=generator).to(images)
        seen = batch.attention_mask
        if self.training and self.text_dropout_prob:
            hidden = torch.rand(n, generator=generator) < self.text_dropout_prob
            seen = seen & ~hidden.to(device)[:, None]
        context = self.encode_prompt(batch.tokens, batch.attention_mask)
        x = self.diffusion.noised(images, noise, times)
        predicted = self.transformer(x, times, context, context_mask=seen)
        losses = self.diffusion.loss(predicted, images, noise, times)
        return SumAndCount(losses.sum(), torch.tensor(n, device=device))

    def conditions(
        self, tokens: Tensor, attention_mask: Tensor, negative: tuple[Tensor, Tensor] | None = None
    ) -> tuple[TextContext, Tensor]:
        """What `guided` walks with: the texts as the transformer reads them, then what to go away from.

        Args:
            tokens: (n q) long.
            attention_mask: (n q) bool.
            negative: the same of the texts to go away from (one row, or n); None = no text at all.

        Returns:
            2 n rows of texts, and their mask (2n q).
        """
        n, q = tokens.shape
        context = self.encode_prompt(tokens, attention_mask)
        other, other_mask = context, torch.zeros_like(attention_mask)
        if negative is not None:
            other_mask = negative[1].expand(n, -1)
            other = self.encode_prompt(*negative).expand(n, -1, -1)
            longest = max(q, other_mask.shape[1])
            context, other = (nn.functional.pad(x, (0, 0, 0, longest - x.shape[1])) for x in (context, other))
            attention_mask, other_mask = (
                nn.functional.pad(x, (0, longest - x.shape[1])) for x in (attention_mask, other_mask)
            )
        both, mask = torch.cat((context, other)), torch.cat((attention_mask, other_mask))
        return self.transformer.project_context(both, mask), mask
