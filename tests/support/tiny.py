"""A run of a small model that takes a fifth of a second, in forked processes that may be killed: for several tests."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from mmtransformer import (
    CLIP,
    ImageTransform,
    NativeSize,
    TextDecoder,
    TextTower,
    VisionEncoderDecoder,
    ViT,
    ViTBlockConfig,
)
from mmtransformer.batch import CaptionBatch
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.loading.module import LoaderConfig
from mmtransformer.data.mixture import Mixture
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.images import Augment
from mmtransformer.training.callbacks.saving import LastCheckpoint
from mmtransformer.training.engine.log import MetricsLog
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.task import Task
from mmtransformer.training.tasks.captioning import Captioning
from mmtransformer.training.tasks.contrastive_learning import ContrastiveLearning
from support.sources import FakePairs, FakeSource

VOCAB = 300


def captioner(
    vocab: int = VOCAB, dim: int = 24, depth: int = 1, *, freeze_vision: bool = False, seed: int = 3
) -> VisionEncoderDecoder:
    """A captioner with dropout."""
    torch.manual_seed(seed)
    vision = ViT(32, 8, 24, 1, 3, class_token=False, pool="mean", block=ViTBlockConfig(dropout=0.1))
    decoder = TextDecoder(vocab, dim, depth, 2, max_len=60, context_dim=24, dropout=0.1)
    return VisionEncoderDecoder(vision, decoder, freeze_vision=freeze_vision)


def scenes(batch_size: int = 4, train_size: int = 11, *, mixture: bool = False, **arguments: Any) -> CaptionData:
    """Eleven pictures, augmented; or as many from two sources, two of the one for one of the other."""
    source = Scenes(image_size=32, train_size=train_size, val_size=5, compositional_size=3)
    if mixture:
        other = Scenes(image_size=32, train_size=5, val_size=2, compositional_size=1, seed=7)
        source = Mixture({"a": source, "b": other}, {"a": 2.0, "b": 1.0}, epoch_size=train_size)
    arguments = {"vocab_size": VOCAB, "max_len": 60, "augment": Augment(scale=(0.6, 1.0))} | arguments
    return CaptionData(source, transform=ImageTransform(32), batch_size=batch_size, **arguments)


class ManySizes(FakePairs):
    """Pictures of noise, no two of one shape."""

    def image(self, i: int) -> Image.Image:
        size = (9 + 7 * i % 40, 11 + 5 * i % 31, 3)
        return Image.fromarray(np.random.default_rng([self.seed, i]).integers(0, 256, size, dtype=np.uint8))


def many_sizes(batch_size: int = 4, *, loader: LoaderConfig = LoaderConfig(), **arguments: Any) -> CaptionData:
    """Eleven pictures of native size, augmented, in batches of up to 30 patches."""
    transform = ImageTransform(resize="native", native=NativeSize(8, 9, enlarge=False))
    loader = dataclasses.replace(loader, max_patches_per_batch=30)
    arguments = {"vocab_size": VOCAB, "max_len": 60, "augment": Augment(scale=(0.6, 1.0))} | arguments
    source = FakeSource(train=ManySizes(11), val=ManySizes(5, seed=1))
    return CaptionData(source, transform=transform, batch_size=batch_size, loader=loader, **arguments)


def contrast(optim: OptimConfig) -> ContrastiveLearning:
    """Two towers with dropout, whose negatives count the more the harder they are."""
    torch.manual_seed(3)
    vision = ViT(32, 8, 24, 1, 3, class_token=False, pool="mean", block=ViTBlockConfig(dropout=0.1))
    text = TextTower(VOCAB, 24, 1, 3, max_len=60, dropout=0.1)
    return ContrastiveLearning(CLIP(vision, text, embed_dim=11, hardness=1.0), optim=optim, recall_images=4)


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, of any number format."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Witness(pl.Callback):
    """Writes down every batch, loss and validation; and sends a signal at one of them.

    The signal goes to this process, or with `all` to its workers as well, as a scheduler or a terminal sends it.
    """

    def __init__(self, path: Path, at: int = -1, number: int = 9, where: str = "train", all: bool = False) -> None:
        self.path, self.at, self.number, self.where, self.all = path, at, number, where, all
        self.batches = 0

    def kill(self) -> None:
        if self.all:
            workers = [str(child.pid) for child in multiprocessing.active_children()]
            assert workers
            subprocess.run(["kill", f"-{int(self.number)}", *workers], check=True)  # not by their parent
            time.sleep(0.3)
        os.kill(os.getpid(), self.number)

    def tell(self, *words: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(words) + "\n")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: CaptionBatch, batch_idx: int
    ) -> None:
        assert batch.pixels is not None
        pixels = hashlib.sha256(raw(batch.pixels) + raw(batch.tokens)).hexdigest()[:12]
        step = [trainer.current_epoch, batch_idx, trainer.global_step]
        self.tell(*step, pixels, float(outputs["loss"]).hex(), list(batch.names))
        self.batches += 1
        if self.batches == self.at and self.where == "train":
            self.kill()

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.batches == self.at and self.where == "validation":
            self.kill()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        losses = {k: float(v).hex() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self.tell("validation", trainer.global_step, losses)


def in_child(job: Callable[[], object]) -> int:
    """Runs a job in a forked process, where nothing has to be imported; its exit code, or minus its signal."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            job()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fit(
    folder: Path,
    witness: Witness,
    *,
    resume: bool = False,
    every_steps: int = 1,
    workers: int = 0,
    ema: float = 0.9,
    batch_size: int = 4,
    mixture: bool = False,
    captioner: Callable[[], VisionEncoderDecoder] = captioner,
    task: Callable[[OptimConfig], Task[CaptionData]] | None = None,
    data: Callable[..., CaptionData] = scenes,
    loading: dict[str, Any] | None = None,
    **arguments: Any,
) -> str:
    """Trains in `folder`, or goes on there; a hash of the weights that come of it."""
    warnings.simplefilter("ignore")
    optim = OptimConfig(lr=0.01, warmup_steps=2, ema_decay=ema)
    module = Captioning(captioner(), optim=optim, image_ablation_batches=0) if task is None else task(optim)
    last = folder / "checkpoints" / "last.ckpt"
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=MetricsLog(folder),
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=[witness, LastCheckpoint(every_n_train_steps=every_steps)],
        **({"max_epochs": 3} | arguments),
    )
    mixed = {"mixture": True} if mixture else {}
    pictures = data(batch_size, loader=LoaderConfig(num_workers=workers, **(loading or {})), **mixed)
    trainer.fit(module, datamodule=pictures, ckpt_path=last if resume and last.exists() else None)
    weights = b"".join(raw(p.detach()) for p in module.parameters())
    return hashlib.sha256(weights).hexdigest()


def run(
    folder: Path, log: Path, *, at: int = -1, number: int = 9, where: str = "train", all: bool = False, **arguments: Any
) -> int:
    """`fit` in a forked process; what it saw stands in `log`. Its exit code, or minus its signal."""

    def job() -> None:
        witness = Witness(log, at, number, where, all)
        witness.tell("end", fit(folder, witness, **arguments))

    return in_child(job)


def lines(log: Path) -> list[Any]:
    """What a run has seen."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of a size such as "4m", until the test ends; who may not mount one skips the test."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, check=False).returncode
    except OSError:
        done = 1
    if done:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
