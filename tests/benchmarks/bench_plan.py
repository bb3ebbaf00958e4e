"""What `mmt plan` says of a recipe's memory beside what three of its steps take, in processes of their own.

    python tests/benchmarks/bench_plan.py caption_scenes lm_scenes translate_scenes

Measured is the growth of the process's peak from the start of training, and the weights that were there before; three
steps with batches of four come first, so that code which is loaded at its first use is not counted. On a CPU the
allocator keeps what it freed unless it is told not to, hence MALLOC_TRIM_THRESHOLD_.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from mmtransformer.cli.plan import _cli, plan

ROOT = Path(__file__).parents[2]


class Growth(pl.Callback):
    """Bytes in use where training begins, and of the weights."""

    def __init__(self) -> None:
        self.begin = self.weights = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.begin = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self.weights = sum(p.numel() * p.element_size() for p in pl_module.parameters())


def measure(words: list[str]) -> int:
    """Bytes that three steps of a recipe take."""
    growth = Growth()
    with tempfile.TemporaryDirectory() as folder:
        cli = _cli(words, ["--trainer.max_steps=3"], folder)
        cli.trainer.callbacks.append(growth)  # type: ignore[attr-defined]
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak - growth.begin + growth.weights


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="+", help="names of recipes")
    parser.add_argument("--part", choices=["measure", "plan"], help="what one process does")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in args.recipes:
        words = ["--config", str(ROOT / f"recipes/{name}.yaml")]
        if args.part:
            if args.part == "measure":
                measure([*words, "--data.batch_size=4"])
                gc.collect()
            print(json.dumps(measure(words) if args.part == "measure" else plan(words)[0].memory))
            continue
        found = []
        for part in ("measure", "plan"):
            command = [sys.executable, "-W", "ignore", __file__, name, "--part", part]
            environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found.append(int(done.stdout.splitlines()[-1]))
        measured, planned = found
        print(
            f"{name}: measured {measured / 1e6:.0f} MB, planned {planned / 1e6:.0f} MB: {planned / measured - 1:+.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
