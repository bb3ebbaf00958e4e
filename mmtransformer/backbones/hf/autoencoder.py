"""HFAutoencoder: an autoencoder of diffusers, which must be installed, makes images small for `DiffusionTransformer`.

Latent diffusion (arXiv:2112.10752): what is drawn are latents, an eighth of the image's side as a rule.

Shapes: s side factor, c channels of an image, l channels of its latents.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from mmtransformer.serialization.pretrained import Pretrained

_KIND = "AutoencoderKL"


class HFAutoencoder(Pretrained, nn.Module):
    """diffusers' `AutoencoderKL` (of Stable Diffusion 1 to 3, SDXL, Flux), frozen: its weights stay what they are.

    Images are in [-1, 1], as `ImageTransform` makes them with its usual mean and deviation of 0.5. Latents come out as
    diffusion wants them: shifted and scaled to about unit deviation by the numbers of the config.

    Args:
        config: what the autoencoder's config.json says; weights are random until they are loaded
            (`weights.load_autoencoder`).

    Raises:
        ValueError: if diffusers is missing, or cannot build it.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        kind = config.get("_class_name", _KIND)
        if kind != _KIND:
            raise ValueError(f'the config is of a "{kind}", and HFAutoencoder holds {_KIND}')
        diffusers = _diffusers()
        given = {name: value for name, value in config.items() if not name.startswith("_")}
        try:
            model = diffusers.AutoencoderKL(**given)
        except Exception as error:  # a config that makes no sense brings out almost any
            raise ValueError(f"diffusers {diffusers.__version__} cannot build this {_KIND}: {error}") from error
        self.config, self.model = given, model.eval().requires_grad_(False)
        built: Any = model.config
        self.latent_channels, self.in_channels = int(built.latent_channels), int(built.in_channels)
        self.factor = 2 ** (len(built.block_out_channels) - 1)
        self.scale, self.shift = float(built.scaling_factor), float(built.shift_factor or 0.0)

    def train(self, mode: bool = True) -> Self:
        """Evaluation mode, always: it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The means of the latents, without chance: (b c height width) -> (b l height/s width/s).

        Raises:
            ValueError: if the sides are not divided by s.
        """
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"images of {height} x {width} are not divided by the autoencoder's {self.factor}")
        latents = self.model.encode(images).latent_dist.mean
        return (latents - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents as images: (b l height/s width/s) -> (b c height width)."""
        return self.model.decode(latents / self.scale + self.shift, return_dict=False)[0]


def _diffusers() -> Any:
    try:
        import diffusers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        needed = 'HFAutoencoder needs diffusers, which is not installed (the extra "draw"; docs/install.md)'
        raise ValueError(needed) from error
    return diffusers
