"""`mmt parity`: families that are compared with transformers stage by stage, and what cannot be."""

import json
from pathlib import Path

import pytest
import torch

from mmtransformer import ImageCaptioner, ImageTransform, TextDecoder, Tokenizer, VisionEncoderDecoder, ViT
from mmtransformer.pipelines import parity
from mmtransformer.serialization.weight_files import write_weights
from mmtransformer.weights.adapters import Adapter, hash_of
from mmtransformer.weights.shared.folders import read_tensors
from support.cli import mmt
from support.hub import FAMILIES, folder
from support.public import pictures


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [None, "a photo of"])
def test_there_is_no_difference(
    family: str, prompt: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path / "model", family)
    images = [str(tmp_path / f"{i}.png") for i in range(2)]
    for name, image in zip(images, pictures(), strict=False):
        image.save(name)
    words = [*images, "--prompt", prompt] if prompt else []
    code, out, err = mmt(capsys, "parity", str(path), *words, "--max-new-tokens", "6")
    assert code == 0, out + err
    lines = out.splitlines()
    assert lines[-1].endswith(": no difference")
    stages = 5 if prompt or family != "blip2-t5" else 4  # of whose first token no pass there has the logits
    assert len(lines) == (2 if prompt else 3) * stages + 1
    assert all("=" in line for line in lines[:-1])


def test_differences_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path / "model", "blip")
    ours = ImageCaptioner.from_pretrained(path, device="cpu")
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    assert ours.processor is not None
    transform = ours.processor.transform
    ours.processor.transform = ImageTransform(28, "squash", transform.mean, transform.std, interpolation="bilinear")
    monkeypatch.setattr(parity.ImageCaptioner, "from_pretrained", lambda *args, **options: ours)
    code, out, _ = mmt(capsys, "parity", str(path), "--max-new-tokens", "6")
    assert code == 1
    wrong = [line for line in out.splitlines() if "  " in line and "!" in line]
    assert {word for line in wrong for word in ("pixels", "logits", "greedy ids") if word in line} == {
        "pixels", "logits", "greedy ids"
    }  # fmt: skip
    assert "here and" in out
    assert f"{len(wrong)} of 15 lines differ" in out


def test_an_adapter_is_compared_as_it_would_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = folder(tmp_path / "base", "git")
    tensors = {"head_bias": 0.1 * torch.randn(len(read_tensors(base)["output.bias"]))}
    Adapter(str(base), hash_of(base), tensors).save(tmp_path / "adapter")
    code, out, err = mmt(capsys, "parity", str(tmp_path / "adapter"), "--max-new-tokens", "4")
    assert code == 0, out + err


def test_what_cannot_be_compared_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = VisionEncoderDecoder(ViT(16, 8, 16, 1, 2), TextDecoder(300, 16, 1, 2, context_dim=16))
    ImageCaptioner(model, Tokenizer.train(["a cat"], 300), ImageTransform(16), device="cpu").save_pretrained(
        tmp_path / "own"
    )
    code, _, err = mmt(capsys, "parity", str(tmp_path / "own"))
    assert (code, "is a model of this library, and transformers has none" in err) == (2, True)
    from support.hub_models import hub_folder

    hub_folder(tmp_path / "hub", "internvl")
    code, _, err = mmt(capsys, "parity", str(tmp_path / "hub"))
    assert (code, "internvl runs in transformers itself" in err) == (2, True)
    half = folder(tmp_path / "half", "blip")
    tensors = read_tensors(half)
    write_weights(half / "model.safetensors", dict(list(tensors.items())[:-1]))
    code, _, err = mmt(capsys, "parity", str(half))
    assert (code, err.count("\n")) == (2, 1)
    config = json.loads((half / "config.json").read_text()) | {"model_type": "gpt2"}
    (half / "config.json").write_text(json.dumps(config))
    code, _, err = mmt(capsys, "parity", str(half))
    assert (code, "a text model alone" in err) == (2, True)
