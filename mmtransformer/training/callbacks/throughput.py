"""How fast a run is, and how much of the machine it uses: in the progress line and in metrics.csv."""

import contextlib
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmtransformer.training.engine.internals import in_a_step
from mmtransformer.training.engine.task import Task


class Throughput(pl.Callback):
    """Measures samples and tokens a second, the memory's peak, and the model FLOP utilisation (MFU).

    MFU is what the model's products need, as counted in the second batch, over what the device does in products of
    square matrices, as measured at the start in the run's own number format. Recomputed activations do not count.

    Args:
        size: Rows of the square matrices.
    """

    def __init__(self, size: int = 1024) -> None:
        self.size = size
        self.gemm_rate = 0.0
        """FLOPs a second of a product of matrices."""
        self.flops_per_sample = 0.0
        self.samples_per_second = self.tokens_per_second = 0.0
        self._counter: FlopCounterMode | None = None
        self._batches, self._world = 0, 1
        self._last = (0.0, 0, 0)  # clock, samples, tokens
        self._paused = 0.0

    @property
    def mfu(self) -> float:
        """The share of the device's rate that the model's products reach; 0 where it is not known."""
        done = self.flops_per_sample * self.samples_per_second / self._world
        return done / self.gemm_rate if self.gemm_rate else 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the device."""
        half = str(trainer.precision).startswith(("bf16", "16"))
        kind = torch.get_default_dtype()
        if half:
            kind = torch.bfloat16 if str(trainer.precision).startswith("bf16") else torch.float16
        self.gemm_rate = gemm_rate(pl_module.device, kind, self.size)
        self._batches, self.flops_per_sample, self._world = 0, 0.0, trainer.world_size
        self._restart(pl_module)

    def _restart(self, module: pl.LightningModule) -> None:
        if isinstance(module, Task):
            self._last = (time.monotonic(), module.samples_seen, module.tokens_seen)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts the work of the second batch; in compiled blocks it cannot be counted."""
        self._batches += 1
        if self._batches != 2 or not isinstance(pl_module, Task):
            return
        if all(part._compiled_call_impl is None for part in pl_module.modules()):
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs with the run's other numbers."""
        if not isinstance(pl_module, Task):
            return
        if self._counter is not None:
            self._close()
            assert self._counter is not None
            self.flops_per_sample = self._counter.get_total_flops() / max(len(pl_module.names(batch)), 1)
            self._counter = None
            self._restart(pl_module)  # A counted batch is a slow one.
        every = getattr(trainer, "log_every_n_steps", 0)
        if self._batches > 2 and every and trainer.global_step % every == 0 and not in_a_step(trainer):
            self.measure(pl_module)
            row = {
                "epoch": trainer.current_epoch,
                "train/samples_per_second": self.samples_per_second,
                "train/tokens_per_second": self.tokens_per_second,
                "train/mfu": self.mfu,
                "train/memory_gb": peak_memory(pl_module.device) / 1e9,
            }
            for logger in trainer.loggers:
                logger.log_metrics(row, max(trainer.global_step - 1, 0))

    def measure(self, module: Task) -> None:
        """Takes the rates since the last measurement."""
        now, (then, samples, tokens) = time.monotonic(), self._last
        if (seconds := now - then) > 0 and module.samples_seen > samples:
            self.samples_per_second = (module.samples_seen - samples) / seconds
            self.tokens_per_second = (module.tokens_seen - tokens) / seconds
        self._last = (now, module.samples_seen, module.tokens_seen)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock stands still while the run validates."""
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock goes on."""
        then, samples, tokens = self._last
        self._last = (then + time.monotonic() - self._paused, samples, tokens)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stops counting."""
        self._close()

    def _close(self) -> None:
        if self._counter is not None:
            with contextlib.suppress(Exception):
                self._counter.__exit__(None, None, None)

    def words(self, device: torch.device) -> str:
        """MFU and memory for the progress line."""
        share = f"MFU {self.mfu:.0%}  " if self.mfu else ""
        peak = peak_memory(device)
        return f"{share}{peak / 1e9:.1f} GB" if peak else share.strip()


def gemm_rate(device: torch.device, kind: torch.dtype, size: int = 1024) -> float:
    """FLOPs a second of a product of square matrices: the best of a few tries.

    Args:
        device: Where.
        kind: The number format.
        size: Rows of the matrices.
    """
    a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(kind)
    best = float("inf")
    for _ in range(4):
        _wait(device)
        began = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use at once: the device's, or this process's; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
