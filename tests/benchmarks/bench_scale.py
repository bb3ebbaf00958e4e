"""How the cost of a step grows with tokens, pictures a row, beams and the model's size, as a figure.

python tests/benchmarks/bench_scale.py [--threads N] [--pairs CALLS] [--only NAME] [--sizes tiny]

CPU time of ours alone, float32. "growth" is the exponent between two neighbours: 1 = twice the cost for twice the size.
Dashed: a straight line through the last point. The figure is written to results/scale-CPU.png.
"""

from collections.abc import Callable
from itertools import pairwise
from math import log
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
from harness import cpu_name, note, start, timed
from run import RESULTS, cpu_kind

from mmtransformer import CaptionBatch, Flamingo, PerceiverResampler, TextDecoder, VisionEncoderDecoder, ViT
from mmtransformer.captioners.base import caption_loss
from mmtransformer.generation.loop import generate
from mmtransformer.layers.config import PositionConfig

matplotlib.use("Agg")

Line = tuple[str, list[int], Callable[[int], tuple[float, Callable[[], object]]]]
VOCAB = 2000
RAYS = PositionConfig("rotary")


def language_model(dim: int, depth: int = 4, **more: Any) -> TextDecoder:
    return TextDecoder(VOCAB, dim=dim, depth=depth, num_heads=max(dim // 64, 1), max_len=8192, positions=RAYS, **more)


def texts(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length))


def lines(*, tiny: bool) -> list[Line]:
    """Name, sizes, and what makes of a size the number that stands on the axis and the call that is timed."""
    dim, depth, most = (32, 1, 2) if tiny else (256, 4, 99)

    def over_tokens(length: int) -> tuple[float, Callable[[], object]]:
        model, ids = language_model(dim, depth), texts(length)
        return length, lambda: model(ids).logsumexp(-1).sum().backward()

    def over_pictures(count: int) -> tuple[float, Callable[[], object]]:
        vision, ids = ViT(64, 16, dim=dim, depth=depth, num_heads=4), texts(256)
        model = Flamingo(vision, language_model(dim, depth), connector=PerceiverResampler(dim, depth=1))
        real, where = ids >= 0, torch.arange(256)[None] * count // 256 + 1
        batch = CaptionBatch(ids, real, real, torch.rand(1, count, 3, 64, 64), image_index=where)
        return count, lambda: caption_loss(model, batch).backward()

    def over_beams(count: int) -> tuple[float, Callable[[], object]]:
        model = VisionEncoderDecoder(
            ViT(64, 16, dim=dim, depth=1, num_heads=4), language_model(dim, depth, context_dim=dim)
        )
        model.eval()
        start = torch.zeros(1, 1, dtype=torch.long)
        batch = CaptionBatch(start, start == 0, start > 0, torch.rand(1, 1, 3, 64, 64))
        return count, lambda: generate(model, batch, eos_id=VOCAB - 1, max_new_tokens=20, num_beams=count)

    def over_size(width: int) -> tuple[float, Callable[[], object]]:
        model, ids = language_model(width, depth), texts(256)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        return millions, lambda: model(ids).logsumexp(-1).sum().backward()

    return [
        ("tokens a row", [256, 512, 1024, 2048, 4096, 8192][:most], over_tokens),
        ("pictures a row", [1, 2, 4, 8, 16, 32, 64][:most], over_pictures),
        ("beams", [1, 2, 3, 5, 7, 10][:most], over_beams),
        ("million parameters", [64, 128, 256, 512, 768, 1024][:most], over_size),
    ]


def draw(found: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """A panel a line: ms over size, both in powers."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, panels = plt.subplots(1, len(found), figsize=(3.6 * len(found), 3.4), squeeze=False, layout="constrained")
    for panel, (name, points) in zip(panels[0], found.items(), strict=True):
        sizes, times = zip(*points, strict=True)
        panel.loglog(sizes, times, "o-", color="#1f5fbf")
        panel.loglog(sizes, [times[-1] * size / sizes[-1] for size in sizes], "--", color="#999999", linewidth=1)
        panel.set(xlabel=name, ylabel="CPU ms a step" if panel is panels[0, 0] else "")
        panel.grid(alpha=0.3, which="both")
        panel.xaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(
        f"{cpu_kind()}, float32, torch {torch.__version__.split('+')[0]}; dashed: in proportion", fontsize=10
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    args = start(__doc__ or "", sizes=("whole", "tiny"))
    found: dict[str, list[tuple[float, float]]] = {}
    for name, sizes, make in lines(tiny=args.sizes == "tiny"):
        if args.only not in name:
            continue
        for size in sizes:
            x, run = make(size)
            timed(run), timed(run)
            found.setdefault(name, []).append((x, 1e3 * median(timed(run).cpu for _ in range(args.pairs))))
            note(f"{name}: {x:.3g}", found[name][-1][1], "ms")
        growth = [log(b[1] / a[1]) / log(b[0] / a[0]) for a, b in pairwise(found[name])]
        print(f"{name}: growth {', '.join(f'{exponent:.2f}' for exponent in growth)}", flush=True)
    if args.sizes == "whole" and not args.only:
        path = RESULTS / f"scale-{cpu_kind()}.png"
        draw(found, path)
        print(f"{cpu_name()}: {path}")


if __name__ == "__main__":
    main()
