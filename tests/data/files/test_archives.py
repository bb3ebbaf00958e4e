"""Bad input from outside: paths that leave the root, hostile and damaged archives, odd tables and texts."""

import csv
import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransformer.data.files.archives import FileError, Files
from mmtransformer.data.files.names import join, refusal
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.files.tables import ColumnNames, read_table
from mmtransformer.data.files.text import is_missing, normalize_text
from mmtransformer.data.loading.errors import TooManyErrors
from mmtransformer.data.loading.source import Caption
from mmtransformer.data.pairs import PairFiles
from mmtransformer.images import ImageError
from support.pair_files import NAMES, caption, colour, draw, everything, expected, jsonl, pack, png, rows_jsonl


def with_one_bad(root: Path, image: object, **more: object) -> PairFiles:
    """Good pictures, and one row with a bad name in line 24."""
    draw(root)
    rows = [{"image": n, "caption": caption(n)} for n in NAMES]
    rows.append({"image": image, "caption": "the one", **more})  # type: ignore[dict-item]
    (root / "c.jsonl").write_text(jsonl(rows))
    return PairFiles(root)


HOSTILE = {
    "../../etc/passwd": "climbs out of the root",
    "a/../../secret.png": "climbs out of the root",
    "..\\..\\secret.png": "climbs out of the root",
    "/etc/passwd": "an absolute path",
    "\\\\server\\share\\a.png": "an absolute path",
    "C:\\a.png": "an absolute path",
    "~/a.png": "an absolute path",
    "http://example.org/a.png": "a URL",
    "file:///etc/passwd": "a URL",
    "data:image/png;base64,AAAA": "a picture itself, in base64",
    "/9j/" + "A" * 300: "a picture itself, in base64",
    "p00.png\0.jpg": "a NUL byte",
    "out.png": "a link that leads out of the root",
    "outside/secret.png": "a link that leads out of the root",
    "pipe.png": "not a regular file",
    "a" * 5000 + ".png": "aaaa",
    "": "no picture named",
    "null": "no picture named",
    ".": "'.'",
}


def test_base64_in_an_object_is_told_as_base64(tmp_path: Path) -> None:
    source = with_one_bad(tmp_path, {"bytes": "/9j/" + "A" * 300, "path": None})  # as `datasets` describes a picture
    assert "is a picture itself, in base64: write it into a file" in source.report.first["refused path"][0]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_leave_the_root_are_refused_by_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png("p1.png"))
    root = tmp_path / "a" / "root"
    draw(root)
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "outside").symlink_to(tmp_path)
    os.mkfifo(root / "pipe.png")
    source = with_one_bad(root, name)
    assert everything(source) == expected(1)
    assert source.report.bad_rows == 1
    (cause,) = source.report.errors
    named = f"{cause}: " + source.report.first[cause][0]
    assert "c.jsonl:24" in named
    assert HOSTILE[name] in named
    assert len(named) < 300


@pytest.mark.parametrize("image", [None, 3, [["a"]], [], {"path": 3}, float("nan")])
def test_a_image_that_is_no_name(image: object, tmp_path: Path) -> None:
    source = with_one_bad(tmp_path, image)
    assert everything(source) == expected(1)
    assert source.report.errors == {"no picture named": 1}


def test_links_inside_the_root_are_followed_for_files(tmp_path: Path) -> None:
    draw(tmp_path / "store", NAMES[:1])
    (tmp_path / "p00.png").symlink_to(tmp_path / "store" / "p00.png")
    (tmp_path / "c.jsonl").write_text(rows_jsonl(NAMES[:1]))
    assert everything(PairFiles(tmp_path, ReadOptions(val_fraction=0))) == expected(names=NAMES[:1])


def test_up_and_down_again_inside_the_root(tmp_path: Path) -> None:
    draw(tmp_path / "images")
    (tmp_path / "annotations").mkdir()
    rows = [{"image": f"../images/{n}", "caption": caption(n)} for n in NAMES]
    (tmp_path / "annotations" / "c.jsonl").write_text(jsonl(rows))
    source = PairFiles(tmp_path)
    assert sum(len(source.split(s)) for s in source.splits()) == 23
    with pytest.raises(TooManyErrors, match="climbs out of the root: give a folder higher up as the root"):
        PairFiles(tmp_path / "annotations")


def test_names_by_hand() -> None:
    assert join("a/b", "../c.png") == "a/c.png"
    assert join("", "./x//y.png") == "x/y.png"
    assert join("a", "../../x") is None
    assert refusal("a b/ko 한글.png") is None
    assert refusal("12:30.png") is None
    assert refusal("s3://bucket/a.png")


