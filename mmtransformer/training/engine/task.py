"""Task: what every recipe trains. A loss per token of the global batch, the optimizer, the guard; and a finish."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmtransformer.batch import SumAndCount
from mmtransformer.data.loading.module import DataModule
from mmtransformer.pipelines.base import write_json
from mmtransformer.serialization.printable import counted, printable, say
from mmtransformer.training.engine.accumulators import Means, StepAccumulator, StepSums
from mmtransformer.training.engine.ema import EMA
from mmtransformer.training.engine.guard import MOST_IN_A_ROW, RECORD, first_bad_module, memory_advice, not_finite
from mmtransformer.training.engine.internals import normalize_counters, resume_loaders
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.parameters import say_what_cannot_learn, set_modes, trainable_parameters
from mmtransformer.training.engine.resume import (
    frozen_hashes,
    refuse_another_optimizer,
    restore_frozen,
    seed_step,
    strip_frozen,
)
from mmtransformer.training.engine.run import Run, device_name
from mmtransformer.training.engine.sharded import Sharded, not_finite_in, shard, unshard
from mmtransformer.training.evaluation.report import plot_curves, seconds_to_text

DataT = TypeVar("DataT", bound=DataModule)


class Task(pl.LightningModule, ABC, Generic[DataT]):
    """The contract between a recipe and `mmt fit`: a loss to train on, and what is written when training ends.

    A training step returns the SUM of the losses; before the optimizer step the gradient is divided by the count (of
    tokens, say) that all micro-batches and processes had together. So the gradient is the mean over the global batch,
    however it was cut up.

    Args:
        optim: The optimizer and its schedule.
    """

    unit = "pictures"
    """What a sample is called where the throughput is shown."""
    data_kind: type[DataT] = DataModule  # pyright: ignore[reportAssignmentType]
    """The data that it knows."""
    val_metrics: tuple[tuple[str, str], ...] = ()
    """What a validation's line says after the loss: a metric's name and its words, such as "{:.1%} right"."""

    def __init__(self, optim: OptimConfig) -> None:
        super().__init__()
        self.optim = optim
        self.samples_seen = self.tokens_seen = 0  # by all processes
        self.last_loss = torch.tensor(math.nan)
        self._parts, self._means = StepAccumulator(), Means()
        self._size = 0  # samples of the last micro-batch
        self.skipped = self._in_a_row = 0  # steps that were left out as they were not finite
        self._at_first_batch = True  # whether the first batch is still to come
        self._seed: int | None = None
        self._hashes: dict[str, str] | None = None
        self.validation_means: dict[str, float] = {}  # of the last validation: those of the model that is kept

    # ------------------------------------------------------------------------------------- what a task has to say

    @abstractmethod
    def loss(self, batch: Any) -> SumAndCount:
        """The training loss of a batch: a sum, and the number that it is to be divided by."""

    @abstractmethod
    def finish(self, run: Run) -> None:
        """Evaluates what was trained, and writes metrics.json, model/ and pictures into the run's folder."""

    @property
    def data(self) -> DataT | None:
        """The run's data, if it is of the kind that the task knows."""
        found = getattr(self.trainer, "datamodule", None)
        return found if isinstance(found, self.data_kind) else None

    def names(self, batch: Any) -> Sequence[str]:
        """The names of a batch's samples: for the count of samples, and for errors."""
        return batch.names

    def learned_tokens(self, batch: Any, loss: SumAndCount) -> Tensor:
        """How many tokens of a batch are learned: for the count of tokens; the loss's count unless a task says else."""
        return loss.count

    def log_value(self, name: str, value: Tensor) -> None:
        """Lets a single number be logged with the step that is computed, without waiting for it."""
        self._parts.watched[name] = value.detach()

    @property
    def logs_this_step(self) -> bool:
        """Whether the step that is computed is one of those whose numbers are logged."""
        every = getattr(self.trainer, "log_every_n_steps", 1)
        return every > 0 and self.trainer.global_step % every == 0

    def sample(self, turn: int) -> list[str]:
        """Lines that show what the model can do by now; none unless a task has some.

        Args:
            turn: How many samples of the run came before this one; another is shown each time.
        """
        return []

    def describe(self, split: str, metrics: Mapping[str, Tensor]) -> str:
        """A validation's result in a line: the loss, and what of `val_metrics` there is."""
        said = (("loss", "loss {:.3f}"), *self.val_metrics)
        found = [text.format(float(metrics[f"{split}/{name}"])) for name, text in said if f"{split}/{name}" in metrics]
        return f"{split}: {', '.join(found)}"

    # ------------------------------------------------------------------------------------------------ training

    def configure_callbacks(self) -> list[pl.Callback]:
        """The moving average, if there is one."""
        return [EMA(self.optim.ema_decay)] if self.optim.ema_decay else []

    def configure_model(self) -> None:
        """Shares the weights out among the processes, with the strategy `Sharded`."""
        if isinstance(self.trainer.strategy, Sharded):
            self.trainer.precision_plugin.convert_module(self)  # A hash is that of the run's number format.
            self._hashes = frozen_hashes(self)
            assert self.device_mesh is not None
            shard(self, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Says what there is to learn from, where the data can say it."""
        if self.trainer.is_global_zero and (describe := getattr(self.data, "describe", None)):
            say(describe())

    def teardown(self, stage: str) -> None:
        """Gives every process whole weights again, after a validation too."""
        if isinstance(self.trainer.strategy, Sharded):
            unshard(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, with warm-up and cosine over the whole run.

        Raises:
            ValueError: If the run has no end, the optimizer needs whole weights where they are shared out, or what
                learns is kept in bfloat16.
        """
        half = [n for n, p in self.named_parameters() if p.requires_grad and p.dtype == torch.bfloat16]
        if half and self.trainer.precision != "bf16-true":
            raise ValueError(
                f"{len(half)} of the parameters that learn are kept in bfloat16 ({half[0]}, ...), which rounds small "
                f"steps away: load that part with dtype float32, or freeze it"
            )
        if self.optim.kind == "muon" and isinstance(self.trainer.strategy, Sharded):
            raise ValueError("optim.kind=muon needs whole matrices, and Sharded shares them out; take adamw, or ddp")
        # With float16 a fused optimizer would unscale the gradients itself, after they were clipped.
        optimizer = self.optim.build(self, fused=self.trainer.precision != "16-mixed")
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        scheduler = self.optim.schedule(optimizer, max(int(steps), 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Goes on where the run was, if it was resumed; else forgets what an earlier one met in its folder."""
        self.set_modes()
        self._at_first_batch = True
        resume_loaders(self.trainer)  # The last that can refuse to go on.
        data = getattr(self.trainer, "datamodule", None)
        if self.trainer.ckpt_path and isinstance(data, DataModule):
            data.clear_reports()
        if self.trainer.is_global_zero and not self.trainer.ckpt_path:
            (Path(self.trainer.default_root_dir) / RECORD).unlink(missing_ok=True)

    def set_modes(self) -> None:
        """What learns trains, what is frozen evaluates: at the start of a run, and of epochs if that has changed."""
        set_modes(self)

    def on_train_epoch_start(self) -> None:
        """A callback may have thawed a part."""
        self.set_modes()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Makes what the step draws a function of seed, step and process."""
        if self._seed is None:
            self._seed = torch.initial_seed()
        seed_step(self._seed, self.trainer.fit_loop.total_batch_idx, self.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum of the losses of a batch."""
        names = self.names(batch)
        self._size = len(names)
        with self._memory_advice():
            loss = self.loss(batch)
        if self._at_first_batch:
            say_what_cannot_learn(self, loss.sum)
        self._at_first_batch = False
        self._parts.add(batch, names, loss, self.learned_tokens(batch, loss))
        return loss.sum

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward, with advice where the memory ends."""
        with self._memory_advice():
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step, with advice where the memory ends."""
        with self._memory_advice():
            super().optimizer_step(*args, **kwargs)

    def _memory_advice(self) -> AbstractContextManager[None]:
        return memory_advice(self.device, lambda: self.trainer.global_step, lambda: self._size)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """From the sum of gradients to the mean over the global batch; clips, logs, and guards the weights.

        Raises:
            NonFiniteError: If loss or gradient are not, unless such steps are to be skipped.
            ValueError: If there is nothing to learn from in the global batch.
        """
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        parts, self._parts = self._parts.read(norm, self.trainer.world_size).exact(grads), StepAccumulator()
        self.samples_seen += parts.samples
        self.tokens_seen += parts.tokens
        if not parts.count:
            raise ValueError(f"step {self.trainer.global_step}: none of the samples has a target token")
        # Lightning has divided by the micro-batches, DDP by the processes.
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / parts.count
        loss, norm, lr = parts.loss / parts.count, parts.norm * scale, optimizer.param_groups[0]["lr"]
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.optim.refuse_rates(optimizer, self.trainer.global_step)
        # float16's scaler finds gradients that overflow itself, leaves the step out and scales less.
        if not finite and not (math.isfinite(loss) and self.trainer.precision == "16-mixed"):
            self._leave_out(parts, loss, norm, lr)
            for parameter in params:
                parameter.grad = None  # An optimizer passes over what has no gradient.
            return
        self._in_a_row = 0
        # Lightning's own clipping refuses fused optimizers, and would measure the norm once more.
        by_value = gradient_clip_algorithm == "value"
        if gradient_clip_val and not by_value:
            scale *= min(1.0, gradient_clip_val / (norm + 1e-6))
        if scale != 1.0 and finite:
            torch._foreach_mul_(grads, scale)  # pyright: ignore[reportPrivateImportUsage]
        if gradient_clip_val and by_value:
            torch.nn.utils.clip_grad_value_(params, gradient_clip_val)
        self.last_loss = torch.tensor(loss)
        if self.logs_this_step:  # before the step's checkpoint, which Lightning's own log would come after
            row = {"train/loss": loss, "train/grad_norm": norm, "lr": lr} | parts.watched
            for logger in self.trainer.loggers:
                logger.log_metrics(row | {"epoch": self.trainer.current_epoch}, self.trainer.global_step)

    def _leave_out(self, parts: StepSums, loss: float, norm: float, lr: float) -> None:
        """Finds what is wrong with a step, in all processes at once, and counts it, or raises `NonFiniteError`."""
        weights = dict(self.named_parameters(remove_duplicate=False))
        bad = not_finite_in({n: p.grad for n, p in weights.items() if p.grad is not None})
        culprit = first_bad_module(self, lambda: self.compute_again(parts.suspect), not_finite_in(weights))
        error = not_finite(
            loss=loss,
            grad_norm=norm,
            step=self.trainer.global_step,
            lr=lr,
            names=parts.suspects,
            process=self.global_rank,
            bad_here=parts.bad,
            culprit=culprit,
            gradient=next((name for name in weights if name in bad), None),
            record=Path(self.trainer.default_root_dir) / RECORD,
            precision=str(self.trainer.precision),
        )
        self._in_a_row += 1
        if self.optim.nonfinite == "stop" or self._in_a_row > MOST_IN_A_ROW:
            raise error
        self.skipped += 1
        if parts.bad or self.trainer.is_global_zero:  # whose samples are bad says so too
            warnings.warn(printable(f"step left out ({self.skipped} so far): {error}"), stacklevel=2)

    def compute_again(self, batch: Any) -> None:
        """The way forward of a training step, in its number format, to see where numbers stop being finite."""
        with self.trainer.precision_plugin.forward_context():
            self.loss(batch)

    # ---------------------------------------------------------------------------------------------- validation

    @property
    def split_names(self) -> tuple[str, ...]:
        """The names of the validation (or test) splits, as they stand in the log."""
        data, testing = getattr(self.trainer, "datamodule", None), self.trainer.testing
        named = getattr(data, "test_splits" if testing else "val_splits", None)
        if named is not None:
            return tuple(named)
        count = self.trainer.num_test_batches if testing else self.trainer.num_val_batches
        return ("val",) if len(count) == 1 else tuple(f"val{i}" for i in range(len(count)))

    def add(self, split: str, name: str, loss: SumAndCount) -> None:
        """Adds a batch's sum and count to a mean that is logged as SPLIT/NAME when the validation ends."""
        self._means.add(split, name, loss)

    def on_validation_epoch_end(self) -> None:
        """Logs the means of everything that was added; a loss called "loss" also as a perplexity."""
        means = self._means.take(self.trainer.world_size)
        self.validation_means = {n: float(mean) for n, mean in means.items() if not self.trainer.sanity_checking}
        self.log_dict(means, rank_zero_only=True)

    on_test_epoch_end = on_validation_epoch_end

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As `validation_step`."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    # ---------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the run needs to go on bit for bit, and leaves frozen weights out."""
        self._hashes = self._hashes or frozen_hashes(self)
        strip_frozen(self, checkpoint, self._hashes)
        normalize_counters(self.trainer, checkpoint)
        checkpoint |= {"optim": asdict(self.optim), "seed": self._seed, "validation_means": self.validation_means}
        checkpoint["seen"] = {"samples": self.samples_seen, "tokens": self.tokens_seen, "skipped": self.skipped}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over what `on_save_checkpoint` has added.

        Raises:
            CheckpointError: If the run had another model or another optimizer, or left nothing of it behind.
        """
        # Lightning would do so later, and round a checkpoint in float64 to float32 on the way.
        self.trainer.precision_plugin.convert_module(self)
        self._hashes = self._hashes or frozen_hashes(self)
        restore_frozen(self, checkpoint, self._hashes)
        if self.trainer.state.fn == "fit":
            refuse_another_optimizer(checkpoint, asdict(self.optim))
        self._seed, self.validation_means = checkpoint.get("seed"), checkpoint.get("validation_means", {})
        seen = checkpoint.get("seen", {})
        self.samples_seen, self.tokens_seen = seen.get("samples", 0), seen.get("tokens", 0)
        self.skipped = seen.get("skipped", 0)

    # -------------------------------------------------------------------------------------------------- the end

    def conclude(
        self,
        run: Run,
        metrics: Mapping[str, Any],
        table: str,
        *,
        shown: Sequence[str] = (),
        files: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Writes metrics.json, with how the run went, and curves.png; says what was found and where it is.

        Args:
            run: The run.
            metrics: What was measured.
            table: The same as lines of text.
            shown: Lines below it: examples.
            files: What else lies in the folder: "texts" -> "texts.txt".
        """
        write_json(run.folder / "metrics.json", {**metrics, "training": self.training_facts(run)})
        plot_curves(run.folder)
        took = f"trained {counted(self.trainer.global_step, 'step')} in {seconds_to_text(run.seconds)}"
        paths = {"metrics": "metrics.json", **files, "model": "model"}
        where = [f"{what:<10}{run.folder / name}" for what, name in paths.items()]
        say("\n".join([took, "", table, *run.unread(), "", *shown, *([""] if shown else []), *where]))

    def training_facts(self, run: Run) -> dict[str, Any]:
        """How the run went, for metrics.json."""
        return {
            "seconds": round(run.seconds, 1),
            "steps": self.trainer.global_step,
            self.unit: self.samples_seen,
            "tokens": self.tokens_seen,
            "skipped_steps": self.skipped,
            "device": device_name(run.device),
            "precision": str(self.trainer.precision),
            "parameters": trainable_parameters(self),
        }
