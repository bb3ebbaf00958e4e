"""Connector: the contract of what stands between a vision encoder and the blocks that read its tokens."""

import inspect
from abc import ABC, abstractmethod

from torch import Tensor, nn

from mmtransformer.serialization.pretrained import Pretrained


class Connector(Pretrained, nn.Module, ABC):
    """Visual tokens -> tokens that cross-attention reads: the `connector` of `VisionEncoderDecoder` and `Flamingo`.

    Where tokens stand amid the text, a `projector` of a grid of patches (`MLPProjector`, `LinearProjector`) takes its
    place (`Llava`, `PaliGemma`, `PrefixCaptioner`), which is called in another way, and not of this class.

    A new one is a class of this kind, in a file beside this one or in a module of your own: it is saved if it keeps
    each argument of its constructor under its name (docs/pytorch.md).

    Attributes:
        visual_dim: width of the tokens that it takes.
        dim: width of those that it gives.
        max_images: most images of a row; None = any number, each by itself.
        keeps_tokens: whether it gives a token for each that it takes, in their order; heat maps then lay its tokens out
            as patches. There are none behind one that does not, but for a `PerceiverResampler` in `Flamingo`.
    """

    visual_dim: int
    dim: int
    max_images: int | None = None
    keeps_tokens: bool = False

    @abstractmethod
    def forward(self, visual_tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The tokens of each image: (b i p visual_dim) -> (b i l dim).

        Args:
            visual_tokens: of the images.
            mask: (b i p) bool, which of them are real, where images have different numbers; None = all. What is given
                for the others means nothing.
        """

    def forward_with_mask(self, visual_tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`forward`, and which of the tokens that it gives are those of a real image: (b i l) bool, None = all.

        Raises:
            ValueError: if there is a mask, and this connector's `forward` takes none.
        """
        if mask is None:
            return self(visual_tokens), None
        if "mask" not in inspect.signature(self.forward).parameters:
            raise ValueError(
                f"a {type(self).__name__} cannot read images of native size: its forward takes no mask of their tokens"
            )
        x = self(visual_tokens, mask)
        return x, mask if self.keeps_tokens else mask.any(-1, keepdim=True).expand(x.shape[:3])


def heatmap_error(connector: Connector | None) -> str | None:
    """Why nobody knows which patches the tokens that are read come from; None = each is one patch's."""
    if connector is None or connector.keeps_tokens:
        return None
    return (
        f"there are no heat maps behind a {type(connector).__name__}: it does not give a token for each patch (a class "
        f"of your own that does says keeps_tokens = True)"
    )


def check_connector(connector: object, visual_dim: int) -> None:
    """Refuses what cannot stand between a vision encoder and cross-attention; None may.

    Args:
        connector: what was given as one.
        visual_dim: width of the vision encoder's tokens.

    Raises:
        ValueError: naming its class or its width.
    """
    if connector is None:
        return
    if not isinstance(connector, Connector):
        raise ValueError(f"connector must be a Connector, such as a LinearConnector, not a {type(connector).__name__}")
    if connector.visual_dim != visual_dim:
        raise ValueError(
            f"the connector's visual_dim ({connector.visual_dim}) must be the vision encoder's dim ({visual_dim})"
        )
