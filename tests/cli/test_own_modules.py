"""Modules of the user's own that lie in the working folder: recipes name their classes, and commands import them."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtransformer import ImageCaptioner
from mmtransformer.cli.guards.own_modules import look_here, with_imports
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.serialization.printable import program
from support.cli import mmt

MINE = """
from torch import nn
from mmtransformer.connectors.base import Connector


class MyConnector(Connector):
    keeps_tokens = True

    def __init__(self, visual_dim: int, dim: int) -> None:
        super().__init__()
        self.visual_dim, self.dim = visual_dim, dim
        self.proj = nn.Linear(visual_dim, dim)

    def forward(self, visual_tokens, mask=None):
        return self.proj(visual_tokens)


class Pools(MyConnector):
    keeps_tokens = False

    def forward(self, visual_tokens, mask=None):
        return self.proj(visual_tokens.mean(2, keepdim=True))


class Unannotated:
    languages = ()

    def splits(self) -> tuple[str, ...]:
        return ("train", "val")

    def split(self, name):
        raise ValueError(name)


class Lacking:
    languages = ()

    def splits(self):
        return ("train", "val")


class Forgets(MyConnector):
    def __init__(self, visual_dim: int, dim: int, heads: int = 2) -> None:
        super().__init__(visual_dim, dim)
"""
SMALL = [f"--model.captioner.{part}.depth=1" for part in ("vision", "decoder")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a module of one's own, which the path does not lead to."""
    (tmp_path / "mine.py").write_text(MINE, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", ".", str(tmp_path))])
    yield tmp_path
    sys.modules.pop("mine", None)


def connector(name: str) -> list[str]:
    key = "--model.captioner.connector"
    return [*SMALL, f"{key}=mine.{name}", f"{key}.visual_dim=192", f"{key}.dim=192"]


def test_an_own_connector_is_trained_saved_and_captions(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = mmt(capsys, "fit", "--config", "caption_scenes", "--config", "tiny", *connector("MyConnector"))
    assert code == 0, err
    folder = here / "runs" / "caption_scenes" / "model"
    said = [line for line in out.splitlines() if f"{program()} caption" in line]
    assert "--model runs/caption_scenes/model --import mine --language" in said[0]
    shutil.copytree(folder, here / "saved")
    Scenes(image_size=64, train_size=1).split("train").image(0).save(here / "a.png")
    sys.modules.pop("mine")
    code, _, err = mmt(capsys, "caption", "a.png", "--model", "saved", "--min-new-tokens", "2")
    assert code == 2
    assert "saved/config.json: mine.MyConnector is a class of your own: import mine first" in err
    words = ["--import", "mine", "--min-new-tokens", "2", "--language", "ko"]
    code, out, err = mmt(capsys, "caption", "a.png", "--model", "saved", *words)
    assert (code, err) == (0, "")
    assert out
    if (os.cpu_count() or 1) > 1:
        shutil.copy("a.png", "b.png")
        two = [*words, "--device", "cpu", "--devices", "2", "--batch-size", "1"]
        code, both, err = mmt(capsys, "caption", "a.png", "b.png", "--model", "saved", *two)
        assert (code, err) == (0, "2 pictures captioned\n")
        assert both.count(out.strip()) == 2


def test_heat_maps_end_at_a_connector_that_pools(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = mmt(capsys, "fit", "--config", "caption_scenes", "--config", "tiny", *connector("Pools"))
    assert code == 0, err
    assert (here / "runs" / "caption_scenes" / "gallery.png").is_file()
    (said,) = (line for line in out.splitlines() if f"{program()} caption" in line)
    assert "--heatmap" not in said
    Scenes(image_size=64, train_size=1).split("train").image(0).save(here / "a.png")
    words = ["--model", "runs/caption_scenes/model", "--import", "mine", "--language", "ko", "--device", "cpu"]
    code, out, err = mmt(capsys, "caption", "a.png", *words, "--heatmap", "words.png")
    assert (code, out) == (2, "")
    assert "--heatmap: there are no heat maps behind a Pools: it does not give a token for each patch" in err
    captioner = ImageCaptioner.from_pretrained("runs/caption_scenes/model", device="cpu")
    (captions,) = captioner(["a.png"], language="ko")
    with pytest.raises(ValueError, match="no heat maps behind a Pools"):
        captioner.heatmap("a.png", captions[0])


@pytest.mark.parametrize("command", ["fit", "plan"])
def test_what_could_not_be_saved_is_not_trained(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "caption_scenes", "--config", "tiny", *connector("Forgets")]
    code, out, err = mmt(capsys, command, *words)
    assert code == 2
    assert "connector (mine.Forgets) cannot be saved: its constructor takes heads, and does not keep it" in err
    assert "step" not in out
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No module named 'mine'; no mine.py in this folder, on PYTHONPATH, or installed"),
        ("import nonsense", "No module named 'nonsense'; no nonsense.py in this folder, on PYTHONPATH, or installed"),
        ("import torch", "module 'mine' has no attribute 'MyConnector'"),
    ],
)
def test_a_module_that_cannot_be_found_is_told_where_it_is_looked_for(
    text: str | None, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mine.py").unlink()
    if text is not None:
        (here / "mine.py").write_text(text, "utf-8")
    code, _, err = mmt(capsys, "fit", "--config", "caption_scenes", "--config", "tiny", *connector("MyConnector"))
    assert code == 2
    assert err.endswith(f"mmt fit: error: model.captioner.connector: {said}\n")


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("Unannotated", "def split(self, name: str) -> Pairs"),
        ("Lacking", "def split(self, name: str) -> Pairs; def splits(self) -> tuple[str, ...]"),
    ],
)
def test_a_source_is_told_its_methods(name: str, lacks: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "own.yaml").write_text(f"data: {{init_args: {{source: {{class_path: mine.{name}}}}}}}\n", "utf-8")
    code, _, err = mmt(capsys, "fit", "--config", "caption_flickr8k", "--config", "tiny", "--config", "own.yaml")
    assert code == 2
    assert f"data.source: mine.{name} is no PairSource, whose methods are annotated: {lacks}\n" in err


