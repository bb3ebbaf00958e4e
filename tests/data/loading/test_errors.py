"""Counting what is wrong: thresholds, the report of bad pictures shared by processes."""

import json
import pickle
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mmtransformer.data.captions import CaptionData
from mmtransformer.data.class_sources import ImageFolder
from mmtransformer.data.classes import ClassData
from mmtransformer.data.documents.interleaved import InterleavedFiles
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.interleaved_data import InterleavedData
from mmtransformer.data.loading.errors import BadImages, Report, TooManyErrors, allowed
from mmtransformer.data.loading.module import DataModule, Splits
from mmtransformer.data.pairs import PairFiles


@pytest.mark.parametrize(
    ("total", "fraction", "count"),
    [(1000, 0.01, 10), (1099, 0.01, 10), (50, 0.01, 1), (0, 0.01, 1), (50, 0, 0), (7, 1.0, 7)],
)
def test_one_may_always_be_bad_unless_none_may(total: int, fraction: float, count: int) -> None:
    assert allowed(total, fraction) == count


def test_a_report_counts_each_row_once_and_names_the_first() -> None:
    report = Report()
    report.rows = 300
    for line in range(7):
        report.error("empty caption", f"c.csv:{line}", "x" * 300)
        report.error("missing picture", f"c.csv:{line}")
    report.note("remark", "c.csv:9", "kept")
    assert report.bad_rows == 7
    assert report.errors == {"empty caption": 7, "missing picture": 7}
    assert len(report.first["empty caption"]) == 5
    assert report.first["missing picture"][0] == "c.csv:0"
    assert max(map(len, str(report).splitlines())) < 220
    assert "... and 2 more" in str(report)
    assert "remark: 1\n    c.csv:9: kept" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["bad_rows"] == 7
    report.enforce("c.csv", 0.03)
    with pytest.raises(TooManyErrors, match=r"c.csv: 7 of 300 rows can't be used \(2.3%, more than 2.0% allowed"):
        report.enforce("c.csv", 0.02)
    with pytest.raises(
        TooManyErrors,
        match=r"max_bad_fraction 0\.03` in `mmt fit`, `--max-bad-fraction 0\.03` in .*, max_bad_fraction=0\.03 in P",
    ):
        report.enforce("c.csv", 0.02)


def test_bad_images_are_named_once_and_stop_past_the_threshold(tmp_path: Path) -> None:
    path = tmp_path / "run" / "bad.jsonl"
    bad = BadImages(path, total=301)
    assert bad.names() == {}
    assert not path.parent.exists()
    for _ in range(3):  # epochs
        for i in range(3):
            bad.record(f"그림{i}.png", ValueError(f"cut at {i}"))
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert rows[1] == {"image": "그림1.png", "error": "ValueError: cut at 1"}
    assert len(rows) == 3
    with pytest.raises(
        TooManyErrors, match=r"4 of 301 pictures can't be read .* than 1.0% allowed by max_bad_fraction"
    ) as e:
        bad.record("x.png", OSError("gone"))
    assert str(path) in str(e.value)
    assert "그림0.png: ValueError: cut at 0" in str(e.value)
    assert str(e.value).endswith("max_bad_fraction=0.02 in Python allow as many; others that come need more")
    again = BadImages(path, total=301)  # a resumed run knows them
    assert list(again.names()) == ["그림0.png", "그림1.png", "그림2.png", "x.png"]
    again.reset()
    again.record("x.png", OSError("gone"))
    assert list(again.names()) == ["x.png"]


def test_a_strict_run_stops_at_the_first(tmp_path: Path) -> None:
    with pytest.raises(TooManyErrors, match="1 of 5,000"):
        BadImages(tmp_path / "bad.jsonl", 5000, max_fraction=0).record("x.png", OSError("gone"))


def test_half_a_line_in_the_report_is_passed_over(tmp_path: Path) -> None:
    bad = BadImages(tmp_path / "bad.jsonl", 100)
    bad.path.write_text('{"image": "a", "error": "e"}\n{"pict')
    assert bad.names() == {"a": "e"}


def _record(bad: BadImages, start: int) -> str:
    try:
        for i in range(start, start + 40):
            bad.record(f"p{i}.png", ValueError("broken"))
    except TooManyErrors as error:
        return str(error)
    return ""


def test_workers_share_one_report(tmp_path: Path) -> None:
    bad = BadImages(tmp_path / "bad.jsonl", total=1000, max_fraction=0.119)
    with get_context("fork").Pool(3) as pool:
        said = pool.starmap(_record, [(bad, 0), (bad, 20), (bad, 60)])
    assert said == ["", "", ""]
    assert len(bad.names()) == 100
    assert len(pickle.loads(pickle.dumps(bad)).names()) == 100
    assert "120 of 1,000" in _record(bad, 100)


def made(kind: str, root: Path) -> DataModule:
    """Data of a kind over the pictures of one folder."""
    if kind == "classes":
        return ClassData(ImageFolder(str(root), val_fraction=0.5), splits=Splits(val=[]))
    read = ReadOptions(val_fraction=0)
    if kind == "pairs":
        return CaptionData(str(root / "cat"), read=read, vocab_size=300, splits=Splits(val=[]))
    rows = [{"text": f"<image> a dog {i}", "images": [f"cat/{i}.png"], "split": "train"} for i in range(6)]
    (root / "cat/documents.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return InterleavedData(
        InterleavedFiles(root / "cat/documents.jsonl", image_folder=root, val_fraction=0),
        captions=PairFiles(root / "dog", read),
        splits=Splits(val=[]),
        caption_splits=[],
        vocab_size=300,
    )


@pytest.mark.parametrize("kind", ["pairs", "classes", "documents"])
def test_a_run_that_goes_on_forgets_pictures_that_are_gone_or_repaired(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for folder in ("cat", "dog"):
        (root / folder).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (9, 9), (i, 0, 0)).save(root / folder / f"{i}.png")
            (root / folder / f"{i}.txt").write_text(f"a dog {i}")
    data: Any = made(kind, root)
    state = SimpleNamespace(fn="fit")
    data.trainer = SimpleNamespace(
        is_global_zero=True, ckpt_path="last.ckpt", default_root_dir=str(tmp_path), state=state
    )
    bad = data.bad_samples("train")
    split = data.documents("train") if kind == "documents" else data.source.split("train")
    name = split.image_name(1, 0) if kind == "documents" else split.name(1)
    whole = root / ("" if kind in ("classes", "documents") else "cat") / name
    good = whole.read_bytes()
    whole.write_bytes(good[:40])
    bad.max_fraction = 1.0
    for listed in (name, "gone.png"):
        bad.record(listed, ValueError("cut"))
    data.setup("fit")
    assert len(bad.names()) == 2  # until the checkpoint is accepted
    data.clear_reports()
    assert bad.names() == {name: "ValueError: cut"}
    before = bad.path.read_bytes()
    data.clear_reports()
    assert bad.path.read_bytes() == before
    whole.write_bytes(good)
    data.clear_reports()
    assert not bad.path.exists()
    bad.record("gone.png", ValueError("cut"))
    data.trainer.ckpt_path = None
    data.setup("fit")
    assert not bad.path.exists()
