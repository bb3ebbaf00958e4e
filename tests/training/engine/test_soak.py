"""Twenty thousand steps: memory and file handles stay what they are."""

import contextlib
import gc
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from mmtransformer.data.loading.module import LoaderConfig
from mmtransformer.training.callbacks.saving import LastCheckpoint
from mmtransformer.training.engine.log import MetricsLog
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.tasks.captioning import Captioning
from support import tiny

STEPS = 20_000


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def handles() -> tuple[int, int]:
    """Open files; and the shared memory of the batches that two workers have ready, which is open too."""
    names = []
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists the folder
            names.append(str(handle.readlink()))
    shared = sum(name.startswith("/dev/shm/") for name in names)
    return len(names) - shared, shared


class Look(pl.Callback):
    """Memory and handles, twenty times in a run; and a caption at every validation."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.seen: list[tuple[int, int, int, int]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            self.seen.append((trainer.global_step, resident(), *handles()))
            print(*self.seen[-1], flush=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Captioning)
        assert pl_module.sample(0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for the memory")
def test_twenty_thousand_steps_keep_memory_and_handles_flat(tmp_path: Path) -> None:
    """With 200 checkpoints, 100 validations and their captions, the log, the average, and two workers."""
    warnings.simplefilter("ignore")
    look = Look(STEPS // 20)
    trainer = pl.Trainer(
        accelerator="cpu", logger=MetricsLog(tmp_path), enable_model_summary=False, enable_progress_bar=False,
        default_root_dir=tmp_path, max_steps=STEPS, num_sanity_val_steps=0, check_val_every_n_epoch=None,
        val_check_interval=STEPS // 100, limit_val_batches=1,
        callbacks=[look, LastCheckpoint(every_n_train_steps=STEPS // 200)],
    )  # fmt: skip
    module = Captioning(tiny.captioner(), optim=OptimConfig(lr=1e-3, ema_decay=0.9))
    trainer.fit(module, datamodule=tiny.scenes(2, train_size=41, augment=None, loader=LoaderConfig(num_workers=2)))
    assert trainer.global_step == STEPS
    _, memory, files, shared = zip(*look.seen[2:], strict=True)
    assert max(memory) - memory[0] < 24 << 20, look.seen
    assert max(files) == min(files), look.seen
    # Of each of two workers two batches wait and one is in use, with four tensors each.
    assert max(shared) <= 2 * 2 * 4 + 2 * 4, look.seen
