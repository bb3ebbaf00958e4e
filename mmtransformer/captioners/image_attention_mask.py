"""Images anywhere in the text: which token sees which image.

Shapes: n rows of text, r of each of the b samples, side by side.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from mmtransformer.batch import CaptionBatch
from mmtransformer.layers import masks

VisibleImages = Literal["last", "all_previous", "none"]
"""Which of the images before it a token sees: the last one, as in Flamingo; all; or none."""


def check_visible_images(visible_images: VisibleImages) -> VisibleImages:
    """The word itself.

    Raises:
        ValueError: if it is another one.
    """
    if visible_images not in get_args(VisibleImages):
        raise ValueError(f'visible_images must be "last", "all_previous" or "none", not "{visible_images}"')
    return visible_images


def image_attention_mask(batch: CaptionBatch, visible_images: VisibleImages) -> Tensor | None:
    """Which token sees which image: (n q i) bool, or None where all see all.

    A token never sees an image that comes after it, nor one of another document of its row.

    Args:
        batch: tokens and images.
        visible_images: "last" = only the last image before the token, as in Flamingo; "all_previous"; "none".

    Raises:
        ValueError: for another word, packed rows that do not say where images stand, or (on a CPU) tokens that come
            after more images than there are, or fewer than none.
    """
    check_visible_images(visible_images)
    (n, q), (b, i) = batch.tokens.shape, batch.visual.shape[:2]
    if visible_images == "none" or not i:
        return torch.zeros(n, q, i, dtype=torch.bool, device=batch.tokens.device)
    if batch.document_ids is not None and (
        batch.image_index is None or (visible_images == "all_previous" and batch.first_image_index is None)
    ):
        missing = "image_index" if batch.image_index is None else "first_image_index"
        raise ValueError(f"rows of packed documents need {missing}: which images belong to which document")
    told = (batch.image_index, batch.first_image_index, batch.image_mask)
    if all(x is None for x in told) and (i == 1 or visible_images == "all_previous"):
        return None
    numbers = torch.arange(1, i + 1, device=batch.tokens.device).expand(b, i)
    if batch.image_mask is not None:
        numbers = numbers * batch.image_mask
    numbers = numbers.repeat_interleave(n // b, 0)
    last = numbers.amax(1, keepdim=True)
    seen = last.expand(n, q) if batch.image_index is None else batch.image_index
    if seen.device.type == "cpu" and bool((seen > last).any()):
        row = int((seen > last).any(1).nonzero()[0])
        raise ValueError(f"row {row} has text after image {int(seen[row].max())}, but only {int(last[row])} images")
    if seen.device.type == "cpu" and bool((seen < 0).any()):
        row = int((seen < 0).any(1).nonzero()[0])
        raise ValueError(
            f"image_index of row {row} has {int(seen[row].min())}: images are numbered from 1, and 0 stands before all"
        )
    allowed = masks.images(seen, numbers, last_only=visible_images == "last")
    if batch.first_image_index is not None:
        first = batch.first_image_index
        allowed = masks.all_of(allowed, lambda b, q, k: numbers[b, k] >= first[b, q])
    return masks.dense(allowed, n, q, i, batch.tokens.device)


def show_mask(
    batch: CaptionBatch, visible_images: VisibleImages = "last", *, row: int = 0, words: Sequence[str] | None = None
) -> str:
    """One row's mask as text: a line a token, a column an image, "#" where it is seen.

    Args:
        batch: tokens and images.
        visible_images: see `image_attention_mask`.
        row: number of the row.
        words: what to call the row's q tokens; None = their ids.
    """
    seen = image_attention_mask(batch, visible_images)
    i = batch.visual.shape[1]
    mask = torch.ones(batch.tokens.shape[1], i, dtype=torch.bool) if seen is None else seen[row]
    labels = [str(t) for t in batch.tokens[row].tolist()] if words is None else list(words)
    return masks.show(mask, labels, [str(image) for image in range(1, i + 1)])
