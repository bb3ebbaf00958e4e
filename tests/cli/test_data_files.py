"""A file given as data is data, whatever is in it: the parser does not take it for a configuration."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mmtransformer import ImageCaptioner, ImageTransform, TextDecoder, Tokenizer, VisionEncoderDecoder, ViT
from mmtransformer.cli import main
from support.cli import mmt

ROWS = [(f"p{i}.png", f"a {color} star") for i, color in enumerate(["red", "blue", "green"] * 3)]


def table(between: str, rows: list[tuple[str, str]] = ROWS) -> str:
    return "\n".join(between.join(row) for row in [("image", "caption"), *rows]) + "\n"


LISTED = [{"image": image, "caption": caption} for image, caption in ROWS]
FILES: dict[str, tuple[str, bytes]] = {
    "csv": ("captions.csv", table(",").encode()),
    "a csv that is no YAML": ("captions.csv", table(",", [(image, f"a star: {c}: x") for image, c in ROWS]).encode()),
    "a csv of one row": ("captions.csv", table(",", ROWS[:1]).encode()),
    "a large csv": ("captions.csv", table(",", ROWS * 5000).encode()),  # more than a recipe may have
    "a csv with a mark": ("captions.csv", table(",").encode("utf-8-sig")),
    "tsv": ("captions.tsv", table("\t").encode()),
    "utf-16 csv": ("captions.csv", table(",").encode("utf-16")),
    "cp949 csv": ("captions.csv", table(",", [(image, "빨간 별") for image, _ in ROWS]).encode("cp949")),
    "jsonl": ("captions.jsonl", "\n".join(json.dumps(row) for row in LISTED).encode()),
    "json": ("captions.json", json.dumps(LISTED).encode()),
    "a json of one mapping": ("captions.json", json.dumps({"annotations": LISTED}).encode()),
    "txt": ("captions.txt", table("\t").encode()),
    "yaml": ("captions.yaml", b"class_path: os.system\ninit_args: {command: ls}\n"),
    "no ending": ("captions", b"mmtransformer.data.PairSource\n"),
}
SPELLINGS: dict[str, Callable[[str], list[str]]] = {
    "two words": lambda file: ["--data.source", file],
    "one word": lambda file: [f"--data.source={file}"],
    "an overlay": lambda file: ["--config", overlay({"source": file})],
    "an overlay's init_args": lambda file: ["--config", overlay({"init_args": {"source": file}})],
}  # fmt: skip


def overlay(data: dict[str, Any]) -> str:
    Path("overlay.yaml").write_text(yaml.safe_dump({"data": data}))
    return "overlay.yaml"


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The configuration that the parser makes of them."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--debug", *words, "--print_config"])
    assert not stop.value.code
    return yaml.safe_load(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_data_stays_a_path(kind: str, spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, content = FILES[kind]
    Path(name).write_bytes(content)
    found = printed(["--config", "finetune_pairs", "--config", "tiny", *SPELLINGS[spelling](name)], capsys)
    assert found["data"]["init_args"]["source"] == name


@pytest.mark.parametrize("recipe", ["finetune_hub", "finetune_clip"])
def test_in_other_recipes_too(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("captions.csv").write_text(table(","))
    for words in SPELLINGS.values():
        found = printed(["--config", recipe, *words("captions.csv")], capsys)
        assert found["data"]["init_args"]["source"] == "captions.csv"


def test_a_tokenizers_file_and_a_text_stay_paths(capsys: pytest.CaptureFixture[str]) -> None:
    """Other arguments that are a class or a text, and those that may be a list of texts."""
    Path("captions.csv").write_text(table(","))
    Path("tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}}))
    words = ["--data.source=captions.csv", "--data.tokenizer=tokenizer.json"]
    found = printed(["--config", "finetune_pairs", *words], capsys)
    assert found["data"]["init_args"]["tokenizer"] == "tokenizer.json"
    Path("data.yaml").write_text("max_scenes: null\n")
    for kind in ("classes.ClassData", "translation.TranslationData", "text_only.texts.TextData"):
        words = ["--model=mmtransformer.training.Captioning", f"--data=mmtransformer.data.{kind}"]
        found = printed(["--config", "data.yaml", *words, "--data.source=captions.csv"], capsys)
        assert found["data"]["init_args"]["source"] == "captions.csv"


def test_a_part_may_still_be_a_file_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    Path("captions.csv").write_text(table(","))
    kind = "mmtransformer.data.CaptionData"
    for name, write in (("data.yaml", yaml.safe_dump), ("data.json", json.dumps)):
        Path(name).write_text(write({"class_path": kind, "init_args": {"source": "captions.csv", "batch_size": 3}}))
        found = printed(["--config", "finetune_pairs", f"--data={name}"], capsys)
        assert found["data"]["init_args"]["source"] == "captions.csv"
        assert found["data"]["init_args"]["batch_size"] == 3
    Path("image.yaml").write_text("class_path: mmtransformer.ImageTransform\ninit_args: {image_size: 48}\n")
    Path("optim.yaml").write_text("lr: 0.125\n")
    Path("trainer.yaml").write_text("max_epochs: 7\n")
    words = ["--data.source=captions.csv", "--data.transform=image.yaml", "--trainer=trainer.yaml"]
    found = printed(["--config", "finetune_pairs", *words, "--model.optim=optim.yaml"], capsys)
    assert found["data"]["init_args"]["source"] == "captions.csv"
    assert "48" in json.dumps(found["data"]["init_args"]["transform"])
    assert found["trainer"]["max_epochs"] == 7
    assert found["model"]["init_args"]["optim"]["lr"] == 0.125


@pytest.mark.parametrize("path", ["mmtransformer.data.Scenes", "mmtransformer.data.scenes.scenes.Scenes"])
def test_a_class_has_a_short_path_and_that_of_its_file(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is what a run saves as config.yaml, and can be run again."""
    found = printed(["--config", "caption_scenes", f"--data.source={path}"], capsys)
    assert found["data"]["init_args"]["source"]["class_path"] == path
    Path("config.yaml").write_text(yaml.safe_dump(found))
    assert printed(["--config", "config.yaml"], capsys)["data"] == found["data"]


