"""Classifier-free guidance (arXiv:2207.12598): away from what the network says without the text."""

from collections.abc import Callable

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""Noisy images (b ...) and their times (b) -> what the network predicts (b ...)."""


def guided(predict: Predict, scale: float) -> Predict:
    """Both answers in one pass: unconditional + scale * (conditional - unconditional).

    A mix of predictions is the mix of their velocities, whatever is predicted, since each is linear in the other.

    Args:
        predict: takes twice the images: first those with their texts, then the same without (or with negative ones).
        scale: 1 = the text as it is; 0 = without it; above 1 exaggerates it.
    """

    def both(x: Tensor, times: Tensor) -> Tensor:
        conditional, unconditional = predict(torch.cat((x, x)), torch.cat((times, times))).chunk(2)
        return torch.lerp(unconditional, conditional, scale)

    return both
