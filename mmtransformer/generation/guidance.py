"""Guidance: what a picture makes likelier than a blank one does, made likelier still.

Shapes: m rows of texts.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.base import Captioner, State


class GuidedState(NamedTuple):
    """The states with the picture and with a blank one."""

    seen: State
    blank: State

    def reorder(self, rows: Tensor) -> None:
        """Reorders both."""
        self.seen.reorder(rows)
        self.blank.reorder(rows)


class Guided:
    """A captioner whose log-probabilities are blank + scale * (seen - blank) (arXiv:2207.12598, equation 6).

    Args:
        captioner: the model.
        scale: 1 = no guidance; above 1 what the picture says counts for more than how captions usually go.
    """

    def __init__(self, captioner: Captioner, scale: float) -> None:
        self.captioner, self.scale = captioner, scale
        self.vocab_size, self.max_len, self.modules = (captioner.vocab_size, captioner.max_len, captioner.modules)

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, GuidedState]:
        """Reads the prompts twice, with their pictures and with blank ones."""
        seen, state = self.captioner.prefill(batch, expand_size=expand_size, max_new_tokens=max_new_tokens)
        blank, other = self.captioner.prefill(
            blank_images(self.captioner, batch), expand_size=expand_size, max_new_tokens=max_new_tokens
        )
        return self._guided(seen, blank), GuidedState(state, other)

    def decode_step(self, tokens: Tensor, state: Any) -> Tensor:
        """Adds a token to each row of both."""
        seen = self.captioner.decode_step(tokens, state.seen)
        return self._guided(seen, self.captioner.decode_step(tokens, state.blank))

    def _guided(self, seen: Tensor, blank: Tensor) -> Tensor:
        return blank.float().log_softmax(1).lerp(seen.float().log_softmax(1), self.scale)


def blank_images(captioner: Captioner, batch: CaptionBatch, size: tuple[int, int] | None = None) -> CaptionBatch:
    """The batch with grey pictures (the mean colour of the transform) in place of its own.

    Args:
        captioner: the captioner.
        batch: the batch.
        size: height and width of its pictures in px, where their tokens have their place; None = the vision tower's.
    """
    if batch.pixels is not None:
        return replace(batch, pixels=torch.zeros_like(batch.pixels))
    tokens = batch.visual
    height, width = size or (side * captioner.vision.patch_size for side in captioner.vision.grid_size)
    dtype = next(captioner.vision.parameters()).dtype
    pixels = torch.zeros(1, tokens.shape[1], 3, height, width, device=tokens.device, dtype=dtype)
    return replace(batch, visual_tokens=captioner.forward_features(pixels).to(tokens.dtype).expand_as(tokens))
