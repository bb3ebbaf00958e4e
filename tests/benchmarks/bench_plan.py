"""What `mmt plan` says of a recipe's memory beside what its first steps take, on a CPU with Linux, a process for each.

    python tests/benchmarks/bench_plan.py caption_scenes lm_scenes translate_scenes
    python tests/benchmarks/bench_plan.py bert_captions --words="--data.source=[captions.csv]"

Measured is the peak of the process's memory that no file backs: VmHWM less RssFile of /proc/self/status. Of the whole
process most is Python with its libraries, which hardly differs from recipe to recipe; so the rest is compared as well:
what comes to it from the start of training, and the weights. The batch with the longest sample, which a whole run has,
comes third. malloc keeps what it is given back, unless MALLOC_TRIM_THRESHOLD_ tells it not to, which is done here; with
--kept its peak without is measured too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from mmtransformer.cli.plan import _cli, longest, plan
from mmtransformer.training.callbacks.memory_estimate import private_bytes

ROOT = Path(__file__).parents[2]


class Begin(pl.Callback):
    """Bytes in use where training begins, and of the weights."""

    def __init__(self) -> None:
        self.bytes = self.weights = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.weights = sum(p.numel() * p.element_size() for p in pl_module.parameters())
        self.bytes = private_bytes()


def measure(words: list[str], steps: int) -> dict[str, int]:
    """Bytes that the first steps of a recipe take: the whole process, and what of it was there before."""
    begin = Begin()
    with tempfile.TemporaryDirectory() as folder:
        cli = _cli(words, [f"--trainer.max_steps={steps}"], folder)
        longest(cli.datamodule)
        cli.trainer.callbacks.append(begin)  # type: ignore[attr-defined]
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    status = {words[0]: int(words[1]) * 1024 for words in lines if words[0] in ("VmHWM:", "RssFile:")}
    return {"bytes": status["VmHWM:"] - status["RssFile:"], "before": begin.bytes - begin.weights}


def in_process(arguments: list[str], **environment: str) -> dict[str, int]:
    """The last line of another process of this file."""
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="names of recipes")
    parser.add_argument("--words", default="", help="keys that are changed, as for mmt fit")
    parser.add_argument("--steps", type=int, default=50, help="steps that are measured")
    parser.add_argument("--kept", action="store_true", help="measure what malloc keeps, too")
    parser.add_argument("--part", choices=["measure", "plan"], help="what one process does")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in args.recipes:
        words = ["--config", str(ROOT / f"recipes/{name}.yaml"), *args.words.split()]
        if args.part:
            found = measure(words, args.steps) if args.part == "measure" else {"bytes": plan(words)[0].memory}
            print(json.dumps(found))
            continue
        mine = [name, f"--words={args.words}", f"--steps={args.steps}", "--part"]
        planned = in_process([*mine, "plan"])["bytes"]
        took = in_process([*mine, "measure"], MALLOC_TRIM_THRESHOLD_="0")
        pairs = (planned, took["bytes"]), (planned - took["before"], took["bytes"] - took["before"])
        text = [f"planned {a / 1e6:.0f} MB, measured {b / 1e6:.0f} MB: {a / b - 1:+.1%}" for a, b in pairs]
        if args.kept:
            kept = in_process([*mine, "measure"])["bytes"]
            text.append(f"malloc keeps {(kept - took['bytes']) / 1e6:.0f} MB more")
        print(f"{name}: {text[0]}; less what was there before, {'; '.join(text[1:])}", flush=True)


if __name__ == "__main__":
    main()
