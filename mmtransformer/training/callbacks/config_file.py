"""A run's config.yaml: what it is trained with, by which it is gone on with."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from mmtransformer.training.engine.checkpoints import written_to


class ConfigFile(Callback):
    """Writes config.yaml: of a new run at once, of one that goes on when its checkpoint is accepted.

    Until then the file is the earlier run's, to which an error that refuses the checkpoint points.

    Args:
        folder: The run's folder.
        text: The configuration.
    """

    def __init__(self, folder: Path, text: str) -> None:
        self.folder, self.text = folder, text
        self._written = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Writes that of a new run."""
        if not trainer.ckpt_path:
            self._write()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Writes that of a run that goes on."""
        self._write()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes it where nothing was left to train."""
        self._write()

    def _write(self) -> None:
        if not self._written:
            with written_to(self.folder):
                (self.folder / "config.yaml").write_text(self.text, encoding="utf-8")
            self._written = True