# Archives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_hostile_names_in_archives_are_refused(kind: str, tmp_path: Path) -> None:
    hostile = ["../p01.png", "/p02.png", "a/../../p03.png", "http://x/p04.png"]
    pack(tmp_path / f"a.{kind}", {n: png(n) for n in [*hostile, "p00.png"]})
    (tmp_path / "c.jsonl").write_text(rows_jsonl(NAMES[:5]))
    source = PairFiles(tmp_path, max_bad_fraction=0.9)
    assert everything(source) == expected(names=NAMES[:1])
    assert source.report.notes["file left out"] == 4
    assert source.report.errors["missing picture"] + source.report.errors.get("refused path", 0) == 4


def test_links_in_tars_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind, to in (("p00.png", tarfile.SYMTYPE, "/etc/passwd"), ("p01.png", tarfile.LNKTYPE, "c.jsonl")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, to
            archive.addfile(info)
    (tmp_path / "c.jsonl").write_text(rows_jsonl(NAMES[:2]))
    with pytest.raises(TooManyErrors, match=r"2 of 2 rows(.|\n)*a link inside an archive"):
        PairFiles(tmp_path)


def test_archives_that_cannot_be_read_in_place_are_named(tmp_path: Path) -> None:
    draw(tmp_path)
    (tmp_path / "c.jsonl").write_text(rows_jsonl())
    whole = pack(tmp_path / "z.zip", {"x.png": png("1")}).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    (tmp_path / "none.zip").write_bytes(b"")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "p00.png", "x.png")
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as other:
        other.writestr("y.png", png("1"))
    source = PairFiles(tmp_path)
    assert everything(source) == expected()
    said = "\n".join(source.report.first["file left out"])
    assert "cut.zip: a damaged archive" in said
    assert "none.zip: a damaged archive" in said
    assert "b.tar.gz: compressed as a whole" in said
    assert "lzma.zip/y.png: packed with zip method 14" in said
    for name, fault in (("cut.zip", "a damaged archive"), ("b.tar.gz", "repack it as .tar or .zip")):
        with pytest.raises(ValueError, match=f"{name}: .*{fault}"):
            PairFiles(tmp_path / name)


def test_bytes_that_change_or_lie_are_errors_not_images(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {n: png(n) for n in NAMES[:3]}, zipfile.ZIP_STORED)
    (tmp_path / "c.jsonl").write_text(rows_jsonl(NAMES[:3]))
    split = PairFiles(tmp_path, ReadOptions(val_fraction=0)).split("train")
    assert split.image(1).getpixel((0, 0)) == colour("p01.png")
    data = bytearray(path.read_bytes())
    at = data.index(png("p01.png"))
    data[at + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"a.zip/p01.png.*checksum"):
        split.image(1)
    assert split.image(2).getpixel((0, 0)) == colour("p02.png")
    path.write_bytes(data[: at + 20])
    with pytest.raises(ImageError, match=r"a.zip/p02.png"):
        split.image(2)


def test_captions_in_a_damaged_archive_are_an_error_or_a_fault(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"c.jsonl": rows_jsonl().encode()} | {n: png(n) for n in NAMES})
    data = path.read_bytes()
    path.write_bytes(data.replace(b"words 1", b"wolds 1"))
    with pytest.raises(FileError, match=r"^a.zip/c.jsonl: bytes fail the zip's checksum$"):
        PairFiles(tmp_path)
    files = {n: png(n) for n in NAMES} | {n[:3] + ".txt": b"some words" for n in NAMES}
    path.write_bytes(pack(path, files).read_bytes().replace(b"some words", b"some wolds", 1))
    source = PairFiles(path)
    assert source.report.errors == {"caption file that can't be read": 1}
    assert source.report.first["caption file that can't be read"] == ["p00.png: p00.txt: bytes fail the zip's checksum"]


def test_a_zip_that_claims_less_than_it_unpacks_is_cut_short(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"x.bin": b"\0" * 10_000_000}, zipfile.ZIP_DEFLATED)
    files = Files(path)
    (entry,) = files.entries
    assert len(files.read(entry)) == 10_000_000
    with pytest.raises(FileError, match=r"x.bin: 1,001 bytes where its archive says 1,000"):
        files.read(entry._replace(size=1000))
    with pytest.raises(FileError, match="over the limit of 1,073,741,824"):
        files.read(entry._replace(size=1 << 40))
    again = pickle.loads(pickle.dumps(files))
    assert again.read(again.entries[0]) == bytes(10_000_000)


