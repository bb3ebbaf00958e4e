"""Captions in files of the pictures' names, beside them and in folders of their own."""

import json
from pathlib import Path

import pytest

from mmtransformer.data.check import check
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.formats.folders import PARALLEL
from mmtransformer.data.pairs import PairFiles
from support.pair_files import draw, pack, png

IDS = [f"{i:03d}" for i in range(6)]


def captions(source: PairFiles) -> dict[str, list[str]]:
    splits = [source.split(name) for name in source.splits()]
    return {s.name(i): [c.text for c in s.captions(i)] for s in splits for i in range(len(s)) if s.image(i)}


def write(root: Path, pictures: str, texts: str, ids: list[str] = IDS, said: str = "a dog {}") -> None:
    draw(root, [f"{pictures}{i}.png" for i in ids])
    for i in ids:
        path = root / f"{texts}{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(said.format(i), "utf-8")


@pytest.mark.parametrize(
    ("pictures", "texts"),
    [
        ("images/", "labels/"), ("images/", "captions/"), ("사진/", "설명/"), ("", "texts/"), ("images/", ""),
        ("data/images/a/", "data/captions/a/"), ("a/images/", "a/texts/"), ("원천데이터/TS/", "라벨링데이터/TL/"),
    ],
)  # fmt: skip
def test_folders_beside_each_other(pictures: str, texts: str, tmp_path: Path) -> None:
    write(tmp_path / "data", pictures, texts)
    files = {str(p.relative_to(tmp_path / "data")): p.read_bytes() for p in (tmp_path / "data").rglob("*.*")}
    for root in (tmp_path / "data", pack(tmp_path / "data.zip", files)):
        source = PairFiles(root)
        assert {Path(name).stem: said for name, said in captions(source).items()} == {i: [f"a dog {i}"] for i in IDS}
        assert source.report.notes == {PARALLEL: len(IDS)}
        assert not source.report.errors
    assert f"{PARALLEL}: 6" in str(check(tmp_path / "data", progress=False))


def test_every_picture_takes_the_nearest_of_its_name(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path, f"images/{split}/", f"labels/{split}/", said=f"{split} {{}}")
    assert captions(PairFiles(tmp_path)) == {
        f"images/{split}/{i}.png": [f"{split} {i}"] for split in ("train", "val") for i in IDS
    }


def test_a_folder_a_language(tmp_path: Path) -> None:
    write(tmp_path, "images/", "captions/en/")
    write(tmp_path, "images/", "captions/korean/", said="개 {}")
    source = PairFiles(tmp_path)
    assert captions(source) == {f"images/{i}.png": [f"a dog {i}", f"개 {i}"] for i in IDS}
    assert source.languages == ("en", "ko")


def test_what_may_be_of_several_pictures_is_of_none(tmp_path: Path) -> None:
    write(tmp_path, "a/", "captions/")
    draw(tmp_path, [f"b/{i}.png" for i in IDS[:3]])
    source = PairFiles(tmp_path, max_bad_fraction=1)
    assert captions(source) == {f"a/{i}.png": [f"a dog {i}"] for i in IDS[3:]}
    assert source.report.errors == {"no caption file": 6, "missing picture": 3}


def test_one_beside_the_picture_counts(tmp_path: Path) -> None:
    write(tmp_path, "images/", "images/")
    write(tmp_path, "images/", "old/", said="another {}")
    source = PairFiles(tmp_path, max_bad_fraction=1)
    assert captions(source) == {f"images/{i}.png": [f"a dog {i}"] for i in IDS}
    assert source.report.errors == {"missing picture": 6}


@pytest.mark.parametrize("texts", ["images/", "labels/"])
def test_boxes_are_no_captions(texts: str, tmp_path: Path) -> None:
    write(tmp_path, "images/", texts, said="0 0.5 0.5 0.25 0.25\n3 0.1 0.2 0.3 0.4")
    source = PairFiles(tmp_path, max_bad_fraction=1)
    assert source.report.errors == {"boxes or classes in the place of captions": 6}


