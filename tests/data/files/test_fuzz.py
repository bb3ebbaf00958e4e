"""Damaged files by the thousand: what reads pictures and manifests gives them or a typed error, and never hangs."""

import csv
import gc
import io
import json
import os
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtransformer.data.pairs import PairFiles
from mmtransformer.images import ImageError, load

FEW, MANY = 1500, 20_000
SLOW = 5.0  # seconds that no file may take, on a machine that is busy


def images() -> list[bytes]:
    """A small valid file of every kind."""
    noise = np.random.default_rng(5).integers(0, 256, (19, 23, 4), dtype=np.uint8)
    rgb, rgba, grey = Image.fromarray(noise[..., :3]), Image.fromarray(noise), Image.fromarray(noise[..., 0])
    wide = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for image, kind, options in (
        (rgb, "PNG", {}), (rgba, "PNG", {}), (grey, "PNG", {}), (wide, "PNG", {}), (rgb.quantize(7), "PNG", {}),
        (rgb, "JPEG", {"exif": exif}), (grey, "JPEG", {}), (rgb, "JPEG", {"progressive": True}),
        (rgb, "GIF", {"save_all": True, "append_images": [rgb.transpose(Image.Transpose.ROTATE_180)]}),
        (rgb, "BMP", {}), (rgb, "TIFF", {}), (wide, "TIFF", {"compression": "tiff_lzw"}), (rgb, "PPM", {}),
        (rgb, "WEBP", {}), (rgba, "WEBP", {"lossless": True}),
    ):  # fmt: skip
        file = io.BytesIO()
        image.save(file, kind, **options)
        files.append(file.getvalue())
    return files


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A file with something wrong: bits, bytes, pieces lost, doubled, moved or made up; at its start more often."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        size = len(found)
        if not size:
            break
        place = draw.randrange(min(size, 64)) if draw.random() < 0.5 else draw.randrange(size)
        length = min(draw.choice((1, 2, 4, 8, 64)), size - place)
        match draw.randrange(7):
            case 0:
                found[place] ^= 1 << draw.randrange(8)
            case 1:
                found[place : place + length] = draw.randbytes(length)
            case 2:
                del found[place : place + length]
            case 3:
                found[place:place] = found[place : place + length] * draw.choice((1, 1, 100))
            case 4:
                del found[place:]
            case 5:
                found[place : place + length] = draw.choice((b"\x00", b"\xff", b"\x7f")) * length
            case _:
                other = draw.randrange(size)
                found[place : place + length] = found[other : other + length]
    return bytes(found)


def fuzz(valid: list[bytes], read: Callable[[bytes], bool], count: int, seed: int) -> int:
    """Reads so many damaged files; how many of them could be read."""
    draw, good = random.Random(seed), 0
    before = 0
    for i in range(count):
        data = mutated(draw.choice(valid), draw)
        began = time.process_time()
        try:
            good += read(data)
        except BaseException as error:
            raise AssertionError(f"file {i} of seed {seed} ({len(data)} bytes): {type(error).__name__}") from error
        assert time.process_time() - began < SLOW, f"file {i} of seed {seed} took too long"
        if i == count // 3:
            before = memory()
    assert memory() - before < 64 << 20, f"{memory() - before:,} bytes more memory after {count} files"
    return good


def memory() -> int:
    """Bytes of memory that this process has now; 0 where the system does not say."""
    gc.collect()
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def read_image(data: bytes) -> bool:
    try:
        image = load(data)
    except ImageError:
        return False
    assert image.mode == "RGB"
    assert image.size[0] * image.size[1] < 10**8
    return True


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_damaged_images_give_a_image_or_an_image_error(count: int) -> None:
    valid = images()
    assert all(read_image(data) for data in valid)
    good = fuzz(valid, read_image, count, 11)
    assert 0.05 * count < good < 0.8 * count, f"{good} of {count} could be read: the damage is not what it was"


def manifests(folder: Path) -> dict[str, bytes]:
    """A small valid file of every layout, over three pictures of a folder."""
    names, texts = ["a.png", "b.png", "c.png"], ["a red star", 'a "big" dog, here', "빨간 별 하나"]
    for name in names:
        Image.new("RGB", (5, 7)).save(folder / name)
    rows = io.StringIO()
    writer = csv.writer(rows)
    writer.writerows([["filepath", "title", "split"], *zip(names, texts, ["train", "train", "val"], strict=True)])
    tabs = "\n".join(f"{name}\t{text}" for name, text in zip(names, texts, strict=True))
    lines = [{"image": name, "caption": text} for name, text in zip(names, texts, strict=True)]
    coco = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"id": 9 + i, "image_id": i, "caption": text} for i, text in enumerate(texts)],
    }
    karpathy = {
        "dataset": "own",
        "images": [
            {"filename": name, "split": "train", "sentids": [i], "sentences": [{"raw": text, "sentid": i}]}
            for i, (name, text) in enumerate(zip(names, texts, strict=True))
        ],
    }
    (folder / "train.en").write_text("".join(f"{text}\n" for text in texts), "utf-8")
    flickr = "".join(f"{name}#{i}\t{text}\n" for name, text in zip(names, texts, strict=True) for i in range(2))
    return {
        "pairs.csv": rows.getvalue().encode(),
        "pairs.tsv": f"filepath\ttitle\n{tabs}\n".encode(),
        "pairs.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines).encode(),
        "list.json": json.dumps(lines).encode(),
        "captions_train2014.json": json.dumps(coco).encode(),
        "dataset_own.json": json.dumps(karpathy).encode(),
        "results.token": flickr.encode(),
        "train_images.txt": "".join(f"{name}\n" for name in names).encode(),
    }


def reader(folder: Path, name: str) -> Callable[[bytes], bool]:
    def read(data: bytes) -> bool:
        path = folder / name
        path.write_bytes(data)
        try:
            source = PairFiles(folder, max_bad_fraction=1.0)
            for split in source.splits():
                pairs = source.split(split)
                for i in range(len(pairs)):
                    assert pairs.name(i)
                    for caption in pairs.captions(i):
                        assert caption.text.strip()
                        assert caption.text.lower() != "nan" or b"nan" in data.lower()
        except ValueError:
            return False
        return True

    return read


@pytest.mark.parametrize("count", [FEW // 5, pytest.param(MANY, marks=pytest.mark.slow)])
def test_damaged_manifests_give_pairs_or_a_value_error(count: int, tmp_path: Path) -> None:
    warnings.simplefilter("ignore")
    kinds, good = manifests(tmp_path), 0
    for seed, (name, data) in enumerate(kinds.items()):
        read = reader(tmp_path, name)
        assert read(data), name
        good += fuzz([data], read, count // len(kinds), seed)
        (tmp_path / name).unlink()
    assert 0.05 * count < good < 0.95 * count
