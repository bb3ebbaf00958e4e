"""NaN in fine-tuning BLIP-2: the causes of public reports, and that none of them is here.

LAVIS issues 111, 267 and 409 (weights that learn kept in float16, float16 Q-Former), notebooks issue 454 (LoRA on a
float16 model: NaN after some epochs), transformers issues 11461 and 23918 and pull request 10956 (T5's activations, up
to 2.8e5, are more than float16 holds), transformers issue 5300 (rows of ignored labels).
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration

from mmtransformer import CaptionBatch
from mmtransformer.training import finetune
from mmtransformer.training.engine.accumulators import norm_of_large
from mmtransformer.training.engine.guard import not_finite
from mmtransformer.training.tasks.tuning import TuningConfig
from support.cli import mmt
from support.hub import blip2, folder, pairs
from support.public import load


def batch(rows: int = 4, length: int = 6, seed: int = 0) -> CaptionBatch:
    torch.manual_seed(seed)
    tokens = torch.randint(5, 300, (rows, length))
    real = torch.ones_like(tokens, dtype=torch.bool)
    learned = real.clone()
    learned[:, 0] = False
    return CaptionBatch(tokens, real, learned, pixels=torch.randn(rows, 1, 3, 28, 28))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_what_learns_of_a_float16_folder_is_float32(tmp_path: Path) -> None:
    """LAVIS 409: a float16 ViT is NaN after its first step; notebooks 454: float16 under LoRA after some epochs."""
    base = folder(tmp_path / "base", "blip2", scale=0.1)
    theirs: Any = Blip2ForConditionalGeneration.from_pretrained(base)
    theirs.to(torch.float16).save_pretrained(base)
    for tuning in (TuningConfig(), TuningConfig(["vision", "decoder"], method="lora")):
        model = finetune(str(base), tuning=tuning).captioner.train()
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-5)
        for seed in range(3):
            model(batch(seed=seed)).loss.backward()
            optimizer.step()
            assert all(bool(x.isfinite().all()) for x in gradients(model))
        after = [p for p in model.parameters() if p.requires_grad]
        # Steps of 1e-7 would be lost in float16.
        assert all(
            not torch.equal(x, y) for x, y in zip(before, after, strict=True) if y.grad is not None and y.grad.any()
        )


@pytest.mark.parametrize("half", [False, True])
def test_activations_beyond_float16_are_finite(half: bool, tmp_path: Path) -> None:
    """transformers 10956: T5's residual stream reaches 2.8e5, and float16 ends at 65504; autocast here is bfloat16."""
    model = load(folder(tmp_path, "blip2")).model.train()
    seen: list[float] = []
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if name.endswith(("mlp.fc2.weight", "attn.out_proj.weight")):
                parameter *= 1e5
    for block in model.decoder.blocks:
        block.register_forward_hook(lambda _m, _a, out: seen.append(float(out.detach().abs().max())))
    model.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model(batch()).loss
    loss.backward()
    assert max(seen) > 3e5 > torch.finfo(torch.float16).max
    assert loss.isfinite()
    assert all(bool(x.isfinite().all()) for x in gradients(model))


def test_rows_without_targets_are_zero_not_nan(tmp_path: Path) -> None:
    """transformers 5300: a mean over no labels is 0 / 0."""
    model = load(folder(tmp_path, "blip2")).model.eval()
    given = batch()
    given.loss_mask[:] = False
    loss = model(given).loss
    assert loss.item() == 0.0
    loss.backward()
    assert all(not x.any() for x in gradients(model))
    whole = batch()
    whole.loss_mask[1:] = False  # one row of four has targets: the mean is that row's
    fields: Any = {name: getattr(whole, name)[:1] for name in ("tokens", "attention_mask", "loss_mask", "pixels")}
    alone = replace(whole, **fields)
    torch.testing.assert_close(model(whole).loss, model(alone).loss)


def test_padding_leaves_no_trace(tmp_path: Path) -> None:
    """A row that may see nothing gives NaN in a softmax over minus infinity; gradients must be those of rows alone."""
    model = load(folder(tmp_path, "blip2")).model.eval()
    model.requires_grad_(True)
    given, lengths = batch(), torch.tensor([6, 2, 3, 1])
    real = torch.arange(6) < lengths[:, None]
    padded = CaptionBatch(given.tokens, real, given.loss_mask & real, pixels=given.pixels)
    model(padded).loss.backward()
    together = gradients(model)
    model.zero_grad()
    count = int(padded.loss_mask.sum())
    for i, length in enumerate(lengths.tolist()):
        row: Any = [x[i : i + 1, :length] for x in (given.tokens, real, padded.loss_mask)]
        sums = model(CaptionBatch(*row, pixels=given.pixels[i : i + 1])).sums  # type: ignore[index]
        (sums.sum / count).backward()
    largest = max(float(x.abs().max()) for x in together)
    for one, other in zip(together, gradients(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 * largest)


def test_a_model_behind_zero_queries_learns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random BLIP-2 of transformers has queries of zeros: gradients of 1e18, whose squares are infinite."""
    monkeypatch.setenv("PATH", "")  # without Java there is no METEOR
    base, run = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    torch.manual_seed(0)
    model = blip2(base)
    assert not model.query_tokens.any()
    model.qformer.encoder.layer[0].attention.output.dense.weight.data *= 100.0
    model.save_pretrained(base)
    ours = load(base).model.train()
    ours(batch()).loss.backward()
    norm = torch.nn.utils.get_total_norm(gradients(ours))
    assert all(bool(x.isfinite().all()) for x in gradients(ours))
    assert not norm.isfinite() or norm > 1e15
    words = [
        "--config", "recipes/finetune_hub.yaml", "--model.init", str(base), "--data.source",
        str(pairs(tmp_path / "pairs", 6)), "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu",
        "--data.batch_size", "4", "--data.max_len", "20", "--trainer.default_root_dir", str(run),
        "--trainer.precision", "32-true", "--model.tuning.method", "full", "--model.tuning.parts", "[connector]",
    ]  # fmt: skip
    code, _, err = mmt(capsys, "fit", *words)
    assert code == 0, err
    assert load(run / "model").model.get_parameter("qformer.query_tokens").any()


def test_the_norm_of_large_gradients_is_a_number() -> None:
    for grads in ([torch.full((3,), 2e19), torch.tensor([-3e19, 1.0])], [torch.zeros(2), torch.full((5,), 3e38)]):
        want = torch.cat([x.double() for x in grads]).norm()
        assert norm_of_large(grads) == pytest.approx(float(want), rel=1e-6)
    for odd in (float("inf"), float("nan")):
        assert not math.isfinite(norm_of_large([torch.tensor([1.0, odd])]))


def test_what_is_set_already_is_not_advised() -> None:
    said = {
        precision: str(not_finite(loss=1.0, grad_norm=float("inf"), step=1, lr=0.1, names=(), precision=precision))
        for precision in ("32-true", "bf16-mixed", "16-mixed")
    }
    assert "32-true" not in said["32-true"]
    assert "set trainer.precision to 32-true, or leave such steps out" in said["bf16-mixed"]
