"""`mmt recipes`: what comes with the library is found by its name, in an empty folder too."""

import re
from pathlib import Path

import pytest

from mmtransformer.cli import main, recipes
from support.recipes import NAMES, RECIPES


def test_lists_every_recipe_with_time_and_score(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line[:1].strip()][:-1] == NAMES
    assert all(line.endswith(".") for line in out.splitlines() if line[:1].strip())
    header = (RECIPES / "caption_scenes.yaml").read_text("utf-8")
    time = re.search(r"#   time +(.+? s) of training", header)
    assert time is not None
    assert time[1] in out
    assert re.search(r"val.*9\d\.\d %", out)
    assert "tiny" not in out.split()[0]


def test_shows_and_copies_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (RECIPES / "lm_scenes.yaml").read_text("utf-8")
    assert main(["recipes", "show", "lm_scenes"]) == 0
    assert capsys.readouterr().out == text
    assert main(["recipes", "copy", "lm_scenes"]) == 0
    assert (tmp_path / "lm_scenes.yaml").read_text("utf-8") == text
    assert main(["recipes", "copy", "lm_scenes"]) == 2
    assert "lm_scenes.yaml is there already" in capsys.readouterr().err


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = str(RECIPES / "tiny.yaml")
    assert [recipes.recipe_file(name) for name in ("tiny", "tiny.yaml", "recipes/tiny.yaml")] == [own] * 3
    assert recipes.with_files(["--config", "tiny", "--config=tiny", "--a", "tiny"]) == [
        "--config", own, f"--config={own}", "--a", "tiny",
    ]  # fmt: skip
    (tmp_path / "tiny.yaml").touch()
    assert recipes.recipe_file("tiny.yaml") == "tiny.yaml"
    with pytest.raises(ValueError, match=r'caption_scene: no such recipe; did you mean "caption_scenes"'):
        recipes.recipe_file("caption_scene")
    with pytest.raises(ValueError, match=r"other/tiny\.yaml: no such recipe"):
        recipes.recipe_file("other/tiny.yaml")


def test_an_installed_package_has_them_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    monkeypatch.setattr(recipes, "PACKAGE", tmp_path)
    assert recipes.folder() == tmp_path / "recipes"
