"""Names in tables and files on the disk that are spelt in two ways, and names that only end alike."""

from pathlib import Path

import pytest

from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.loading.errors import TooManyErrors
from mmtransformer.data.pairs import PairFiles
from support.pair_files import NAMES, colour, draw


def found(root: Path, rows: list[tuple[str, str]]) -> tuple[dict[str, str], PairFiles]:
    """Picture -> its caption, for a table of names and captions."""
    text = "\n".join(["image\tcaption", *(f"{name}\t{caption}" for name, caption in rows)])
    (root / "captions.tsv").write_text(text, "utf-8")
    source = PairFiles(root, max_bad_fraction=1)
    splits = [source.split(name) for name in source.splits()]
    assert all(split.image(i) for split in splits for i in range(len(split)))
    return {s.name(i): " / ".join(c.text for c in s.captions(i)) for s in splits for i in range(len(s))}, source


@pytest.mark.parametrize("below", ["", "photos/deep/"])
@pytest.mark.parametrize(
    ("file", "name", "kind"),
    [
        ("a dog {}.png", "a%20dog%20{}.png", "names as URLs write them (%20)"),
        ("강아지 {}.png", "%EA%B0%95%EC%95%84%EC%A7%80%20{}.png", "names as URLs write them (%20)"),
        ("a+b&c{}.png", "a%2Bb%26c{}.png?raw=1", "names as URLs write them (%20)"),
        ("a%20dog%20{}.png", "a dog {}.png", "files whose names are as URLs write them (%20)"),
        ("%ea%b0%9c{}.png", "개{}.png", "files whose names are as URLs write them (%20)"),
        ("a dog {}.png", "a+dog+{}.png", "names with + for spaces"),
        ("R&D {}.png", "R&amp;D {}.png", "names as HTML writes them (&amp;)"),
        ("a{}.png", "a{}.png#0", "names with a caption's number behind (#0)"),
        ("a dog {}.png", "file:///D:/사진/a%20dog%20{}.png", "file paths, found by their ends"),
        ("a dog {}.png", "https://example.org/x/a%20dog%20{}.png?size=3", "URLs, found by their ends"),
        ("a%20{}.png", "https://example.org/x/a%20{}.png", "URLs, found by their ends"),
    ],
)
def test_names_in_another_spelling(file: str, name: str, kind: str, below: str, tmp_path: Path) -> None:
    draw(tmp_path, [below + file.format(i) for i in range(5)])
    rows, source = found(tmp_path, [(name.format(i), f"a dog {i}") for i in range(5)])
    assert {Path(key).stem[-1]: caption[-1] for key, caption in rows.items()} == {str(i): str(i) for i in range(5)}
    assert source.report.notes == {kind: 5}
    assert not source.report.errors


def test_a_name_as_it_is_written_comes_first(tmp_path: Path) -> None:
    draw(tmp_path, ["a 1.png", "a%201.png", "b 2.png"])
    rows, source = found(tmp_path, [("a%201.png", "escaped"), ("a 1.png", "plain"), ("b%202.png", "other")])
    assert rows == {"a%201.png": "escaped", "a 1.png": "plain", "b 2.png": "other"}
    assert source.report.notes == {"names as URLs write them (%20)": 1}


def test_several_captions_with_numbers_are_of_one_picture(tmp_path: Path) -> None:
    draw(tmp_path, ["1.png", "2.png"])
    rows, _ = found(tmp_path, [("1.png#0", "a"), ("1.png#1", "b"), ("2.png#0", "c")])
    assert rows == {"1.png": "a / b", "2.png": "c"}


@pytest.mark.parametrize("places", ["https://{}.org/1.png", "C:\\{}\\1.png", "/kaggle/{}/1.png"])
def test_two_names_that_end_like_one_file_mean_none(places: str, tmp_path: Path) -> None:
    draw(tmp_path, ["1.png", "2.png"])
    rows, source = found(tmp_path, [(places.format("a"), "a"), (places.format("b"), "b"), ("2.png", "c")])
    assert rows == {"2.png": "c"}
    assert source.report.errors == {"ambiguous name": 2}
    assert "others end like 1.png" in source.report.first["ambiguous name"][0]


def test_an_address_of_what_is_not_here_is_refused(tmp_path: Path) -> None:
    draw(tmp_path, ["1.png"])
    rows, source = found(tmp_path, [("1.png", "a"), ("https://example.org/2.png", "b")])
    assert rows == {"1.png": "a"}
    assert "nothing is downloaded" in source.report.first["refused path"][0]


def test_names_that_climb_out_of_a_table_lead_into_a_folder_that_is_named(tmp_path: Path) -> None:
    draw(tmp_path / "img" / "a")
    draw(tmp_path, ["secret7.png"])
    tables = tmp_path / "tables" / "en"
    tables.mkdir(parents=True)
    names = [f"../../img/a/{name}" for name in NAMES]
    (tables / "train.csv").write_text("image,caption\n" + "".join(f"{name},a picture {name}\n" for name in names))
    way = "climbs out of the root: give a folder higher up as the root, or name the pictures' folder: --image-folder"
    with pytest.raises(TooManyErrors, match=way):
        PairFiles(tables / "train.csv")
    for root, folder in ((tables / "train.csv", "img"), (tmp_path / "tables", "img/a"), (tables, "img")):
        source = PairFiles(root, ReadOptions(image_folder=str(tmp_path / folder), val_fraction=0.0))
        split = source.split("train")
        assert [split.image(i).getpixel((1, 1)) for i in range(len(split))] == [*map(colour, NAMES)]
        assert source.report.notes == {}
    with (tables / "train.csv").open("a") as file:
        file.write("../../secret7.png,a secret\n../../img/../secret7.png,another\n../../../img/a/p00.png,a third\n")
    source = PairFiles(tables, ReadOptions(image_folder=str(tmp_path / "img")), max_bad_fraction=1)
    assert source.report.errors == {"refused path": 3}
    assert source.report.first["refused path"][0] == (
        "train.csv:25: '../../secret7.png' is not below img, the pictures' folder"
    )