# Tables and texts ---------------------------------------------------------------------------------------


def read_csv(root: Path, lines: list[bytes], **options: float) -> PairFiles:
    draw(root)
    good = [f"{n},{caption(n).replace(',', '')}".encode() for n in NAMES[5:]]
    (root / "c.csv").write_bytes(b"\n".join([b"image,caption", *lines, *good]) + b"\n")
    source = PairFiles(root, ReadOptions(val_fraction=0), **options)
    found = everything(source)
    for name in NAMES[5:]:  # no odd line costs another one
        assert found[name] == [caption(name).replace(",", "")]
    return source


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'p00.png,"a dog', '"a dog'),
        (b'p00.png,a dog"', 'a dog"'),
        (b'p00.png,a "big" dog', 'a "big" dog'),
        (b'p00.png,"a ""big"" dog"', 'a "big" dog'),
        (b'p00.png,"big" dogs', '"big" dogs'),
        (b"p00.png,one, two, and three", "one, two, and three"),
        (b'p00.png,"two\nlines, here"', "two lines, here"),
        (b'"p00.png", "spaced" ', "spaced"),
        ("p00.png,한 마리의 개\u2028둘".encode(), "한 마리의 개 둘"),
        (b"p00.png,form\x0cfeed\x1c", "form feed"),
    ],
)
def test_odd_lines_of_a_csv_are_read_alone(line: bytes, text: str, tmp_path: Path) -> None:
    source = read_csv(tmp_path, [line])
    split = source.split("train")
    assert split.name(0) == "p00.png"
    assert [c.text for c in split.captions(0)] == [text]
    assert source.report.bad_rows == 0


def test_two_stray_quotes_do_not_swallow_what_is_between(tmp_path: Path) -> None:
    lines = [b'p00.png,"a dog', b"p01.png,a cat", b'p02.png,a cow"', b'p03.png,"a pig', b'p04.png,"a hen"']
    source = read_csv(tmp_path, lines)
    split = source.split("train")
    texts = [split.captions(i)[0].text for i in range(5)]
    assert texts == ['"a dog', "a cat", 'a cow"', '"a pig', "a hen"]
    assert source.report.notes == {"stray quote, kept as text": 2}
    assert source.report.first["stray quote, kept as text"][0] == 'c.csv:2: p00.png,"a dog'


@pytest.mark.parametrize(
    ("line", "cause", "said"),
    [
        (b"p00.png,caf\xe9", "not UTF-8", "byte 0xe9 at column 12 (it may be Latin-1)"),
        ("p00.png,고양이 사진".encode("cp949"), "not UTF-8", "it may be CP949, Korean Windows"),
        (b"p00.png,", "empty caption", "p00.png ''"),
        (b"p00.png,NA", "empty caption", "p00.png 'NA'"),
        (b"p00.png,null", "empty caption", "'null'"),
        (b"p00.png,nan", "empty caption", "'nan'"),
        (b"p00.png,\xe2\x80\x83 ", "empty caption", ""),
        (b"p00.png", "wrong number of cells", "1 cells where the header has 2"),
        (b"nope.png,a dog", "missing picture", "'nope.png'"),
    ],
)
def test_lines_that_cannot_be_used_are_counted_by_line(line: bytes, cause: str, said: str, tmp_path: Path) -> None:
    source = read_csv(tmp_path, [b"p01.png,a cat", line])
    assert source.report.errors == {cause: 1}
    assert (source.report.rows, source.report.bad_rows) == (20, 1)
    (first,) = source.report.first[cause]
    assert first.startswith("c.csv:3: ")
    assert said in first
    names = [source.split("train").name(i) for i in range(len(source.split("train")))]
    assert "p00.png" not in names
    with pytest.raises(TooManyErrors, match=rf"1 of 20 rows can't be used \(5.0%, more than 0.0%(.|\n)*{cause}"):
        read_csv(tmp_path, [b"p01.png,a cat", line], max_bad_fraction=0)


def test_more_than_the_threshold_is_an_error_with_the_first_offenders(tmp_path: Path) -> None:
    with pytest.raises(TooManyErrors) as error:
        read_csv(tmp_path, [b"x%d.png,a dog" % i for i in range(7)])
    said = str(error.value)
    assert "7 of 25 rows can't be used (28.0%, more than 1.0% allowed by max_bad_fraction; " in said
    assert "missing picture: 7" in said
    assert "c.csv:2: 'x0.png'" in said
    assert "... and 2 more" in said
    assert len(read_csv(tmp_path, [b"x%d.png,a dog" % i for i in range(7)], max_bad_fraction=0.3).split("train")) == 18


