"""Two ways to do one thing, timed in turns in one run: A B A B ..., and the median of the pairs' ratios.

A ratio of two neighbours is hardly moved by what else the machine does; a time is. CPU time, which other processes
move least, decides; wall time stands beside it. And the share of the limit: how near ours is to what the machine could
do (see work.py). With BENCH_RECORD=FILE each line is also appended there as JSON (run.py makes tables of it).
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from work import Rates, rates, work_of

from mmtransformer.layers.kernels import bfloat16_hardware

_MEASURED: list[Rates] = []


class Timing(NamedTuple):
    """Seconds of one call: on the clock, and of all threads on their cores."""

    wall: float
    cpu: float


def slow_in_bfloat16() -> bool:
    return not torch.cuda.is_available() and not bfloat16_hardware("cpu").fast


def process_as(mmt_fit: bool) -> None:
    """Sets what `mmt fit` sets for its process, or what torch and malloc do by themselves; each side's step does, anew.

    By itself malloc gives tensors above 32 MB back to the system. Smaller ones stay for both sides: else the one would
    give back what the other has kept for its next step.
    """
    torch.set_float32_matmul_precision("medium" if mmt_fit else "highest")
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(-3, 2**30 if mmt_fit else 2**25)  # from which size on
        set_option(-1, 2**31 - 1)  # how much is kept


def timed(run: Callable[[], object]) -> Timing:
    wall, cpu = time.perf_counter(), _cpu_seconds()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Timing(time.perf_counter() - wall, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    """Of this process, and of those that it started and saw end (the workers of a loader)."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


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
    limit: tuple[float, str] | None = None,
    by_clock: bool = False,
) -> float:
    """Prints one line: both medians, the ratio peer / ours (above 1 = ours is faster), and hit or missed.

    A line that has "bf16" or "bfloat16" in its name is left out on a CPU without kernels for it, where it takes minutes
    a call and says nothing: nobody computes so there. Its ratio is then 0.

    Args:
        name: what is timed.
        ours: one call of ours.
        peer: one call of the peer's.
        target: the ratio that is wanted.
        flops: floating point operations of one call of ours, where they cannot be counted (a compiled function).
        gemm: the measured rate of a large matrix product in that number format, operations a CPU second.
        pairs: timed calls of each, after one of each to warm up.
        unit: how many of what one call makes (tokens, pictures), for a rate.
        limit: CPU seconds that ours takes at least, and what bounds it; counted unless given.
        by_clock: whether wall time decides: where processes work that go on living, whose CPU time is not seen.
    """
    if ("bf16" in name or "bfloat16" in name) and slow_in_bfloat16():
        print(f"{name}: left out, as the CPU has {bfloat16_hardware('cpu').words}", flush=True)
        return 0.0
    if limit is None and flops and gemm:
        limit = flops / gemm, "GEMM"
    if limit is None and _MEASURED:
        work = work_of(ours)
        limit = _MEASURED[0].limit(work) if work.flops else None
    timed(ours), timed(peer)
    gc.collect()
    rows = [(timed(ours), timed(peer)) for _ in range(pairs)]
    mine, theirs = median(a.wall for a, _ in rows), median(b.wall for _, b in rows)
    wall, cpu = median(b.wall / a.wall for a, b in rows), median(b.cpu / a.cpu for a, b in rows)
    cpu = wall if by_clock else cpu
    # The fastest call: the one that the machine's other work disturbed least.
    best = min(b.wall for _, b in rows) / min(a.wall for a, _ in rows)
    line = f"{name:<48} {1e3 * mine:8.1f} ms {1e3 * theirs:8.1f} ms   x{wall:.2f} (cpu x{cpu:.2f}, best x{best:.2f})"
    if target is not None:
        line += f"  target x{target:.2f} {'hit' if cpu >= target else 'MISSED'}"
    # Of the fastest call's CPU time, as the rates are.
    share = limit[0] / min(a.cpu for a, _ in rows) if limit else None
    if limit and share is not None:
        line += f"  {100 * share:.0f} % of {limit[1]}"
    if unit is not None:
        line += f"  {unit[0] / mine:.1f} against {unit[0] / theirs:.1f} {unit[1]}/s"
    print(line, flush=True)
    _record(
        line=name, ratio=cpu, wall=wall, best=best, ours_ms=1e3 * mine, peer_ms=1e3 * theirs, target=target,
        share=share, bound=limit[1] if limit else None, pairs=pairs, per_s=unit and unit[0] / mine,
        unit=unit and unit[1],
    )  # fmt: skip
    return cpu


def _record(**values: object) -> None:
    """Appends a line to the file of BENCH_RECORD, if there is one."""
    if path := os.environ.get("BENCH_RECORD"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def note(name: str, value: float, unit: str, *, target: float | None = None, share: float | None = None) -> None:
    """Prints and records what has no peer: pictures a second of three workers, seconds until a file is open."""
    print(f"{name:<48} {value:10.3f} {unit}" + (f"  {100 * share:.0f} % of the limit" if share else ""), flush=True)
    _record(line=name, value=value, unit=unit, target=target, share=share)


def start(description: str, **choices: tuple[str, ...] | int | str) -> argparse.Namespace:
    """Reads the command line, sets the threads, prints the machine.

    Args:
        description: what `--help` says.
        choices: further options by name, each with what may be chosen, the first by default; or a number, or any text.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=9, help="timed calls of each side")
    parser.add_argument("--only", default="", help="run the lines whose name has this in it")
    for name, values in choices.items():
        some = isinstance(values, tuple)
        kind: dict[str, Any] = {"choices": values} if some else {"type": type(values)}
        parser.add_argument(f"--{name}", default=values[0] if some else values, **kind)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found = rates()
    _MEASURED[:] = [found]
    args.rates, args.gemm = found, {torch.float32: found.gemm["fp32"], torch.bfloat16: found.gemm["bf16"]}
    print(f"{cpu_name()}, {args.threads} threads, Python {platform.python_version()}, torch {torch.__version__}")
    said = [f"{kind} {rate / 1e9:.0f}" for kind, rate in found.gemm.items()]
    print(f"GFLOP/s a CPU second: {', '.join(said)}; reading {found.read / 1e9:.1f} GB/s")
    _record(rates={kind: rate / 1e9 for kind, rate in found.gemm.items()}, read=found.read / 1e9, threads=args.threads)
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
