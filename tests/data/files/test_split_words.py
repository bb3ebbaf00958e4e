"""Splits as people name them, in columns and folders."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.files.text import split_word
from mmtransformer.data.open_sources import open_pairs
from mmtransformer.data.parallel_texts import ParallelTable

KINDS = ("csv", "jsonl", "parquet")
WORDS = {
    "train": (
        "학습",
        "훈련용",
        "트레이닝",
        "학습 데이터",
        "训练",
        "訓練",
        "训练集",
        " Train ",
        "TRAIN",
        "Training set",
    ),
    "val": ("검증", "검증용", "밸리데이션", "验证", "検証", "驗證集", "Val", "validation ", "Evaluation"),
    "test": ("테스트", "테스트용", "평가용", "시험", "테스트셋", "测试", "テスト", "テスト用", "TEST", "test set"),
}


def pictures(root: Path, count: int = 6) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (20, 20), (30 * i, 0, 0)).save(root / f"{i}.png")


def test_words() -> None:
    assert [(split, word, split_word(word)) for split, words in WORDS.items() for word in words] == [
        (split, word, split) for split, words in WORDS.items() for word in words
    ]
    assert [split_word(word) for word in ("기타", "train and val", "strain", "最新", "0")] == [None] * 5


def test_values_of_a_column(tmp_path: Path) -> None:
    pictures(tmp_path)
    for trio in zip(*WORDS.values(), strict=False):
        rows = "".join(f'{i}.png,a dog,"{trio[i % 3]}"\n' for i in range(6))
        (tmp_path / "c.csv").write_text(f"image,caption,split\n{rows}", "utf-8")
        source = open_pairs(tmp_path)
        assert {name: len(source.split(name)) for name in source.splits()} == {"train": 2, "val": 2, "test": 2}, trio


def test_names_of_folders(tmp_path: Path) -> None:
    for trio in (
        ("학습용", "검증용", "테스트"),
        ("1.训练集", "2.验证集", "3.测试集"),
        ("학습 데이터", "밸리데이션", "평가용"),
    ):
        root = tmp_path / trio[0]
        for name in trio:
            pictures(root / name, 2)
            for i in range(2):
                (root / name / f"{i}.txt").write_text(f"a dog {name}", "utf-8")
        source = open_pairs(root)
        assert {name: len(source.split(name)) for name in source.splits()} == {"train": 2, "val": 2, "test": 2}, trio


def table(path: Path, column: str, cells: Sequence[str | int]) -> None:
    """Six pictures, each with a caption and a cell of a column."""
    rows = [{"image": f"{i}.png", "caption": "a dog", column: cells[i % len(cells)]} for i in range(6)]
    if path.suffix == ".csv":
        lines = [f"image,caption,{column}", *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines), "utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    else:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path, row_group_size=4)


@pytest.mark.parametrize(
    ("column", "ending"),
    [
        (column, ending)
        for column in ("구분", "데이터구분", "세트", "set", "fold", "Data Split", "phase")
        for ending in KINDS
    ]
    + [("내 열", "csv"), ("내 열", "jsonl")],
)
def test_a_column_of_splits_is_taken_whatever_it_is_called(tmp_path: Path, column: str, ending: str) -> None:
    pictures(tmp_path)
    table(tmp_path / f"c.{ending}", column, ("학습", "검증", "테스트"))
    source = open_pairs(tmp_path)
    assert {name: len(source.split(name)) for name in source.splits()} == {"train": 2, "val": 2, "test": 2}
    assert f"split={column}" in source.describe()


def test_a_column_of_other_words_is_none_of_splits(tmp_path: Path) -> None:
    pictures(tmp_path)
    for column, cells in (("구분", ("남성", "여성")), ("fold", ("1", "2")), ("vehicle", ("train", "train"))):
        rows = "".join(f"{i}.png,a dog,{cells[i % 2]}\n" for i in range(6))
        (tmp_path / "c.csv").write_text(f"image,caption,{column}\n{rows}", "utf-8")
        assert "split=" not in open_pairs(tmp_path).describe()


def test_texts_in_two_languages(tmp_path: Path) -> None:
    rows = "".join(f"dog {i},Hund {i},{('학습', ' 검증')[i % 2]}\n" for i in range(6))
    (tmp_path / "c.csv").write_text(f"en,de,split\n{rows}", "utf-8")
    source = ParallelTable(str(tmp_path / "c.csv"), directions=["en-de"])
    assert {name: len(source.split(name)) for name in source.splits()} == {"train": 3, "val": 3}


@pytest.mark.parametrize("ending", KINDS)
def test_splits_that_are_numbers_are_the_same_in_any_table(tmp_path: Path, ending: str) -> None:
    pictures(tmp_path)
    table(tmp_path / f"c.{ending}", "split", (0, 1, 2))
    source = open_pairs(tmp_path)
    assert {name: len(source.split(name)) for name in source.splits()} == {"0": 2, "1": 2, "2": 2}


@pytest.mark.parametrize("ending", KINDS)
@pytest.mark.parametrize(
    ("column", "cells", "told"),
    [
        ("fold", (0, 1), True),
        ("my split", ("a", "b"), True),
        ("set", ("train", "b"), True),
        ("set", ("a", "b"), False),
        ("type", ("car", "bus"), False),
    ],
)
def test_a_column_that_may_be_meant_for_splits_is_named(
    tmp_path: Path, ending: str, column: str, cells: tuple[str | int, ...], told: bool
) -> None:
    pictures(tmp_path)
    table(tmp_path / f"c.{ending}", column, cells)
    source = open_pairs(tmp_path)
    said = f" ({column} is not taken for splits, as it has other words: --split-column takes it); "
    assert (source.splits(), said in source.describe()) == (("train", "val"), told)
    assert "by hash of the name" in source.describe()
    again = open_pairs(tmp_path, ReadOptions(split_column=column))
    assert set(again.splits()) >= {str(cell) for cell in cells}
