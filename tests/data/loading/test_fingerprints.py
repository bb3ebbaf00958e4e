"""A run that goes on tells whether its texts or pictures are still what they were."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtransformer import ImageTransform
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.classes import ClassData
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.interleaved_data import InterleavedData
from mmtransformer.data.loading import fingerprints
from mmtransformer.data.loading.module import DataModule
from mmtransformer.data.text_only.masked import MaskedTextData
from mmtransformer.data.text_only.texts import TextData
from mmtransformer.data.translation import TranslationData
from support.sources import tokenizer


def data(root: Path) -> CaptionData:
    return CaptionData(
        str(root), read=ReadOptions(val_fraction=0.3), transform=ImageTransform(8), tokenizer=tokenizer()
    )


def picture(path: Path, color: object = "red", when: float = 1e9) -> None:
    Image.new("RGB", (9, 7), color).save(path)  # type: ignore[arg-type]
    os.utime(path, (when, when))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(20):
        picture(tmp_path / f"{i}.png", (10 * i, 0, 0))
        (tmp_path / f"{i}.txt").write_text(f"picture {i}\n", "utf-8")
    return tmp_path


def told(root: Path, state: dict, make: Callable[[Path], DataModule] = data) -> str:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make(root).load_state_dict(state)
    return "\n".join(str(warning.message) for warning in found)


def test_what_has_changed_is_told_by_name(root: Path) -> None:
    state = data(root).state_dict()
    split = data(root).pairs("train")
    first, second = split.name(0), split.name(1)
    assert told(root, state) == ""
    (root / f"{Path(first).stem}.txt").write_text("something else\n", "utf-8")
    assert f"the captions of 1 picture ({first}) of 'train'" in told(root, state)
    assert "no longer the one that it would have been" in told(root, state)
    picture(root / second, "blue", 2e9)
    said = told(root, state)
    assert f"the captions of 1 picture ({first}) and the files of 1 picture ({second}) of 'train'" in said
    assert "'val'" not in said
    outside = data(root).pairs("val").name(0)
    os.utime(root / outside, (2e9, 2e9))
    assert f"the files of 1 picture ({outside}) of 'val'" in told(root, state)
    assert told(root, {key: value for key, value in state.items() if key != "fingerprints"}) == ""  # of a run of before


def test_another_number_of_pictures_is_told(root: Path) -> None:
    state = data(root).state_dict()
    state["fingerprints"]["val"] = state["fingerprints"]["val"][:-1]
    count = len(data(root).pairs("val"))
    assert f"{count - 1} pictures have become {count} of 'val'" in told(root, state)


def test_of_very_many_files_some_are_asked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_MOST_FILES", 4)
    found = data(root).fingerprints("train")
    assert found is not None
    assert 2 <= int((found[:, 1] != 0).sum()) <= 4
    assert (found[:, 0] != 0).all()


def test_picture_files_of_classes(tmp_path: Path) -> None:
    for i in range(12):
        place = tmp_path / ("train" if i < 8 else "val") / ("가", "나")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture(place / f"{i}.png")

    def make(root: Path) -> ClassData:
        return ClassData(str(root), transform=ImageTransform(8))

    state = make(tmp_path).state_dict()
    assert told(tmp_path, state, make) == ""
    os.utime(tmp_path / "train/가/2.png", (2e9, 2e9))
    said = told(tmp_path, state, make)
    assert "the files of 1 picture (" in said
    assert "2.png) of 'train'" in said
    (tmp_path / "val/가/8.png").rename(tmp_path / "val/나/8.png")
    assert "the classes of " in told(tmp_path, state, make)


def test_texts_and_translations(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"

    def write(changed: str) -> None:
        rows = [{"text": f"number {i} is here", "split": "train" if i < 6 else "val"} for i in range(9)]
        rows[4]["text"] = changed
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    kinds: list[Any] = [TextData, MaskedTextData]
    for kind in kinds:

        def make(root: Path, kind: Any = kind) -> DataModule:
            return kind(str(path), tokenizer=tokenizer())

        write("number 4 is here")
        state = make(tmp_path).state_dict()
        assert told(tmp_path, state, make) == ""
        write("number four is here")
        assert "since the run was saved: 1 text (train 4) of 'train'" in told(tmp_path, state, make)

    table, words = tmp_path / "pairs.csv", tokenizer()

    def pairs(root: Path) -> DataModule:
        return TranslationData(str(table), tokenizer=words)

    rows = [f"text {i},글 {i},{'train' if i < 6 else 'val'}\n" for i in range(9)]
    table.write_text("en,ko,split\n" + "".join(rows), "utf-8")
    state = pairs(tmp_path).state_dict()
    assert told(tmp_path, state, pairs) == ""
    table.write_text("en,ko,split\n" + "".join(rows).replace("글 7", "말 7"), "utf-8")
    said = told(tmp_path, state, pairs)
    assert said.count("the data have changed since the run was saved") == 1
    assert "of 'val'" in said


def test_interleaved_documents(tmp_path: Path) -> None:
    rows = []
    for i in range(8):
        picture(tmp_path / f"{i}.png")
        row = {"id": f"문서 {i}", "split": "train" if i < 5 else "val"}
        rows.append(row | {"texts": ["a", None, f"text {i}"], "images": [None, f"{i}.png", None]})

    def write() -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "documents.jsonl").write_text(text, "utf-8")

    def make(root: Path) -> InterleavedData:
        return InterleavedData(str(root), transform=ImageTransform(8), tokenizer=tokenizer())

    write()
    state = make(tmp_path).state_dict()
    assert told(tmp_path, state, make) == ""
    os.utime(tmp_path / "3.png", (2e9, 2e9))
    rows[2]["texts"][2] = "text 9"  # type: ignore[index]
    write()
    said = told(tmp_path, state, make)
    assert "the texts of 1 document (문서 2) and the files of 1 document (문서 3) of 'train'" in said
