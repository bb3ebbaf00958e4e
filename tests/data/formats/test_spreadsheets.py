"""What spreadsheets, Windows and downloads leave: empty rows, `sep=`, numbers written anew, other case, pointers."""

import io
import json
import re
import unicodedata
import zipfile
from pathlib import Path
from typing import get_args

import pytest

from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.columns import Columns, find_columns
from mmtransformer.data.files.endings import IMAGES, UNREAD
from mmtransformer.data.files.read_options import Format, ReadOptions
from mmtransformer.data.files.shards import ShardError, TarShards
from mmtransformer.data.files.tables import read_table
from mmtransformer.data.formats import manifests
from mmtransformer.data.formats.readers import BY_SUFFIX, FORMATS, SUFFIXES
from mmtransformer.data.image_files import ImageFiles
from mmtransformer.data.open_sources import open_pairs
from mmtransformer.data.pairs import PairFiles
from support.pair_files import colour, draw, png

ALL = ReadOptions(val_fraction=0)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def captions(root: Path) -> dict[str, list[str]]:
    """Name -> captions, where every picture is the one that its first caption names."""
    split = open_pairs(root, ALL, max_bad_fraction=0).split("train")
    for i in range(len(split)):
        assert split.image(i).getpixel((0, 0)) == colour(split.captions(i)[0].text)
    return {split.name(i): [caption.text for caption in split.captions(i)] for i in range(len(split))}


def pictures(root: Path, *names: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(Path(name).stem))


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_rows_that_nobody_has_filled_in_are_no_rows(mark: str, tmp_path: Path) -> None:
    pictures(tmp_path, "1.png", "2.png")
    rows = ["Image File,Caption,,", "1.png,a dog 1,,", ",,,", "2.png,a dog 2,,", '"",,"",', " , ,,", ",,,"]
    (tmp_path / "Captions - Sheet1.csv").write_text("\r\n".join(rows).replace(",", mark) + "\r\n")
    source = open_pairs(tmp_path, ALL)
    assert source.report.rows == 2  # pyright: ignore[reportOptionalMemberAccess]
    assert captions(tmp_path) == {"1.png": ["a dog 1"], "2.png": ["a dog 2"]}
    (tmp_path / "Captions - Sheet1.csv").write_text("\n".join(["image,caption", "1.png,", ",a dog"]))
    with pytest.raises(ValueError, match="2 of 2 rows can't be used"):
        open_pairs(tmp_path, ALL)


@pytest.mark.parametrize("first", ["sep=;", "SEP=; ", "\ufeffsep=;"])
def test_the_first_line_that_excel_writes_is_no_header(first: str, tmp_path: Path) -> None:
    pictures(tmp_path, "1.png", "2.png")
    (tmp_path / "book.csv").write_text("\r\n".join([first, "Datei;Text", "1.png;a dog 1", "2.png;a dog, 2"]), "utf-8")
    assert captions(tmp_path) == {"1.png": ["a dog 1"], "2.png": ["a dog, 2"]}


@pytest.mark.parametrize("name", ["Caption (EN)", "caption [English]", "Caption - en", "caption: en", "Caption.EN"])
def test_a_language_in_brackets_is_one(name: str) -> None:
    columns = find_columns(["image", name, "캡션 (한국어)"], ReadOptions().wanted, "t.csv")
    assert columns.captions == ((name, "en"), ("캡션 (한국어)", "ko"))


def test_columns_without_a_name_are_not_listed() -> None:
    with pytest.raises(ValueError, match=r"its columns are: a, b\. Name it"):
        read_table(b"a,b,,\n1,2,,\n", "t.csv", ReadOptions().wanted)
    columns, _ = read_table(b",image,caption\n0,1.png,a dog\n", "t.csv", ReadOptions().wanted)  # pandas' index
    assert columns == Columns("image", (("caption", None),))


