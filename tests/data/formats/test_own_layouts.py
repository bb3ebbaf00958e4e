"""Layouts that people make themselves: nothing of them is passed over without a word."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mmtransformer.data.check import check
from mmtransformer.data.pairs import PairFiles


def pictures(folder: Path, count: int = 6, ending: str = "jpg") -> list[str]:
    """Names of pictures in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"사진 {i}.{ending}" for i in range(count)]
    for i, name in enumerate(names):
        Image.new("RGB", (20, 20 + i), (i, 9, 9)).save(folder / name)
    return names


def test_labels_json_by_picture_is_read(tmp_path: Path) -> None:
    names = pictures(tmp_path / "images")
    said = {name: {"ko": f"{i}번 사진", "en": f"photo {i}"} for i, name in enumerate(names)}
    (tmp_path / "labels.json").write_text(json.dumps(said), "utf-8")
    found = PairFiles(tmp_path)
    assert found.describe().startswith("JSON labels.json: 6 pictures, 12 captions; ")
    assert sorted(map(str, found.languages)) == ["en", "ko"]


@pytest.mark.parametrize("name", ["labels.json", "라벨링데이터/labels_01.json", "meta/dataset.labels.json"])
@pytest.mark.parametrize("shape", ["list", "below a key", "COCO", "lines"])
def test_labels_in_a_list_are_read(name: str, shape: str, tmp_path: Path) -> None:
    names = pictures(tmp_path / "원천데이터")
    rows = [
        {"file_name": name, "caption_ko": f"{i}번 사진", "caption_en": f"photo {i}"} for i, name in enumerate(names)
    ]
    path = tmp_path / (name.removesuffix("json") + ("jsonl" if shape == "lines" else "json"))
    path.parent.mkdir(exist_ok=True)
    said: object = rows
    if shape == "below a key":
        said = {"info": {"name": "한국어"}, "data": rows}
    elif shape == "COCO":
        images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
        notes = [{"id": i, "image_id": i, "caption": f"{i}번 사진"} for i in range(len(names))]
        said = {"images": images, "annotations": notes}
    lines = "\n".join(map(json.dumps, rows)) if shape == "lines" else json.dumps(said)
    path.write_text(lines, "utf-8")
    found = PairFiles(tmp_path)
    assert f"6 pictures, {6 if shape == 'COCO' else 12} captions" in found.describe()
    assert "0번 사진" in [caption.text for caption in found.split("train").captions(0)]


def test_labels_beside_texts_are_left_alone(tmp_path: Path) -> None:
    for name in (names := pictures(tmp_path)):
        (tmp_path / name).with_suffix(".txt").write_text("사진 한 장", "utf-8")
    rows = [{"file_name": name, "caption": "cat"} for name in names]
    (tmp_path / "labels.json").write_text(json.dumps(rows), "utf-8")
    assert PairFiles(tmp_path).describe().startswith("pictures with text files: 6 pictures, 6 captions; ")


def test_labels_json_of_classes_is_left_alone(tmp_path: Path) -> None:
    for name in pictures(tmp_path):
        (tmp_path / name).with_suffix(".txt").write_text("사진 한 장", "utf-8")
    (tmp_path / "labels.json").write_text(json.dumps(dict.fromkeys(pictures(tmp_path), "cat")), "utf-8")
    assert PairFiles(tmp_path).describe().startswith("pictures with text files: 6 pictures, 6 captions; ")


@pytest.mark.parametrize("header", ["ko_caption,en_caption", "캡션,영어 캡션", "한국어 설명,영어 설명"])
def test_a_language_may_stand_before_the_word(tmp_path: Path, header: str) -> None:
    rows = "".join(f"{name},{i}번 사진,photo {i}\n" for i, name in enumerate(pictures(tmp_path)))
    (tmp_path / "captions.csv").write_text(f"파일,{header}\n{rows}", "utf-8")
    found = PairFiles(tmp_path)
    assert (sorted(map(str, found.languages)), "12 captions" in found.describe()) == (["en", "ko"], True)
    assert [c.text for c in found.split("train").captions(0)] == ["0번 사진", "photo 0"]


def test_rubbish_of_windows_is_no_manifest_and_what_is_no_picture_is_named(tmp_path: Path) -> None:
    for name in pictures(tmp_path):
        (tmp_path / name).with_suffix(".txt").write_text("사진 한 장", "utf-8")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "원본.NEF").write_bytes(b"II*\0")
    (tmp_path / "원본.txt").write_text("날것", "utf-8")
    found = PairFiles(tmp_path)
    assert found.report.notes == {}
    why = "원본.txt: a caption file without a picture: 원본.NEF is of no kind that is read; save it as JPEG or PNG"
    assert found.report.first["missing picture"] == [why]
    assert found.describe().endswith("; left out 1 of 7 rows: missing picture 1")


def test_captions_that_stand_twice_are_mentioned(tmp_path: Path) -> None:
    names = pictures(tmp_path)
    rows = "".join(f"{name},{i}번 사진\n" for i, name in enumerate(names)) + f"{names[0]},0번 사진\n" * 2
    (tmp_path / "captions.csv").write_text(f"파일,캡션\n{rows}", "utf-8")
    (found,) = (f for f in check(PairFiles(tmp_path)).findings if "several times" in f.what)
    assert (found.count, found.hurts, found.first) == (1, False, ["사진 0.jpg: '0번 사진', 3 times"])
