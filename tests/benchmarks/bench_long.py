"""How the cost of attention grows with the length: softmax, FAVOR+ (Performer), and a window with global tokens.

python tests/benchmarks/bench_long.py [--threads N] [--calls N] [--longest N] [--device cpu] [--no-window]

One layer's attention without projections, (1 8 n 64), float32, no gradient. "growth" is the exponent between two
lengths: 2 = four times the cost for twice the length, 1 = twice. CPU time decides on a CPU, the clock on a GPU.
"""

import argparse
import math
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch
from harness import cpu_name, timed

from mmtransformer.layers import masks
from mmtransformer.layers.attention import attend
from mmtransformer.layers.linear_attention import linear_attend, random_directions

HEADS, WIDTH, FEATURES, WINDOW, GLOBALS = 8, 64, 256, 128, 2


def ways(length: int, device: str, *, window: bool) -> dict[str, Callable[[], object]]:
    """The ways to attend over so many tokens."""
    q, k, v = torch.randn(3, 1, HEADS, length, WIDTH, device=device).unbind()
    directions = random_directions(FEATURES, WIDTH).to(device)
    found: dict[str, Callable[[], object]] = {
        "softmax": lambda: attend(q, k, v),
        "softmax, causal": lambda: attend(q, k, v, "causal"),
        f"FAVOR+, {FEATURES} features": lambda: linear_attend(q, k, v, directions),
        f"FAVOR+, {FEATURES} features, causal": lambda: linear_attend(q, k, v, directions, causal=True),
    }
    if window:
        is_global = torch.arange(length, device=device)[None] < GLOBALS
        pattern = masks.any_of(masks.window(WINDOW), masks.global_tokens(is_global))
        block = masks.block(pattern, 1, length, length, device)
        found[f"window {WINDOW} + {GLOBALS} global, BlockMask"] = lambda: attend(q, k, v, block)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--calls", type=int, default=5, help="timed calls, after two to warm up")
    parser.add_argument("--longest", type=int, default=8192, help="the longest length; the first is 512")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-window", action="store_true", help="leave FlexAttention out, which compiles for minutes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    on_gpu = args.device != "cpu"
    machine = torch.cuda.get_device_name() if on_gpu else f"{cpu_name()}, {args.threads} threads"
    print(f"{machine}, torch {torch.__version__}")
    lengths = [512 * 2**i for i in range(1 + int(math.log2(args.longest / 512)))]
    table: dict[str, list[float]] = {}
    for length in lengths:
        for name, run in ways(length, args.device, window=not args.no_window).items():
            timed(run), timed(run)
            calls = [timed(run) for _ in range(args.calls)]
            table.setdefault(name, []).append(median(c.wall if on_gpu else c.cpu for c in calls))
    print(f"{'ms, and growth':<38}" + "".join(f"{length:>15,}" for length in lengths))
    for name, times in table.items():
        cells = [f"{1e3 * times[0]:10.2f}     "]
        cells += [f"{1e3 * b:10.2f} {math.log2(b / a):4.1f}" for a, b in pairwise(times)]
        print(f"{name:<38}" + "".join(cells))


if __name__ == "__main__":
    main()
