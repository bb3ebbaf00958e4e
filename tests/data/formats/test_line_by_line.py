"""Lists of pictures, and their captions line by line in other files."""

from pathlib import Path

import pytest

from mmtransformer.data.pairs import PairFiles
from support.pair_files import draw

N = 6
NAMES = [f"{i:03d}.png" for i in range(N)]


def captions(source: PairFiles) -> dict[str, list[tuple[str, str | None]]]:
    splits = [source.split(name) for name in source.splits()]
    found = {s.name(i): [c[:2] for c in s.captions(i)] for s in splits for i in range(len(s)) if s.image(i)}
    return {name.rpartition("/")[2]: said for name, said in found.items()}


def write(path: Path, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows), "utf-8")


@pytest.mark.parametrize(
    ("pictures", "texts"),
    [
        ("{}_images.txt", "{}.{}"),
        ("data/task1/image_splits/{}.txt", "data/task1/raw/{}.{}"),
        ("{}_files.txt", "text/{}_captions.{}"),
    ],
)
def test_multi30k(pictures: str, texts: str, tmp_path: Path) -> None:
    draw(tmp_path, [f"images/{name}" for name in NAMES])
    for split, part in (("train", slice(0, 4)), ("val", slice(4, 6))):
        write(tmp_path / pictures.format(split), NAMES[part])
        for code, word in (("de", "ein Hund"), ("en", "a dog")):
            write(tmp_path / texts.format(split, code), [f"{word} {name}" for name in NAMES[part]])
    source = PairFiles(tmp_path)
    assert captions(source) == {name: [(f"ein Hund {name}", "de"), (f"a dog {name}", "en")] for name in NAMES}
    assert {name: len(source.split(name)) for name in source.splits()} == {"train": 4, "val": 2}
    assert not source.report.errors


@pytest.mark.parametrize("alone", [False, True])
def test_sbu(alone: bool, tmp_path: Path) -> None:
    draw(tmp_path, [f"images/{name}" for name in NAMES])
    write(tmp_path / "SBU_photo_urls.txt", [f"http://static.flickr.com/27/{name}" for name in NAMES])
    write(tmp_path / "SBU_photo_captions.txt", [f"a dog {i}" for i in range(N)])
    source = PairFiles(tmp_path / "SBU_photo_urls.txt" if alone else tmp_path)
    assert captions(source) == {name: [(f"a dog {i}", None)] for i, name in enumerate(NAMES)}


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    draw(tmp_path, NAMES)
    write(tmp_path / "train_images.txt", [*NAMES[:4], "", NAMES[5]])
    (tmp_path / "train.en").write_bytes(b"a dog 0\na dog 1\n\xff\nNA\nnothing\na dog 5\n")
    source = PairFiles(tmp_path, max_bad_fraction=1)
    assert captions(source) == {NAMES[i]: [(f"a dog {i}", "en")] for i in (0, 1, 5)}
    assert source.report.errors == {"not UTF-8": 1, "empty caption": 1, "no picture named": 1}
    assert source.report.first["not UTF-8"][0].startswith("train_images.txt:3: train.en:3: byte 0xff")
    write(tmp_path / "train.ko", ["개"])
    with pytest.raises(ValueError, match=r"train_images.txt has 6 lines and train.ko 1: they go line by line"):
        PairFiles(tmp_path)


def test_lists_that_name_pictures_themselves_are_no_captions_of_another(tmp_path: Path) -> None:
    draw(tmp_path, NAMES)
    write(tmp_path / "train.txt", NAMES)
    write(tmp_path / "train_captions.txt", [f"{name}\ta dog {i}" for i, name in enumerate(NAMES)])
    assert captions(PairFiles(tmp_path)) == {name: [(f"a dog {i}", None)] for i, name in enumerate(NAMES)}
