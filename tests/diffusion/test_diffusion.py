"""Paths, predictions and solvers: by their definitions, and on data whose flow is known exactly."""

import math

import pytest
import torch
from torch import Tensor

from mmtransformer.diffusion.guidance import guided
from mmtransformer.diffusion.paths import LEAST_TIME, DiffusionConfig
from mmtransformer.diffusion.solvers import integrate, step_times

MEAN, SPREAD = 0.7, 0.3


def triple(path: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, noise = (torch.randn(5, 3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    times = torch.tensor([0.06, 0.2, 0.5, 0.77, 0.95], dtype=torch.float64)
    return images, noise, times, DiffusionConfig(path=path).noised(images, noise, times)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_velocity_is_the_derivative_of_the_path(path: str) -> None:
    images, noise, times, x = triple(path)
    diffusion = DiffusionConfig(path=path)  # type: ignore[arg-type]
    step = 1e-6
    later = diffusion.noised(images, noise, times + step)
    torch.testing.assert_close((later - x) / step, diffusion.velocity(images, noise, times), atol=1e-4, rtol=1e-4)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(diffusion.noised(images[:2], noise[:2], ends)[0], images[0])
    torch.testing.assert_close(diffusion.noised(images[:2], noise[:2], ends)[1], noise[1])


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("prediction_type", ["image", "velocity", "noise"])
def test_each_prediction_stands_for_the_same_image_and_velocity(path: str, prediction_type: str) -> None:
    images, noise, times, x = triple(path)
    diffusion = DiffusionConfig(path=path, prediction_type=prediction_type)  # type: ignore[arg-type]
    right = {"image": images, "noise": noise, "velocity": diffusion.velocity(images, noise, times)}[prediction_type]
    torch.testing.assert_close(diffusion.image_of(right, x, times), images)
    torch.testing.assert_close(diffusion.velocity_of(right, x, times), diffusion.velocity(images, noise, times))
    assert float(diffusion.loss(right, images, noise, times).max()) < 1e-25


def test_the_loss_of_an_image_is_that_of_its_velocity() -> None:
    images, noise, times, x = triple("linear")
    diffusion = DiffusionConfig()
    said = images + torch.randn_like(images)
    gap = diffusion.velocity_of(said, x, times) - diffusion.velocity(images, noise, times)
    torch.testing.assert_close(
        diffusion.loss(said, images, noise, times).double(), gap.square().flatten(1).mean(1), atol=1e-5, rtol=1e-5
    )
    least = diffusion.loss(said[:1], images[:1], noise[:1], torch.tensor([1e-6]))
    want = ((said[:1] - images[:1]) * (1 + 1 / LEAST_TIME)).square().mean()  # both its own and its noise's velocity
    torch.testing.assert_close(least[0].double(), want, atol=1e-3, rtol=1e-3)


def test_times_are_logit_normal() -> None:
    times = DiffusionConfig(logit_mean=0.5, logit_std=0.7).times(20_000, torch.Generator().manual_seed(0))
    logits = torch.logit(times)
    assert abs(float(logits.mean()) - 0.5) < 0.02
    assert abs(float(logits.std()) - 0.7) < 0.02
    assert abs(float(DiffusionConfig(logit_std=0).times(20_000, torch.Generator().manual_seed(0)).mean()) - 0.5) < 0.01


def exact(diffusion: DiffusionConfig, x: Tensor, times: Tensor) -> Tensor:
    """E[image | x] where images are N(MEAN, SPREAD^2): what a perfect network predicts, as this diffusion wants it."""
    alpha, sigma = (level.view(-1, 1) for level in diffusion.levels(times))
    gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
    image = MEAN + gain * (x - alpha * MEAN)
    noise = (x - alpha * image) / sigma
    return {"image": image, "noise": noise, "velocity": diffusion.velocity(image, noise, times)}[
        diffusion.prediction_type
    ]


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("prediction_type", ["image", "velocity", "noise"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpm", 2)])
def test_solvers_follow_the_flow_at_their_order(path: str, prediction_type: str, solver: str, order: int) -> None:
    """The flow of Gaussian data takes noise z to MEAN + SPREAD z; the error falls as steps ** -order."""
    diffusion = DiffusionConfig(path=path, prediction_type=prediction_type)  # type: ignore[arg-type]
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1)

    def error(steps: int) -> float:
        last = z
        times = [t * 0.998 for t in step_times(steps)][:-1] + [LEAST_TIME]
        begin = math.hypot(0.002 * SPREAD, 0.998) if path == "linear" else None
        if begin is None:
            alpha, sigma = (float(a) for a in diffusion.levels(torch.tensor(0.998, dtype=torch.float64)))
            mean, scale = alpha * MEAN, math.hypot(alpha * SPREAD, sigma)
        else:
            mean, scale = 0.002 * MEAN, begin
        x = mean + scale * z
        times = sorted({*[t for t in times if t > LEAST_TIME], LEAST_TIME}, reverse=True)
        for last, _ in integrate(lambda y, t: exact(diffusion, y, t.double()), x, diffusion, times, solver):  # type: ignore[arg-type]  # noqa: B007
            pass
        alpha, sigma = (float(a) for a in diffusion.levels(torch.tensor(LEAST_TIME, dtype=torch.float64)))
        want = alpha * MEAN + math.hypot(alpha * SPREAD, sigma) * z
        return float((last - want).abs().max())

    few, many = error(20), error(80)
    assert many < few / 4 ** (order - 0.45), (few, many)
    assert many < (0.02 if order == 1 else 2e-3)


def test_the_last_step_gives_the_clean_image() -> None:
    x = torch.randn(3, 4)
    for solver in ("euler", "heun", "dpm"):
        *_, (last, image) = integrate(lambda y, t: y * 0 + 5, x, DiffusionConfig(), step_times(4), solver)  # type: ignore[arg-type]
        assert torch.equal(last, torch.full_like(x, 5.0))
        assert torch.equal(image, last)
    with pytest.raises(ValueError, match='unknown solver "rk4": known are euler, heun, dpm'):
        next(integrate(lambda y, t: y, x, DiffusionConfig(), [1.0, 0.0], "rk4"))  # type: ignore[arg-type]


def test_step_times_fall_from_the_start_to_nothing() -> None:
    assert step_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert step_times(2, 0.6) == [0.6, 0.3, 0.0]
    shifted = step_times(4, shift=3.0)
    assert shifted[0] == 1.0
    assert shifted[-1] == 0.0
    assert shifted[2] == 0.75  # 3 * 0.5 / (1 + 2 * 0.5)


def test_guidance_goes_away_from_what_is_said_without_the_text() -> None:
    def predict(x: Tensor, times: Tensor) -> Tensor:
        first, second = x.chunk(2)
        assert torch.equal(first, second)
        return torch.cat((first + 1, second - 1))

    x = torch.randn(3, 2)
    for scale, want in ((1.0, 1.0), (0.0, -1.0), (3.0, 5.0)):
        torch.testing.assert_close(guided(predict, scale)(x, torch.ones(3)), x + want)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "bent"}, 'path must be "linear" or "cosine", not "bent"'),
        ({"prediction_type": "score"}, 'prediction_type must be "image", "velocity" or "noise", not "score"'),
        ({"logit_std": -1.0}, "logit_std"),
        ({"logit_mean": math.nan}, "logit_mean"),
    ],
)
def test_a_diffusion_that_there_is_not_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**settings)
