"""What learns trains and what is frozen evaluates, whoever looks; and what no loss reaches is said."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from mmtransformer import EncoderDecoder
from mmtransformer.training.callbacks.samples import Samples
from mmtransformer.training.callbacks.saving import Saving
from mmtransformer.training.engine.optim import Optim
from mmtransformer.training.engine.parameters import in_words, not_reached, set_modes
from mmtransformer.training.tasks.captioning import Captioning
from support import tiny


class Modes(pl.Callback):
    """The modules that are in training mode, batch by batch."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.seen.append({name for name, part in module.named_modules() if part.training})


def fit(
    folder: Path, steps: int, *looks: pl.Callback, resume: bool = False
) -> tuple[list[Tensor], list[set[str]]]:
    """A run with a decoder as it is loaded, in evaluation mode, and a frozen tower that somebody put into training."""
    warnings.simplefilter("ignore")
    captioner, modes = tiny.captioner(freeze_vision=True), Modes()
    captioner.vision.blocks[0].train()
    captioner.decoder.eval()
    module = Captioning(captioner, optim=Optim(lr=0.01, ema=0.5, lr_schedule="inverse_sqrt"))
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_model_summary=False, enable_progress_bar=False, max_steps=steps,
        num_sanity_val_steps=0, default_root_dir=folder, callbacks=[modes, Saving(every_steps=1), *looks],
    )  # fmt: skip
    last = folder / "checkpoints/last.ckpt"
    trainer.fit(module, datamodule=tiny.scenes(), ckpt_path=last if resume else None)
    return [p.detach().clone() for p in module.parameters()], modes.seen


def test_modes_are_those_of_what_learns_whoever_looks(tmp_path: Path) -> None:
    """Bit for bit the same with samples and without, and resumed; dropout is on from the first step to the last."""
    runs = [
        fit(tmp_path / "plain", 5),
        fit(tmp_path / "samples", 5, Samples(every_seconds=0.0)),
        (fit(tmp_path / "resumed", 2, Samples(every_seconds=0.0)), fit(tmp_path / "resumed", 5, resume=True))[
            1
        ],
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
        assert [part.training for part in module.modules()] == [
            True,
            False,
            False,
            False,
            True,
            True,
            True,
            True,
        ]


# ------------------------------------------------------------------------------------- what no loss reaches


class Lazy(EncoderDecoder):
    """A captioner with a part that its loss passes by."""

    def __init__(self, model: EncoderDecoder) -> None:
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
    with pytest.warns(
        UserWarning, match=r"2 parameters .* does not reach them: captioner\.idle \(2\); freeze"
    ) as said:
        trainer.fit(module, datamodule=tiny.scenes())
    assert len([w for w in said if "does not reach" in str(w.message)]) == 1
