"""A run that goes on tells whether its captions or pictures are still what they were."""

import os
import warnings
from pathlib import Path

import pytest
from PIL import Image

from mmtransformer import ImageTransform
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.loading import traces
from support.sources import tokenizer


def data(root: Path) -> CaptionData:
    return CaptionData(str(root), read=ReadOptions(val_fraction=0.3), image=ImageTransform(8), tokenizer=tokenizer())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(20):
        Image.new("RGB", (9, 7), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}\n", "utf-8")
        os.utime(tmp_path / f"{i}.png", (1e9, 1e9))
    return tmp_path


def told(root: Path, state: dict) -> str:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        data(root).load_state_dict(state)
    return "\n".join(str(warning.message) for warning in found)


def test_what_has_changed_is_told_by_name(root: Path) -> None:
    state = data(root).state_dict()
    split = data(root).pairs("train")
    first, second = split.name(0), split.name(1)
    assert told(root, state) == ""
    (root / f"{Path(first).stem}.txt").write_text("something else\n", "utf-8")
    assert f"the captions of 1 pictures ({first}) of 'train'" in told(root, state)
    assert "no longer the one that it would have been" in told(root, state)
    Image.new("RGB", (9, 7), "blue").save(root / second)
    os.utime(root / second, (2e9, 2e9))
    said = told(root, state)
    assert f"the captions of 1 pictures ({first}) and the files of 1 pictures ({second}) of 'train'" in said
    assert "'val'" not in said
    outside = data(root).pairs("val").name(0)
    os.utime(root / outside, (2e9, 2e9))
    assert f"the files of 1 pictures ({outside}) of 'val'" in told(root, state)
    assert told(root, {key: value for key, value in state.items() if key != "traces"}) == ""  # of a run of before


def test_another_number_of_pictures_is_told(root: Path) -> None:
    state = data(root).state_dict()
    state["traces"]["val"] = state["traces"]["val"][:-1]
    count = len(data(root).pairs("val"))
    assert f"{count - 1} pictures have become {count} of 'val'" in told(root, state)


def test_of_very_many_files_some_are_asked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "_MOST_FILES", 4)
    found = data(root)
    asked = (found.traces("train")[:, 1] != 0).sum()
    assert 2 <= int(asked) <= 4
    assert (found.traces("train")[:, 0] != 0).all()
