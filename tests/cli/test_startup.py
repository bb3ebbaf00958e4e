"""One picture from the shell: what is imported beside torch, and that nothing is done that one picture does not pay."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmtransformer import ImageCaptioner, ImageTransform, TextDecoder, Tokenizer, VisionEncoderDecoder, ViT
from mmtransformer.layers.weight_prepacking import Precision, PrepackedLinear, for_inference
from mmtransformer.pipelines import image_captioner
from support.cli import mmt

NOT_NEEDED = {"sympy", "mpmath", "lightning", "matplotlib", "timm", "torchvision", "transformers", "jsonargparse",
              "yaml", "pandas", "pyarrow", "huggingface_hub", "requests", "tqdm.auto", "fontTools", "scipy",
              "torch.nn.attention.flex_attention", "torch.fx.experimental.symbolic_shapes",
              "mmtransformer.weights.families", "mmtransformer.weights.captioner_folders", "mmtransformer.training",
              "mmtransformer.plots", "mmtransformer.data.scenes", "mmtransformer.metrics"}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "model"
    captioner = VisionEncoderDecoder(
        ViT(32, 8, 16, 1, 2, class_token=False, pool="mean"), TextDecoder(300, 16, 1, 2, max_len=64, context_dim=16)
    )
    tokenizer = Tokenizer.train(["a red star on a blue field"], 300)
    ImageCaptioner(captioner, tokenizer, ImageTransform(32), device="cpu").save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def test_captioning_imports_nothing_that_it_does_not_use(model: Path, photo: Path) -> None:
    words = ["caption", "--model", str(model), "--device", "cpu", "--max-new-tokens", "4", str(photo)]
    script = (
        f"import json, sys, torch\nbefore = set(sys.modules)\nfrom mmtransformer.cli import main\n"
        f"assert main({words!r}) == 0\nprint()\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    more = json.loads(done.stdout.splitlines()[-1])
    assert "mmtransformer.pipelines.image_captioner" in more
    assert NOT_NEEDED & set(more) == set()
    assert len(more) < 170  # 163 when batches came to a folder of their own, 698 once


def test_one_image_is_captioned_without_prepacking_and_two_with_it(
    model: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[bool] = []
    real = image_captioner.for_inference

    def noted(captioner: torch.nn.Module, precision: Precision, *, prepack: bool = True) -> torch.nn.Module:
        real(captioner, precision, prepack=prepack)
        made.append(any(isinstance(module, PrepackedLinear) for module in captioner.modules()))
        return captioner

    monkeypatch.setattr(image_captioner, "for_inference", noted)
    other = photo.with_name("other.jpg")
    Image.new("RGB", (64, 48), "blue").save(other)
    words = ["caption", "--model", str(model), "--device", "cpu", "--max-new-tokens", "4"]
    code, one, _ = mmt(capsys, *words, str(photo))
    assert (code, made) == (0, [False])
    code, two, _ = mmt(capsys, *words, str(photo), str(other))
    assert (code, made) == (0, [False, True])
    assert one.strip() == two.splitlines()[0].split(": ", 1)[1].strip()
    code, _, _ = mmt(capsys, *words, "--precision", "int8", str(photo))
    assert (code, made[2]) == (0, True)


def test_prepacking_is_what_it_was_where_nothing_is_said() -> None:
    prepacked = for_inference(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    assert isinstance(prepacked[0], PrepackedLinear)
    plain = for_inference(torch.nn.Sequential(torch.nn.Linear(4, 4)), prepack=False)
    assert not isinstance(plain[0], PrepackedLinear)
