"""Data made to do harm: archives, shards, indices, tables and manifests that lie, loop, grow or lead elsewhere."""

import io
import json
import os
import resource
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.files.shards import TarShards
from mmtransformer.data.open_sources import open_pairs
from mmtransformer.data.parallel_texts import ParallelTable
from mmtransformer.images import ImageError


def image() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (5, 7), "red").save(data, "PNG")
    return data.getvalue()


PNG = image()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of four pictures, beside a secret one."""
    (tmp_path / "secret.png").write_bytes(PNG)
    folder = tmp_path / "root"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(PNG)
    return folder


def shard(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for i in range(3):
            for ending, data in (("png", PNG), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def taken(job: Callable[[], object]) -> int:
    """Bytes of memory that were taken for good."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    job()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


# -------------------------------------------------------------------------------------------------------- archives


def test_a_tar_that_leads_back_to_itself_ends(root: Path) -> None:
    first, second = tarfile.TarInfo("a.png"), tarfile.TarInfo("b.png")
    first.size = len(PNG)
    header = bytearray(second.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-512).to_bytes(12, "big", signed=True)  # the next header is this one
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = root / "x.tar"
    path.write_bytes(first.tobuf() + PNG + bytes(-len(PNG) % 512) + header + bytes(1024))
    assert "leads backwards" in Files(root).refused["x.tar"]
    with pytest.raises(ValueError, match=r"x\.tar: a damaged archive \(a header at byte 1024 leads backwards"):
        Files(path)


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "captions.json", "0.txt", "x.png"])
def test_a_zip_that_grows_is_not_unpacked(name: str, root: Path) -> None:
    with zipfile.ZipFile(root / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        with archive.open(name, "w") as file:
            for _ in range(128):
                file.write(b"\n" * (1 << 20))
        archive.writestr("small.txt", b"\n" * 1000)
    files: list[Files] = []
    assert taken(lambda: files.append(Files(root))) < 1 << 26
    assert "134,217,728 bytes out of" in files[0].refused[f"a.zip/{name}"]
    assert "a.zip/small.txt" in files[0].by_path


@pytest.mark.parametrize("name", ["x.tar", "x.zip"])
def test_a_pipe_for_an_archive_is_refused(name: str, root: Path) -> None:
    os.mkfifo(root / name)
    with pytest.raises(ValueError, match="not a regular file"):
        open_pairs(root / name)


# ---------------------------------------------------------------------------------------------------------- shards


def test_a_pipe_among_shards_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "x.tar")
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "a.tar")
    with pytest.raises(ValueError, match=r"a\.tar: not a regular file"):
        open_pairs(tmp_path)


def test_links_to_shards_elsewhere_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shard(tmp_path / "private.tar")
    (tmp_path / "data" / "x.tar").symlink_to("../private.tar")
    with pytest.raises(ValueError, match=r"x\.tar: a link that leads out of .*private\.tar: name that folder"):
        TarShards(str(tmp_path / "data"))
    assert len(TarShards(str(tmp_path / "data" / "x.tar"), val_fraction=0).split("train")) == 3  # asked for by name


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "other index"])
def test_an_index_that_is_none_is_made_again(kind: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = shard(tmp_path / "data" / "x.tar")
    index = path.with_name(".x.tar.index.jsonl")
    if kind == "pipe":
        os.mkfifo(index)
    elif kind == "folder":
        index.mkdir()
    else:
        (tmp_path / "other").write_text("precious")
        index.symlink_to("/dev/zero" if kind == "device" else "../other")
    read: list[TarShards] = []
    assert taken(lambda: read.append(TarShards(str(path), val_fraction=0))) < 1 << 27
    assert len(read[0].split("train")) == 3
    assert kind != "other index" or (tmp_path / "other").read_text() == "precious"


def test_an_index_is_not_written_through_a_link(tmp_path: Path) -> None:
    path, precious = shard(tmp_path / "x.tar"), tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / f".x.tar.index.jsonl.{os.getpid()}.part").symlink_to(precious)
    TarShards(str(path), val_fraction=0)
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("pattern", ["{a,b}" * 40, "{0..9999}{0..9999}{0..9999}"])
def test_a_pattern_that_grows_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="stands for more than 100,000 shards"):
        TarShards(pattern)


# --------------------------------------------------------------------------------------------------------- parquet


