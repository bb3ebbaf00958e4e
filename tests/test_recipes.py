"""Every recipe runs, from its YAML to the files in its folder, with recipes/tiny.yaml laid over it."""

import json
import warnings
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mmtransformer import ImageCaptioner, ImageClassifier, ImageGenerator, ImageTextEmbedder, TextEncoder, Tokenizer
from mmtransformer.cli import main
from mmtransformer.pipelines.translator import Translator
from mmtransformer.training.tasks.captioning import Captioning
from mmtransformer.weights import load_lm
from support.recipes import NAMES, RECIPES, arguments


@pytest.mark.parametrize("name", NAMES)
def test_recipe_runs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # without Java there is no METEOR, which would take most of the time
    run = tmp_path / "run"
    words = ["--config", str(RECIPES / f"{name}.yaml"), "--config", str(RECIPES / "tiny.yaml")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(["fit", *words, f"--trainer.default_root_dir={run}", *arguments(name, tmp_path)])
    out, err = capsys.readouterr()
    assert code == 0, err
    always = "config.yaml metrics.csv metrics.json checkpoints/last.ckpt model/model.safetensors model/config.json"
    assert [file for file in f"{always} model/README.md".split() if not (run / file).is_file()] == []
    CHECKS.get(name, check_captioner)(name, run, out)


def test_batches_between_validations_are_counted_over_epochs() -> None:
    """Of data of one's own an epoch may have fewer, which Lightning refuses."""
    trainers = {
        path.stem: yaml.safe_load(path.read_text("utf-8")).get("trainer", {}) for path in RECIPES.glob("*.yaml")
    }
    batches = {n: t for n, t in trainers.items() if isinstance(t.get("val_check_interval"), int)}
    assert {n: t.get("check_val_every_n_epoch", 1) for n, t in batches.items()} == {"draw_scenes": None}


def check_captioner(name: str, run: Path, out: str) -> None:
    pixels = "processor_config.json" if name == "finetune_hub" else "preprocessor.json"
    files = f"gallery.png gallery.html predictions_val.jsonl model/tokenizer.json model/{pixels}"
    assert [file for file in files.split() if not (run / file).is_file()] == []
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert metrics["training"]["steps"] == (3 if name.endswith("_scenes") else 1)
    assert metrics["image_ablation"]["val"].keys() >= {
        "loss",
        "loss_right_image",
        "loss_other_image",
        "loss_blank_image",
    }
    if name.endswith("_scenes"):
        assert {s: set(by) for s, by in metrics["facts"].items()} == {
            "val": {"en", "ko"},
            "compositional": {"en", "ko"},
        }
    else:
        assert all("bleu_4" in scores["values"] for scores in metrics["captions"]["val"].values())
    assert f"caption YOUR_PICTURE.jpg --model {run / 'model'}" in out
    assert ImageCaptioner.from_pretrained(run / "model", device="cpu").model.vocab_size > 0


def check_stage1(name: str, run: Path, out: str) -> None:
    check_captioner(name, run, out)
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert metrics["stage1"]["val"].keys() >= {"itc", "itm", "itg", "itm_accuracy", "itg_perplexity"}
    for found in metrics["retrieval"]["val"].values():
        assert found["itc"].keys() == found["itm"].keys() >= {"text_recall@1", "image_recall@10"}
    assert "caption -> picture, matched again" in out
    assert (run / "retrieval.png").read_bytes()[1:4] == b"PNG"


def check_language_model(name: str, run: Path, out: str) -> None:
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    languages = {"en", "ko", "all"} if name == "lm_scenes" else {"all"}
    assert set(metrics["scores"]["val"]) == languages
    assert set(metrics["ngrams"]) == {"2", "3", "4", "5"}
    assert "5-grams" in out
    assert (run / "texts.txt").read_text("utf-8").strip()
    decoder, tokenizer = load_lm(run / "model"), Tokenizer.from_pretrained(run / "model")
    assert decoder.vocab_size >= tokenizer.vocab_size


def check_masked(name: str, run: Path, out: str) -> None:
    scores = json.loads((run / "metrics.json").read_text("utf-8"))["scores"]["val"]
    assert scores.keys() >= {"words", "unigram_words", "bigram_words", "nsp_accuracy"}
    assert f"bigrams {scores['bigram_words']:.1%}" in out
    assert "[" in (run / "filled.txt").read_text("utf-8")
    tokenizer = Tokenizer.from_pretrained(run / "model")
    assert TextEncoder.from_pretrained(run / "model").vocab_size >= tokenizer.vocab_size


def check_translation(name: str, run: Path, out: str) -> None:
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    scores = metrics["translation"]["compositional"]
    assert set(scores) == {"en-ko", "ko-en"}
    assert set(scores["en-ko"]) == {"bleu_4", "bleu_low", "bleu_high", "exact", "facts", "pairs"}
    assert "BLEU-4" in out
    lines = (run / "translations_val.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 4
    assert (run / "attention_ko-en.png").is_file()
    assert len(Translator.from_pretrained(run / "model", device="cpu")(["a red star"] * 3, "ko")) == 3


def check_classification(name: str, run: Path, out: str) -> None:
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    scores = metrics["classification"]["compositional"]
    assert (scores["images"], sum(sum(r.values()) for r in scores["confusion_by_true_class"].values())) == (4, 4)
    assert "worst classes" in out
    assert [f for f in ("gallery.png", "attention.png", "model/classes.json") if not (run / f).is_file()] == []
    classifier = ImageClassifier.from_pretrained(run / "model", device="cpu")
    ((name, share),) = classifier(Image.new("RGB", (50, 40)))[0]
    assert name in classifier.classes
    assert 0.1 < share < 1.0


def check_drawing(name: str, run: Path, out: str) -> None:
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert {split: set(by) for split, by in metrics["drawings"].items()} == {
        "val": {"en", "ko"},
        "compositional": {"en", "ko"},
    }
    assert metrics["drawings"]["val"]["en"]["images"] == 2
    assert 0.5 < metrics["reader"]["val"]["facts"] <= 1
    assert set(metrics["guidance"]["val"]) == {"1.0", "2.0", "5.0"}
    assert "of true pictures the reader reads" in out
    with Image.open(run / "gallery.png") as gallery:
        assert gallery.width > 200
    ((picture,),) = ImageGenerator.from_pretrained(run / "model", device="cpu")("큰 빨간 별")
    assert picture.size == (64, 64)


def check_few_shot(name: str, run: Path, out: str) -> None:
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert set(metrics["captions"]["val"]) & {"en", "ko"}
    assert metrics["image_ablation"]["val"]["loss_other_image"] > 0
    scores = metrics["few_shot"]["scores"]
    assert {"description, en", "color, ko", "fill, en"} < set(scores)
    assert all(set(by) == {"0", "1", "2", "4"} for by in scores.values())
    assert "% of answers right after so many examples" in out
    assert ImageCaptioner.from_pretrained(run / "model", device="cpu").generation.add_image_tokens


def check_contrast(name: str, run: Path, out: str) -> None:
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    for found in metrics["retrieval"]["val"].values():
        assert found["itc"].keys() >= {"text_recall@1", "image_recall@10"}
    assert ("zero_shot" in metrics) == (name == "clip_scenes")
    assert "caption -> picture" in out
    assert (run / "retrieval.png").read_bytes()[1:4] == b"PNG"
    encoder = ImageTextEmbedder.from_pretrained(run / "model", device="cpu")
    assert encoder.similarity(Image.new("RGB", (50, 40)), ["a red star", "빨간 별"]).shape == (1, 2)


CHECKS = {
    "clip_scenes": check_contrast,
    "finetune_clip": check_contrast,
    "clip_flickr8k": check_contrast,
    "qformer_stage1_scenes": check_stage1,
    "qformer_stage1_flickr8k": check_stage1,
    "qformer_stage1_coco": check_stage1,
    "few_shot_scenes": check_few_shot,
    "draw_scenes": check_drawing,
    "vit_classify": check_classification,
    "translate_scenes": check_translation,
    "lm_scenes": check_language_model,
    "lm_captions": check_language_model,
    "bert_captions": check_masked,
}


def test_a_recipe_runs_barebones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning refuses a logger, a progress bar, checkpoints and a rate of logging then: the command gives it none.

    A share of the validation's batches is that of the evaluation as well.
    """
    ends: list[tuple[int, int | None]] = []
    monkeypatch.setattr(
        Captioning, "finish", lambda self, run: ends.append((self.trainer.global_step, run.limit_batches))
    )
    words = ["--config", str(RECIPES / "caption_scenes.yaml"), "--config", str(RECIPES / "tiny.yaml")]
    words += ["--trainer.barebones=true", "--trainer.limit_val_batches=0.67"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["fit", *words, f"--trainer.default_root_dir={tmp_path}"]) == 0
    assert ends == [(3, 2)]  # of three batches
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


@pytest.mark.parametrize("name", NAMES)
def test_recipe_says_what_it_does(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    head = text[: text.index("\nseed_everything")]
    assert all(line.startswith("#") for line in head.splitlines() if line)
    assert all(f"#   {word}" in head for word in ("command", "hardware", "time", "score"))
    assert f"mmt fit --config recipes/{name}.yaml" in head
    assert "${" not in text
