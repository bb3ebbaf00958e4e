"""Compressed tables are read; archives that can't be read in place are named, with what to do."""

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import pytest

from mmtransformer.data.image_files import ImageFiles
from mmtransformer.data.pairs import PairFiles
from support.pair_files import NAMES, caption, draw, everything, jsonl


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "txt"])
def test_compressed_tables_are_read(kind: str, ending: str, tmp_path: Path) -> None:
    draw(tmp_path / "photos")
    rows = [{"image": f"photos/{n}", "caption": caption(n)} for n in NAMES]
    mark = "," if kind == "csv" else "\t"
    table = "\n".join(["image" + mark + "caption", *(mark.join(row.values()) for row in rows)])
    text = {"jsonl": jsonl(rows), "json": json.dumps(rows)}.get(kind, table)
    opener = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[ending]
    path = tmp_path / f"Captions.{kind.upper()}.{ending}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    for root in (tmp_path, path):
        assert everything(PairFiles(root)).keys() == {f"photos/{name}" for name in NAMES}
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"Captions\.{kind.upper()}\.{ending}: damaged or cut short .*get the file"):
        PairFiles(path)


def test_a_bomb_of_text_is_refused(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "c.csv.gz", "wb") as file:
        file.write(b"image,caption\n" + b"a" * (1 << 27))
    with pytest.raises(ValueError, match=r"c\.csv\.gz: more than 67,108,864 bytes out of .*: a bomb"):
        PairFiles(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("p.rar", "packed by RAR"), ("p.7z", "packed by 7-Zip"), ("사진.ALZ", "packed by ALZip"),
        ("p.egg", "packed by ALZip"), ("c.csv.zst", "packed by Zstandard"), ("p.tar.gz", "compressed as a whole"),
        ("p.zip.part0", r"a part of an archive .* \(cat p\.zip\.part\* > p\.zip\) and unpack it"),
        ("p.zip.001", "a part of an archive in several: put them together and unpack it"), ("p.z01", "a part of an"),
        ("p.part2.rar", "a part of an archive"), ("c.parquet.gz", "packed by gzip"),
    ],
)  # fmt: skip
def test_archives_that_must_be_unpacked_are_named_with_the_remedy(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not looked at")
    with pytest.raises(ValueError, match=rf"no pictures .*{name}: {said}"):
        PairFiles(tmp_path)
    with pytest.raises(ValueError, match=rf"{name}: {said}"):
        PairFiles(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: {said}"):
        len(ImageFiles([str(tmp_path / name)]))
    draw(tmp_path)
    for image in NAMES:
        (tmp_path / image).with_suffix(".txt").write_text(caption(image), "utf-8")
    source = PairFiles(tmp_path)
    assert re.search(said, source.report.first["file left out"][0])
    images = ImageFiles([str(tmp_path)])
    assert len(images) == len(NAMES) + 1
