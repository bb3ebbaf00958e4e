"""Splits as people name them, in columns and folders."""

from pathlib import Path

import pytest
from PIL import Image

from mmtransformer.data.files.text import split_word
from mmtransformer.data.open_sources import open_pairs
from mmtransformer.data.parallel_texts import ParallelTable

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


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("column", ["구분", "데이터구분", "세트", "set", "fold", "Data Split", "내 열"])
def test_a_column_of_splits_is_taken_whatever_it_is_called(tmp_path: Path, column: str, ending: str) -> None:
    pictures(tmp_path)
    said = ("학습", "검증", "테스트")
    if ending == "csv":
        text = f"image,caption,{column}\n" + "".join(f"{i}.png,a dog,{said[i % 3]}\n" for i in range(6))
    else:
        text = "".join(f'{{"image": "{i}.png", "caption": "a dog", "{column}": "{said[i % 3]}"}}\n' for i in range(6))
    (tmp_path / f"c.{ending}").write_text(text, "utf-8")
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
