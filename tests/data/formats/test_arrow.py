"""Arrow files: as `datasets.save_to_disk` lays them out, as Feather, damaged."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from mmtransformer.data.loading.source import Caption
from mmtransformer.data.pairs import PairFiles
from support.pair_files import NAMES, colour, draw, png

pa = pytest.importorskip("pyarrow")


def table(names: list[str], kind: str = "struct") -> Any:
    pictures: dict[str, list[Any]] = {
        "struct": [{"bytes": png(name), "path": name} for name in names],
        "bytes": [png(name) for name in names],
        "path": names,
    }
    return pa.table({"image": pictures[kind], "caption": [[f"picture {n}", f"그림 {n}"] for n in names], "x.y": names})


def write_stream(path: Path, names: list[str], kind: str = "struct") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = table(names, kind)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=4)


def saved(root: Path, kind: str = "struct") -> Path:
    """A DatasetDict as `save_to_disk` leaves it, a cache of `map` beside its data."""
    (root / "train").mkdir(parents=True)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    write_stream(root / "train" / "data-00000-of-00002.arrow", NAMES[:10], kind)
    write_stream(root / "train" / "data-00001-of-00002.arrow", NAMES[10:19], kind)
    write_stream(root / "test" / "data-00000-of-00001.arrow", NAMES[19:], kind)
    write_stream(root / "train" / "cache-1f2e3d4c5b6a7980.arrow", NAMES[:3], kind)
    for split in ("train", "test"):
        files = [{"filename": path.name} for path in sorted((root / split).glob("data-*"))]
        (root / split / "state.json").write_text(json.dumps({"_data_files": files, "_split": split}))
        (root / split / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return root


@pytest.mark.parametrize("kind", ["struct", "bytes", "path"])
def test_a_data_set_as_datasets_saves_it(kind: str, tmp_path: Path) -> None:
    if kind == "path":
        draw(tmp_path)
    source = PairFiles(saved(tmp_path, kind))
    assert {split: len(source.split(split)) for split in source.splits()}.keys() >= {"train", "test"}
    test = pickle.loads(pickle.dumps(source.split("test")))
    assert [test.image(i).getpixel((0, 0)) for i in range(4)] == [colour(n) for n in NAMES[19:]]
    assert test.captions(3) == [Caption("picture p22.png", "en"), Caption("그림 p22.png", "ko")]
    assert sum(len(source.split(split)) for split in source.splits()) == len(NAMES)
    assert "Arrow" in source.describe()


def test_feather_packed_or_not(tmp_path: Path) -> None:
    feather = pytest.importorskip("pyarrow.feather")
    for compression in ("lz4", "zstd", "uncompressed"):
        path = tmp_path / compression / "pairs.feather"
        path.parent.mkdir()
        feather.write_feather(table(NAMES), str(path), compression=compression, chunksize=5)
        split = PairFiles(path).split("train")
        assert split.image(0).getpixel((0, 0)) == colour(split.name(0))


def test_damaged_arrow_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "data-00000-of-00001.arrow"
    write_stream(path, NAMES)
    data = path.read_bytes()
    for bad in (b"", b"no arrow at all", data[: len(data) // 2]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"data-00000-of-00001.arrow is not Arrow"):
            PairFiles(tmp_path)


def test_a_packed_batch_of_nothing_is_a_bomb(tmp_path: Path) -> None:
    feather = pytest.importorskip("pyarrow.feather")
    path = tmp_path / "bomb.feather"
    rows = pa.table({"image": [bytes(1 << 20)] * 80, "caption": ["a"] * 80})
    feather.write_feather(rows, str(path), compression="zstd")
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match=r"bomb.feather is not Arrow: .* bytes once unpacked: a bomb"):
        PairFiles(path)
    with pa.OSFile(str(path), "wb") as file:  # as a stream, and packed by the other
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_stream(file, rows.schema, options=options) as writer:
            writer.write_table(rows)
    with pytest.raises(ValueError, match="once unpacked: a bomb"):
        PairFiles(path)