def test_a_class_in_the_place_of_a_path_is_told_its_key(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "train.py").write_text("raise SystemExit(7)", "utf-8")  # a script that is not run for a table
    words = ["fit", "--config", "caption_scenes", "--config", "tiny", "--data.source"]
    for word, told in (
        ("train.csv", "train.csv does not exist"),
        ("mine.Lacking", "a word alone there is a path: --data.source.class_path=mine.Lacking"),
        ("mine.Absent", "mine.Absent does not exist"),
    ):
        code, _, err = mmt(capsys, *words, word)
        assert (code, err.endswith(f"{told}\n")) == (2, True), err
    (here / "mine.Lacking").mkdir()  # what is there is read
    assert mmt(capsys, *words, "mine.Lacking")[2].startswith("mmt fit: error: mine.Lacking (pictures with text files)")


def test_the_folder_is_looked_in_last_and_only_for_what_is_named_and_there(here: Path) -> None:
    for name in ("json.py", "yaml.py", "data.py", "train.py", "b.parquet", "b.py"):
        (here / name).touch()
    for text in (
        "json.dumps",
        "yaml.X",
        "other.X",
        "--data.source=a",
        "folder/mine.csv",
        "x.mine.csv",
        "class_path: mine",
        "--data.source=train.csv",
        "source: train.tar.gz",
        "source: b.parquet",
    ):
        look_here(f"{text}\n")
        assert str(here) not in sys.path, text
    look_here("class_path: mine.MyConnector\n")
    assert sys.path[-1] == str(here)


def test_modules_to_import_are_named_as_modules(here: Path) -> None:
    assert with_imports(["--a", "--import", "mine", "--b=1", "--import=json"]) == ["--a", "--b=1"]
    assert "mine" in sys.modules
    (here / "broken.py").write_text("1 / 0", "utf-8")
    for words, message in (
        (["--import"], "--import needs the name of a module"),
        (["--import", "nowhere"], "--import nowhere: ModuleNotFoundError: No module named 'nowhere'"),
        (["--import", "mine.py"], "give a module's name, mine, not its file's"),
        (["--import", "broken"], "--import broken: ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(ValueError, match=message):
            with_imports(words)
