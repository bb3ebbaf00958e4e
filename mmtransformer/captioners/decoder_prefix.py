"""Images as a soft prompt: embeddings in front of the text of a causal language model.

Shapes: n rows of text, r of each of the b samples, side by side; m rows of embeddings (b, or n where instructions make
them differ), l embeddings of an image, k = i * l, e width of the decoder's embeddings.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mmtransformer.backbones.base import Decoder, DecoderState, repeat_rows
from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.batch import CaptionBatch


def forward_with_prefix(
    decoder: Decoder, prefix_embeds: Tensor, batch: CaptionBatch, prefix_mask: Tensor | None = None
) -> Tensor:
    """The hidden states of right-padded text behind its images: (n q d).

    Args:
        decoder: the language model.
        prefix_embeds: what stands before the text (m i l e).
        batch: the text, and which images are real.
        prefix_mask: (b i l) bool, which embeddings of each image are real; None = all of real images.
    """
    images, real = join_images(prefix_embeds, batch, prefix_mask)
    text = decoder.embed_tokens(batch.tokens)
    x = torch.cat((images.to(text.dtype), text), dim=1)
    attention_mask = None if real is None else torch.cat((real, torch.ones_like(batch.attention_mask)), dim=1)
    positions = decoder.position_ids(x, attention_mask)
    hidden = decoder.forward_embeds(decoder.add_positions(x, positions), positions, attention_mask=attention_mask)
    return hidden[:, images.shape[1] :]


def prefill_with_prefix(
    decoder: Decoder,
    prefix_embeds: Tensor,
    batch: CaptionBatch,
    prefix_mask: Tensor | None = None,
    *,
    expand_size: int,
    max_new_tokens: int,
) -> tuple[Tensor, DecoderState]:
    """Reads images and left-padded prompts, then repeats every row `expand_size` times; see `Captioner.prefill`."""
    images, real = join_images(prefix_embeds, batch, prefix_mask)
    text = decoder.embed_tokens(batch.tokens)
    x, attention_mask = torch.cat((images.to(text.dtype), text), dim=1), None
    if real is not None or not bool(batch.attention_mask.all()):
        real = batch.attention_mask.new_ones(images.shape[:2]) if real is None else real
        attention_mask = torch.cat((real, batch.attention_mask), dim=1)
        # Padding goes to the front: a window counts places, and the images are as near to each prompt.
        order = attention_mask.long().argsort(dim=1, stable=True)
        x = x.take_along_dim(order[..., None], 1)
        attention_mask = attention_mask.gather(1, order)
    state = decoder.new_state(x.shape[1] + max_new_tokens)
    positions = decoder.position_ids(x, attention_mask, state=state)
    hidden = decoder.forward_embeds(
        decoder.add_positions(x, positions), positions, attention_mask=attention_mask, state=state
    )
    return repeat_rows(decoder.head(hidden[:, -1]), state, expand_size)


def read_behind_images(
    decoder: TextDecoder,
    prefix_embeds: Tensor,
    batch: CaptionBatch,
    inside: Tensor,
    *,
    image_positions: bool,
    state: DecoderState | None = None,
) -> Tensor:
    """The hidden states (n q d) of text behind images that enter behind its embedding, and are seen both ways.

    Scale, positions and norm of the decoder's embedding are the text's alone.

    Args:
        decoder: the language model.
        prefix_embeds: what stands before the text (m i l d).
        batch: the text, and which images are real.
        inside: (n q) bool, text that sees the images' tokens and itself in both directions, and is seen by them.
        image_positions: whether images take positions before the text's.
        state: an empty one, for left-padded prompts; None = rows are padded on the right, and causality hides it.
    """
    images, real = join_images(prefix_embeds, batch)
    n, count = images.shape[:2]
    attention_mask, text_mask = None, None
    if real is not None or (state is not None and not bool(batch.attention_mask.all())):
        real = batch.attention_mask.new_ones(n, count) if real is None else real
        text_mask = batch.attention_mask if state is not None else torch.ones_like(batch.attention_mask)
        attention_mask = torch.cat((real, text_mask), dim=1)
    positions = decoder.position_ids(batch.tokens, text_mask)
    text = decoder.embed(batch.tokens, positions)
    x, bidirectional = torch.cat((images.to(text.dtype), text), dim=1), F.pad(inside, (count, 0), value=True)
    if attention_mask is not None and state is not None:
        # Padding goes to the front: a window counts places, and the images are as near to each prompt.
        order = attention_mask.long().argsort(dim=1, stable=True)
        x = x.take_along_dim(order[..., None], 1)
        attention_mask, bidirectional = attention_mask.gather(1, order), bidirectional.gather(1, order)
        positions = F.pad(positions, (count, 0), value=-1).gather(1, order)
    else:
        positions = F.pad(positions, (count, 0), value=-1)  # The text's next position does not count images.
    if image_positions:
        positions = decoder.position_ids(x, attention_mask)
    hidden = decoder.forward_embeds(
        x, positions, attention_mask=attention_mask, bidirectional=bidirectional, state=state
    )
    return hidden[:, count:]


def join_images(
    prefix_embeds: Tensor, batch: CaptionBatch, prefix_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A row's images one behind the other, what is padding of them first, for each row of text.

    Where a window or a relative position counts places, real images must stand beside the text.

    Args:
        prefix_embeds: (m i l e).
        batch: the text, and which images are real.
        prefix_mask: (b i l) bool, which embeddings of each image are real; None = all of real images.

    Returns:
        (n k e), and which are of real images (n k); None = all.
    """
    n, real = len(batch.tokens), _real(batch, prefix_embeds.shape[2], prefix_mask)
    x = rearrange(prefix_embeds, "m i l e -> m (i l) e")
    if n % len(x) if len(x) else n:
        raise ValueError(f"rows of tokens ({n}) must be a multiple of the samples with pictures ({len(x)})")
    if real is not None:
        order = _padding_first(real)
        x = x.take_along_dim(order.repeat_interleave(len(x) // max(len(order), 1), 0)[..., None], 1)
        real = real.gather(1, order).repeat_interleave(n // max(len(real), 1), 0)
    return x.repeat_interleave(n // max(len(x), 1), 0), real


def in_image_order(weights: Tensor, batch: CaptionBatch, prefix_mask: Tensor | None = None) -> Tensor:
    """Weights on the embeddings of images as `join_images` arranged them, (n q k), by image: (n q i l)."""
    i = batch.visual.shape[1]
    real = _real(batch, weights.shape[2] // i, prefix_mask)
    if real is not None:
        back = _padding_first(real).argsort(1)
        weights = weights.take_along_dim(back.repeat_interleave(len(weights) // len(back), 0)[:, None], 2)
    return rearrange(weights, "n q (i l) -> n q i l", i=i)


def _real(batch: CaptionBatch, count: int, prefix_mask: Tensor | None) -> Tensor | None:
    """Which embeddings are real, (b k) bool; None = all."""
    if prefix_mask is not None:
        return prefix_mask.flatten(1)
    return None if batch.image_mask is None else batch.image_mask.repeat_interleave(count, 1)


def _padding_first(real: Tensor) -> Tensor:
    return real.long().argsort(dim=1, stable=True)
