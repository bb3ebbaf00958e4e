"""Two processes train the model that one trains: gloo on a CPU, one pair of processes for all comparisons."""

import csv
import dataclasses
import json
import math
import os
import signal
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from mmtransformer import QFormer, TextDecoder, VisionEncoderDecoder, ViT
from mmtransformer.batch import SumAndCount
from mmtransformer.cli import main
from mmtransformer.data.loading.module import Splits
from mmtransformer.training.callbacks.samples import SamplePrinter
from mmtransformer.training.callbacks.saving import LastCheckpoint
from mmtransformer.training.engine.checkpoints import read
from mmtransformer.training.engine.guard import NonFiniteError
from mmtransformer.training.engine.log import MetricsLog
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.recompute_and_compile import checkpoint_activations
from mmtransformer.training.engine.sharded import Sharded, number_format, shard
from mmtransformer.training.tasks.captioning import Captioning
from support import tiny
from support.processes import pair

RECIPES = Path(__file__).parents[3] / "recipes"


def model(*, freeze_vision: bool = False) -> VisionEncoderDecoder:
    """Without dropout, which every process draws for itself."""
    torch.manual_seed(3)
    vision = ViT(32, 8, 24, 1, 3, class_token=False, pool="mean")
    decoder = TextDecoder(tiny.VOCAB, 24, 1, 2, max_len=60, context_dim=24)
    return VisionEncoderDecoder(vision, decoder, freeze_vision=freeze_vision)


def fit(
    folder: Path,
    *,
    batch_size: int,
    steps: int = 16,
    world: int = 1,
    resume: bool = False,
    strategy: Any = None,
    freeze_vision: bool = False,
    look: pl.Callback | None = None,
    recompute: bool = False,
    **arguments: Any,
) -> Captioning:
    """Trains on 19 pictures an epoch: the last batch is uneven, and one process gets none of it."""
    warnings.simplefilter("ignore")
    optim = OptimConfig(lr=0.003, warmup_steps=3, ema_decay=0.9)
    captioner = model(freeze_vision=freeze_vision).double()
    data = tiny.scenes(batch_size, train_size=19, splits=Splits(val=["val"]))
    precision, plugins, looks = "64-true", [], 0
    if isinstance(strategy, Sharded):  # A process may look at more batches of a validation than the others.
        (precision, plugins), looks = number_format("64-true"), 2
    module = Captioning(captioner, optim=optim, image_ablation_batches=looks)
    if recompute:
        checkpoint_activations(module)
    last = folder / "checkpoints" / "last.ckpt"
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy or ("ddp" if world > 1 else "auto"),
        precision=precision,  # type: ignore[arg-type]
        plugins=plugins,
        gradient_clip_val=1.0,
        logger=MetricsLog(folder),
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        max_steps=steps,
        callbacks=[LastCheckpoint(every_n_train_steps=5), *([look] if look else [])],
        **arguments,
    )
    trainer.fit(module, datamodule=data, ckpt_path=last if resume else None)
    return module


def weights(module: Captioning) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.captioner.named_parameters()}


class BadGradient(pl.Callback):
    """One process's loss becomes NaN at a step."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3 and trainer.global_rank == 1:
            batch.pixels[0] = torch.nan


class Extra(pl.Callback):
    """Only one process has something to add to a validation."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            pl_module.add("val", "extra", SumAndCount(torch.tensor(6.0), torch.tensor(4)))


