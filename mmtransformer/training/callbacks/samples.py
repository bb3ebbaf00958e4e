"""A sample now and then, so that one sees a run learn."""

import time
from typing import Any

import lightning.pytorch as pl
import torch

from mmtransformer.captioners.base import Captioner
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.loading.sampler import SampleIndex
from mmtransformer.generation.captions import write_captions
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.layers.modes import evaluation_mode
from mmtransformer.training.engine.sharded import Sharded
from mmtransformer.training.engine.task import Task
from mmtransformer.training.evaluation.evaluation import split_languages


class SamplePrinter(pl.Callback):
    """Prints what the model can do by now (`Task.sample`), every so many seconds.

    Nothing random is drawn, so a run with samples and one without are the same.

    Args:
        every_seconds: Seconds between samples.
    """

    def __init__(self, every_seconds: float = 40.0) -> None:
        self.every_seconds = every_seconds
        self._last, self._turn = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows a sample, if it is time."""
        if not isinstance(trainer.strategy, Sharded):
            self._show(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where weights are shared out, they are whole only here."""
        if isinstance(trainer.strategy, Sharded) and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show(trainer, pl_module)

    def _show(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if time.monotonic() - self._last >= self.every_seconds and trainer.is_global_zero:
            self.show(trainer, module)
            self._last = time.monotonic()

    def show(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Prints a task's sample."""
        if not isinstance(module, Task):
            return
        # Compiled blocks would be compiled anew for caches of every length.
        eager = torch.compiler.set_stance("force_eager")
        with evaluation_mode(module), eager, torch.no_grad(), trainer.precision_plugin.forward_context():
            lines = module.sample(self._turn)
        self._turn += 1
        show = trainer.progress_bar_callback.print if trainer.progress_bar_callback else print
        for line in lines:
            show(f"  {line}")


def sample_captions(
    captioner: Captioner, data: CaptionData, device: torch.device, *, turn: int, max_new_tokens: int = 40
) -> list[str]:
    """What a captioner says of one held-out picture, in each language, with what a person said.

    Args:
        captioner: The model, in evaluation mode.
        data: The data; the picture is one of its first validation split.
        device: Where to compute.
        turn: Which picture.
        max_new_tokens: Most tokens of a caption.
    """
    if not data.val_splits or not len(dataset := data.dataset(data.val_splits[0])):
        return []
    sample = dataset[SampleIndex(0, turn % len(dataset))]
    with torch.autocast(device.type, enabled=False):  # on a CPU it cannot stack a cache's float16
        batch = data.collate(data.val_splits[0])([sample]).to(device)
    languages = split_languages(data.tokenizer, data.rows(data.val_splits[0]).languages)
    greedy = GenerationConfig(num_beams=1, max_new_tokens=max_new_tokens, add_image_tokens=data.add_image_tokens)
    (rows,) = write_captions(
        captioner, data.tokenizer, batch, languages, generation=greedy, prompt_builder=data.prompt_builder
    )
    lines = [sample.name]
    for language, (said,) in zip(languages, rows, strict=True):
        of_language = (text for text, code, _ in sample.references if code == language or language is None)
        tag = f"{language}: " if language else ""
        lines += [f"  {tag}{said.text}", f"    (a person: {next(of_language, '')})"]
    return lines
