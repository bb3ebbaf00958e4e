"""PatchConvs: convolutions between an image and a transformer's tokens, with skips past the transformer.

"simple diffusion" (arXiv:2301.11093) puts its transformer in the middle of such convolutions (U-ViT): neighbouring
pixels hang together from the first step, where linear patches must learn to fit at their seams.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.layers.linear import Linear


class PatchConvs(nn.Module):
    """Three convolutions down to a quarter of the side, then linear patches; and the same way back.

    The last convolution begins at zero, and so does what the condition changes.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the result.
        dim: width d of a token and of the condition.
        patch_size: side of what one token stands for; divisible by 4.
        width: channels w at full resolution; 2 w at half and 4 w at a quarter.

    Raises:
        ValueError: if the patch is not divided by 4, or there are no channels.
    """

    def __init__(self, in_channels: int, out_channels: int, dim: int, patch_size: int, width: int) -> None:
        super().__init__()
        if patch_size % 4:
            raise ValueError(f"patch_size ({patch_size}) must be divisible by 4 for convolutions to a quarter")
        if width < 1:
            raise ValueError(f"conv_width ({width}) must be at least 1")
        self.side = patch_size // 4
        wide, widest = 2 * width, 4 * width
        pixels = widest * self.side**2
        self.down = nn.ModuleList(
            (
                nn.Conv2d(in_channels, width, 3, padding=1),
                nn.Conv2d(width, wide, 3, stride=2, padding=1),
                nn.Conv2d(wide, widest, 3, stride=2, padding=1),
            )
        )
        self.embed, self.unembed = Linear(pixels, dim), Linear(dim, pixels)
        self.up = nn.ModuleList(
            (
                nn.Conv2d(widest, wide, 3, padding=1),
                nn.Conv2d(wide, width, 3, padding=1),
                nn.Conv2d(width, out_channels, 3, padding=1),
            )
        )
        self.gates = nn.ModuleList(Linear(dim, channels) for channels in (widest, wide, width))

    def init_weights(self) -> None:
        """Torch's own for convolutions; zero as the class says."""
        for layer in (*self.gates, self.up[-1]):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def encode(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(b c height width) -> tokens (b q d), and what goes past the transformer."""
        x, skips = images.contiguous(memory_format=torch.channels_last), []  # Half the time of convolutions on a CPU.
        for conv in self.down:
            x = F.silu(conv(x))
            skips.append(x)
        x = rearrange(x, "b c (y p) (x q) -> b (y x) (c p q)", p=self.side, q=self.side)
        return self.embed(x), skips

    def decode(self, tokens: Tensor, skips: list[Tensor], condition: Tensor) -> Tensor:
        """Tokens (b q d) and `encode`'s skips -> (b c height width); the condition (b d) says how much of each skip."""
        rows = skips[-1].shape[2] // self.side
        x = rearrange(self.unembed(tokens), "b (y x) (c p q) -> b c (y p) (x q)", y=rows, p=self.side, q=self.side)
        x, condition = x.contiguous(memory_format=torch.channels_last), F.silu(condition)
        for i, (conv, gate) in enumerate(zip(self.up, self.gates, strict=True)):
            x = torch.addcmul(x, skips[-1 - i], 1 + gate(condition)[:, :, None, None])
            x = conv(x) if i == 2 else F.interpolate(F.silu(conv(x)), scale_factor=2)
        return x
