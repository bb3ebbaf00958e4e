"""Images with their texts: what captioners read.

Shapes: n rows of text, r of each of the b samples, side by side: they share its images; gh gw rows and columns of
patches; c numbers of a patch (its channels, rows and columns).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from mmtransformer.batch.base import Batch, as_mask, check_shape, with_images
from mmtransformer.batch.images import pad_images

DOCUMENT_FIELDS = ("image_index", "first_image_index", "document_ids")
"""The fields that a batch of packed documents has beside others."""
# The fields that have a place for every text token.
_TOKEN_FIELDS = ("tokens", "attention_mask", "loss_mask", *DOCUMENT_FIELDS)


@dataclass
class CaptionBatch(Batch):
    """Images with their texts.

    Attributes:
        tokens: (n q) long: prompt, caption and end-of-sequence, padded on the right; a prompt alone, on the left.
        attention_mask: (n q) bool, True = a real token.
        loss_mask: (n q) bool, True = a token that the model must predict: caption and end, not prompt, not padding.
        pixels: (b i 3 height width); (b 3 height width) is taken as one image a sample. With `patch_grids` patches
            (b i p c), filled up to the most that an image has.
        visual_tokens: (b i p d), what `Captioner.forward_features` makes of pixels, in their place (a feature cache).
        names: the b samples' names. In contrastive losses, samples of one name are no negatives of each other.
        references: the b samples' captions, each (text, language).
        questions: what is asked of each of the b samples, None where nothing is; () = of none.
        image_mask: (b i) bool, which of a sample's images are real, where samples have different numbers; None = all.
        image_index: (n q) long: number (from 1) of the last image that has come up to and including a token, 0 = none
            in its own document; None = all images stand before the text.
        first_image_index: (n q) long: number of the first image of the token's own document; None = 1.
        document_ids: (n q) long: number (from 0) of the token's document in a packed row; None = one document a row.
        patch_grids: (b i 2) long, rows and columns of patches of each image, where images have sizes of their own
            (`ImageTransform` with resize "native"); 0 = no image. None = all have one size.

    Raises:
        ValueError: if pixels have another number of dimensions, or masks other numbers than 0 and 1.
    """

    tokens: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    pixels: Tensor | None = None
    visual_tokens: Tensor | None = None
    names: tuple[str, ...] = ()
    references: tuple[tuple[tuple[str, str | None], ...], ...] = ()
    questions: tuple[str | None, ...] = ()
    image_mask: Tensor | None = None
    image_index: Tensor | None = None
    first_image_index: Tensor | None = None
    document_ids: Tensor | None = None
    patch_grids: Tensor | None = None

    def __post_init__(self) -> None:
        if self.pixels is not None and self.pixels.ndim != 5 and self.patch_grids is None:
            self.pixels = with_images(self.pixels)
        if not (self.attention_mask.dtype == self.loss_mask.dtype == torch.bool):
            self.attention_mask = as_mask(self.attention_mask, "attention_mask")
            self.loss_mask = as_mask(self.loss_mask, "loss_mask")

    @classmethod
    def from_pixels(cls, pixels: Sequence[Tensor], patch_size: int | None = None) -> Self:
        """Images (3 height width), one a sample, without texts.

        Args:
            pixels: of one size; with `patch_size` of any that it divides.
            patch_size: side of the vision encoder's patches, px, where images have sizes of their own.
        """
        none = torch.zeros(len(pixels), 0, dtype=torch.long)
        if patch_size is None:
            return cls(none, none.bool(), none.bool(), pixels=torch.stack([*pixels])[:, None])
        patches, grids = pad_images([[image] for image in pixels], patch_size)
        return cls(none, none.bool(), none.bool(), pixels=patches, patch_grids=grids)

    @property
    def visual(self) -> Tensor:
        """The images in whatever form they came, pixels or cached tokens: (b i ...).

        Raises:
            ValueError: if the batch has neither.
        """
        visual = self.pixels if self.visual_tokens is None else self.visual_tokens
        if visual is None:
            raise ValueError("a batch needs pixels or visual_tokens, this one has neither")
        return visual

    def pick_images(self, order: Tensor) -> Self:
        """The batch with other images in its samples' places: numbers (b i) among all of its b * i, read in a row."""
        images = {name: getattr(self, name) for name in ("pixels", "visual_tokens", "patch_grids")}
        kept = {name: x.flatten(0, 1)[order.to(x.device)] for name, x in images.items() if x is not None}
        return replace(self, **kept)

    def truncate(self, length: int) -> Self:
        """The batch with only the first `length` tokens of every row."""
        texts = {name: getattr(self, name) for name in _TOKEN_FIELDS}
        return replace(self, **{name: x[:, :length] for name, x in texts.items() if x is not None})


def check_texts(batch: Any) -> None:
    """Refuses rows of another type than ids or with a mask of another shape, and texts that cannot be shared out among
    the samples' images.

    Raises:
        ValueError: naming the type, the shapes, or both numbers.
    """
    tokens, mask = batch.tokens, batch.attention_mask
    if mask.shape != tokens.shape:
        check_shape(mask, "attention_mask", tokens.shape, "tokens")
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens are ids in torch.int64, not in {tokens.dtype}: give tokens.long()")
    pixels, visual = getattr(batch, "pixels", None), getattr(batch, "visual_tokens", None)
    samples = len(visual) if visual is not None else 0 if pixels is None else len(pixels)
    if samples and len(tokens) % samples:
        raise ValueError(
            f"{len(tokens)} texts cannot be shared out among {samples} images (rows of pixels): each has one, or as "
            f"many as the others, side by side"
        )
