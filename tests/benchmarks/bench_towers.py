"""Forward passes of public towers against timm's, on the same weights: never slower.

python tests/benchmarks/bench_towers.py [--threads N] [--pairs N] [--only NAME]

DINOv3-S/16, SigLIP-B/16 and EVA-02-S/14 at their usual sizes, with random weights; one picture and eight, float32 and
bfloat16. The ratio of the fastest calls decides: what else the machine does moves it least.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
from harness import compare, start
from torch import Tensor, nn

from mmtransformer.weights import from_timm

TOWERS = {
    "DINOv3-S/16 224": "vit_small_patch16_dinov3",
    "SigLIP-B/16 224": "vit_base_patch16_siglip_224",
    "EVA-02-S/14 224": "eva02_small_patch14_224",
}


def forward(model: nn.Module, pixels: Tensor) -> Callable[[], object]:
    """Features and pooling, as both libraries' `forward` gives them."""

    def run() -> Tensor:
        with torch.inference_mode():
            return model(pixels)

    return run


def main() -> None:
    args = start(__doc__ or "")
    for name, timms in TOWERS.items():
        if args.only not in name:
            continue
        more: dict[str, Any] = {"num_classes": 0}
        if "siglip" not in timms:
            more["img_size"] = 224
        peer: Any = timm.create_model(timms, **more).eval()
        ours = from_timm(peer)
        for dtype in (torch.float32, torch.bfloat16):
            ours, peer = ours.to(dtype), peer.to(dtype)
            for count in (1, 8):
                pixels = torch.randn(count, 3, *ours.image_size, dtype=dtype)
                label = f"{name}, {count} picture{'s' * (count > 1)}, {str(dtype)[6:]}"
                compare(label, forward(ours, pixels), forward(peer, pixels), target=1.0, pairs=args.pairs)


if __name__ == "__main__":
    main()
