import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning

from mmtransformer import ImageCaptioner, ImageTransform, TextDecoder, Tokenizer, VisionEncoderDecoder, ViT
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.base import caption_loss
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.loading.features import FeatureCacheConfig
from mmtransformer.data.loading.module import Splits
from mmtransformer.data.loading.source import Caption
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.generation.captions import write_captions
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.layers.modes import freeze, is_frozen
from mmtransformer.training import Captioning, NonFiniteError, Progress, SamplePrinter, evaluate, finetune, write_report
from mmtransformer.training.callbacks.progress import clock
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.evaluation import evaluation as evaluation_module
from mmtransformer.training.tasks.captioning import _most_trained_first

VOCAB = 300


@pytest.fixture(autouse=True)
def lightning_is_quiet() -> None:
    """Advice on workers, intervals and frozen towers is not a fault."""
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    for message in (".*LeafSpec.*", ".*in eval mode.*"):
        warnings.filterwarnings("ignore", message=message)


def captioner(vocab: int = VOCAB, patch: int = 8) -> VisionEncoderDecoder:
    torch.manual_seed(3)
    vision = ViT(32, patch, 24, 1, 3, class_token=False, pool="mean")
    return VisionEncoderDecoder(vision, TextDecoder(vocab, 24, 1, 2, max_len=60, context_dim=24))


def scenes(batch_size: int = 4, **arguments: object) -> CaptionData:
    source = Scenes(image_size=32, train_size=11, val_size=5, compositional_size=3)
    arguments = {"vocab_size": VOCAB, "max_len": 60, "splits": Splits(val=["val", "compositional"])} | arguments
    return CaptionData(source, transform=ImageTransform(32), batch_size=batch_size, **arguments)  # type: ignore[arg-type]


def trainer(folder: Path, **arguments: object) -> pl.Trainer:
    arguments = {"max_steps": 2, "max_epochs": 1, "enable_progress_bar": False} | arguments
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **arguments,  # type: ignore[arg-type]
    )


def batch(rows: list[int], seed: int = 0) -> CaptionBatch:
    """Random rows of the given numbers of target tokens, behind a prompt of one."""
    torch.manual_seed(seed)
    attention_mask = torch.arange(1 + max(rows)) < 1 + torch.tensor(rows)[:, None]
    loss_mask = attention_mask.clone()
    loss_mask[:, 0] = False
    tokens = torch.randint(3, VOCAB, attention_mask.shape).masked_fill(~attention_mask, 0)
    names = tuple(f"picture-{seed}-{i}" for i in range(len(rows)))
    return CaptionBatch(tokens, attention_mask, loss_mask, pixels=torch.randn(len(rows), 1, 3, 32, 32), names=names)


# -------------------------------------------------------------------------------------------------- the loss


def gradients(tmp_path: Path, batches: list[CaptionBatch], accumulate: int) -> list[torch.Tensor]:
    """What the optimizer gets to see at its first step."""
    module = Captioning(captioner().double(), optim=OptimConfig(warmup_steps=0))
    seen: list[torch.Tensor] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
            seen.extend(p.grad.clone() for p in pl_module.parameters() if p.grad is not None)

    doubles = [CaptionBatch(b.tokens, b.attention_mask, b.loss_mask, b.pixels.double()) for b in batches]  # type: ignore[union-attr]
    run = trainer(tmp_path, accumulate_grad_batches=accumulate, precision="64-true", max_steps=1, callbacks=[Look()])
    run.fit(module, train_dataloaders=torch.utils.data.DataLoader(doubles, batch_size=None))  # type: ignore[arg-type]
    return seen[-len(list(module.parameters())) :]


