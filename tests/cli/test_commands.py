"""The commands as they follow each other: stage 1, then stage 2 from its folder; and heat maps, whatever the bridge."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmtransformer import (
    AttentionConfig,
    Blip2,
    Blip2QFormer,
    CoCa,
    Flamingo,
    Git,
    ImageCaptioner,
    ImageTransform,
    MLPConfig,
    NormConfig,
    PositionConfig,
    PrefixCaptioner,
    QFormer,
    TextDecoder,
    Tokenizer,
    Transformer,
    VisionEncoderDecoder,
    ViT,
)
from mmtransformer.cli import main
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.weights import from_transformers, save_lm, save_timm
from support.cli import mmt

RECIPES = Path(__file__).parents[2] / "recipes"
WORDS = 300


def tokenizer(languages: tuple[str, ...] = ("en", "ko")) -> Tokenizer:
    split = Scenes(image_size=32, train_size=9).split("train")
    return Tokenizer.train([c.text for i in range(9) for c in split.captions(i)], WORDS, languages)


# ---------------------------------------------------------------------------------------------------- two stages

SCENES = ["--model.generation.max_new_tokens=5", "--data.transform.image_size=32"]
SCENES += [f"--data.source.{name}_size={size}" for name, size in (("train", 12), ("val", 3), ("compositional", 2))]


@pytest.fixture(name="no_java", autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # without Java there is no METEOR, which would take most of the time


def configs(name: str, run: Path) -> list[str]:
    files = (RECIPES / f"{name}.yaml", RECIPES / "tiny.yaml")
    return [*(word for file in files for word in ("--config", str(file))), f"--trainer.default_root_dir={run}"]


def fit(capsys: pytest.CaptureFixture[str], name: str, run: Path, *words: str) -> str:
    code, out, err = mmt(capsys, "fit", *configs(name, run), *words)
    assert code == 0, err
    return out


def test_stage_2_takes_the_folder_of_stage_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, two, lm = tmp_path / "stage1", tmp_path / "stage2", tmp_path / "lm"
    tower().save_pretrained(tmp_path / "vit")
    vision = [f"--model.captioner.vision.source={tmp_path / 'vit'}", "--model.captioner.qformer.visual_dim=16"]
    out = fit(capsys, "qformer_stage1_scenes", one, *SCENES, *vision)
    between = json.loads((one / "metrics.json").read_text("utf-8"))
    for split in ("val", "compositional"):
        for found in between["retrieval"][split].values():
            recalls = [f"{way}_recall@{k}" for way in ("text", "image") for k in (1, 5, 10)]
            assert found["itc"].keys() >= set(recalls)
        assert between["stage1"][split].keys() >= {"itm_accuracy", "itg_perplexity"}
    assert "matching" in out
    assert "perplexity of a caption's token" in out

    torch.manual_seed(0)
    TextDecoder(640, 16, 2, 2, max_len=128).save_pretrained(lm)
    Tokenizer.from_pretrained(one / "model").save_pretrained(lm)
    fit(
        capsys, "qformer_stage2_scenes", two, *SCENES,
        f"--model.captioner.folder={one}", f"--model.captioner.decoder.source={lm}", f"--data.tokenizer={lm}",
    )  # fmt: skip
    after = json.loads((two / "metrics.json").read_text("utf-8"))
    assert after["facts"]["val"].keys() == {"en", "ko"}
    assert {"loss_right_image", "loss_other_image", "loss_blank_image"} <= after["image_ablation"]["val"].keys()
    first, last = (ImageCaptioner.from_pretrained(run / "model", device="cpu").model for run in (one, two))
    assert isinstance(first, Blip2QFormer)
    assert isinstance(last, Blip2)
    assert (last.qformer.num_queries, last.qformer.dim) == (first.qformer.num_queries, first.qformer.dim)
    for mine, theirs in zip(last.vision.parameters(), first.vision.parameters(), strict=True):
        assert torch.equal(mine, theirs)  # frozen from then on


# ------------------------------------------------------------------------------------------------- COCO and hubs


def opt() -> TextDecoder:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "ffn_dim": 31, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=WORDS, max_position_embeddings=64, **sizes)
    return from_transformers(OPTForCausalLM(config).eval())


def smollm2() -> TextDecoder:
    return TextDecoder(
        WORDS,
        16,
        2,
        2,
        max_len=64,
        attention=AttentionConfig(bias=False),
        mlp=MLPConfig("swiglu", bias=False),
        norm=NormConfig("rms"),
        positions=PositionConfig("rotary"),
    )


LANGUAGE_MODELS: dict[str, tuple[str, Callable[[], TextDecoder]]] = {
    "OPT": ("opt", opt),
    "GPT-2": ("gpt2", lambda: TextDecoder(WORDS, 16, 2, 2, max_len=64)),
    "SmolLM2": ("llama", smollm2),
}


@pytest.fixture(name="coco", scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pictures with captions, and a run of stage 1 on them: a tower as timm saves it, kept in bfloat16, and a BERT."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("coco")
    images, bert, one, vit = (folder / part for part in ("pictures", "bert", "one", "vit"))
    split = Scenes(image_size=32, train_size=8, languages=("en",)).split("train")
    images.mkdir()
    for i in range(8):
        split.image(i).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(split.captions(i)[0].text, "utf-8")
    save_timm(ViT(32, 8, 64, 1, 1), vit)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 31}
    BertModel(BertConfig(vocab_size=WORDS, max_position_embeddings=40, **sizes)).save_pretrained(bert)
    tokenizer(()).save_pretrained(bert)
    words = [
        f"--data.source={images}", f"--model.captioner.vision.source={vit}",
        f"--model.captioner.qformer.source={bert}",
        "--model.captioner.qformer.visual_dim=64", f"--model.captioner.cls_token_id={WORDS}",
        f"--data.tokenizer={bert}",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("PATH", "")
        warnings.simplefilter("ignore")
        assert main(["fit", *configs("qformer_stage1_coco", one), *words]) == 0
    return images, one


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_blip2_on_pairs_with_a_hubs_tower_and_language_model(
    name: str, coco: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    (family, build), (images, one), lm = LANGUAGE_MODELS[name], coco, tmp_path / "lm"
    given = build()
    save_lm(given, lm, family, tokenizer=tokenizer(()))
    assert json.loads((lm / "config.json").read_text("utf-8"))["model_type"] == family
    two = tmp_path / "two"
    fit(
        capsys, "qformer_stage2_coco", two, f"--data.source={images}", "--data.transform.image_size=32",
        f"--model.captioner.folder={one}", f"--model.captioner.decoder.source={lm}",
        f"--data.tokenizer={lm}",
    )  # fmt: skip
    saved = ImageCaptioner.from_pretrained(two / "model", device="cpu").model
    assert isinstance(saved, Blip2)
    assert isinstance(saved.decoder, TextDecoder)
    want = given.state_dict()
    for part, tensor in saved.decoder.state_dict().items():
        assert torch.equal(tensor, want[part].bfloat16().float()), part


def test_the_papers_hyper_parameters() -> None:
    """arXiv:2301.12597, section 3.4: both stages."""
    import yaml

    for name, low in (("qformer_stage1_coco", 1e-5), ("qformer_stage2_coco", 5e-5)):
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text("utf-8"))
        optim = recipe["model"]["init_args"]["optim"]
        assert (optim["kind"], optim["betas"], optim["weight_decay"]) == ("adamw", [0.9, 0.98], 0.05)
        assert (optim["lr"], optim["warmup_steps"]) == (1e-4, 2000)
        assert optim["lr"] * optim["min_lr_ratio"] == pytest.approx(low)
        data = recipe["data"]["init_args"]
        assert data["augment"]["flip"]
        if name == "qformer_stage2_coco":
            assert (data["transform"]["image_size"], data["transform"]["resize"]) == (224, "squash")
        else:  # the size is the tower's own
            assert data["resize"] == "squash"
            assert "224" in recipe["model"]["init_args"]["captioner"]["init_args"]["vision"]["init_args"]["source"]


# ------------------------------------------------------------------------------------------------------ heat maps


def tower() -> ViT:
    return ViT(32, 8, 16, 1, 2)


def decoder(**options: Any) -> TextDecoder:
    return TextDecoder(WORDS, 16, 2, 2, max_len=96, **options)


BRIDGES: dict[str, Callable[[], Any]] = {
    "encoder-decoder": lambda: VisionEncoderDecoder(tower(), decoder(context_dim=16)),
    "flamingo": lambda: Flamingo(tower(), decoder()),
    "q-former": lambda: Blip2(tower(), QFormer(3, 16, 2, 2, 16), decoder()),
    "q-former, encoder-decoder": lambda: Blip2(
        tower(), QFormer(3, 16, 2, 2, 16), Transformer(WORDS, 16, 1, 2, mlp_dim=31, max_len=96)
    ),
    "q-former, stage 1": lambda: Blip2QFormer(
        tower(), QFormer(3, 16, 2, 2, 16, vocab_size=WORDS, max_len=96), embed_dim=8
    ),
    "git": lambda: Git(tower(), decoder()),
    "prefix": lambda: PrefixCaptioner(tower(), decoder(), pixel_shuffle=2),
    "coca": lambda: CoCa(
        tower(),
        decoder(),
        decoder(context_dim=16, positions=PositionConfig("rotary")),
        num_queries=5,
        num_heads=2,
        embed_dim=8,
    ),
}


@pytest.mark.parametrize("name", BRIDGES)
def test_each_word_has_its_heat_map(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tmp_path / "model"
    ImageCaptioner(BRIDGES[name](), tokenizer(), ImageTransform(32), device="cpu").save_pretrained(model)
    image, sheet, page = tmp_path / "p.png", tmp_path / "words.png", tmp_path / "words.html"
    Scenes(image_size=48, train_size=1).split("train").image(0).save(image)
    words = ["caption", str(image), "--model", str(model), "--device", "cpu"]
    words += ["--force-words", "star", "--max-new-tokens", "6", "--heatmap"]
    for out in (sheet, page):
        code, said, err = mmt(capsys, *words, str(out))
        assert code == 0, err
        assert "star" in said
    with Image.open(sheet) as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > 240  # more than one panel
    text = page.read_text("utf-8")
    assert "star" in text
    assert "data:image" in text
