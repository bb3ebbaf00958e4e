"""Integrating the path back, from noise to an image, in few steps: Euler, Heun, DPM-Solver++."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from mmtransformer.diffusion.guidance import Predict
from mmtransformer.diffusion.paths import DiffusionConfig

Solver = Literal["euler", "heun", "dpm"]


def step_times(steps: int, start: float = 1.0, *, shift: float = 1.0) -> list[float]:
    """The times of `steps` steps from `start` down to 0, `steps` + 1 of them.

    Args:
        steps: at least 1.
        start: where the integration begins; 1 = pure noise.
        shift: above 1, more of the steps are spent where there is much noise (arXiv:2403.03206, section 5.3.2).
    """
    even = [start * (1 - i / steps) for i in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


def integrate(
    predict: Predict, noise: Tensor, diffusion: DiffusionConfig, times: list[float], solver: Solver = "heun"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images with less and less noise.

    Args:
        predict: the network, guided or not.
        noise: where to begin: (b ...), on the path at the first time.
        diffusion: the path, and what the network predicts.
        times: falling, the last one 0 (see `step_times`).
        solver: "euler", first order; "heun", second order, two passes a step but the last; "dpm", DPM-Solver++(2M)
            (arXiv:2211.01095), second order, one pass a step.

    Yields:
        After each step the images (b ...), and the network's idea of the clean image.

    Raises:
        ValueError: for a solver that there is not.
    """
    if solver not in get_args(Solver):
        raise ValueError(f'unknown solver "{solver}": known are {", ".join(get_args(Solver))}')
    step = {"euler": _euler, "heun": _heun, "dpm": _Dpm()}[solver]
    x = noise
    for now, then in pairwise(times):
        x, image = step(predict, x, diffusion, now, then)
        yield x, image


def _at(x: Tensor, time: float) -> Tensor:
    return torch.full((x.shape[0],), time, device=x.device, dtype=torch.float32)


def _look(predict: Predict, x: Tensor, diffusion: DiffusionConfig, time: float) -> tuple[Tensor, Tensor]:
    """Velocity and clean image."""
    t = _at(x, time)
    predicted = predict(x, t).to(x.dtype)
    return diffusion.velocity_of(predicted, x, t), diffusion.image_of(predicted, x, t)


Step = Callable[[Predict, Tensor, DiffusionConfig, float, float], tuple[Tensor, Tensor]]


def _euler(predict: Predict, x: Tensor, diffusion: DiffusionConfig, now: float, then: float) -> tuple[Tensor, Tensor]:
    velocity, image = _look(predict, x, diffusion, now)
    return (x + (then - now) * velocity if then else image), image


def _heun(predict: Predict, x: Tensor, diffusion: DiffusionConfig, now: float, then: float) -> tuple[Tensor, Tensor]:
    velocity, image = _look(predict, x, diffusion, now)
    if not then:
        return image, image
    ahead, _ = _look(predict, x + (then - now) * velocity, diffusion, then)
    return x + (then - now) * (velocity + ahead) / 2, image


class _Dpm:
    """DPM-Solver++(2M): a line through the last two clean images, in half the logarithm of signal over noise."""

    def __init__(self) -> None:
        self.last: tuple[float, Tensor] | None = None  # the step before: its length, its image

    def __call__(
        self, predict: Predict, x: Tensor, diffusion: DiffusionConfig, now: float, then: float
    ) -> tuple[Tensor, Tensor]:
        _, image = _look(predict, x, diffusion, now)
        if not then:
            return image, image
        (alpha, sigma), (alpha_then, sigma_then) = (
            [float(level) for level in diffusion.levels(torch.tensor(t, dtype=torch.float64))] for t in (now, then)
        )
        if alpha < 1e-6:  # Pure noise: there is no signal to take a logarithm of; a first-order step is exact there.
            self.last = None
            noise = x / sigma
            return alpha_then * image + sigma_then * noise, image
        length = math.log(alpha_then / sigma_then) - math.log(alpha / sigma)
        mixed = image
        if self.last is not None:
            before, earlier = self.last
            mixed = image + (length / before / 2) * (image - earlier)
        self.last = length, image
        return sigma_then / sigma * x - alpha_then * math.expm1(-length) * mixed, image
