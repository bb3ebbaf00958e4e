"""ViT against timm's, on the same weights: training steps, and inference with linear weights prepacked once.

python tests/benchmarks/bench_vit.py [--threads N] [--pairs N] [--only NAME]
"""

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from harness import compare, start
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmtransformer.layers.weight_prepacking import prepack_weights
from mmtransformer.weights import from_timm


def training_step(model: nn.Module, pixels: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """Forward, loss, backward and update; the optimizer is the same for both sides."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(pixels).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference(model: nn.Module, pixels: Tensor) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.inference_mode():
            return model(pixels)

    return run


def flops_of(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def main() -> None:
    args = start(__doc__ or "")
    bf16 = torch.bfloat16

    def line(
        name: str, model: str, batch: int, dtype: torch.dtype, target: float | None, compiled: bool = False
    ) -> None:
        if args.only not in name:
            return
        theirs = timm.create_model(model, num_classes=1000)
        ours = from_timm(theirs)
        pixels, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
        train = "train" in name
        if train:
            ours.train(), theirs.train()
            flops = flops_of(training_step(ours, pixels, labels, dtype))
            if compiled:
                ours, theirs = torch.compile(ours), torch.compile(theirs)  # pyright: ignore
            mine, peer = (training_step(m, pixels, labels, dtype) for m in (ours, theirs))
        else:
            ours, theirs, pixels = ours.eval().to(dtype), theirs.eval().to(dtype), pixels.to(dtype)
            flops = flops_of(inference(ours, pixels))
            if "prepacked" in name:
                prepack_weights(ours)
            mine, peer = inference(ours, pixels), inference(theirs, pixels)
        compare(
            name,
            mine,
            peer,
            target=target,
            flops=flops,
            gemm=args.gemm[dtype],
            pairs=args.pairs,
            unit=(batch, "pictures"),
        )

    ti, b = "vit_tiny_patch16_224", "vit_base_patch16_224"
    line("train Ti/16 bf16, batch 32", ti, 32, bf16, 1.35)
    line("train Ti/16 fp32, batch 32", ti, 32, torch.float32, None)
    line("inference Ti/16 fp32, batch 1, prepacked", ti, 1, torch.float32, 1.3)
    line("inference Ti/16 fp32, batch 8, prepacked", ti, 8, torch.float32, 1.3)
    line("inference Ti/16 bf16, batch 1, prepacked", ti, 1, bf16, 1.3)
    line("inference Ti/16 bf16, batch 8, prepacked", ti, 8, bf16, 1.3)
    line("inference Ti/16 fp32, batch 8, as it is", ti, 8, torch.float32, None)
    line("inference Ti/16 bf16, batch 8, as it is", ti, 8, bf16, None)
    line("train B/16 bf16, batch 8, compiled", b, 8, bf16, 1.15, compiled=True)


if __name__ == "__main__":
    main()
