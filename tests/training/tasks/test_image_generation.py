"""Image generation as a task: a run from YAML to its folder, scores that follow from the seed, and what is refused."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mmtransformer import DiffusionTransformer, ImageGenerationConfig, ImageGenerator, TextEncoder, TextToImageModel
from mmtransformer.data.open_sources import open_pairs
from mmtransformer.data.scenes.facts import judge_facts
from mmtransformer.data.scenes.meaning import Facts, GroupFacts
from mmtransformer.data.scenes.scenes import Scenes, SceneSplit
from mmtransformer.data.scenes.world import Group
from mmtransformer.training import ImageGeneration
from mmtransformer.training.evaluation.drawn_facts import (
    SEED,
    DrawnFacts,
    compare_seeds,
    reader_accuracy,
    score_drawings,
    texts_of,
)
from mmtransformer.training.tasks.image_generation import draw_captions
from support.cli import mmt

ENCODER = {"vocab_size": 300, "dim": 12, "depth": 1, "num_heads": 2, "max_len": 96, "pooler": False, "dropout": 0.0}
TRANSFORMER: dict[str, Any] = {"patch_size": 16, "dim": 16, "depth": 1, "num_heads": 2, "context_dim": 12}


def recipe(**model) -> dict:
    scenes = {"train_size": 12, "val_size": 4, "compositional_size": 4}
    return {
        "seed_everything": 0,
        "trainer": {"max_epochs": 1, "max_steps": 3, "accelerator": "cpu", "log_every_n_steps": 1},
        "model": {
            "class_path": "mmtransformer.training.ImageGeneration",
            "init_args": {
                "model": {
                    "class_path": "mmtransformer.TextToImageModel",
                    "init_args": {
                        "text": {"class_path": "mmtransformer.TextEncoder", "init_args": ENCODER},
                        "transformer": {"class_path": "mmtransformer.DiffusionTransformer", "init_args": TRANSFORMER},
                    },
                },
                "generation": {"num_inference_steps": 2},
                "num_test_images": 2,
                "guidance_scales": [1.0, 4.0],
                "num_gallery_images": 4,
            }
            | model,
        },
        "data": {
            "class_path": "mmtransformer.data.CaptionData",
            "init_args": {
                "source": {"class_path": "mmtransformer.data.Scenes", "init_args": scenes},
                "transform": {"image_size": 64},
                "vocab_size": 300,
                "batch_size": 4,
                "max_len": 96,
                "splits": {"val": ["val", "compositional"]},
            },
        },
    }


def test_a_run_from_its_recipe_to_a_drawing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("draw.yaml").write_text(yaml.safe_dump(recipe()), "utf-8")
    code, out, errors = mmt(capsys, "fit", "--config", "draw.yaml")
    assert code == 0, errors
    assert " pictures/s" in out
    assert " tokens/s" not in out  # a loss a picture, so it would be the same number
    run = tmp_path / "runs" / "draw"
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    assert metrics["drawings"].keys() == metrics["reader"].keys() == {"val", "compositional"}
    assert metrics["drawings"]["val"].keys() == {"en", "ko"}
    assert metrics["reader"]["val"]["facts"] > 0.8
    assert metrics["guidance"]["val"].keys() == {"1.0", "4.0"}
    assert metrics["seeds"]["val"].keys() == {"facts", "other_facts", "same", "pixels", "texts"}
    assert metrics["training"]["steps"] == 3
    assert (run / "gallery.png").stat().st_size > 1000
    painter = ImageGenerator.from_pretrained(run / "model", device="cpu")
    assert painter.generation == ImageGenerationConfig(num_inference_steps=2)
    words = ["draw", "빨간 별", "--model", str(run / "model"), "--out", "one.png", "--strip", "strip.png"]
    assert mmt(capsys, *words)[0] == 0
    assert Path("one.png").is_file()


def test_of_own_data_captions_are_drawn_beside_their_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    rows = ["image,caption,split"]
    for i in range(9):
        Image.new("RGB", (40 + i, 30), (20 * i, 90, 200)).save(f"own/{i}.png")
        rows.append(f"{i}.png,it's picture {i}{' of several' * i},{'train' if i < 6 else 'val'}")
    Path("own/captions.csv").write_text("\n".join(rows), "utf-8")
    Path("own/6.png").write_bytes(b"no picture")
    Path("draw.yaml").write_text(yaml.safe_dump(recipe()), "utf-8")
    words = ["fit", "--config", "draw.yaml", "--data.source", "own", "--trainer.max_steps", "2"]
    code, out, errors = mmt(capsys, *words)
    assert code == 0, errors
    run = Path("runs/draw")
    text = "it's picture 7" + " of several" * 7
    card = (run / "model" / "README.md").read_text("utf-8")
    assert f'painter("{text}")' in card
    loss = json.loads((run / "metrics.json").read_text("utf-8"))["loss"]["val"]
    assert f"val: loss {loss:.4f}" in card
    assert f"val: loss {loss:.4f}" in out
    assert "1 picture could not be read" in out
    assert "of true pictures" not in out
    assert f"gallery   {run / 'gallery.png'}" in out
    assert (run / "gallery.png").stat().st_size > 1000
    told = shlex.split(out[out.index("Draw something of your own:") :].splitlines()[1])
    assert told[told.index("draw") + 1] == text
    painter = ImageGenerator.from_pretrained(run / "model", device="cpu")
    cards = draw_captions(painter, open_pairs("own").split("val"), 5)
    assert [(c.heading, c.captions[0].text) for c in cards] == [
        (f"{i}.png", f"it's picture {i}" + " of several" * i) for i in (7, 8)
    ]
    assert cards[0].image.size == (2 * 64 + 4, 64)
    assert cards[0].image.getpixel((32, 32)) == (140, 90, 200)


@pytest.mark.parametrize("limit", ["0", "0.0"])
def test_a_run_without_validation_ends_with_scores_of_one_batch(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("draw.yaml").write_text(yaml.safe_dump(recipe(guidance_scales=[])), "utf-8")
    words = ["fit", "--config", "draw.yaml", "--trainer.max_steps", "1", "--trainer.limit_val_batches", limit]
    code, out, errors = mmt(capsys, *words)
    assert code == 0, errors
    assert "one batch of each split, as limit_val_batches is 0" in out
    assert json.loads(Path("runs/draw/metrics.json").read_text("utf-8"))["drawings"]["val"]


def model() -> TextToImageModel:
    torch.manual_seed(0)
    return TextToImageModel(TextEncoder(**ENCODER), DiffusionTransformer(**TRANSFORMER))


def test_validations_see_the_same_noise() -> None:
    task = ImageGeneration(model())
    added: list[float] = []
    task.add = lambda split, name, loss: added.append(loss.sum.item())  # type: ignore[method-assign]
    task._trainer = SimpleNamespace(datamodule=None, testing=False, num_val_batches=[1])  # type: ignore[assignment]
    from mmtransformer import CaptionBatch

    tokens = torch.randint(3, 300, (2, 5))
    batch = CaptionBatch(tokens, tokens > 0, tokens > 0, pixels=torch.randn(2, 1, 3, 32, 32))
    head = task.model.transformer.head
    assert head is not None
    torch.nn.init.normal_(head.weight)
    for number in (0, 0, 1):
        torch.manual_seed(number + len(added))
        task.validation_step(batch, number)
    assert added[0] == added[1] != added[2]


def firsts(split: SceneSplit) -> list[tuple[int, Group]]:
    return [(i, split.scene(i).groups[0]) for i in range(6)]


def said(group: Group, **changes: Any) -> GroupFacts:
    return replace(GroupFacts.of(group), **changes)


def test_true_pictures_are_scored_as_the_reader_reads_them() -> None:
    """A painter that draws the truth gets what the reader gets right of it, and one that draws another less."""
    split = Scenes(val_size=6).split("val")

    class Truth:
        generation = ImageGenerationConfig()

        def __init__(self, shift: int) -> None:
            self.shift = shift

        def __call__(self, texts: list[str], **_) -> list[list]:
            return [[split.image((i + self.shift) % 6)] for i in range(len(texts))]

    best = reader_accuracy(split, 6).to_dict()
    found, drawings = score_drawings(Truth(0), split, "ko", 6)  # type: ignore[arg-type]
    assert found.to_dict() == best
    assert len(drawings) == 6
    facts = [group for i in range(6) for group in split.scene(i).groups]
    large = DrawnFacts([judge_facts(Facts((said(group, size="large"),)), split.scene(i)) for i, group in firsts(split)])
    shares = large.to_dict()["parts"]
    assert shares["shape"] == shares["color"] == shares["count"] == pytest.approx(6 / len(facts))
    assert shares["size"] == pytest.approx(sum(group.size == "large" for _, group in firsts(split)) / len(facts))
    assert shares["size"] < shares["shape"]
    wrong, _ = score_drawings(Truth(1), split, "ko", 6)  # type: ignore[arg-type]
    assert wrong.right.recall < best["facts"] / 2
    assert texts_of(split, "ko", 2) == [next(c.text for c in split.captions(i) if c.language == "ko") for i in range(2)]


def test_two_seeds_of_a_text_are_compared() -> None:
    """The second drawing is of another seed: of the same scene, or of the next one."""
    split = Scenes(val_size=6).split("val")
    true = [split.image(i) for i in range(6)]

    class Painter:
        generation = ImageGenerationConfig()

        def __init__(self, shift: int) -> None:
            self.shift = shift

        def __call__(self, texts: list[str], *, seed: range, **_) -> list[list]:
            away = self.shift if seed[0] != SEED else 0
            assert len({*seed, *range(SEED, SEED + 6)}) == (12 if seed[0] != SEED else 6)
            return [[true[(i + away) % 6]] for i in range(len(texts))]

    same = compare_seeds(Painter(0), split, "en", true)  # type: ignore[arg-type]
    assert same["same"] == 1
    assert same["facts"] == same["other_facts"] == reader_accuracy(split, 6).right.recall
    assert same["pixels"] == 0 < same["texts"]
    other = compare_seeds(Painter(1), split, "en", true)  # type: ignore[arg-type]
    assert other["same"] == 0
    assert other["other_facts"] < other["facts"]
    assert other["pixels"] > 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_test_images": 0}, "num_test_images"), ({"num_gallery_images": -1}, "num_gallery_images")],
)
def test_numbers_without_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageGeneration(model(), **settings)


def test_patches_that_do_not_divide_the_pictures_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = recipe()
    given["model"]["init_args"]["model"]["init_args"]["transformer"]["init_args"] = TRANSFORMER | {"patch_size": 5}
    Path("draw.yaml").write_text(yaml.safe_dump(given), "utf-8")
    code, _, errors = mmt(capsys, "fit", "--config", "draw.yaml")
    assert code == 2
    assert "64 x 64 px are not divided by the model's patches of 5 px" in errors
