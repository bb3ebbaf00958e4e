"""Folders and archives of pictures with captions: a colour is its number, so a wrong picture is found out."""

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mmtransformer.data.pairs import PairFiles

NAMES = [f"p{i:02d}.png" for i in range(23)]


def colour(name: str) -> tuple[int, int, int]:
    """The colour of a picture is its number, so that a wrong picture is found out."""
    return (int(re.findall(r"\d+", name)[-1]) * 11, 7, 200)


def png(name: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (7, 5), colour(name)).save(out, "PNG")
    return out.getvalue()


def draw(folder: Path, names: Sequence[str] = NAMES) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(name))


def pack(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", method) as box:
            for name, data in files.items():
                box.writestr(name, data)
    else:
        with tarfile.open(path, "w") as box:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                box.addfile(info, io.BytesIO(data))
    return path


def everything(source: PairFiles) -> dict[str, list[str]]:
    """Name -> captions of all splits; every picture is decoded and must be the one that its name says."""
    found: dict[str, list[str]] = {}
    for split in map(source.split, source.splits()):
        for i in range(len(split)):
            name = split.name(i)
            image = split.image(i)
            assert image.size == (7, 5)
            assert image.getpixel((3, 2)) == colour(Path(name).name), name
            assert name not in found
            found[name] = [caption.text for caption in split.captions(i)]
    return found


def caption(name: str, k: int = 0) -> str:
    return f"picture {name}, words {k}"


def jsonl(rows: Sequence[object]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rows_jsonl(names: Sequence[str] = NAMES, folder: str = "") -> str:
    return jsonl([{"image": folder + name, "captions": [caption(name, k) for k in range(3)]} for name in names])


def expected(count: int = 3, folder: str = "", names: Sequence[str] = NAMES) -> dict[str, list[str]]:
    return {folder + name: [caption(name, k) for k in range(count)] for name in names}