def test_a_text_for_a_images_bytes_is_no_path(root: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": str(root.parent / "secret.png"), "path": f"{i}.png"} for i in range(3)]
    pq.write_table(pa.table({"image": pa.array(rows), "caption": ["a"] * 3}), root / "t.parquet")
    split = open_pairs(root / "t.parquet", ReadOptions(val_fraction=0)).split("train")
    with pytest.raises(ImageError, match="a str where the picture's bytes should be"):
        split.image(0)


def test_a_table_that_grows_is_refused(root: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 1_000_001, pa.int32()), pa.array(["0.png"]))
    pq.write_table(pa.table({"image": same, "caption": same}), root / "rows.parquet", compression="zstd")
    with pytest.raises(ValueError, match=r"rows\.parquet: 1,000,001 rows out of \d[\d,]* bytes: a bomb"):
        open_pairs(root / "rows.parquet")
    blank = pa.array([bytes(1 << 25)] * 3, pa.binary())
    table = pa.table({"image": blank, "caption": ["a"] * 3})
    pq.write_table(table, root / "blank.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(ValueError, match=r"blank\.parquet: a row group of 10\d,\d{3},\d{3} bytes out of .*: a bomb"):
        open_pairs(root / "blank.parquet")


def test_a_parquet_of_few_words_many_times_is_counted_before_it_is_written_out(root: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = 950_000
    same = pa.array([0] * rows, pa.int32())
    caption = pa.DictionaryArray.from_arrays(same, pa.array(["x" * 42_000]))
    table = pa.table({"image": pa.DictionaryArray.from_arrays(same, pa.array(["0.png"])), "caption": caption})
    pq.write_table(table, root / "words.parquet", compression="zstd", row_group_size=rows)
    before = time.process_time()
    with pytest.raises(ValueError, match=r"words\.parquet .*: 39,9[\d,]{10} bytes of texts out of [\d,]+: a bomb"):
        open_pairs(root / "words.parquet")
    assert time.process_time() - before < 2
    nested = pa.table({"image": ["0.png"], "caption": pa.array([[None] * 3_000_000], pa.list_(pa.string()))})
    pq.write_table(nested, root / "nulls.parquet")
    with pytest.raises(ValueError, match=r"nulls\.parquet .*: 3,000,000 values of a column out of .*: a bomb"):
        open_pairs(root / "nulls.parquet")
    words = pa.array([["red", "blue"], ["red"], ["green"]])
    pq.write_table(pa.table({"image": [f"{i}.png" for i in range(3)], "caption": words}), root / "few.parquet")
    split = open_pairs(root / "few.parquet", ReadOptions(val_fraction=0)).split("train")
    assert [[c.text for c in split.captions(i)] for i in range(3)] == words.to_pylist()


# ------------------------------------------------------------------------------------------------------- manifests

DEEP = ('{"image": "1.png", "caption": ' + "[" * 900 + "]" * 900 + "}",
        '{"image": "1.png", "caption": ' + '{"en": ' * 600 + '"x"' + "}" * 600 + "}")  # fmt: skip
GOOD = '{"image": "0.png", "caption": "a star"}'
COCO: dict[str, Any] = {
    "images": [{"id": 0, "file_name": "0.png"}, {"id": 1, "file_name": "1.png"}],
    "annotations": [{"image_id": 0, "caption": "a star"}, {"image_id": 1, "caption": "a dog"}],
}
KARPATHY: dict[str, Any] = {
    "images": [{"filename": f"{i}.png", "filepath": "", "sentences": [{"raw": "a star"}]} for i in (0, 1)]
}


def spoilt(whole: dict[str, Any], key: str, value: Any) -> str:
    images = [whole["images"][0], whole["images"][1] | {key: value}]
    return json.dumps(whole | {"images": images})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("p.jsonl", f"{GOOD}\n{deep}\n") for deep in DEEP),
        *(("p.json", f"[{GOOD}, {deep}]") for deep in DEEP),
        ("c.json", spoilt(COCO, "id", [])),
        ("c.json", spoilt(COCO, "id", {})),
        ("k.json", spoilt(KARPATHY, "sentences", 5)),
    ],
)  # fmt: skip
def test_one_odd_row_costs_one_row(name: str, text: str, root: Path) -> None:
    (root / name).write_text(text)
    pairs = open_pairs(root / name, ReadOptions(val_fraction=0), max_bad_fraction=1.0)
    assert [caption.text for caption in pairs.split("train").captions(0)] == ["a star"]
    assert len(pairs.split("train")) == 1
    assert pairs.report.bad_rows >= 1


def test_a_folder_that_is_no_text_is_left_out(root: Path) -> None:
    (root / "k.json").write_text(spoilt(KARPATHY, "filepath", 5))
    assert len(open_pairs(root / "k.json", ReadOptions(val_fraction=0), max_bad_fraction=1.0).split("train")) == 2


@pytest.mark.parametrize("text", [f"{GOOD}\n{'[' * 100_000}", f"[{'9' * 5000}]", f"{GOOD}\n{'9' * 5000}"])
def test_json_that_cannot_be_read_is_named(text: str, root: Path) -> None:
    (root / "p.json").write_text(text)
    with pytest.raises(ValueError, match=r"^p\.json.* is not JSON"):
        open_pairs(root / "p.json")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.jsonl", "[" * 100_000),
        ("t.jsonl", '{"en": ' + "[" * 100_000),
        ("t.csv", "en,ko\n" + "x" * 200_000 + ",y\n"),
        ("t.jsonl", '{"en": ' + "9" * 5000 + "}"),
    ],
    ids=range(4),
)
def test_translations_that_cannot_be_read_are_named(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}:"):
        ParallelTable(str(tmp_path / name))
