"""Two ways to do one thing, timed in turns in one run: A B A B ..., and the median of the pairs' ratios.

A ratio of two neighbours is hardly moved by what else the machine does; a time is. CPU time, which other processes
move least, decides; wall time stands beside it.
"""

import argparse
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds of one call: on the clock, and of all threads on their cores."""

    wall: float
    cpu: float


def timed(run: Callable[[], object]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def compare(
    name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    target: float | None = None,
    flops: float = 0.0,
    gemm: float = 0.0,
    pairs: int = 9,
    unit: tuple[float, str] | None = None,
) -> float:
    """Prints one line: both medians, the ratio peer / ours (above 1 = ours is faster), and hit or missed.

    Args:
        name: what is timed.
        ours: one call of ours.
        peer: one call of the peer's.
        target: the ratio that is wanted.
        flops: floating point operations of one call of ours, for "% of GEMM rate".
        gemm: the measured rate of a large matrix product, operations a CPU second.
        pairs: timed calls of each, after one of each to warm up.
        unit: how many of what one call makes (tokens, pictures), for a rate.
    """
    timed(ours), timed(peer)
    gc.collect()
    rows = [(timed(ours), timed(peer)) for _ in range(pairs)]
    mine, theirs = median(a.wall for a, _ in rows), median(b.wall for _, b in rows)
    wall, cpu = median(b.wall / a.wall for a, b in rows), median(b.cpu / a.cpu for a, b in rows)
    # The fastest call: the one that the machine's other work disturbed least.
    best = min(b.wall for _, b in rows) / min(a.wall for a, _ in rows)
    line = f"{name:<48} {1e3 * mine:8.1f} ms {1e3 * theirs:8.1f} ms   x{wall:.2f} (cpu x{cpu:.2f}, best x{best:.2f})"
    if target is not None:
        line += f"  target x{target:.2f} {'hit' if cpu >= target else 'MISSED'}"
    if flops and gemm:
        line += f"  {100 * flops / min(a.cpu for a, _ in rows) / gemm:.0f} % of GEMM"
    if unit is not None:
        line += f"  {unit[0] / mine:.1f} against {unit[0] / theirs:.1f} {unit[1]}/s"
    print(line, flush=True)
    return cpu


def gemm_rate(dtype: torch.dtype, size: int = 1536, device: str = "cpu") -> float:
    """Operations a CPU second of a large square matrix product: what a core can do at best."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    calls = [timed(lambda: torch.mm(a, b)).cpu for _ in range(8)]
    return 2 * size**3 / min(calls)


def start(description: str, **choices: tuple[str, ...]) -> argparse.Namespace:
    """Reads the command line, sets the threads, prints the machine.

    Args:
        description: what `--help` says.
        choices: further options by name, each with what may be chosen, the first by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=9, help="timed calls of each side")
    parser.add_argument("--only", default="", help="run the lines whose name has this in it")
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.gemm = {d: gemm_rate(d) for d in (torch.float32, torch.bfloat16)}
    print(f"{cpu_name()}, {args.threads} threads, Python {platform.python_version()}, torch {torch.__version__}")
    print(", ".join(f"{str(d).removeprefix('torch.')} GEMM {r / 1e9:.0f} GFLOP/s" for d, r in args.gemm.items()))
    print(f"{'':<48} {'ours':>11} {'peer':>11}   median of {args.pairs} ratios", flush=True)
    return args


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def agreement(ours: list[list[int]], peer: list[list[int]]) -> str:
    """How many texts are the peer's to the last id, and how many ids of the others are up to where they part."""
    parted = [
        next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
        for mine, theirs in zip(ours, peer, strict=True)
        if mine != theirs
    ]
    if not parted:
        return "the same ids"
    return f"{len(ours) - len(parted)} of {len(ours)} texts have the same ids, the others part at tokens {parted}"
