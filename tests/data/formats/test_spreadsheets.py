"""What spreadsheets, Windows and downloads leave: empty rows, `sep=`, numbers written anew, other case, pointers."""

import io
import unicodedata
import zipfile
from pathlib import Path

import pytest

from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.files.shards import ShardError, Shards
from mmtransformer.data.files.tables import Columns, find_columns, read_table
from mmtransformer.data.image_files import ImageFiles
from mmtransformer.data.opening import open_pairs
from support.pair_files import colour, png

ALL = ReadOptions(val_fraction=0)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def captions(root: Path) -> dict[str, list[str]]:
    """Name -> captions, where every picture is the one that its first caption names."""
    split = open_pairs(root, ALL, max_bad=0).split("train")
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
        open_pairs(tmp_path, ALL, max_bad=0)


def test_names_that_differ_in_upper_and_lower_case(tmp_path: Path) -> None:
    pictures(tmp_path, "photos/IMG 1.JPG", "photos/img 2.jpg", "photos/Bär 3.PNG")
    rows = ["photos/IMG 1.jpg,a dog 1", "Photos/img 2.jpg,a dog 2", "photos/BÄR 3.png,a dog 3"]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]), "utf-8")
    assert len(captions(tmp_path)) == 3
    source = open_pairs(tmp_path, ALL)
    assert source.report.notes == {"names that differ in upper and lower case": 3}  # pyright: ignore
    pictures(tmp_path, "photos/IMG 1.Jpg")
    with pytest.raises(ValueError, match="missing picture"):  # either may be meant
        open_pairs(tmp_path, ALL, max_bad=0)
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


@pytest.mark.parametrize("name", ["data/train-0.parquet", "t.csv", "photos.zip", "t.jsonl", "book.xlsx"])
def test_a_pointer_of_git_lfs_is_called_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(POINTER)
    for root in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=r"a Git LFS pointer \(run `git lfs pull`\)"):
            open_pairs(root)


def test_a_shard_that_is_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(POINTER)
    with pytest.raises(ShardError, match=r"0\.tar: a Git LFS pointer"):
        Shards(str(tmp_path))
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
