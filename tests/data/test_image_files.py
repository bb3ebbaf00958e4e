"""What a folder, an archive or a pattern of a command line holds: no picture is left out without being counted."""

import io
import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from mmtransformer.data.class_sources import ImageFolder
from mmtransformer.data.files.endings import IMAGES
from mmtransformer.data.image_files import ImageFiles
from mmtransformer.images import ImageError, load

KINDS = {
    "JPEG": ".jpg .jpeg .jpe .jfif", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tif .tiff",
    "AVIF": ".avif", "PPM": ".ppm .pgm .pbm .pnm", "JPEG2000": ".jp2 .j2k", "HEIF": ".heic .heif",
}  # fmt: skip


def said(pictures: ImageFiles) -> dict[str, str]:
    """What is wrong with each picture that cannot be used."""
    wrong: dict[str, str] = {}
    for i in range(len(pictures)):
        try:
            pictures.image(i)
        except ImageError as error:
            wrong[pictures.name(i)] = str(error).removeprefix(f"{pictures.name(i)}: ")
    return wrong


def test_names_that_are_no_utf8_are_counted(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in (b"\xbb\xe7.png", b"\xc6\xfa/b.png", b"\xbb\xe7.txt"):
        path = os.path.join(os.fsencode(tmp_path), name)  # noqa: PTH118 (pathlib takes no bytes)
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        with open(path, "wb") as file:  # noqa: PTH123
            file.write((tmp_path / "a.png").read_bytes())
    wrong = said(ImageFiles([tmp_path]))
    assert {name.removeprefix(f"{tmp_path}/") for name in wrong} == {"\\udcbb\\udce7.png", "\\udcc6\\udcfa"}
    assert all("not UTF-8: rename it" in reason for reason in wrong.values())


def test_a_linked_folder_elsewhere_is_counted_and_one_inside_is_not(tmp_path: Path) -> None:
    for name in ("here/a", "there"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    (tmp_path / "here/again").symlink_to(tmp_path / "here/a")
    (tmp_path / "here/other").symlink_to(tmp_path / "there")
    pictures = ImageFiles([tmp_path / "here"])
    assert len(pictures) == 2
    assert [name.rpartition("/")[2] for name in said(pictures)] == ["other"]


def test_an_empty_folder_among_others_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b.jpg"):
        Path(name).mkdir()
    Image.new("RGB", (8, 8)).save("c.jpg")
    for places in (["a", "b.jpg", "c.jpg"], ["a", "*.jpg"]):
        wrong = said(ImageFiles(places))
        assert [*wrong] == ["a", "b.jpg"]
        assert all(reason.startswith("no pictures there") for reason in wrong.values())
    with pytest.raises(ValueError, match=r"^a: no pictures there"):
        ImageFiles(["a"])


def test_an_archive_inside_an_archive_is_named_so_by_its_own_path_too(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.png", data.getvalue())
        file.writestr("inner.zip", b"PK")
    named = said(ImageFiles([tmp_path / "a.zip/inner.zip", tmp_path / "a.zip/a.png"]))
    assert named == said(ImageFiles([tmp_path / "a.zip"]))
    assert ["an archive inside an archive" in reason for reason in named.values()] == [True]


def test_every_format_that_is_read_is_found_by_its_endings(tmp_path: Path) -> None:
    assert {ending for endings in KINDS.values() for ending in endings.split()} == set(IMAGES)
    for kind, endings in KINDS.items():
        if kind in ("AVIF", "HEIF"):  # where Pillow has them
            continue
        for ending in endings.split():
            path = tmp_path / "cat" / f"{kind}{ending}"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(path, kind)
            assert load(path).size == (8, 8)
    assert said(ImageFiles([tmp_path])) == {}
    pictures = len(ImageFiles([tmp_path]))
    assert pictures == sum(len(endings.split()) for endings in KINDS.values()) - 3
    (tmp_path / "dog").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "dog/a.png")
    (tmp_path / "dog/._a.png").write_bytes(b"\0\5\x16\7")  # what a Mac leaves
    folder = ImageFolder(str(tmp_path))
    assert sum(len(folder.split(name)) for name in folder.splits()) == pictures + 1
    assert (folder.ignored, folder.left_out) == (0, "")
