"""Captions of some languages alone."""

from pathlib import Path

import pytest
from PIL import Image

from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.open_sources import open_pairs
from mmtransformer.data.pairs import PairFiles


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(4):
        Image.new("RGB", (9, 8), (60 * i, 9, 99)).save(tmp_path / f"{i}.png")
        text = "빨간 공" if i == 3 else f"a ball {i}\n공 {i}"
        (tmp_path / f"{i}.txt").write_text(text, "utf-8")
    return tmp_path


@pytest.mark.parametrize("wanted", ["en", ["en"]])
def test_other_languages_are_left_out_and_counted(photos: Path, wanted: str | list[str]) -> None:
    whole = open_pairs(photos, ReadOptions(val_fraction=0.0))
    some = open_pairs(photos, ReadOptions(languages=wanted, val_fraction=0.0))
    assert isinstance(some, PairFiles)
    assert (whole.languages, some.languages) == (("en", "ko"), ("en",))
    split = some.split("train")
    assert [[c.text for c in split.captions(i)] for i in range(len(split))] == [[f"a ball {i}"] for i in range(3)]
    assert "left out: 4 captions in other languages than en, with them 1 picture" in some.describe()
    both = open_pairs(photos, ReadOptions(languages=["ko", "en"], val_fraction=0.0))
    assert len(both.split("train")) == 4
    assert "left out: 0 captions" in both.describe()


def test_a_language_that_is_not_there_is_refused(photos: Path) -> None:
    with pytest.raises(ValueError, match=r"no caption is in de; the languages of the captions: en, ko"):
        open_pairs(photos, ReadOptions(languages="de"))


@pytest.mark.parametrize("none", ["", []])
def test_no_language_at_all_is_refused(none: str | list[str]) -> None:
    with pytest.raises(ValueError, match="languages is empty"):
        ReadOptions(languages=none)