class Stop(pl.Callback):
    """The scheduler sends one process a signal."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step - 1 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def begin(folder: Path, **arguments: Any) -> None:
    """As `fit`, but stopped after seven of its steps."""
    with pytest.raises(SystemExit):
        fit(folder, look=Stop(7), **arguments)
    assert read(folder / "checkpoints/last.ckpt")["global_step"] == 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """All that two processes compute, in files; and what one began for them."""
    begin(folder / "one then two", batch_size=8)

    def job(rank: int) -> None:
        found = {
            "ddp": weights(fit(folder / "ddp", batch_size=4, world=2)),
            "accumulation": weights(
                fit(folder / "accumulated", batch_size=2, world=2, accumulate_grad_batches=2, look=Extra())
            ),
            "one then two": weights(fit(folder / "one then two", batch_size=4, world=2, resume=True)),
            "frozen": weights(fit(folder / "frozen", batch_size=4, world=2, freeze_vision=True)),
        }
        begin(folder / "two then one", batch_size=4, world=2)
        try:
            fit(folder / "bad", batch_size=4, world=2, look=BadGradient())
        except NonFiniteError as error:
            (folder / f"bad-{rank}.txt").write_text(str(error))
        try:  # as if the second process could not see the folder
            fit(folder / "one then two", batch_size=4, world=2, resume=rank == 0)
        except ValueError as error:
            (folder / f"lost-{rank}.txt").write_text(str(error))
        torch.save(found, folder / f"weights-{rank}.pt")

    assert pair(job) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Tensor]:
    return weights(fit(folder / "one", batch_size=8))


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_two_processes_train_the_model_of_one(two: Path, one: dict[str, Tensor]) -> None:
    ranks = [torch.load(two / f"weights-{rank}.pt") for rank in range(2)]
    for name in ("ddp", "accumulation", "one then two"):
        assert apart(ranks[0][name], ranks[1][name]) == 0.0
        assert apart(ranks[0][name], one) < 1e-12
    start = {name: p.detach().double() for name, p in model().named_parameters()}
    assert apart(start, one) > 1e-3


def test_two_processes_train_beside_what_is_frozen(two: Path) -> None:
    found = torch.load(two / "weights-0.pt")["frozen"]
    alone = weights(fit(two / "frozen, alone", batch_size=8, freeze_vision=True))
    assert apart(found, alone) < 1e-12
    start = {name: p.detach().double() for name, p in model().named_parameters()}
    assert all(torch.equal(found[name], start[name]) for name in start if name.startswith("vision."))


def test_what_was_seen_is_that_of_all_processes(two: Path, one: dict[str, Tensor]) -> None:
    seen = [read(two / name / "checkpoints/last.ckpt")["seen"] for name in ("one", "ddp", "one then two")]
    assert seen[0] == seen[1] == seen[2]
    assert seen[0]["samples"] == 5 * 19 + 8  # 16 steps; an epoch has three
    assert seen[0]["tokens"] > 5 * seen[0]["samples"]


def test_what_one_process_alone_has_to_add_is_logged(two: Path) -> None:
    rows = list(csv.DictReader((two / "accumulated/metrics.csv").read_text().splitlines()))
    assert {row["val/extra"] for row in rows} == {"", "1.5"}


def test_a_process_that_does_not_see_the_folder_is_named(two: Path) -> None:
    for rank in range(2):
        text = (two / f"lost-{rank}.txt").read_text()
        assert text.startswith(f"process 1 (on {socket.gethostname()}) would go on from step 0, process 0 (on")
        assert f"from step 16: the run's folder, {two / 'one then two'}, must" in text
        assert "must be on a disk that all nodes share" in text


def test_accumulation_trains_the_same_model(folder: Path, one: dict[str, Tensor]) -> None:
    assert apart(weights(fit(folder / "4 + 4", batch_size=4, accumulate_grad_batches=2)), one) < 1e-12


def test_one_process_goes_on_with_what_two_began(two: Path, one: dict[str, Tensor]) -> None:
    assert apart(weights(fit(two / "two then one", batch_size=8, resume=True)), one) < 1e-12


def test_two_processes_log_the_loss_of_one(two: Path, one: dict[str, Tensor]) -> None:
    def rows(name: str) -> list[list[float]]:
        text = (two / name / "metrics.csv").read_text().splitlines()[1:]
        return [[float(cell) for cell in line.split(",") if cell] for line in text]

    assert len(rows("one")) > 16
    for a, b in zip(rows("ddp"), rows("one"), strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def test_a_bad_number_of_one_process_stops_both(two: Path) -> None:
    said_of_a_bad_number(two, "bad", "vision.pos_embed")


def said_of_a_bad_number(folder: Path, name: str, gradient: str) -> None:
    """Of two processes the second's samples were bad, and it names them and the module."""
    texts = [(folder / f"{name}-{rank}.txt").read_text() for rank in range(2)]
    assert all("step 3: the loss is nan" in text for text in texts)
    rows = map(json.loads, (folder / name / "not_finite.jsonl").read_text().splitlines())
    found = {row["process"]: row for row in rows}
    assert [found[rank]["bad_here"] for rank in range(2)] == [False, True]
    assert f"samples: {', '.join(found[1]['samples'])}. " in texts[1]
    assert "samples: those of another process, whose message names them" in texts[0]
    assert "first bad module: captioner.vision.patch_embed" in texts[1]
    assert "first bad module" not in texts[0]
    # Gradients are the sum of all processes'; shared out, the first process may hold none of what is bad.
    assert all(f"first bad gradient: captioner.{gradient}; " in text for text in texts), texts


def test_a_signal_to_one_process_saves_and_stops_both(folder: Path) -> None:
    codes = pair(lambda rank: fit(folder / "term", batch_size=4, world=2, look=Stop(5, rank=1)))
    assert codes == [143, 143]
    assert read(folder / "term/checkpoints/last.ckpt")["global_step"] == 5