@pytest.mark.parametrize("labels", ["images/", "labels/", "annotations/", ""])
@pytest.mark.parametrize(
    "content",
    [
        {"caption": "a dog {}", "width": 7},
        {"image": {"file_name": "{}.png"}, "annotations": [{"id": 1, "text": "a dog {}"}]},
        {"info": {"name": "x"}, "annotation": {"captions": ["a dog {}"]}},
        {"이미지": {"파일명": "{}.png"}, "라벨": [{"설명": "a dog {}"}]},
        [{"file_name": "{}.png", "caption": "a dog {}"}],
    ],
)
def test_a_json_file_a_picture(content: object, labels: str, tmp_path: Path) -> None:
    for i in IDS:
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / labels).mkdir(exist_ok=True)
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
        (tmp_path / labels / f"{i}.json").write_text(json.dumps(content, ensure_ascii=False).replace("{}", i), "utf-8")
    source = PairFiles(tmp_path)
    assert captions(source) == {f"images/{i}.png": [f"a dog {i}"] for i in IDS}
    (tmp_path / labels / "000.json").write_text('{"x": 1}')
    (tmp_path / labels / "001.json").write_text("{'x': 1}")
    source = PairFiles(tmp_path, max_bad_fraction=1)
    assert source.report.errors == {"no caption": 1, "not JSON": 1}
    assert "000.json has no key that is called like one" in source.report.first["no caption"][0]


def test_pictures_without_an_ending(tmp_path: Path) -> None:
    for i in IDS:
        (tmp_path / i).write_bytes(png(i))
        (tmp_path / f"{i}.txt").write_text(f"a dog {i}")
    (tmp_path / "notes").write_text("no picture")
    (tmp_path / "notes.txt").write_text("a text of its own")
    source = PairFiles(tmp_path, max_bad_fraction=1)
    assert captions(source) == {i: [f"a dog {i}"] for i in IDS}
    assert source.report.errors == {"missing picture": 1}


@pytest.mark.parametrize("name", ["목록.xls", "설명.hwp", "annotations.xml", "captions.yaml", "a.sqlite"])
def test_files_that_are_not_read_are_mentioned(name: str, tmp_path: Path) -> None:
    draw(tmp_path, [f"{i}.png" for i in IDS])
    (tmp_path / name).write_bytes(b"?")
    (said,) = PairFiles(tmp_path, max_bad_fraction=1).report.first["a manifest that was not read"]
    assert said.startswith(f"{name}: {Path(name).suffix} is not read")
    assert "save them as CSV, JSON or .xlsx" in said


@pytest.mark.parametrize("archive", [False, True])
def test_the_pictures_of_text_files_may_lie_in_a_folder_that_is_named(archive: bool, tmp_path: Path) -> None:
    write(tmp_path, "사진/", "texts/")
    draw(tmp_path, ["사진/900.png"])
    photos = tmp_path / "사진"
    if archive:
        photos = pack(tmp_path / "photos.zip", {path.name: path.read_bytes() for path in photos.iterdir()})
    alone = check(tmp_path / "texts", progress=False)
    assert (alone.findings[0].what, alone.findings[0].count) == ("missing picture", len(IDS))
    assert "--image-folder FOLDER (data.read.image_folder)" in alone.findings[0].remedy  # which works:
    source = PairFiles(tmp_path / "texts", ReadOptions(image_folder=str(photos)), max_bad_fraction=0)
    assert captions(source) == {f"{i}.png": [f"a dog {i}"] for i in IDS}
    assert source.report.notes == {"pictures without a caption file, left out": 1}
    (tmp_path / "texts/007.txt").write_text("a dog")
    assert PairFiles(tmp_path / "texts", ReadOptions(image_folder=str(photos))).report.errors == {"missing picture": 1}
