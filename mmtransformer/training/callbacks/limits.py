"""Which limit a run ends at, where several are set: said when it begins, or when one has stopped it early."""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Timer

from mmtransformer.serialization.printable import counted, say
from mmtransformer.training.callbacks.progress import clock


class Limits(pl.Callback):
    """Says which of `max_epochs` and `max_steps` comes first, what stops a run before them, or why it took no step.

    A run that is shorter than `val_check_interval`, where that counts over epochs, is validated at its end.
    """

    def __init__(self) -> None:
        self._from = 0  # the step that the run goes on from

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A run starts anew unless a checkpoint is read."""
        self._from = 0

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Notes where the run goes on."""
        self._from = checkpoint["global_step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says which limit comes first, where both are set, and lets no run end without a validation."""
        _validate_at_the_end(trainer)
        steps, epochs = trainer.max_steps, trainer.max_epochs or -1
        if min(steps, epochs) < 0 or math.isinf(trainer.num_training_batches) or not trainer.is_global_zero:
            return
        one = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if one * epochs < steps:
            say(
                f"trainer.max_epochs ({epochs:,}) ends the run at step {one * epochs:,}, before trainer.max_steps "
                f"({steps:,}), as an epoch of the data has {counted(one, 'step')}; trainer.max_epochs -1 leaves it to "
                f"max_steps"
            )
        elif steps < one * epochs:
            say(f"trainer.max_steps ({steps:,}) ends the run in epoch {-(-steps // one):,} of {epochs:,}")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says what has stopped the run early, or why it took no step."""
        step = trainer.global_step
        if not trainer.is_global_zero:
            return
        if step == self._from > 0:
            end = _time_over(trainer) or f"trainer.max_epochs ({trainer.max_epochs})"
            end = f"trainer.max_steps ({trainer.max_steps})" if 0 <= trainer.max_steps <= step else end
            say(f"nothing was left to train, as the run had reached {end} at step {step}: a larger one goes on")
        elif step < (total := trainer.estimated_stepping_batches) and (
            stopped := _time_over(trainer) or _early(trainer)
        ):
            say(f"{stopped} ended the run at step {step:,} of {total:,}")


def _validate_at_the_end(trainer: pl.Trainer) -> None:
    """Puts the first validation at the end of a run that has fewer batches than lie between two."""
    every, batches = trainer.val_check_batch, trainer.num_training_batches
    by_epochs = trainer.check_val_every_n_epoch is not None or not trainer.enable_validation
    if by_epochs or every is None or not math.isfinite(min(every, batches)):
        return
    epochs, more = divmod(trainer.estimated_stepping_batches, math.ceil(batches / trainer.accumulate_grad_batches))
    total = int(epochs) * int(batches) + int(more) * trainer.accumulate_grad_batches
    if 0 < total < every:
        trainer.val_check_batch = total
        if trainer.is_global_zero:
            say(
                f"the run has {counted(total, 'batch', 'batches')}, fewer than trainer.val_check_interval ({every:,}): "
                f"it is validated once, at its end"
            )


def _time_over(trainer: pl.Trainer) -> str:
    """The time that a run might take, in words; "" if it has some left."""
    for timer in (c for c in trainer.callbacks if isinstance(c, Timer)):  # pyright: ignore[reportAttributeAccessIssue]
        if (left := timer.time_remaining()) is not None and left <= 0:
            return f"trainer.max_time ({clock(left + timer.time_elapsed())})"
    return ""


def _early(trainer: pl.Trainer) -> str:
    """Why `EarlyStopping` ended a run; "" if it did not."""
    said = (callback.stopping_reason_message for callback in trainer.early_stopping_callbacks)
    return next((f"EarlyStopping ({' '.join(reason.split()).rstrip('.')})" for reason in said if reason), "")