def test_weights_may_be_shared_out_with_frozen_towers_among_them(folder: Path) -> None:
    """FSDP2 trains what one process trains, and each goes on with the other's."""
    settings: dict[str, Any] = {"freeze_vision": True, "batch_size": 8}
    alone = weights(fit(folder / "alone", **settings))
    begin(folder / "alone then shared", **settings)

    def job(rank: int) -> None:
        # Of the five pictures of a validation one process gets three, in two batches, the other two, in one.
        settings: dict[str, Any] = {"freeze_vision": True, "batch_size": 2, "accumulate_grad_batches": 2}

        def shared(name: str, call: Callable[..., Any] = fit, **more: Any) -> Any:
            return call(folder / name, **settings, world=2, strategy=Sharded(), **more)

        module = shared("shared", look=SamplePrinter(every_seconds=0.0), recompute=True)
        assert type(module) is Captioning
        assert not any(isinstance(p, DTensor) for p in module.parameters())
        module.captioner.save_pretrained(folder / f"model-{rank}")
        again = shared("alone then shared", resume=True)
        shared("shared then alone", begin)
        torch.save([weights(module), weights(again)], folder / f"shared-{rank}.pt")
        try:
            shared("bad, shared", look=BadGradient())
        except NonFiniteError as error:
            (folder / f"bad, shared-{rank}.txt").write_text(str(error))
        first = next(iter(module.trainer.datamodule.val_dataloader()[0]))  # type: ignore[attr-defined]
        assert first.pixels is not None
        logits = module.captioner.logits(dataclasses.replace(first, pixels=first.pixels.double()))
        assert logits.isfinite().all()
        (found,) = module.trainer.validate(module, datamodule=module.trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
        assert math.isfinite(found["val/loss"])  # once more shared out, and whole again
        assert not any(isinstance(p, DTensor) for p in module.parameters())
        assert apart(weights(module), torch.load(folder / f"shared-{rank}.pt")[0]) == 0

    assert pair(job) == [0, 0]
    for rank in range(2):
        for found in torch.load(folder / f"shared-{rank}.pt"):
            assert apart(found, alone) < 1e-12
    assert apart(weights(fit(folder / "shared then alone", resume=True, **settings)), alone) < 1e-12
    shared, whole = (read(folder / name / "checkpoints/last.ckpt") for name in ("shared", "alone"))
    assert shared["state_dict"].keys() == whole["state_dict"].keys()
    assert not any(".vision." in name for name in shared["state_dict"])
    assert shared["frozen"] == whole["frozen"]
    said_of_a_bad_number(folder, "bad, shared", "decoder.tok_embed.weight")


def test_mmt_shares_weights_out(folder: Path) -> None:
    """As one asks for it, in float64; and one process goes on."""
    small = {"vision.dim": 48, "vision.depth": 1, "decoder.dim": 48, "decoder.depth": 1, "decoder.context_dim": 48}
    words = ["fit", f"--config={RECIPES / 'caption_scenes.yaml'}", f"--config={RECIPES / 'tiny.yaml'}"]
    words += [f"--model.captioner.{key}={value}" for key, value in small.items()]
    words += [f"--data.source.{key}" for key in ("train_size=12", "val_size=5", "compositional_size=1")]
    optim = {"kind": "adamw", "ema_decay": 0.9, "warmup_steps": 2, "lr_schedule": "inverse_sqrt"}
    words += [f"--model.optim.{key}={value}" for key, value in optim.items()]
    words += ["--trainer.precision=64-true", "--trainer.gradient_clip_val=0.5"]
    words += ["--model.captioner.freeze_vision=true"]  # whose hash is that of float64

    def mmt(name: str, *more: str) -> int:
        warnings.simplefilter("ignore")
        Captioning.finish = lambda self, run: None  # type: ignore[method-assign]
        return main([*words, f"--trainer.default_root_dir={folder / name}", *more])

    def job(rank: int) -> None:
        sharded = ["--trainer.strategy=fsdp", "--trainer.devices=2", "--data.batch_size=2"]
        assert mmt("mmt, shared", "--trainer.max_steps=2", *sharded) == 0
        half = "--trainer.precision=16-mixed"
        assert mmt("mmt, half", *sharded, half) == 2

    assert tiny.in_child(lambda: mmt("mmt")) == 0
    assert pair(job) == [0, 0]
    assert tiny.in_child(lambda: mmt("mmt, shared", "--resume")) == 0
    one, two = (read(folder / name / "checkpoints/last.ckpt") for name in ("mmt", "mmt, shared"))
    assert one["global_step"] == two["global_step"] == 3
    assert apart(one["state_dict"], two["state_dict"]) < 1e-12


class Reads(pl.LightningModule):
    """A Q-Former, whose blocks are never called as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.qformer = QFormer(3, 8, 3, 2, 8, dropout=0.0)

    def training_step(self, visual: Tensor) -> Tensor:
        return self.qformer(visual).square().sum()


def test_a_q_formers_weights_may_be_shared_out() -> None:
    def job() -> None:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        task = Reads()
        shard(task, init_device_mesh("cpu", (1,)))
        task.training_step(torch.randn(2, 5, 8)).backward()
        assert all(isinstance(weight.grad, DTensor) for weight in task.parameters())

    assert tiny.in_child(job) == 0


def test_a_single_number_cannot_be_shared_out() -> None:
    task = Reads()
    task.qformer.log_temperature = torch.nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match=r"cannot share out qformer\.log_temperature, .* --trainer\.strategy ddp"):
        shard(task, None)  # type: ignore[arg-type]