@pytest.mark.parametrize("said", ["{}", "{}.0", "0{}"])
def test_numbers_that_a_spreadsheet_has_written_anew(said: str, tmp_path: Path) -> None:
    pictures(tmp_path / "photos", *(f"{i:05d}.png" for i in range(7, 12)))
    rows = [f"{said.format(i)},a dog {i}" for i in range(7, 12)]
    (tmp_path / "t.csv").write_text("\n".join(["image_id,caption", *rows]))
    found = captions(tmp_path)
    assert sorted(text for texts in found.values() for text in texts) == sorted(f"a dog {i}" for i in range(7, 12))
    pictures(tmp_path / "others", "007.png")
    with pytest.raises(ValueError, match=r"'7' may be|'7\.0' may be|'07' may be"):
        open_pairs(tmp_path, ALL, max_bad_fraction=0)


def test_names_that_differ_in_upper_and_lower_case(tmp_path: Path) -> None:
    pictures(tmp_path, "photos/IMG 1.JPG", "photos/img 2.jpg", "photos/Bär 3.PNG")
    rows = ["photos/IMG 1.jpg,a dog 1", "Photos/img 2.jpg,a dog 2", "photos/BÄR 3.png,a dog 3"]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]), "utf-8")
    assert len(captions(tmp_path)) == 3
    source = open_pairs(tmp_path, ALL)
    assert source.report.notes == {"names that differ in upper and lower case": 3}  # pyright: ignore
    pictures(tmp_path, "photos/IMG 1.Jpg")
    with pytest.raises(ValueError, match="missing picture"):  # either may be meant
        open_pairs(tmp_path, ALL, max_bad_fraction=0)
    (tmp_path / "t.csv").write_text("image,caption\nphotos/IMG 1.JPG,a dog 1\nphotos/IMG 1.Jpg,a dog 1", "utf-8")
    assert len(captions(tmp_path)) == 2


def test_texts_beside_pictures_whose_names_are_spelt_in_the_other_unicode_form(tmp_path: Path) -> None:
    name = "고양이 사진😺👍🏽 1"
    for picture, text in (("NFD", "NFC"), ("NFC", "NFD")):
        root = tmp_path / picture
        root.mkdir()
        (root / f"{unicodedata.normalize(picture, name)}.png").write_bytes(png("1"))
        (root / f"{unicodedata.normalize(text, name)}.ko.txt").write_text("고양이 1")
        assert list(captions(root).values()) == [["고양이 1"]]


@pytest.mark.parametrize("name", ["data/train-0.parquet", "t.csv", "photos.zip", "t.jsonl", "book.xlsx", "t.own"])
def test_a_pointer_of_git_lfs_is_called_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(POINTER)
    for root in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=r"a Git LFS pointer \(run `git lfs pull`\)"):
            open_pairs(root)


def test_a_shard_that_is_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(POINTER)
    with pytest.raises(ShardError, match=r"0\.tar: a Git LFS pointer"):
        TarShards(str(tmp_path))
    with pytest.raises(ValueError, match="a Git LFS pointer"):
        open_pairs(tmp_path)


