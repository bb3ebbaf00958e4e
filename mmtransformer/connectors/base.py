"""Connector: the contract of what stands between a vision encoder and the blocks that read its tokens."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from mmtransformer.serialization.pretrained import Pretrained


class Connector(Pretrained, nn.Module, ABC):
    """Visual tokens -> tokens that cross-attention reads: for `VisionEncoderDecoder` and `Flamingo`.

    A new one is a class of this kind in a file beside this one; only the library's public names can be saved. For
    `VisionEncoderDecoder`'s attention maps it gives a token a patch.

    Attributes:
        visual_dim: width of the tokens that it takes.
        dim: width of those that it gives.
        max_images: most images of a row; None = any number, each by itself.
    """

    visual_dim: int
    dim: int
    max_images: int | None = None

    @abstractmethod
    def forward(self, visual_tokens: Tensor) -> Tensor:
        """The tokens of each image: (b i p visual_dim) -> (b i l dim)."""
