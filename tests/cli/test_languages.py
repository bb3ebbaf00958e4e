"""The languages of the same data are the same in every command that reads them for a model."""

import csv
import json
import re
from pathlib import Path

import pytest

from mmtransformer import ImageCaptioner, ImageTransform, TextDecoder, Tokenizer, VisionEncoderDecoder, ViT
from mmtransformer.data.scenes.scenes import Scenes
from support.cli import mmt

ROOT = Path(__file__).parents[2]
FIT = [
    *("fit", "--config", str(ROOT / "recipes/finetune_pairs.yaml"), "--config", str(ROOT / "recipes/tiny.yaml")),
    *("--config", "open.yaml", "--data.splits.val=[train]", "--data.read.val_fraction=0"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt nothing, and captions in Korean unless asked for English."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = Tokenizer.train(["빨간 원", "a red dog"], 300, ("ko", "en"))
    decoder = TextDecoder(300, 16, 1, 2, max_len=64, context_dim=16)
    captioner = VisionEncoderDecoder(ViT(32, 8, 16, 1, 2, class_token=False, pool="mean"), decoder)
    ImageCaptioner(captioner, tokenizer, ImageTransform(32), device="cpu").save_pretrained(folder)
    return folder


def _table(folder: Path, *captions: str) -> Path:
    split = Scenes(image_size=32, train_size=len(captions)).split("train")
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for i, text in enumerate(captions):
            split.image(i).save(folder / f"p{i}.png")
            rows.writerow([f"p{i}.png", text])
    return folder / "captions.csv"


def _languages(said: str) -> str:
    return re.findall(r"languages ([^;\n]*)", said)[0]


@pytest.mark.parametrize(
    ("captions", "languages"),
    [
        (["빨간 원", "파란 별", "a red star"], "en 1, ko 2 (en where nothing says otherwise)"),
        (["a red star", "a blue dog", "a ring"], "en 3"),
        (["빨간 원", "파란 별", "노란 별"], "ko 3"),
    ],
)
def test_commands_agree_on_languages(
    captions: list[str], languages: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    Path("open.yaml").write_text("data: {init_args: {read: {default_language: null}}}", "utf-8")
    table = str(_table(tmp_path, *captions))
    split = ["--split", "train"]
    for words in (
        ["check", table, "--model", str(model)],
        ["evaluate", "--data", table, "--model", str(model), *split, "--captions-out", "said.jsonl"],
        [*FIT, f"--data.source={table}", f"--model.init={model}"],
    ):
        caplog.clear()
        code, out, err = mmt(capsys, *words)
        assert (code, _languages(out)) == (0, languages), (words[0], err)
        assumed = "nothing names a language: read as en, which the model knows" in caplog.text
        assert assumed is (languages == "en 3"), words[0]
    rows = map(json.loads, Path("said.jsonl").read_text("utf-8").splitlines())
    assert all(row["language"] == ("en" if row["references"][0].isascii() else "ko") for row in rows)
