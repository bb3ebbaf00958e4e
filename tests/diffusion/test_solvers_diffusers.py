"""The solvers beside diffusers' schedulers: the same network, the same times, the same steps."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtransformer.diffusion.paths import DiffusionConfig
from mmtransformer.diffusion.solvers import integrate, step_times

STEPS = 7

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, of numpy 2


@pytest.fixture(scope="module")
def diffusers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


def network(x: Tensor, times: Tensor) -> Tensor:
    """Anything that bends with place and time."""
    return torch.sin(2 * x) + times.view(-1, 1).to(x) * x - 0.3


def begin() -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def theirs(scheduler: Any, times: list[float]) -> list[Tensor]:
    """diffusers' loop; `times` are what the network is told at each of its calls."""
    x, found = begin(), []
    for step, now in zip(scheduler.timesteps, times, strict=False):
        x = scheduler.step(network(x, torch.full((3,), now)), step, x, return_dict=False)[0]
        found.append(x)
    return found


def ours(times: list[float], solver: Any, diffusion: DiffusionConfig) -> list[Tensor]:
    return [x for x, _ in integrate(network, begin(), diffusion, times, solver)]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_on_straight_paths(diffusers: Any, shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=step_times(STEPS)[:-1])
    times = step_times(STEPS, shift=shift)
    torch.testing.assert_close(scheduler.sigmas.double(), torch.tensor(times).double(), atol=1e-6, rtol=0)
    found = ours(times, "euler", DiffusionConfig("linear", "velocity"))
    torch.testing.assert_close(found, theirs(scheduler, times), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_on_straight_paths(diffusers: Any, shift: float) -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(STEPS)
    every = scheduler.sigmas.tolist()  # each twice, as the network is asked twice, but for the first and the last
    times = list(dict.fromkeys(every))
    want = theirs(scheduler, every[:-1])
    found = ours(times, "heun", DiffusionConfig("linear", "velocity"))
    torch.testing.assert_close(found, [*want[1::2], want[-1]], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_on_straight_paths(diffusers: Any, shift: float) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, euler_at_final=True
    )
    scheduler.set_timesteps(STEPS)
    times = scheduler.sigmas.tolist()
    found = ours(times, "dpm", DiffusionConfig("linear", "velocity"))
    torch.testing.assert_close(found, theirs(scheduler, times), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("kind", "prediction_type"), [("epsilon", "noise"), ("sample", "image")])
def test_dpm_on_paths_of_constant_variance(diffusers: Any, kind: str, prediction_type: Any) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="leading", prediction_type=kind, euler_at_final=True
    )
    scheduler.set_timesteps(STEPS)
    times = (torch.atan(scheduler.sigmas.double()) * 2 / torch.pi).tolist()  # sigma over alpha is the tangent
    found = ours(times, "dpm", DiffusionConfig("cosine", prediction_type))
    torch.testing.assert_close(found, theirs(scheduler, times), atol=1e-4, rtol=1e-4)
