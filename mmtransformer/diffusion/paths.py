"""The path from an image to noise, x(t) = alpha(t) image + sigma(t) noise, and what a network predicts on it.

Times are in [0, 1]: 0 = the image, 1 = noise. Shapes: x (b ...), times (b).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmtransformer.layers.config import known_fields

Path = Literal["linear", "cosine"]
PredictionType = Literal["image", "velocity", "noise"]

LEAST_TIME = 0.05
"""Where an image is predicted, its velocity is (x - image) / t: below this time it is divided by this
("Just image Transformers", arXiv:2511.13720, section 4, clips the same way)."""


@known_fields
@dataclass(frozen=True)
class DiffusionConfig:
    """A path, a prediction, and the times that are trained on.

    Args:
        path: "linear", straight lines (rectified flow, arXiv:2209.03003; flow matching, arXiv:2210.02747), or
            "cosine", of constant variance (arXiv:2102.09672, in continuous time).
        prediction_type: what the network says: the clean "image" (for plain Transformers on large patches of pixels, as
            arXiv:2511.13720 argues: images lie on a small manifold, noise and velocity do not), the "velocity"
            dx/dt, or the "noise" (DDPM, arXiv:2006.11239).
        logit_mean: times are sigmoid(N(logit_mean, logit_std)) (logit-normal, arXiv:2403.03206, section 3.1); above 0
            there is more noise than image. arXiv:2511.13720 uses 0.8.
        logit_std: see `logit_mean`; 0 = uniform times.

    Raises:
        ValueError: for an unknown path or prediction_type, or a negative spread.
    """

    path: Path = "linear"
    prediction_type: PredictionType = "image"
    logit_mean: float = 0.8
    logit_std: float = 0.8

    def __post_init__(self) -> None:
        if self.path not in ("linear", "cosine"):
            raise ValueError(f'path must be "linear" or "cosine", not "{self.path}"')
        if self.prediction_type not in ("image", "velocity", "noise"):
            raise ValueError(f'prediction_type must be "image", "velocity" or "noise", not "{self.prediction_type}"')
        if not (self.logit_std >= 0 and math.isfinite(self.logit_std) and math.isfinite(self.logit_mean)):
            raise ValueError(
                f"logit_mean ({self.logit_mean}) and logit_std ({self.logit_std}, not below 0) are numbers"
            )

    def times(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Times to train on, drawn on the CPU: (count) in (0, 1)."""
        if not self.logit_std:
            return torch.rand(count, generator=generator)
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.randn(count, generator=generator))

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """How much image and how much noise there is: alpha and sigma, as `times`."""
        if self.path == "linear":
            return 1 - times, times
        return torch.cos(math.pi / 2 * times), torch.sin(math.pi / 2 * times)

    def _rates(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives of `levels`."""
        if self.path == "linear":
            return -torch.ones_like(times), torch.ones_like(times)
        alpha, sigma = self.levels(times)
        return -math.pi / 2 * sigma, math.pi / 2 * alpha

    def noised(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The images on their way: (b ...)."""
        alpha, sigma = (append_dims(level, images) for level in self.levels(times))
        return alpha * images + sigma * noise

    def velocity(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """dx/dt of the path through an image and a noise: (b ...)."""
        of_image, of_noise = (append_dims(rate, images) for rate in self._rates(times))
        return of_image * images + of_noise * noise

    def image_of(self, predicted: Tensor, x: Tensor, times: Tensor) -> Tensor:
        """The clean image that a prediction stands for: (b ...).

        Where an image can not be told from a prediction (noise at t = 1), alpha counts as 1e-3.
        """
        if self.prediction_type == "image":
            return predicted
        alpha, sigma = (append_dims(level, x) for level in self.levels(times))
        if self.prediction_type == "noise":
            return (x - sigma * predicted) / alpha.clamp(min=1e-3)
        rate, noise_rate = (append_dims(level, x) for level in self._rates(times))
        # x = alpha image + sigma noise and v = rate image + noise_rate noise; the determinant is 1 or pi / 2.
        return (noise_rate * x - sigma * predicted) / (noise_rate * alpha - rate * sigma)

    def velocity_of(self, predicted: Tensor, x: Tensor, times: Tensor) -> Tensor:
        """The velocity that a prediction stands for: (b ...)."""
        if self.prediction_type == "velocity":
            return predicted
        alpha, sigma = (append_dims(level, x) for level in self.levels(times))
        image = self.image_of(predicted, x, times)
        noise = predicted if self.prediction_type == "noise" else (x - alpha * image) / sigma.clamp(min=LEAST_TIME)
        return self.velocity(image, noise, times)

    def loss(self, predicted: Tensor, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What is trained on, of each image: (b), at least float32, a mean over its values.

        The squared error of the velocity where an image or a velocity is predicted (so that an image's error counts
        for more the less noise there is, arXiv:2511.13720, table 1), of the noise where that is.
        """
        predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        if self.prediction_type == "noise":
            error = predicted - noise
        elif self.prediction_type == "velocity":
            error = predicted - self.velocity(images, noise, times)
        else:  # Both velocities go through x, so only the images differ.
            alpha, sigma = self.levels(times)
            rate, noise_rate = self._rates(times)
            weight = rate - noise_rate * alpha / sigma.clamp(min=LEAST_TIME)
            error = append_dims(weight, images) * (predicted - images)
        return error.square().flatten(1).mean(1)


def append_dims(numbers: Tensor, x: Tensor) -> Tensor:
    """One number an image, to be multiplied with images: (b) -> (b 1 ... 1)."""
    return numbers.view(-1, *[1] * (x.ndim - 1)).to(x)