def test_loss_is_a_mean_over_tokens_however_the_batch_is_cut(tmp_path: Path) -> None:
    whole = batch([2, 9, 5, 3, 7, 1])
    parts = [
        CaptionBatch(whole.tokens[s], whole.attention_mask[s], whole.loss_mask[s], whole.pixels[s])  # type: ignore[index]
        for s in (slice(0, 1), slice(1, 6))
    ]
    one = gradients(tmp_path, [whole], 1)
    two = gradients(tmp_path, parts, 2)
    assert max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True)) < 1e-14
    model = captioner().double()
    loss = caption_loss(
        model, CaptionBatch(whole.tokens, whole.attention_mask, whole.loss_mask, whole.pixels.double()), reduction="sum"
    )  # type: ignore[union-attr]
    (loss.sum / 27).backward()
    assert int(loss.count) == 27
    assert max(float((a - p.grad).abs().max()) for a, p in zip(one, model.parameters(), strict=True)) < 1e-14  # type: ignore[operator]


def test_not_a_number_stops_before_the_weights(tmp_path: Path) -> None:
    bad = batch([4, 6], seed=5)
    bad.pixels[1, 0, 2, 7, 7] = math.nan  # type: ignore[index]
    module = Captioning(captioner(), optim=OptimConfig(lr=0.01, warmup_steps=0))
    loader = torch.utils.data.DataLoader([batch([4, 6]), bad, batch([3, 3])], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(
        NonFiniteError, match=r"step 1: the loss is nan .* samples: picture-5-0, picture-5-1\."
    ) as caught:
        trainer(tmp_path, max_steps=3).fit(module, train_dataloaders=loader)
    assert "captioner." in str(caught.value)
    assert all(p.isfinite().all() for p in module.parameters())


def test_gradient_is_clipped(tmp_path: Path) -> None:
    class Norm(pl.Callback):
        norms: list[float] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.norms.append(float(torch.nn.utils.get_total_norm(grads)))

    loader = torch.utils.data.DataLoader([batch([4, 6])], batch_size=None)  # type: ignore[arg-type]
    run = trainer(tmp_path, max_steps=1, gradient_clip_val=0.03, callbacks=[look := Norm()])
    run.fit(Captioning(captioner()), train_dataloaders=loader)
    assert look.norms == pytest.approx([0.03], rel=1e-4)


# ------------------------------------------------------------------------------------------ other and blank images


@pytest.mark.parametrize("blind", [False, True])
def test_losses_of_other_and_blank_images(tmp_path: Path, blind: bool) -> None:
    model = captioner()
    with torch.no_grad():
        for parameter in model.parameters():  # at initialisation it hardly looks
            parameter.add_(0.2 * torch.randn_like(parameter))
        if blind:
            for name, parameter in model.decoder.named_parameters():
                if "cross_attn.out_proj" in name:
                    parameter.zero_()
    data, run = scenes(), trainer(tmp_path)
    run.validate(Captioning(model), datamodule=data, verbose=False)
    for split in ("val", "compositional"):
        right, other, blank = (
            float(run.callback_metrics[f"{split}/loss_{kind}_image"]) for kind in ("right", "other", "blank")
        )
        assert (right == other == blank) is blind
        if not blind:
            assert min(abs(right - other), abs(right - blank), abs(other - blank)) > 1e-4
        loader = data.loader(split)
        with torch.no_grad():
            sums = [caption_loss(model, b, reduction="sum") for b in loader]
        mean = float(sum(s.sum for s in sums) / sum(s.count for s in sums))
        assert float(run.callback_metrics[f"{split}/loss"]) == pytest.approx(mean, rel=1e-5)


def test_no_validation_loss_is_computed_twice(tmp_path: Path) -> None:
    model, calls = captioner(), []
    model.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    data = scenes()
    for batches in (0, 1):
        trainer(tmp_path).validate(Captioning(model, image_ablation_batches=batches), datamodule=data, verbose=False)
        splits = {split: len(data.loader(split)) for split in data.val_splits}
        assert len(calls) == sum(splits.values()) + 2 * batches * len(splits), (batches, splits)
        calls.clear()


# --------------------------------------------------------------------------------------------- what must fit


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (captioner(vocab=290), scenes(), r"wrong vocabulary: the tokenizer has \d+ tokens, but the model scores 290"),
        (captioner(), scenes(max_len=61), r"data.max_len \(61\) is more than the 60 tokens"),
        (captioner(patch=16), scenes(), None),
    ],
)
def test_model_and_data_must_fit(
    tmp_path: Path, model: VisionEncoderDecoder, data: CaptionData, message: str | None
) -> None:
    if message is None:
        data.transform = ImageTransform(40)
        message = "pictures of 40 x 40 px, which the backbone's patches of 16 px do not divide"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(Captioning(model), datamodule=data)