def test_a_source_may_still_be_named_with_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(["--config", "caption_scenes", "--data.source.train_size=8"], capsys)
    assert found["data"]["init_args"]["source"]["init_args"]["train_size"] == 8


def test_a_run_reads_the_table_that_it_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parsed, built, trained and written: the parser looks at its values each time."""
    for image, _ in ROWS:
        Image.new("RGB", (24, 24), "red").save(image)
    Path("captions.csv").write_text(table(","))
    decoder = TextDecoder(300, 16, 1, 2, max_len=24, context_dim=16)
    captioner = VisionEncoderDecoder(ViT(16, 8, 16, 1, 2, class_token=False, pool="mean"), decoder)
    tokenizer = Tokenizer.train([caption for _, caption in ROWS], 300)
    ImageCaptioner(captioner, tokenizer, ImageTransform(16), device="cpu").save_pretrained(folder / "model")
    words = [
        "--model.init=model",
        "--data.source=captions.csv",
        "--data.max_len=24",
        "--trainer.enable_progress_bar=false",
    ]
    code, _, err = mmt(capsys, "fit", "--config", "finetune_pairs", "--config", "tiny", *words)
    assert code == 0, err
    written = yaml.safe_load(Path("runs/finetune_pairs/config.yaml").read_text("utf-8"))
    assert written["data"]["init_args"]["source"] == "captions.csv"
    logging.getLogger("lightning.fabric").setLevel(logging.INFO)
    code, out, err = mmt(capsys, "plan", "finetune_pairs", "--config", "tiny", *words)
    assert logging.getLogger("lightning.fabric").level == logging.WARNING, "it says which seed it has set, three times"
    assert code == 0, err
    assert "weights" in out


@pytest.mark.parametrize(
    ("words", "key", "meant"),
    [
        (["--data.read.encodng", "cp949"], "data.read.encodng", "data.read.encoding"),
        (["--data.read.encodng=cp949"], "data.read.encodng", "data.read.encoding"),
        (["--data.read.max_bad_fraction=0.1"], "data.read.max_bad_fraction", "data.loader.max_bad_fraction"),
        (["--model.optim.lrr=3"], "model.optim.lrr", "model.optim.lr"),
        (["--config=keys.yaml"], "data.read.encodng", "data.read.encoding"),
        # Abbreviations are no keys, wherever they stand.
        (["--data.loader.num_worker=2"], "data.loader.num_worker", "data.loader.num_workers"),
        (["--data.init_args.loader.num_worker", "2"], "data.loader.num_worker", "data.loader.num_workers"),
        (["--model.optim.warmup=3"], "model.optim.warmup", "model.optim.warmup_steps"),
        (
            ["--config=caption_scenes", "--data.image.image_size=32"],
            "data.image.image_size",
            "data.transform.image_size",
        ),
        (["--config=short.yaml"], "data.loader.num_worker", "data.loader.num_workers"),
        (["--config=trainer.yaml"], "trainer.max_step", "trainer.max_steps"),
        (
            ["--config=caption_scenes", "--model.captioner.vision.block.drop=1"],
            "model.captioner.vision.block.drop",
            "model.captioner.vision.block.dropout",
        ),
        # Names that transformers or older versions have for the same.
        (
            ["--config=flamingo_scenes", "--model.captioner.cross_layer_interval=2"],
            "model.captioner.cross_layer_interval (mmtransformer.Flamingo has none)",
            "cross_attn_every_n_layers",
        ),
        (
            ["--config=flamingo_scenes", "--model.captioner.gated.mlp=relu"],
            "model.captioner.gated.mlp",
            "model.captioner.gated.activation",
        ),
        (
            ["--config=few_shot_scenes", "--data.max_len=80"],
            "data.max_len (mmtransformer.data.InterleavedData has none)",
            "row_len",
        ),
        (["--config=llava.yaml"], "model.captioner.connector (mmtransformer.Llava has none)", "projector"),
    ],
)
def test_a_mistyped_key_is_named_whole(
    words: list[str], key: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("captions.csv").write_text(table(","))
    Path("keys.yaml").write_text("data: {read: {encodng: cp949}}\n")
    Path("short.yaml").write_text("data: {init_args: {loader: {num_worker: 2}}}\n")
    Path("trainer.yaml").write_text("trainer: {max_step: 2}\n")
    connector = "{class_path: mmtransformer.MLPProjector, init_args: {visual_dim: 8, dim: 8}}"
    captioner = f"{{class_path: mmtransformer.Llava, init_args: {{connector: {connector}}}}}"
    task = f"{{class_path: mmtransformer.training.Captioning, init_args: {{captioner: {captioner}}}}}"
    Path("llava.yaml").write_text(f"model: {task}\n")
    code, _, err = mmt(capsys, "fit", "--config", "finetune_pairs", "--data.source=captions.csv", *words)
    assert code == 2
    assert f'no such key: {key}; did you mean "{meant}"?' in err
    assert err.count("\n") == 1


def test_a_key_that_stands_one_level_lower_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("captions.csv").write_text(table(","))
    words = ["--config", "finetune_pairs", "--data.source=captions.csv", "--data.num_worker=2"]
    code, _, err = mmt(capsys, "fit", *words)
    assert code == 2
    assert "no such key: data.num_worker (" in err
    assert 'did you mean "data.loader.num_workers"?' in err


@pytest.mark.parametrize("none", ["=null", "=None", " None"])
def test_every_key_that_may_be_null_takes_it(none: str, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("data.read.encoding", "model.captioner.vision.mlp_dim", "model.generation.top_k")
    words = [word for key in (*keys, "trainer.check_val_every_n_epoch") for word in f"--{key}{none}".split()]
    found = printed(["--config", "caption_scenes", "--config", "tiny", *words], capsys)
    model, data = found["model"]["init_args"], found["data"]["init_args"]
    assert data["read"]["encoding"] is model["captioner"]["init_args"]["vision"]["init_args"]["mlp_dim"] is None
    assert model["generation"]["top_k"] is found["trainer"]["check_val_every_n_epoch"] is None
