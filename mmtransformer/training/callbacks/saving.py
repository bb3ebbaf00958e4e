"""When a run is saved: now and then, at the end of every epoch, and before it obeys a signal to stop.

A checkpoint is taken between optimizer steps only (see resume.py for what is in it).
"""

import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

from mmtransformer.serialization.printable import say
from mmtransformer.training.engine.checkpoints import SUFFIX, AtomicCheckpointIO, remove_leftovers
from mmtransformer.training.engine.ema import EMA
from mmtransformer.training.engine.internals import (
    Place,
    checkpoint_of,
    epoch_ends,
    in_a_step,
    place_of,
    validation_follows,
)
from mmtransformer.training.engine.log import MetricsLog
from mmtransformer.training.engine.sharded import Sharded

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SignalExit(SystemExit):
    """The run obeyed a signal, after it was saved; the process ends with 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class LastCheckpoint(Checkpoint):
    """Writes checkpoints/last.ckpt, from which the run goes on bit for bit.

    SIGTERM (what schedulers send) and SIGINT (Ctrl+C) end the run after the optimizer step that is being computed: it
    is saved, and the process ends with 143 or 130. The second Ctrl+C ends it at once. A run that waits for data, or for
    a process that is lost, perhaps for ever, is saved and ended without that step: at once, or of several processes in
    seconds (see `processes.watched`, which calls `rescue`).

    Args:
        dirpath: Folder of the checkpoint; "checkpoints" in the run's folder unless told.
        every_n_train_steps: Optimizer steps between checkpoints; 0 goes by the clock alone.
        every_n_minutes: Most minutes between checkpoints.
    """

    def __init__(
        self, dirpath: str | Path | None = None, *, every_n_train_steps: int = 0, every_n_minutes: float = 10.0
    ) -> None:
        if every_n_train_steps < 0 or every_n_minutes <= 0:
            raise ValueError(
                f"every_n_train_steps ({every_n_train_steps}) must be at least 0 and every_n_minutes "
                f"({every_n_minutes}) above 0"
            )
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.every_n_train_steps, self.every_n_minutes = every_n_train_steps, every_n_minutes
        self.signal = 0
        self.path = Path("last" + SUFFIX)
        self._trainer: pl.Trainer | None = None
        self._place: Place | None = None  # of a run of several processes
        self._step, self._clock = -1, 0.0  # of the last checkpoint
        self._from = 0  # the step that the run goes on from
        self.earlier = 0.0
        """Seconds that the run had taken when it was saved, if it was resumed."""
        self._began = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes over the writing of checkpoint files, and clears away what a killed run left."""
        self._from, self.earlier, self._began = 0, 0.0, time.monotonic()
        folder = self.dirpath or Path(trainer.default_root_dir) / "checkpoints"
        self.path = Path(trainer.strategy.broadcast(str(folder))) / f"last{SUFFIX}"
        if not isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.is_global_zero and stage == "fit":
            remove_leftovers(self.path.parent)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compares the processes, before they wait for one another."""
        self._same_start(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listens to signals, in place of Lightning, which loses the run."""
        self._same_start(trainer)  # `Sharded` reads its checkpoint late.
        self.signal, self._step, self._clock = 0, trainer.global_step, time.monotonic()
        self._trainer = trainer
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:  # Lightning puts back what was there when the run ends.
                signal.signal(number, self._listen)

    def _listen(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.signal = number
        if self._trainer is not None and self._trainer.world_size == 1 and self.waiting:
            if not in_a_step(self._trainer):
                self._leave_validation(self._trainer)
                self._save(self._trainer, again=self._trainer.validating)
            self._stop(self._trainer, number)
        text = f"\n{signal.Signals(number).name}: the run stops after this step, and is saved\n"
        sys.stderr.write(text)

    @property
    def waiting(self) -> bool:
        """Whether the run stands still until loading workers have a batch."""
        if self._trainer is None:
            return False
        loaders = self._trainer.val_dataloaders if self._trainer.validating else self._trainer.train_dataloader
        return any(
            getattr(loader, "waiting", False) for loader in (loaders if isinstance(loaders, list) else [loaders])
        )

    def rescue(self) -> bool:
        """Saves the last step of a run of several processes while this one waits for another that is lost.

        It asks no process for anything, and may be called from another thread, after which the process has to end. The
        log is that of the file: rows that a lost first process had not written are not there.

        Returns:
            Whether the last step is saved: not where weights are shared out, before the first step, or after the run
            has gone on meanwhile.
        """
        trainer, place = self._trainer, self._place
        if trainer is None or place is None or isinstance(trainer.strategy, Sharded):
            return False
        if self._step == place.step:
            return True
        self._leave_validation(trainer)
        for log in trainer.loggers:
            log.save()
        if (checkpoint := checkpoint_of(trainer, place)) is None:
            return False
        for log in trainer.loggers:
            if isinstance(log, MetricsLog):  # A validation that has followed is done once more.
                checkpoint["rows"] = log.written(place.step)
        trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, self.path)
        return True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves after an optimizer step, if it is time to or a signal came."""
        if in_a_step(trainer):
            return
        if trainer.world_size > 1:
            self._place = place_of(trainer)
        step, number = trainer.global_step, self._agreed(trainer)
        due = self.every_n_train_steps and step % self.every_n_train_steps == 0
        late = self._late(trainer)
        last = epoch_ends(trainer) and not validation_follows(trainer)
        if (due or late or number) and not last:  # The epoch's end is saved when it has ended.
            self._save(trainer)
            self._stop(trainer, number)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Obeys a signal in the middle of a validation, which is then still due; not between a step's batches."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or in_a_step(trainer):
            return
        if number := self._agreed(trainer):
            self._leave_validation(trainer)
            self._save(trainer, again=True)
            self._stop(trainer, number)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the epoch."""
        self._save(trainer, again=True)
        self._stop(trainer, self._agreed(trainer))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes how far the log has come, and how long the run took."""
        checkpoint["seconds"] = self.earlier + time.monotonic() - self._began
        checkpoint["rows"] = max((log.rows for log in trainer.loggers if isinstance(log, MetricsLog)), default=0)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Goes on with the log."""
        self._from, self.earlier = checkpoint["global_step"], checkpoint.get("seconds", 0.0)
        for log in trainer.loggers if trainer.state.fn == "fit" else []:
            if isinstance(log, MetricsLog):
                log.resume(checkpoint.get("rows", 0))

    def _late(self, trainer: pl.Trainer) -> bool:
        late = time.monotonic() - self._clock > 60 * self.every_n_minutes
        return bool(trainer.strategy.broadcast(late)) if trainer.world_size > 1 else late

    def _agreed(self, trainer: pl.Trainer) -> int:
        """The signal that any process got, or 0; all processes ask at the same steps."""
        if trainer.world_size == 1:
            return self.signal
        number = torch.tensor(self.signal, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)

    def _stop(self, trainer: pl.Trainer, number: int) -> None:
        if number:
            if trainer.is_global_zero:
                say(f"stopped at step {trainer.global_step}; go on with --resume ({self.path})", file=sys.stderr)
            raise SignalExit(number)

    def _leave_validation(self, trainer: pl.Trainer) -> None:
        """Puts the model back where its moving average is being validated."""
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, EMA) and callback.swapped:
                callback.swap(trainer.lightning_module)

    def _save(self, trainer: pl.Trainer, *, again: bool = False) -> None:
        if self._step == trainer.global_step and not again:
            return
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.path)
        self._step, self._clock = trainer.global_step, time.monotonic()

    def _same_start(self, trainer: pl.Trainer) -> None:
        """A node that cannot see the run's folder would begin anew beside the others, or wait for them forever.

        Raises:
            ValueError: If not all processes go on from the same step.
        """
        if trainer.world_size == 1:
            return
        found: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, (socket.gethostname(), self._from))
        for i, (host, step) in enumerate(found):
            if step != found[0][1]:
                raise ValueError(
                    f"process {i} (on {host}) would go on from step {step}, process 0 (on {found[0][0]}) from step "
                    f"{found[0][1]}: the run's folder, {trainer.default_root_dir}, must be on a disk that all nodes "
                    f"share"
                )