def test_schedule_needs_an_end(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs an end"):
        trainer(tmp_path, max_steps=-1, max_epochs=-1).fit(Captioning(captioner()), datamodule=scenes())


def test_frozen_vision_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = ViT.forward_features
    monkeypatch.setattr(ViT, "forward_features", lambda self, x: calls.append(len(x)) or forward(self, x))
    model = captioner()
    freeze(model.vision)
    data = scenes(cache_features=FeatureCacheConfig(str(tmp_path / "features")))
    run = trainer(tmp_path, max_steps=-1, max_epochs=2)
    module = Captioning(model, image_ablation_batches=0)
    run.fit(module, datamodule=data)
    assert sum(calls) == 11 + 5 + 3
    assert run.global_step == 6
    assert not model.vision.training


def test_moving_average_is_what_is_kept(tmp_path: Path) -> None:
    optims = [OptimConfig(lr=0.01, warmup_steps=0, ema_decay=decay) for decay in (0.0, 0.999)]
    plain, averaged = (Captioning(captioner(), optim=optim) for optim in optims)
    for module in (plain, averaged):
        trainer(tmp_path).fit(module, datamodule=scenes())
    start = captioner()
    moved = [
        sum(float((a - b).detach().abs().sum()) for a, b in zip(m.parameters(), start.parameters(), strict=True))
        for m in (plain.captioner, averaged.captioner)
    ]
    assert 0 < moved[1] < 0.99 * moved[0]  # the average lags behind


# ------------------------------------------------------------------------------------------------ evaluation


def test_true_captions_get_all_facts_right(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = scenes(), captioner()

    def tell_the_truth(model: Any, tokenizer: Any, batch: CaptionBatch, languages: list[str], **_: object):
        fake = write_captions(
            model, tokenizer, batch, languages, generation=GenerationConfig(num_beams=1, max_new_tokens=2)
        )
        for row, references in zip(fake, batch.references, strict=True):
            for said, language in zip(row, languages, strict=True):
                text = next(text for text, code in references if code == language)
                object.__setattr__(said[0], "text", text)
        return fake

    monkeypatch.setattr(evaluation_module, "write_captions", tell_the_truth)
    result = evaluate(model, data, n_resamples=0)
    facts = result.to_dict()["facts"]
    assert facts == {split: {"en": 1.0, "ko": 1.0} for split in ("val", "compositional")}
    assert [len(result.predictions[split]["ko"]) for split in ("val", "compositional")] == [5, 3]
    assert result.captions["val"]["ko"].numbers["bleu_4"] == pytest.approx(1.0)
    assert "100.0%" in result.table()


def test_run_leaves_everything_in_its_folder(tmp_path: Path) -> None:
    data, model = scenes(), captioner()
    model.decoder.eval()
    flags = [part.training for part in model.modules()]
    result = evaluate(model, data, generation=GenerationConfig(num_beams=2, max_new_tokens=5), limit_batches=1)
    assert [part.training for part in model.modules()] == flags  # A run that is evaluated midway goes on as it was.
    pipeline = ImageCaptioner(model, data.tokenizer, data.transform, generation=GenerationConfig(max_new_tokens=5))
    write_report(tmp_path, pipeline, data, result, extra={"image_ablation": {}}, num_gallery_images=2)
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert metrics["facts"].keys() == {"val", "compositional"}
    assert metrics["facts"]["val"].keys() == {"en", "ko"}
    assert all(0 <= x <= 1 for by in metrics["facts"].values() for x in by.values())
    assert metrics["image_ablation"] == {}
    lines = (tmp_path / "predictions_val.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["language"] for line in lines] == ["en"] * 4 + ["ko"] * 4
    assert (tmp_path / "gallery.png").read_bytes()[1:4] == b"PNG"
    assert "data:image" in (tmp_path / "gallery.html").read_text("utf-8")

    loaded = ImageCaptioner.from_pretrained(tmp_path / "model", device="cpu")
    pairs = data.pairs("val")
    images = [pairs.image(0), pairs.image(1)]
    assert loaded(images, language="ko") == pipeline(images, language="ko")
    assert loaded.generation == GenerationConfig(max_new_tokens=5)
    continued = finetune(str(tmp_path / "model"), freeze_vision=True)
    assert continued.start is not None
    assert continued.start.tokenizer.vocab_size == data.tokenizer.vocab_size
    assert is_frozen(continued.captioner.vision)


# -------------------------------------------------------------------------------------------------- callbacks


def test_progress_and_samples_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = [Progress(log_seconds=0.0), SamplePrinter(every_seconds=0.0)]
    run = trainer(tmp_path, max_steps=3, callbacks=said, enable_progress_bar=True)
    run.fit(Captioning(captioner()), datamodule=scenes())
    out = capsys.readouterr().out
    assert "step 3/3 (100%)  loss " in out
    assert "0:00 left" in out
    assert "scenes-0-val-000000" in out
    assert "ko: " in out
    assert "(a person: " in out
    assert "val: loss " in out
    assert "another" in out


def test_samples_change_nothing(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [SamplePrinter(every_seconds=0.0)]):
        module = Captioning(captioner())
        trainer(tmp_path, callbacks=callbacks).fit(module, datamodule=scenes())
        weights.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_samples_of_cached_features_in_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = captioner()
    freeze(model.vision)
    data = scenes(cache_features=FeatureCacheConfig(str(tmp_path / "features")))
    said = [Progress(log_seconds=0.0), SamplePrinter(every_seconds=0.0)]
    run = trainer(tmp_path, callbacks=said, enable_progress_bar=True, precision="bf16-mixed")
    run.fit(Captioning(model), datamodule=data)
    assert "(a person: " in capsys.readouterr().out


def test_clock() -> None:
    assert [clock(s) for s in (4.6, 245, 3600)] == ["0:05", "4:05", "1:00:00"]


class Said:
    """Captions in languages, without pictures."""

    def __init__(self, split: str, *counts: tuple[str, int]) -> None:
        self.split_name, self.codes = split, [code for code, count in counts for _ in range(count)]

    def splits(self) -> list[str]:
        return [self.split_name]

    def split(self, name: str) -> "Said":
        assert name == self.split_name
        return self

    def __len__(self) -> int:
        return len(self.codes)

    def captions(self, i: int) -> list[Caption]:
        return [Caption("a dog", self.codes[i])]


@pytest.mark.parametrize(
    ("source", "order"),
    [
        (Said("train", ("ko", 9)), ("ko", "en", "de")),
        (Said("train", ("ko", 9), ("en", 4)), ("ko", "en", "de")),
        (Said("train", ("ko", 9), ("en", 5)), ("en", "ko", "de")),
        (Said("train", ("ko", 9), ("en", 9), ("de", 99)), ("de", "en", "ko")),
        (Said("train", ("fr", 9)), ("en", "ko", "de")),
        (Said("val", ("ko", 9)), ("en", "ko", "de")),  # as what scores interleaved data may be
    ],
)
def test_the_language_that_most_was_trained_on_comes_first(source: Said, order: tuple[str, ...]) -> None:
    tokenizer = Tokenizer.train(["a dog"], 300, ("en", "ko", "de"))
    data: Any = SimpleNamespace(tokenizer=tokenizer, train_split="train", source=source)
    assert _most_trained_first(data).languages == order
    assert tokenizer.languages == ("en", "ko", "de")
