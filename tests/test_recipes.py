"""Every recipe runs, from its YAML to the files in its folder, with recipes/tiny.yaml laid over it."""

import json
import warnings
from pathlib import Path

import pytest
from PIL import Image

from mmtransformer import (
    EncoderDecoder,
    ImageCaptioner,
    ImageClassifier,
    ImageText,
    ImageTransform,
    QFormer,
    TextDecoder,
    TextEncoder,
    Tokenizer,
    ViT,
)
from mmtransformer.cli import main
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.pipelines.translator import Translator
from mmtransformer.weights import load_lm, save_as_hub

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "tiny")


def flickr_folder(folder: Path) -> Path:
    """Six pictures as Flickr8k's authors hand theirs out."""
    (folder / "Flicker8k_Dataset").mkdir(parents=True)
    split = Scenes(image_size=32, train_size=6, phrasings=2, languages=("en",)).split("train")
    lines = []
    for i in range(6):
        split.image(i).save(folder / "Flicker8k_Dataset" / f"{i}.jpg")
        lines += [f"{i}.jpg#{k}\t{caption.text}" for k, caption in enumerate(split.captions(i))]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n", "utf-8")
    for name, some in (("train", (0, 1, 2)), ("dev", (3, 4)), ("test", (5,))):
        text = "".join(f"{i}.jpg\n" for i in some)
        (folder / f"Flickr_8k.{name}Images.txt").write_text(text, "utf-8")
    return folder


def saved_model(folder: Path) -> Path:
    source = Scenes(image_size=32, train_size=9).split("train")
    texts = [caption.text for i in range(9) for caption in source.captions(i)]
    decoder = TextDecoder(300, 16, 1, 2, max_len=64, cross_dim=16)
    captioner = EncoderDecoder(ViT(32, 8, 16, 1, 2, class_token=False, pool="mean"), decoder)
    tokenizer = Tokenizer.train(texts, 300, ("en", "ko"))
    ImageCaptioner(captioner, tokenizer, ImageTransform(32), device="cpu").save_pretrained(folder)
    return folder


def language_model(folder: Path, family: str = "ours") -> list[str]:
    """The arguments that put a small language model with its tokenizer into a recipe: ours, or as a hub has it."""
    source = Scenes(image_size=32, train_size=9).split("train")
    texts = [caption.text for i in range(9) for caption in source.captions(i)]
    tokenizer = Tokenizer.train(texts, 300, ("en", "ko") if family == "ours" else ())
    decoder = TextDecoder(300, 16, 2, 2, max_len=128)
    if family == "gpt2":
        save_as_hub(decoder, folder, "gpt2")
    else:
        decoder.save_pretrained(folder)
    tokenizer.save(folder)
    return [f"--model.captioner.decoder.source={folder}", f"--data.tokenizer={folder}"]


def stage1(folder: Path) -> str:
    """The argument that names a small model of stage 1."""
    qformer = QFormer(3, 16, 2, 2, 16, vocab_size=301, max_len=64)
    ImageText(ViT(32, 8, 16, 1, 2), qformer, class_id=300).save_pretrained(folder)
    return f"--model.captioner.folder={folder}"