def test_utf16_and_other_encodings_of_a_whole_file(tmp_path: Path) -> None:
    draw(tmp_path)
    text = "image\tcaption\r\n" + "".join(f"{n}\t그림 {i}\r\n" for i, n in enumerate(NAMES))
    (tmp_path / "c.tsv").write_text(text, "utf-16", newline="")
    source = PairFiles(tmp_path, ReadOptions(val_fraction=0))
    assert source.split("train").captions(4) == [Caption("그림 4", "ko")]
    (tmp_path / "c.tsv").write_text(text, "cp949", newline="")
    with pytest.raises(
        TooManyErrors, match=r"23 of 23(.|\n)*c.tsv:2: byte .* Korean Windows\): save the file as UTF-8"
    ):
        PairFiles(tmp_path)
    (tmp_path / "c.tsv").write_text("사진\t설명\nx\ty\n", "cp949")
    with pytest.raises(ValueError, match=r"c.tsv:1 is not UTF-8"):
        PairFiles(tmp_path)
    (tmp_path / "c.tsv").write_text("")
    with pytest.raises(ValueError, match=r"c.tsv is empty"):
        PairFiles(tmp_path)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ('{"image": "p00.png", "caption": "a dog"', "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"image": "p00.png", "caption": NaN}', "empty caption"),
        ('{"image": "p00.png", "caption": 7}', "a caption that is not text"),
        ('{"image": "p00.png", "caption": null}', "empty caption"),
        ('{"image": "p00.png", "caption": []}', "empty caption"),
        ('{"image": "p00.png"}', "empty caption"),
        ('{"image": "p00.png", "caption": "half \\ud83d"}', "not valid Unicode"),
        ('{"image": "p00.png", "caption": "x", "language": "K0rean!"}', "not a language"),
    ],
)
def test_json_lines_that_cannot_be_used(line: str, cause: str, tmp_path: Path) -> None:
    draw(tmp_path)
    lines = [json.dumps({"image": n, "caption": caption(n), "language": "en"}) for n in NAMES[1:]]
    (tmp_path / "c.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n\n")
    source = PairFiles(tmp_path)
    assert source.report.errors == {cause: 1}
    assert source.report.first[cause][0].startswith("c.jsonl:3: ")
    (broken := tmp_path / "broken.json").write_text('{"images": [\n{"a": }]}')
    with pytest.raises(ValueError, match=r"broken.json:2 is not JSON: Expecting value at column 7"):
        PairFiles(broken)


def test_one_empty_caption_of_several_costs_only_itself(tmp_path: Path) -> None:
    draw(tmp_path)
    rows = [{"image": n, "captions": ["a dog", "" if n == "p03.png" else "b"]} for n in NAMES]
    (tmp_path / "c.jsonl").write_text(jsonl(rows))
    source = PairFiles(tmp_path, ReadOptions(val_fraction=0))
    assert source.report.errors == {"empty caption": 1}
    assert source.split("train").captions(3) == [Caption("a dog")]
    assert len(source.split("train")) == 23


LETTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda text: ".png" not in text)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(LETTERS, LETTERS), min_size=1, max_size=7), st.sampled_from(",;\t|"), st.booleans())
def test_whatever_a_spreadsheet_writes_is_read_back(cells: list[tuple[str, str]], mark: str, everywhere: bool) -> None:
    """Also quotes, delimiters and line ends inside of cells, in a quoting of either kind."""
    out = io.StringIO()
    quoting: Literal[0, 1] = csv.QUOTE_ALL if everywhere else csv.QUOTE_MINIMAL
    writer = csv.writer(out, delimiter=mark, lineterminator="\n", quoting=quoting)
    writer.writerow(["image", "other", "caption"])
    # the csv module leaves a lone CR in a cell unquoted, which no reader can tell from the end of a line
    cells = [(one.replace("\r", "\n"), two.replace("\r", "\n")) for one, two in cells]
    writer.writerows((f"p{i}.png", other, text) for i, (other, text) in enumerate(cells))
    _, rows = read_table(out.getvalue().encode(), "c.csv", ColumnNames())
    got = list(rows)
    assert [row.image for row in got] == [f"p{i}.png" for i in range(len(cells))]
    for row, (_, text) in zip(got, cells, strict=True):
        normalized = normalize_text(text)
        assert [c.text for c in row.captions] == ([] if is_missing(normalized) else [normalized])
        assert bool(row.errors) == is_missing(normalized)
