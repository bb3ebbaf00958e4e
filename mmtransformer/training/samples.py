"""A sample caption now and then, so that one sees a run learn."""

import time
from typing import Any

import lightning.pytorch as pl
import torch

from mmtransformer.data.dataset import Collate
from mmtransformer.data.sampler import Pick
from mmtransformer.pipeline import Decoding, write_captions
from mmtransformer.training.captioning import Captioning
from mmtransformer.training.evaluation import split_languages


class Samples(pl.Callback):
    """Prints what the model says of a held-out picture, every so many seconds; another picture each time.

    Nothing random is drawn, so a run with samples and one without are the same.

    Args:
        every_seconds: Seconds between samples.
        max_new_tokens: Most tokens of a sample.
    """

    def __init__(self, every_seconds: float = 40.0, max_new_tokens: int = 40) -> None:
        self.every_seconds, self.max_new_tokens = every_seconds, max_new_tokens
        self._last, self._turn = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows a sample, if it is time."""
        if time.monotonic() - self._last < self.every_seconds or not trainer.is_global_zero:
            return
        self.show(trainer, pl_module)
        self._last = time.monotonic()

    def show(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Captions one picture of the first validation split, in each of its languages."""
        if not isinstance(module, Captioning) or module.data is None or not module.data.val_splits:
            return
        data = module.data
        split = data.val_splits[0]
        dataset = data.dataset(split)
        if not len(dataset):
            return
        sample = dataset[Pick(0, self._turn % len(dataset))]
        self._turn += 1
        batch = Collate(data.tokenizer.pad_id)([sample]).to(module.device)
        languages = split_languages(data.tokenizer, data.rows(split).languages)
        was_training = module.training
        module.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            rows = write_captions(
                module.captioner,
                data.tokenizer,
                batch,
                languages,
                decoding=Decoding(num_beams=1, max_new_tokens=self.max_new_tokens),
            )[0]
        module.train(was_training)
        show = trainer.progress_bar_callback.print if trainer.progress_bar_callback else print
        show(f"  {sample.name}")
        for language, (said,) in zip(languages, rows, strict=True):
            reference = next(
                (text for text, code in sample.references if code == language or language is None), ""
            )
            tag = f"{language}: " if language else ""
            show(f"    {tag}{said.text}\n      (a person: {reference})")
