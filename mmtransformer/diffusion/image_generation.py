"""Drawing: from texts and noise to images, or from an image to another one that a text asks for."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, get_args

import torch
from torch import Tensor

from mmtransformer.diffusion.guidance import guided
from mmtransformer.diffusion.solvers import Solver, integrate, step_times
from mmtransformer.diffusion.text_to_image import TextToImageModel
from mmtransformer.layers.config import known_fields
from mmtransformer.layers.modes import evaluation_mode

OnStep = Callable[[int, Tensor], None]
"""Called after each step with its number from 1 and the network's idea of the clean images (n c height width)."""


ELSEWHERE = {
    "steps": "num_inference_steps", "num_steps": "num_inference_steps", "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale", "guidance": "guidance_scale", "scheduler": "solver", "sampler": "solver",
    "shift": "time_shift", "generator": "seed", "generation_config": "generation", "prompt": "texts",
    "num_images_per_prompt": "num_images", "negative": "negative_prompt", "init_image": "image", "mask": "mask_image",
    "height": "", "width": "",
}  # fmt: skip
"""What other libraries call a setting -> its name here, or in the call that it is given to; "" = of the model."""


@functools.partial(known_fields, elsewhere=ELSEWHERE)
@dataclass(frozen=True)
class ImageGenerationConfig:
    """How images are drawn; saved with a model.

    Args:
        num_inference_steps: steps from noise to image.
        guidance_scale: how much more the image follows the text than the model would by itself (classifier-free
            guidance); 1 = no guidance, at half the work.
        solver: "euler", "heun" or "dpm"; see `solvers.integrate`. Heun runs the model twice a step.
        time_shift: above 1, more of the steps are at high noise; see `solvers.step_times`.

    Raises:
        ValueError: naming the field whose value is out of its range.
    """

    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    solver: Solver = "dpm"
    time_shift: float = 1.0

    def __post_init__(self) -> None:
        if (
            isinstance(self.num_inference_steps, bool)
            or not isinstance(self.num_inference_steps, int)
            or self.num_inference_steps < 1
        ):
            raise ValueError(f"num_inference_steps must be a whole number from 1, not {self.num_inference_steps}")
        if not 0 <= self.guidance_scale <= 1000:  # also refuses nan
            raise ValueError(f"guidance_scale must be between 0 and 1000, not {self.guidance_scale}")
        if self.solver not in get_args(Solver):
            raise ValueError(f'solver must be one of {", ".join(get_args(Solver))}, not "{self.solver}"')
        if not 0 < self.time_shift <= 1000:
            raise ValueError(f"time_shift must be above 0 and at most 1000, not {self.time_shift}")

    def updated(self, **changes: Any) -> Self:
        """These settings with some changed.

        Raises:
            ValueError: as the constructor.
            TypeError: for a setting that there is not; names the nearest.
        """
        return replace(self, **changes)


@dataclass(frozen=True)
class Edit:
    """An image to begin with.

    Attributes:
        images: (n c height width).
        strength: how much of the way to noise it is taken first (SDEdit, arXiv:2108.01073): 1 = all of it.
        mask: (n 1 height width) bool, True = where to draw; all else stays as it is. None = everywhere.
    """

    images: Tensor
    strength: float = 0.6
    mask: Tensor | None = field(default=None)

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, not {self.strength}")


def seeded_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Noise of one image a seed, on the CPU, the same whatever else is drawn beside it: (n c height width)."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.inference_mode()
def generate_images(
    model: TextToImageModel,
    tokens: Tensor,
    attention_mask: Tensor,
    noise: Tensor,
    config: ImageGenerationConfig = ImageGenerationConfig(),
    *,
    negative: tuple[Tensor, Tensor] | None = None,
    edit: Edit | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draws one image a text.

    Args:
        model: the model; evaluation mode is set for the call.
        tokens: the texts (n q) long.
        attention_mask: (n q) bool, True = a real token.
        noise: (n c height width), see `seeded_noise`; its shape is the images'.
        config: how to draw.
        negative: tokens and mask of texts to go away from; needs guidance above 1.
        edit: an image to begin with.
        on_step: looks at every step.

    Returns:
        (n c height width), in the numbers that the model was trained on.

    Raises:
        ValueError: if a negative text could have no effect.
    """
    if negative is not None and config.guidance_scale == 1:
        raise ValueError("a negative text has no effect at guidance_scale 1: raise it, or leave the text out")
    steered = config.guidance_scale != 1
    with evaluation_mode(model):
        contexts, mask = model.conditions(tokens, attention_mask, negative)
        if not steered:
            contexts = contexts.select(torch.arange(len(tokens), device=tokens.device))
            mask = mask[: len(tokens)]

        def predict(x: Tensor, times: Tensor) -> Tensor:
            return model.transformer(x, times, contexts, context_mask=mask)

        start, x = 1.0, noise
        if edit is not None:
            start = edit.strength
            begin = torch.full((len(noise),), start, device=noise.device)
            x = model.diffusion.noised(edit.images, noise, begin)
        times = step_times(config.num_inference_steps, start, shift=config.time_shift)
        look = guided(predict, config.guidance_scale) if steered else predict
        steps = integrate(look, x, model.diffusion, times, config.solver)
        for number, (x, image) in enumerate(steps, 1):
            if edit is not None and edit.mask is not None:
                now = torch.full((len(noise),), times[number], device=noise.device)
                kept = model.diffusion.noised(edit.images, noise, now)
                x.copy_(torch.where(edit.mask, x, kept))
            if on_step is not None:
                on_step(number, image)
    return x
