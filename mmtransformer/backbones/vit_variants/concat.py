"""Any blocks' tokens, of one ViT or of two, side by side as one vision encoder for any connector.

LLaVA reads the last block but one (arXiv:2310.03744), others several; two towers see more than one (arXiv:2401.06209,
arXiv:2402.07865, where their channels stand side by side).

Shapes: d width of the first tower's tokens, e of the second's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmtransformer.backbones.vit import ViT
from mmtransformer.images import ImageTransform


class ConcatViT(ViT):
    """One or two ViTs that a captioner, a connector or a projector takes for one, with wider tokens of patches.

    It is a ViT to whoever reads its tokens, without a ViT's own parts: no pooling, no classes, no prefix tokens.
    Both towers get the same pixels: where they were trained with other means and deviations (`ViT.transform`), the
    second's are computed from the first's.

    Args:
        first: a tower.
        second: another one, whose grid of patches is the same at the first's image_size.
        layers: the blocks of the first whose tokens are read, side by side and before its last norm, as
            `tokens_after` counts them: (-2,) in LLaVA-1.5. None = the tokens after the last norm.
        second_layers: the same of the second.

    Raises:
        ValueError: if there is no such block, or the grids differ.
    """

    def __init__(
        self,
        first: ViT,
        second: ViT | None = None,
        *,
        layers: tuple[int, ...] | None = None,
        second_layers: tuple[int, ...] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if second is None and second_layers is not None:
            raise ValueError(f"second_layers {tuple(second_layers)} are of a second tower, and there is none")
        self.first, self.second = first, second
        self.layers = None if layers is None else tuple(layers)
        self.second_layers = None if second_layers is None else tuple(second_layers)
        self.dim = 0
        for tower, chosen in self.towers():
            if chosen is not None and (not chosen or any(not -tower.depth <= i < tower.depth for i in chosen)):
                raise ValueError(f"tokens behind blocks {chosen} are to be read, but there are {tower.depth}")
            self.dim += tower.dim * (1 if chosen is None else len(chosen))
        self.image_size, self.patch_size, self.grid_size = first.image_size, first.patch_size, first.grid_size
        if second is not None and (second.grid_size != first.grid_size or second.image_size != first.image_size):
            raise ValueError(
                f"the first tower cuts {first.image_size} px into {first.grid_size} patches, the second "
                f"{second.image_size} px into {second.grid_size}: load the second with image_size {first.image_size}, "
                f"and one of patches of the same size"
            )
        self.depth, self.num_heads = first.depth, first.num_heads
        self.class_token, self.num_registers, self.num_prefix_tokens, self.num_classes = False, 0, 0, 0
        self.patches, self.block, self.pool, self.grad_checkpointing = first.patches, first.block, "mean", False
        self.norm, self.pool_norm, self.head, self.attn_pool = nn.Identity(), nn.Identity(), nn.Identity(), None
        self.transform: ImageTransform | None = first.transform
        for tower, chosen in self.towers():  # What nobody reads gets no gradient.
            unread: list[Any] = [tower.attn_pool, tower.head, tower.pool_norm]
            if chosen is not None:
                unread += [tower.norm, *tower.blocks[max(i % tower.depth for i in chosen) + 1 :]]
            for part in unread:
                if part is not None:
                    part.requires_grad_(False)

    def towers(self) -> list[tuple[ViT, tuple[int, ...] | None]]:
        """Each tower with the blocks that are read of it."""
        both = [(self.first, self.layers)]
        return both if self.second is None else [*both, (self.second, self.second_layers)]

    @property
    def dtype(self) -> torch.dtype:
        """What the first tower's weights are kept in."""
        return self.first.dtype

    def forward_features(self, pixels: Tensor) -> Tensor:
        """The patches' tokens, side by side: (b channels height width) -> (b p dim), all of d, then all of e."""
        found = []
        for tower, chosen in self.towers():
            seen = pixels if tower is self.first else _as_seen_by(tower, pixels, self.first.transform)
            if chosen is None:
                parts = [tower.forward_features(seen)]
            else:
                parts = tower.tokens_after(seen, list(chosen))
            found += [part[:, tower.num_prefix_tokens :] for part in parts]
        return torch.cat([part.to(found[0].dtype) for part in found], dim=-1)

    def tokens_after(self, pixels: Tensor, blocks: Sequence[int], *, norm: bool = False) -> list[Tensor]:
        """Refused, as the towers' blocks are chosen when they are joined.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"blocks {list(blocks)} of joined towers were asked for: say them as layers and second_layers")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The mean of the patches: (b p dim) -> (b dim)."""
        return x.mean(1)

    def set_input_size(self, image_size: tuple[int, int] | int) -> None:
        """See `ViT.set_input_size`; of both towers."""
        for tower, _ in self.towers():
            tower.set_input_size(image_size)
        self.image_size, self.grid_size, self.transform = (
            self.first.image_size,
            self.first.grid_size,
            self.first.transform,
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `ViT.set_grad_checkpointing`; of both towers."""
        for tower, _ in self.towers():
            tower.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay spares, beside biases and norms (timm's protocol)."""
        named = (("first", self.first), ("second", self.second))
        return {f"{name}.{path}" for name, tower in named if tower is not None for path in tower.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by name, for layer-wise learning rates (timm's protocol)."""
        stem = r"^(?:first|second)\.(?:prefix_tokens|pos_embed|rotary|patch_embed|embed_norm|first_norm)"
        blocks = [(r"^(?:first|second)\.blocks\.(\d+)", None), (r"^(?:first|second)\.(?:pool_)?norm", (99999,))]
        return {"stem": stem, "blocks": blocks}


def _as_seen_by(tower: ViT, pixels: Tensor, made: ImageTransform | None) -> Tensor:
    """Pixels that one tower's mean and deviation were taken off, with another's."""
    own = tower.transform
    if made is None or own is None or (made.mean, made.std) == (own.mean, own.std):
        return pixels
    constants = [_row(x, pixels) for x in (made.mean, made.std, own.mean, own.std)]
    return (pixels * constants[1] + constants[0] - constants[2]) / constants[3]


def _row(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)[:, None, None]
