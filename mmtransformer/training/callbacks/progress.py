"""One line that says how far a run is, how fast, and when it ends; readable in a terminal and in a log file."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from mmtransformer.serialization.printable import printable
from mmtransformer.training.callbacks.throughput import Throughput
from mmtransformer.training.engine.task import Task


class Progress(ProgressBar):
    """Step, loss, throughput and time left of the whole run.

    In a terminal the line is renewed in place; in a log file a new one is written every `log_seconds`.

    Args:
        log_seconds: Seconds between lines where the output is not a terminal.
    """

    def __init__(self, log_seconds: float = 15.0) -> None:
        super().__init__()
        self.log_seconds = log_seconds
        self._enabled = True
        self._shown = 0  # characters of the line that stands in the terminal
        self._begin = self._last = 0.0
        self._first_step, self._seen = 0, (0, 0)  # samples and tokens before this start

    def disable(self) -> None:
        """No output (Lightning calls it on all processes but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Output again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """A line of its own above the progress."""
        if self._enabled:
            self._clear()
            print(*(printable(str(arg)) for arg in args), **kwargs, flush=True)  # noqa: T201 (printing is its job)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._begin, self._last = time.monotonic(), 0.0
        self._first_step = trainer.global_step
        self._seen = (getattr(pl_module, "samples_seen", 0), getattr(pl_module, "tokens_seen", 0))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Renews the line, if it is time."""
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if not self._enabled or now - self._last < (0.2 if terminal else self.log_seconds):
            return
        done = trainer.global_step - self._first_step
        if done < 1:
            return
        self._last = now
        self._write(self.line(trainer, pl_module, now - self._begin, done), terminal)

    def line(self, trainer: pl.Trainer, module: pl.LightningModule, seconds: float, done: int) -> str:
        """The line to show.

        Args:
            trainer: The trainer.
            module: What it trains.
            seconds: Seconds since the start.
            done: Optimizer steps since the start.
        """
        total, step = int(trainer.estimated_stepping_batches), trainer.global_step
        left = max(total - step, 0) * seconds / done
        parts = [f"step {step}/{total} ({step / max(total, 1):.0%})"]
        if isinstance(module, Task):
            parts.append(f"loss {float(module.last_loss):.3f}")
            rate = 1 / max(seconds, 1e-9)
            samples, tokens = module.samples_seen - self._seen[0], module.tokens_seen - self._seen[1]
            parts.append(f"{rate * samples:,.0f} {module.unit}/s")
            if tokens != samples:  # one loss a sample says nothing more
                parts.append(f"{rate * tokens:,.0f} tokens/s")
        meters = (c for c in getattr(trainer, "callbacks", ()) if isinstance(c, Throughput))
        parts += [meter.words(module.device) for meter in meters]
        parts.append(f"{clock(seconds)} gone, {clock(left)} left")
        return "  ".join(parts)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The losses of the validation."""
        if trainer.sanity_checking or not isinstance(pl_module, Task):
            return
        for split in pl_module.split_names:
            if f"{split}/loss" in trainer.callback_metrics:
                self.print(f"  {pl_module.describe(split, trainer.callback_metrics)}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the last line standing."""
        done = trainer.global_step - self._first_step
        if self._enabled and done > 0:
            self.print(self.line(trainer, pl_module, time.monotonic() - self._begin, done))

    def _write(self, line: str, terminal: bool) -> None:
        if terminal:
            sys.stdout.write("\r" + line.ljust(self._shown))
            self._shown = len(line)
        else:
            sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def _clear(self) -> None:
        if self._shown:
            sys.stdout.write("\r" + " " * self._shown + "\r")
            self._shown = 0


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are some: 4:05, 1:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
