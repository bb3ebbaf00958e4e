"""A diffusion transformer of the recipe's size (64 x 64 pixels, patches of 8, width 256, 6 blocks) against diffusers'
PixArt with the same weights: training steps on 32 pictures, and drawing 16 in 20 steps of DPM-Solver++ with guidance.

The loss, AdamW and the number format are the same on both sides, and the texts are tokens that are encoded already.

python tests/benchmarks/bench_draw.py [--threads N] [--pairs N] [--only NAME]
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import compare, start
from torch import Tensor, nn

from mmtransformer.backbones.diffusion_transformer import DiffusionTransformer
from mmtransformer.diffusion.guidance import guided
from mmtransformer.diffusion.paths import DiffusionConfig
from mmtransformer.diffusion.solvers import integrate
from mmtransformer.weights import dit_to_diffusers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

WORDS, TEXT, STEPS, SCALE = 24, 192, 20, 3.0
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def make() -> tuple[DiffusionTransformer, Any]:
    ours = DiffusionTransformer(8, 3, 256, 6, 4, context_dim=TEXT, base_grid=8)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.02)
    config, tensors = dit_to_diffusers(ours)
    peer = PixArtTransformer2DModel(**{k: v for k, v in config.items() if k != "_class_name"})
    peer.load_state_dict(tensors)
    return ours, peer


def training(model: nn.Module, network: Network, dtype: torch.dtype) -> Callable[[], object]:
    adamw, diffusion = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), DiffusionConfig("linear", "velocity")
    images, noise, times, texts = torch.randn(32, 3, 64, 64), torch.randn(32, 3, 64, 64), torch.rand(32), texts_of(32)

    def step() -> None:
        x = diffusion.noised(images, noise, times)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            predicted = network(x, times, texts)
        diffusion.loss(predicted, images, noise, times).mean().backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return step


def texts_of(count: int) -> Tensor:
    return torch.randn(count, WORDS, TEXT, generator=torch.Generator().manual_seed(1))


def scheduler() -> Any:
    found = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, euler_at_final=True)
    found.set_timesteps(STEPS)
    return found


@torch.inference_mode()
def our_drawing(model: DiffusionTransformer, noise: Tensor, texts: Tensor) -> Tensor:
    contexts, x = model.project_context(texts), noise
    look = guided(lambda x, times: model(x, times, contexts), SCALE)
    for x, _ in integrate(look, noise, DiffusionConfig("linear", "velocity"), scheduler().sigmas.tolist(), "dpm"):  # noqa: B007
        pass
    return x


@torch.inference_mode()
def their_drawing(model: Any, noise: Tensor, texts: Tensor) -> Tensor:
    steps, x = scheduler(), noise
    for now, time in zip(steps.sigmas.tolist(), steps.timesteps, strict=False):
        told = torch.full((2 * len(x),), 1000 * now)
        said, silent = model(torch.cat((x, x)), texts, told, return_dict=False)[0].chunk(2)
        x = steps.step(silent + SCALE * (said - silent), time, x, return_dict=False)[0]
    return x


def main() -> None:
    args = start(__doc__ or "")
    ours, peer = make()

    def their_network(x: Tensor, times: Tensor, texts: Tensor) -> Tensor:
        return peer(x, texts, 1000 * times, return_dict=False)[0]

    noise, texts = torch.randn(16, 3, 64, 64), texts_of(32)
    gap = float((our_drawing(ours, noise, texts) - their_drawing(peer, noise, texts)).abs().max())
    print(f"16 drawings differ by {gap:.1e} at most")
    for dtype, precision in ((torch.bfloat16, "medium"), (torch.float32, "medium")):
        torch.set_float32_matmul_precision(precision)
        name = f"train {str(dtype).removeprefix('torch.')}, batch 32"
        if args.only in name:
            steps = training(ours, ours, dtype), training(peer, their_network, dtype)
            compare(name, *steps, target=1.3, pairs=args.pairs, unit=(32, "pictures"))
    name = "draw 16 pictures, 20 steps, guided"
    if args.only in name:
        drawings = [lambda: our_drawing(ours, noise, texts), lambda: their_drawing(peer, noise, texts)]
        compare(name, *drawings, target=1.5, pairs=args.pairs, unit=(16, "pictures"))


if __name__ == "__main__":
    main()