def bert(folder: Path) -> list[str]:
    """The arguments that start a Q-Former from a small BERT with its tokenizer."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 31}
    BertModel(BertConfig(vocab_size=300, max_position_embeddings=40, **sizes)).save_pretrained(folder)
    source = Scenes(image_size=32, train_size=9).split("train")
    Tokenizer.train([c.text for i in range(9) for c in source.captions(i)], 300).save(folder)
    return [
        f"--model.captioner.qformer.source={folder}",
        f"--data.tokenizer={folder}",
        "--model.captioner.class_id=300",
    ]


def arguments(name: str, folder: Path) -> list[str]:
    """What a recipe needs beside recipes/tiny.yaml: small data, made here."""
    if name == "qformer_stage1_scenes":
        ViT(64, 8, 192, 1, 3).save_pretrained(folder / "vit")
        vision = f"--model.captioner.vision.source={folder / 'vit'}"
        return [*arguments("caption_scenes", folder), vision]
    if name == "qformer_stage2_scenes":
        return [
            *arguments("caption_scenes", folder),
            *language_model(folder / "lm"),
            stage1(folder / "stage1"),
            "--data.image.image_size=32",
            "--data.source.image_size=32",
        ]
    if name == "flamingo_scenes":
        ViT(64, 8, 192, 1, 3).save_pretrained(folder / "vit")
        vision = f"--model.captioner.vision.source={folder / 'vit'}"
        return [*arguments("caption_scenes", folder), *language_model(folder / "lm"), vision]
    if name == "few_shot_scenes":
        ViT(64, 8, 192, 1, 3).save_pretrained(folder / "vit")
        return [
            f"--model.captioner.vision.source={folder / 'vit'}",
            "--data.documents.train_size=12",
            "--data.documents.val_size=2",
            "--model.decoding.max_new_tokens=3",
        ]
    if name == "caption_scenes":
        sizes = {"train_size": 12, "val_size": 3, "compositional_size": 2}
        return [f"--data.source.{key}={value}" for key, value in sizes.items()]
    if name == "lm_scenes":
        sizes = {"train_size": 40, "val_size": 3, "compositional_size": 2}
        return [f"--data.source.pairs.{key}={value}" for key, value in sizes.items()] + [
            "--model.num_texts=3"
        ]
    if name == "vit_classify":
        sizes = {"train_size": 12, "val_size": 5, "compositional_size": 5}
        return [f"--data.source.scenes.{key}={value}" for key, value in sizes.items()]
    if name == "translate_scenes":
        sizes = {"train_size": 9, "val_size": 2, "compositional_size": 2}
        return [f"--data.source.scenes.{key}={value}" for key, value in sizes.items()]
    if name == "lm_captions":
        paths = f"--data.paths=[{flickr_folder(folder / 'flickr')}]"
        return [paths, "--data.max_len=48", "--model.num_texts=3"]
    if name == "bert_captions":
        return [f"--data.paths=[{flickr_folder(folder / 'flickr')}]"]
    root = f"--data.root={flickr_folder(folder / 'flickr')}"
    if name == "finetune_pairs":
        return [root, f"--model.init={saved_model(folder / 'model')}"]
    if name in ("qformer_stage2_flickr8k", "qformer_coco"):
        language = language_model(folder / "lm", "gpt2" if name == "qformer_coco" else "ours")
        cache = [f"--data.cache_dir={folder / 'features'}"] if name == "qformer_stage2_flickr8k" else []
        return [root, *language, stage1(folder / "stage1"), "--data.image.image_size=32", *cache]
    dim = {"flamingo_coco": 768, "qformer_stage1_coco": 1024}.get(name, 192)
    vision = ViT(32, 8, dim, 1, 4 if dim % 3 else 3)
    vision.save_pretrained(folder / "vit")
    sources = [root, f"--model.captioner.vision.source={folder / 'vit'}", "--data.image.image_size=32"]
    if name == "flamingo_coco":
        smaller = ["--model.captioner.resampler.depth=1", "--data.max_len=60"]
        return sources + smaller + language_model(folder / "lm", "gpt2")
    if name == "qformer_stage1_coco":
        return sources + bert(folder / "bert")
    sources += [f"--data.cache_dir={folder / 'features'}"]
    return sources + (language_model(folder / "lm") if name == "flamingo_flickr8k" else [])


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
    always = (
        "config.yaml metrics.csv metrics.json checkpoints/last.ckpt model/model.safetensors model/config.json"
    )
    assert [file for file in f"{always} model/README.md".split() if not (run / file).is_file()] == []
    CHECKS.get(name, check_captioner)(name, run, out)


def check_captioner(name: str, run: Path, out: str) -> None:
    files = "gallery.png gallery.html predictions_val.jsonl model/tokenizer.json model/preprocessor.json"
    assert [file for file in files.split() if not (run / file).is_file()] == []
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert metrics["training"]["steps"] == (3 if name.endswith("_scenes") else 1)
    assert metrics["image_use"]["val"].keys() >= {
        "loss",
        "loss_right",
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
    assert ImageCaptioner.from_pretrained(run / "model", device="cpu").captioner.vocab_size > 0


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
    decoder, tokenizer = load_lm(run / "model"), Tokenizer.from_folder(run / "model")
    assert decoder.vocab_size >= tokenizer.vocab_size


def check_masked(name: str, run: Path, out: str) -> None:
    scores = json.loads((run / "metrics.json").read_text("utf-8"))["scores"]["val"]
    assert scores.keys() >= {"words", "unigram_words", "bigram_words", "pairs"}
    assert f"bigrams {scores['bigram_words']:.1%}" in out
    assert "[" in (run / "filled.txt").read_text("utf-8")
    tokenizer = Tokenizer.from_folder(run / "model")
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
    assert (scores["images"], len(scores["confusion"])) == (4, 8)
    assert "worst classes" in out
    assert [
        f for f in ("gallery.png", "attention.png", "model/classes.json") if not (run / f).is_file()
    ] == []
    classifier = ImageClassifier.from_pretrained(run / "model", device="cpu")
    ((name, share),) = classifier(Image.new("RGB", (50, 40)))[0]
    assert name in classifier.classes
    assert 0.1 < share < 1.0


def check_few_shot(name: str, run: Path, out: str) -> None:
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert set(metrics["captions"]["val"]) & {"en", "ko"}
    assert metrics["image_use"]["val"]["loss_other_image"] > 0
    scores = metrics["few_shot"]["scores"]
    assert {"description, en", "color, ko", "fill, en"} < set(scores)
    assert all(set(by) == {"0", "1", "2", "4"} for by in scores.values())
    assert "% of answers right after so many examples" in out
    assert ImageCaptioner.from_pretrained(run / "model", device="cpu").decoding.mark_images


CHECKS = {
    "qformer_stage1_scenes": check_stage1,
    "qformer_stage1_flickr8k": check_stage1,
    "qformer_stage1_coco": check_stage1,
    "few_shot_scenes": check_few_shot,
    "vit_classify": check_classification,
    "translate_scenes": check_translation,
    "lm_scenes": check_language_model,
    "lm_captions": check_language_model,
    "bert_captions": check_masked,
}


@pytest.mark.parametrize("name", NAMES)
def test_recipe_says_what_it_does(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    head = text[: text.index("\nseed_everything")]
    assert all(line.startswith("#") for line in head.splitlines() if line)
    assert all(f"#   {word}" in head for word in ("command", "hardware", "time", "score"))
    assert f"mmt fit --config recipes/{name}.yaml" in head
    assert "${" not in text
