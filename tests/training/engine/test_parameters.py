"""What learns trains and what is frozen evaluates, whoever looks; and what no loss reaches is said."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from mmtransformer import Blip2, CoCa, Flamingo, PositionConfig, QFormer, TextDecoder, VisionEncoderDecoder, ViT
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.base import Captioner
from mmtransformer.training.callbacks.samples import SamplePrinter
from mmtransformer.training.callbacks.saving import LastCheckpoint
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.parameters import in_words, not_reached, set_modes
from mmtransformer.training.tasks.captioning import Captioning
from support import tiny
from support.processes import pair


class Modes(pl.Callback):
    """The modules that are in training mode, batch by batch."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.seen.append({name for name, part in module.named_modules() if part.training})


def fit(folder: Path, steps: int, *looks: pl.Callback, resume: bool = False) -> tuple[list[Tensor], list[set[str]]]:
    """A run with a decoder as it is loaded, in evaluation mode, and a frozen tower that somebody put into training."""
    warnings.simplefilter("ignore")
    captioner, modes = tiny.captioner(freeze_vision=True), Modes()
    captioner.vision.blocks[0].train()
    captioner.decoder.eval()
    module = Captioning(captioner, optim=OptimConfig(lr=0.01, ema_decay=0.5, lr_schedule="inverse_sqrt"))
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_model_summary=False, enable_progress_bar=False, max_steps=steps,
        num_sanity_val_steps=0, default_root_dir=folder,
        callbacks=[modes, LastCheckpoint(every_n_train_steps=1), *looks],
    )  # fmt: skip
    last = folder / "checkpoints/last.ckpt"
    trainer.fit(module, datamodule=tiny.scenes(), ckpt_path=last if resume else None)
    return [p.detach().clone() for p in module.parameters()], modes.seen


def test_modes_are_those_of_what_learns_whoever_looks(tmp_path: Path) -> None:
    """Bit for bit the same with samples and without, and resumed; dropout is on from the first step to the last."""
    runs = [
        fit(tmp_path / "plain", 5),
        fit(tmp_path / "samples", 5, SamplePrinter(every_seconds=0.0)),
        (fit(tmp_path / "resumed", 2, SamplePrinter(every_seconds=0.0)), fit(tmp_path / "resumed", 5, resume=True))[1],
    ]
    for weights, seen in runs:
        assert all(torch.equal(a, b) for a, b in zip(weights, runs[0][0], strict=True))
        assert all(names == runs[0][1][0] for names in seen)
    learning = runs[0][1][0]
    assert {"", "captioner", "captioner.decoder", "captioner.decoder.blocks.0.attn"} <= learning
    assert not [name for name in learning if name.startswith("captioner.vision")]


def test_modes_follow_from_the_parameters() -> None:
    frozen = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).requires_grad_(False)
    module = nn.ModuleList([frozen, nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Dropout()])
    for mode in (True, False):
        module.train(mode)
        set_modes(module)
        assert [part.training for part in module.modules()] == [True, False, False, False, True, True, True, True]


# ------------------------------------------------------------------------------------- what no loss reaches


class Lazy(VisionEncoderDecoder):
    """A captioner with a part that its loss passes by."""

    def __init__(self, model: VisionEncoderDecoder) -> None:
        super().__init__(model.vision, model.decoder)
        self.idle = nn.Linear(3, 5)


def test_what_no_loss_reaches_is_found() -> None:
    used, idle = nn.Linear(3, 2), nn.Linear(2, 2)
    module = nn.ModuleDict({"used": used, "idle": idle, "frozen": nn.Linear(2, 2).requires_grad_(False)})
    assert not_reached(module, used(torch.randn(4, 3)).sum() * 0) == ["idle.weight", "idle.bias"]
    assert not_reached(module, torch.zeros(())) == ["used.weight", "used.bias", "idle.weight", "idle.bias"]
    names = [f"{part}.{name}" for part in "abcdef" for name in ("weight", "bias")]
    assert in_words([*names, "scale"]) == "a (2), b (2), c (2), d (2), and 3 more modules"
    assert in_words(["scale"]) == "the task itself (1)"


def test_it_is_said_at_the_start(tmp_path: Path) -> None:
    warnings.filterwarnings("ignore", message=".*LeafSpec.*|.*does not have many workers.*")
    module = Captioning(Lazy(tiny.captioner()), image_ablation_batches=0)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_model_summary=False, enable_progress_bar=False, max_steps=2,
        limit_val_batches=0, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"2 parameters .* does not reach them: captioner\.idle \(2\); freeze") as said:
        trainer.fit(module, datamodule=tiny.scenes())
    assert len([w for w in said if "does not reach" in str(w.message)]) == 1


# ------------------------------------------------------------------------------------------- in two processes


def lm(**options: Any) -> TextDecoder:
    return TextDecoder(tiny.VOCAB, 24, 1, 2, max_len=60, **options)


def vit(**options: Any) -> ViT:
    return ViT(32, 8, 24, 1, 3, **options)


def coca() -> CoCa:
    return CoCa(
        vit(),
        lm(),
        lm(context_dim=24, positions=PositionConfig("rotary")),
        num_queries=5,
        num_heads=2,
        contrastive_weight=0.0,
    )


def instructed() -> Blip2:
    qformer = QFormer(3, 24, 1, 2, 24, vocab_size=tiny.VOCAB, max_len=60, dropout=0.0)
    return Blip2(vit(), qformer, lm(), instruct=True, freeze_vision=False, freeze_decoder=False)


UNEVEN: dict[str, Callable[[], Captioner]] = {
    "a contrast that counts for nothing": coca,
    "a pool that a captioner passes by": lambda: VisionEncoderDecoder(vit(pool="attention"), lm(context_dim=24)),
    "the last text MLP of a Q-Former": instructed,
    "a gated block that sees no image": lambda: Flamingo(vit(), lm(), visible_images="none", freeze_decoder=False),
}


def test_every_captioner_learns_by_plain_ddp_and_what_cannot_is_named(tmp_path: Path) -> None:
    """All in one pair of processes. A part that no loss reaches would let them wait, and torch name numbers."""

    def fit(model: Captioner) -> tuple[list[Tensor], list[Tensor]]:
        begin = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        tokens = torch.randint(3, tiny.VOCAB, (2, 7))
        mask = torch.ones_like(tokens, dtype=torch.bool)
        given = CaptionBatch(tokens, mask, mask, torch.randn(2, 1, 3, 32, 32), names=("a", "b"))
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_model_summary=False, max_steps=2,
            enable_progress_bar=False, enable_checkpointing=False, default_root_dir=tmp_path,
            use_distributed_sampler=False,
        )  # fmt: skip
        module = Captioning(model, optim=OptimConfig(lr=0.01, warmup_steps=0))
        trainer.fit(module, torch.utils.data.DataLoader([given] * 2, batch_size=None))  # type: ignore[arg-type]
        return begin, [p.detach() for p in model.parameters() if p.requires_grad]

    def job(rank: int) -> None:
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        found = {}
        for name, build in UNEVEN.items():
            begin, end = fit(build())
            found[name] = [torch.equal(a, b) for a, b in zip(begin, end, strict=True)]
        try:
            fit(Lazy(tiny.captioner()))
        except ValueError as error:
            found["lazy"] = str(error)
        (tmp_path / f"{rank}.json").write_text(json.dumps(found))

    assert pair(job) == [0, 0]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        text = found.pop("lazy")
        assert "captioner.idle (2), and processes would wait for their gradients; freeze that part" in text
        assert found.keys() == UNEVEN.keys()
        assert not [name for name, still in found.items() if any(still) or not still]
