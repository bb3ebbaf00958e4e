"""What is printed for people: numbers with what they count."""

from pathlib import Path

import pytest

from mmtransformer.data.check import check
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.pairs import PairFiles
from mmtransformer.serialization.printable import counted
from support.pair_files import png


def test_one_is_not_several() -> None:
    assert [counted(n, "picture") for n in (0, 1, 2, 2000)] == [
        "0 pictures",
        "1 picture",
        "2 pictures",
        "2,000 pictures",
    ]
    assert [counted(n, "process", "processes") for n in (1, 3)] == ["1 process", "3 processes"]


def test_one_picture_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png("1"))
    (tmp_path / "1.txt").write_text("a dog that runs")
    source = PairFiles(tmp_path, ReadOptions(val_fraction=0))
    assert "1 picture, 1 caption;" in source.describe()
    assert repr(source.split("train")) == "PairSplit(1 picture, by index: image(i), captions(i), name(i))"
    report = check(source, progress=False)
    assert "1 picture " in str(report)
    assert "1 pictures" not in str(report)
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "1.txt").write_text("")
    with pytest.raises(ValueError, match="not one of 1 row can be used"):
        PairFiles(tmp_path)