def test_an_archive_inside_an_archive_is_named(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("1.png", png("1"))
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.writestr("all/inner.zip", inner.getvalue())
    with pytest.raises(ValueError, match=r"all/inner\.zip: an archive inside an archive.*unpack it"):
        open_pairs(tmp_path / "outer.zip")
    assert "an archive inside" in Files(tmp_path).refused["outer.zip/all/inner.zip"]
    images = ImageFiles([str(tmp_path)])
    with pytest.raises(ValueError, match="an archive inside an archive"):
        images.data(0)


def test_tables_of_parquet_in_any_folder(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for at, (folder, split) in enumerate([("a", "train"), ("b", "train"), ("a", "test")]):
        path = tmp_path / folder / split / "0000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"image": [png(str(at))], "caption": [f"a dog {at}"]}), path)
    source = open_pairs(tmp_path, ALL)
    assert {name: len(source.split(name)) for name in source.splits()} == {"train": 2, "test": 1}
    pictures(tmp_path / "texts", "1.png")
    (tmp_path / "texts/1.txt").write_text("a dog 1")
    (tmp_path / "texts/more/deep").mkdir(parents=True)
    pq.write_table(pa.table({"vector": [1.0]}), tmp_path / "texts/more/deep/vectors.parquet")
    assert captions(tmp_path / "texts") == {"1.png": ["a dog 1"]}


def test_all_sheets_are_read_and_those_called_like_splits_are_these(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    names = [f"{i}.png" for i in range(8)]
    draw(tmp_path, names)
    book = openpyxl.Workbook()
    book.active.append(["a note", "of nobody"])
    for title, some in (("학습", names[:4]), ("검증", names[4:6]), ("평가", names[6:])):
        sheet = book.create_sheet(title)
        sheet.append(["2026년 이미지 설명"])
        sheet.append([])
        sheet.append(["번호", "파일명", "이미지 설명"])
        for i, name in enumerate(some):
            sheet.append([i, name, f"개 {name}"])
    book.save(tmp_path / "목록.xlsx")
    source = PairFiles(tmp_path)
    assert {name: len(source.split(name)) for name in source.splits()} == {"train": 4, "val": 2, "test": 2}
    assert [c.text for c in source.split("test").captions(0)] == ["개 6.png"]
    assert source.report.notes == {"a sheet that was not read": 1}
    assert "목록.xlsx (Sheet)" in source.report.first["a sheet that was not read"][0]


@pytest.mark.parametrize("title", ["2026년 이미지 설명,,,", "Pictures; all of them", "a title"])
def test_titles_above_the_header_are_said(title: str, tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(5)]
    draw(tmp_path, names)
    rows = [title, ",,,", "번호,파일명,이미지 설명,비고", *(f"{i},{name},개 {i}," for i, name in enumerate(names))]
    (tmp_path / "목록.csv").write_text("\n".join(rows), "utf-8")
    source = PairFiles(tmp_path)
    assert "5 pictures, 5 captions; columns image=파일명 caption=이미지 설명" in source.describe()
    assert source.report.first["lines above the header, left out"] == [f"목록.csv:1: {title}"]


@pytest.mark.parametrize("slash", [False, True])
def test_a_column_of_folders(slash: bool, tmp_path: Path) -> None:
    names = [f"{folder}/{i}.png" for folder in ("봄", "가을") for i in range(4)]
    draw(tmp_path, names)
    cells = [[name.partition("/")[0], name if slash else name.partition("/")[2], f"개 {name}"] for name in names]
    (tmp_path / "a.csv").write_text("\n".join(map(",".join, [["폴더명", "파일명", "설명"], *cells])), "utf-8")
    source = PairFiles(tmp_path)
    assert "folder=폴더명" in source.describe()
    splits = [source.split(name) for name in source.splits()]
    found = {s.name(i): s.captions(i)[0].text for s in splits for i in range(len(s)) if s.image(i)}
    assert found == {name: f"개 {name}" for name in names}


@pytest.mark.parametrize("columns", [("prefix", "suffix"), ("query", "response"), ("instruction", "output")])
def test_what_is_asked_and_answered(columns: tuple[str, str], tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(4)]
    draw(tmp_path, names)
    rows = [{"image": name, columns[0]: "describe", columns[1]: f"dog {i}"} for i, name in enumerate(names)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    split = PairFiles(tmp_path).split("train")
    assert {(c.text[:3], c.question) for i in range(len(split)) for c in split.captions(i)} == {("dog", "describe")}


@pytest.mark.parametrize(
    "header", ["대표이미지,상품명", "이미지파일명,캡션1", "사진번호,설명글", "image_file_name,caption_kor"]
)
def test_columns_as_they_are_called_in_korea(header: str, tmp_path: Path) -> None:
    draw(tmp_path, [f"{i}.png" for i in range(4)])
    ending = "" if "번호" in header else ".png"
    (tmp_path / "a.csv").write_text("\n".join([header, *(f"{i}{ending},개 {i}" for i in range(4))]), "utf-8")
    assert "4 pictures, 4 captions" in PairFiles(tmp_path).describe()


def test_every_format_has_a_reader_and_no_ending_two_formats() -> None:
    assert {*get_args(Format)} == {"auto", "folder", *FORMATS}
    endings = [suffix for format in FORMATS.values() for suffix in format.suffixes]
    assert len(endings) == len(set(endings)) == len(BY_SUFFIX)


def test_every_format_is_described_and_none_is_said_to_be_unread() -> None:
    described = re.findall(r"^- (\w+): ", manifests.__doc__ or "", re.MULTILINE)
    assert described == [name for name in get_args(Format) if name != "auto"]
    assert not set(UNREAD) & {*SUFFIXES, *IMAGES}
