"""Pictures that lie there and that no table lists are counted and named, and cost nothing else."""

from pathlib import Path

import pytest

from mmtransformer.data.check import check
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.pairs import PairFiles
from support.pair_files import draw, pack, png

LISTED = [f"images/p{i}.png" for i in range(1, 9)]
LEFT = ["images/more/p12.png", "images/p10.png", "images/p11.png"]


def table(path: Path, names: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("image,caption\n" + "".join(f"{name},a colour {name}\n" for name in names))
    return path


def left_over(source: PairFiles) -> dict[str, list[str]]:
    notes = [note for note in source.report.notes if "without a caption in" in note]
    return {note: source.report.first[note] for note in notes}


def test_pictures_that_no_table_lists_are_counted_and_named(tmp_path: Path) -> None:
    draw(tmp_path, [*LISTED, *LEFT])
    table(tmp_path / "captions.csv", LISTED)
    what = f"pictures in {tmp_path.name} without a caption in captions.csv, left out"
    for root in (tmp_path, tmp_path / "captions.csv"):
        source = PairFiles(root)
        assert left_over(source) == {what: LEFT}
        assert source.report.notes == {what: 3}
        assert source.describe().startswith("CSV captions.csv: 8 pictures, 8 captions")
        assert source.describe().endswith("; without a caption: 3 pictures")
    report = check(tmp_path, progress=False, threads=1)
    assert f"note   {what}: 3\n         images/more/p12.png\n" in str(report)
    assert not any(finding.hurts for finding in report.findings if finding.what == what)


def test_those_of_rows_that_cannot_be_used_are_counted_once(tmp_path: Path) -> None:
    draw(tmp_path, [*LISTED, LEFT[0]])
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(f"{name},a {name}\n" for name in LISTED[1:]))
    with (tmp_path / "captions.csv").open("a") as file:
        file.write(f"{LISTED[0]},\n")
    source = PairFiles(tmp_path)
    assert source.report.errors == {"empty caption": 1}
    assert [*left_over(source).values()] == [[LEFT[0]]]


def test_one_table_of_several_says_nothing_of_the_others(tmp_path: Path) -> None:
    draw(tmp_path, [*LISTED, *LEFT])
    table(tmp_path / "train.csv", LISTED)
    table(tmp_path / "val.csv", LEFT[:1])
    assert left_over(PairFiles(tmp_path / "train.csv")) == {}
    assert [*left_over(PairFiles(tmp_path)).values()] == [LEFT[1:]]


def test_a_folder_that_is_named_is_looked_through_too(tmp_path: Path) -> None:
    draw(tmp_path / "photos", [*LISTED, *LEFT])
    read = ReadOptions(image_folder=str(tmp_path / "photos"))
    train = table(tmp_path / "tables" / "train.csv", LISTED)
    found = left_over(PairFiles(train, read))
    assert found == {"pictures in photos without a caption in train.csv, left out": LEFT}
    table(tmp_path / "tables" / "val.csv", LEFT)
    assert left_over(PairFiles(train, read)) == {}
    assert left_over(PairFiles(tmp_path / "tables", read)) == {}


def test_a_copy_in_an_archive_is_no_other_picture(tmp_path: Path) -> None:
    draw(tmp_path, LISTED)
    pack(tmp_path / "images.zip", {name: png(name) for name in LISTED})
    table(tmp_path / "captions.csv", LISTED)
    assert left_over(PairFiles(tmp_path)) == {}


@pytest.mark.parametrize("kind", ["json", "txt"])
def test_files_of_single_pictures_are_no_tables(kind: str, tmp_path: Path) -> None:
    draw(tmp_path, [*LISTED, *LEFT])
    (tmp_path / f"images/p1.{kind}").write_text('{"width": 3}')
    assert [*left_over(PairFiles(table(tmp_path / "captions.csv", LISTED))).values()] == [LEFT]


@pytest.mark.parametrize("listed", [True, False])
def test_hidden_pictures_are_counted_and_named(tmp_path: Path, listed: bool) -> None:
    draw(tmp_path, [*LISTED, ".old/p12.png", "images/.p11.png", "images/._p1.png"])
    if listed:
        table(tmp_path / "captions.csv", LISTED)
    else:
        for name in LISTED:
            (tmp_path / name).with_suffix(".txt").write_text(f"a colour {name}")
    source, what = PairFiles(tmp_path), "hidden pictures, or in hidden folders, left out"
    assert source.describe().endswith(f"; {what}: 2 pictures")
    assert source.report.notes == {what: 2}
    assert source.report.first[what] == [".old/p12.png", "images/.p11.png"]
    assert f"note   {what}: 2\n         .old/p12.png\n" in str(check(tmp_path, progress=False, threads=1))


def test_texts_of_two_endings_are_named(tmp_path: Path) -> None:
    draw(tmp_path, LISTED)
    for name in LISTED:
        path = tmp_path / name
        path.with_suffix(".txt").write_text(f"a colour {name}")
        path.with_suffix(".ko.caption").write_text("빨간 별")  # of another language
    (tmp_path / LISTED[2]).with_suffix(".caption").write_text("a stale one")
    source, what = PairFiles(tmp_path), "captions in text files of different endings, all used"
    assert f"; {what}: 1 picture" in source.describe()
    assert source.report.notes == {what: 1}
    said = str(check(tmp_path, progress=False, threads=1))
    assert f"note   {what}: 1\n         {LISTED[2]}: images/p3.caption and images/p3.txt\n" in said
