"""Folders as public data sets, download tools, phones and AI Hub leave them."""

import json
import zipfile
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from mmtransformer.data.check import check
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.pairs import PairFiles
from support.pair_files import draw

N = 6
NAMES = [f"{i:03d}.png" for i in range(N)]
STEMS = [name[:-4] for name in NAMES]
WANTED = {stem: [f"a dog {i}"] for i, stem in enumerate(STEMS)}
NONE = "names no pictures with captions"
AGAIN = "what another file says, once more: as words, or with notes"


def captions(source: PairFiles) -> dict[str, list[str]]:
    """By the last part of the picture's name, without its ending."""
    splits = [source.split(name) for name in source.splits()]
    found = {s.name(i): [c.text for c in s.captions(i)] for s in splits for i in range(len(s)) if s.image(i)}
    return {name.rpartition("/")[2].removesuffix(".png"): said for name, said in found.items()}


def sizes(source: PairFiles) -> dict[str, int]:
    return {name: len(source.split(name)) for name in source.splits()}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


@pytest.mark.parametrize(
    "file",
    ["{}.png.txt", "{}.png.json", "{}.png.supplemental-metadata.json", "{}.png.supplemen.json", "ann/{}.png.json"],
)
def test_files_named_after_the_whole_picture(file: str, tmp_path: Path) -> None:
    draw(tmp_path, [f"img/{name}" for name in NAMES])
    folder = tmp_path if "/" in file else tmp_path / "img"
    for i, stem in enumerate(STEMS):
        said = {"title": f"{stem}.png", "description": f"a dog {i}", "imageViews": "3"}
        write(folder / file.format(stem), json.dumps(said) if file.endswith("json") else f"a dog {i}")
    source = PairFiles(tmp_path)
    assert captions(source) == WANTED
    assert not source.report.errors
    assert "a manifest that was not read" not in source.report.notes


def test_every_picture_has_its_own_file_where_only_endings_differ(tmp_path: Path) -> None:
    draw(tmp_path, ["a1.png", "a1.jpg", "a1(1).jpg"])
    for name, said in (("a1.png", "a1.png"), ("a1.jpg", "a1.jpg"), ("a1(1).jpg", "a1.jpg(1)")):
        write(tmp_path / f"{said}.json", json.dumps({"title": name, "description": f"of {name}!"}))
    source = PairFiles(tmp_path)
    splits = [source.split(name) for name in source.splits()]
    assert {s.name(i): s.captions(i)[0].text for s in splits for i in range(len(s))} == {
        name: f"of {name}!" for name in ("a1.png", "a1.jpg", "a1(1).jpg")
    }


def test_the_keys_of_a_picture_s_own_json_are_named_and_can_be_chosen(tmp_path: Path) -> None:
    draw(tmp_path, NAMES)
    for i, stem in enumerate(STEMS):
        info = {"Annotations": [{"Type": "Caption", "Type_value": f"a dog {i}"}]}
        write(tmp_path / f"{stem}.json", json.dumps({"Raw data Info.": {"Date": "2022"}, "Learning Data Info.": info}))
    with pytest.raises(ValueError, match=r"has no key that is .*: --caption-column names one of Date, Type, Type_v"):
        PairFiles(tmp_path)
    assert captions(PairFiles(tmp_path, ReadOptions(caption_column="Type_value"))) == WANTED


def test_masks_are_left_out(tmp_path: Path) -> None:
    draw(tmp_path, [*NAMES, *(f"{stem}-masklabel.png" for stem in STEMS)])
    for i, stem in enumerate(STEMS):
        write(tmp_path / f"{stem}.txt", f"a dog {i}")
    source = PairFiles(tmp_path)
    assert captions(source) == WANTED
    assert source.report.notes == {"masks of other pictures, left out": N}


def label(i: int) -> str:
    image = {"id": i, "file_name": f"{STEMS[i]}.png"}
    return json.dumps({"images": [image], "annotations": [{"image_id": i, "id": i, "text": f"개 {i}"}]})


@pytest.mark.parametrize(
    ("pictures", "labels"),
    [
        ("{n}.{split}/원천데이터/TS1/{stem}.png", "{n}.{split}/라벨링데이터/TL1/{stem}.json"),
        ("01.데이터/{split}/01.원천데이터/S1.zip", "01.데이터/{split}/02.라벨링데이터/L1.zip"),
        ("{s}S1.zip", "{s}L1.zip"), ("{s}S_풍경/{stem}.png", "{s}L_풍경/{stem}.json"),
    ],
)  # fmt: skip
def test_ai_hub(pictures: str, labels: str, tmp_path: Path) -> None:
    draw(tmp_path / "drawn", NAMES)
    for i, stem in enumerate(STEMS):
        n, split = (1, "Training") if i < 4 else (2, "Validation")
        for place, name, data in (
            (pictures, f"{stem}.png", (tmp_path / "drawn" / f"{stem}.png").read_bytes()),
            (labels, f"{stem}.json", label(i).encode()),
        ):
            path = tmp_path / "set" / place.format(n=n, split=split, stem=stem, s=split[0])
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".zip":
                with zipfile.ZipFile(path, "a") as archive:
                    archive.writestr(name, data)
            else:
                path.write_bytes(data)
    source = PairFiles(tmp_path / "set")
    assert captions(source) == {stem: [f"개 {i}"] for i, stem in enumerate(STEMS)}
    assert sizes(source) == {"train": 4, "val": 2}
    assert "splits by their folders" in source.describe()


@pytest.mark.parametrize("folders", [("train2014", "val2014"), ("1.학습", "2.검증"), ("train.zip", "val.zip")])
def test_folders_called_like_splits(folders: tuple[str, str], tmp_path: Path) -> None:
    draw(tmp_path / "drawn", NAMES)
    for i, name in enumerate(NAMES):
        path = tmp_path / "set" / folders[i > 3]
        for file, data in (
            (name, (tmp_path / "drawn" / name).read_bytes()),
            (f"{STEMS[i]}.txt", f"a dog {i}".encode()),
        ):
            if path.suffix == ".zip":
                path.parent.mkdir(exist_ok=True)
                with zipfile.ZipFile(path, "a") as archive:
                    archive.writestr(file, data)
            else:
                path.mkdir(parents=True, exist_ok=True)
                (path / file).write_bytes(data)
    assert sizes(PairFiles(tmp_path / "set")) == {"train": 4, "val": 2}


def test_the_log_of_a_download_tool_is_no_manifest(tmp_path: Path) -> None:
    """img2dataset writes 00000.parquet, with addresses, and 00000_stats.json beside the folder 00000/."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    draw(tmp_path, [f"00000/{name}" for name in NAMES])
    for i, stem in enumerate(STEMS):
        write(tmp_path / "00000" / f"{stem}.txt", f"a dog {i}")
    rows = [{"url": f"http://x.com/{name}", "caption": "not this", "key": name[:-4]} for name in NAMES]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "00000.parquet")
    write(tmp_path / "00000_stats.json", json.dumps({"count": N, "status_dict": {"success": N}}))
    source = PairFiles(tmp_path)
    assert captions(source) == WANTED
    assert not source.report.notes
    rows = [{"path": f"00000/{name}", "caption": f"a cat {i}"} for i, name in enumerate(NAMES)]
    for path in (tmp_path / "00000").glob("*.txt"):
        path.unlink()
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "00000.parquet")
    assert captions(PairFiles(tmp_path))["003"] == ["a cat 3"]  # pictures without texts have them in the table


def rows(suffix: str = "") -> str:
    return json.dumps([{"image": name, "caption": f"a dog {i}{suffix}"} for i, name in enumerate(NAMES)])


@pytest.mark.parametrize(
    ("file", "other", "content", "why"),
    [
        ("captions_v1.2_train.json", "captions_v1.2_train_tokenized.json", rows(" ."), AGAIN),
        ("karpathy_val.json", "karpathy_val_gt.json", rows(), AGAIN),
        ("text/dogs.txt", "text/dogs.lemma.txt", "".join(f"{name}#0\tdog {name}\n" for name in NAMES), AGAIN),
        ("regions.json", "image_data.json", json.dumps([{"image_id": 1, "width": 5}]), NONE),
        ("styles.csv", "images.csv", "filename,link\n000.png,http://x.com/1.png\n", NONE),
        ("train_a.csv", "train_b.csv", "ID,CUIs\n000.png,C004\n", NONE),
    ],
)  # fmt: skip
def test_of_several_files_those_with_captions_are_meant(
    file: str, other: str, content: str, why: str, tmp_path: Path
) -> None:
    draw(tmp_path, [f"photos/{name}" for name in NAMES])
    if file.endswith(".json"):
        write(tmp_path / file, rows())
    else:
        first, mark = ("", "#0\t") if file.endswith(".txt") else ("image,caption\n", ",")
        write(tmp_path / file, first + "".join(f"{name}{mark}a dog {i}\n" for i, name in enumerate(NAMES)))
    write(tmp_path / other, content)
    source = PairFiles(tmp_path)
    assert captions(source) == WANTED
    assert source.report.first["file left out"] == [f"{other}: {why}"]


def test_lists_of_names_without_endings(tmp_path: Path) -> None:
    """ROCO's, in a folder a split; COCO-CN's have a number behind the name. Columns of keywords are none."""
    for split, part in (("train", slice(0, 4)), ("validation", slice(4, 6))):
        draw(tmp_path, [f"data/{split}/radiology/images/{name}" for name in NAMES[part]])
        lines = [f"{stem}#0\t {WANTED[stem][0]}\n" for stem in STEMS[part]]
        write(tmp_path / f"data/{split}/radiology/captions.txt", "".join(lines))
        keywords = "".join(f"{stem}\tword\tother\n" for stem in STEMS[part])
        write(tmp_path / f"data/{split}/radiology/keywords.txt", keywords)
    source = PairFiles(tmp_path)
    assert captions(source) == WANTED
    assert sizes(source) == {"train": 4, "val": 2}


@pytest.mark.parametrize("name", ["feed.xml", "all.h5", "data.mdb"])
def test_files_of_other_kinds_say_what_to_do(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, "<?xml version='1.0'?>\n<item/>\n")
    for root in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=rf"{name}: \.\w+ is not read: if it holds the captions, save them as CSV"):
            PairFiles(root)


def test_marked_phrases_are_named_and_taken_out(tmp_path: Path) -> None:
    draw(tmp_path, NAMES)
    for i, stem in enumerate(STEMS):
        write(tmp_path / f"{stem}.txt", f"[/EN#1{i}/animals a dog] {i}")
    assert any("captions with HTML or marks" in f.what for f in check(tmp_path, progress=False).findings)
    assert captions(PairFiles(tmp_path, ReadOptions(normalize="html"))) == WANTED


def test_lists_of_names_are_splits_and_no_captions(tmp_path: Path) -> None:
    draw(tmp_path, [f"img/{name}" for name in NAMES])
    for stem, said in WANTED.items():
        write(tmp_path / f"Sentences/{stem}.txt", said[0])
    for split, part in (("train", slice(0, 3)), ("dev", slice(3, 4)), ("test", slice(4, 5))):
        write(tmp_path / f"{split}.txt", "".join(f"{stem}\n" for stem in STEMS[part]))
    source = PairFiles(tmp_path)
    assert sizes(source) == {"train": 3, "val": 1, "test": 1}
    assert source.report.notes["lists of pictures without captions"] == 3
    assert source.report.notes["on none of the split lists, left out"] == 1
    assert not source.report.errors
    assert "by lists of names" in source.describe()
    for name in ("train", "dev"):
        (tmp_path / f"{name}.txt").unlink()
    assert set(sizes(PairFiles(tmp_path))) == {"train", "val"}  # one list alone says no splits


XMP = (
    '<x:xmpmeta><rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description><rdf:Alt>'
    '<rdf:li xml:lang="x-default">{} &amp; a cat</rdf:li></rdf:Alt></dc:description></rdf:Description></x:xmpmeta>'
)


@pytest.mark.parametrize("file", ["{}.xmp", "{}.png.xmp"])
def test_the_xmp_of_photo_libraries(file: str, tmp_path: Path) -> None:
    draw(tmp_path, NAMES)
    for stem, said in WANTED.items():
        write(tmp_path / file.format(stem), XMP.format(said[0]))
    assert captions(PairFiles(tmp_path)) == {stem: [f"{said[0]} & a cat"] for stem, said in WANTED.items()}


@pytest.mark.parametrize("tag", ["ImageDescription", "Description", "Caption-Abstract"])
def test_descriptions_inside_pictures_are_mentioned_with_what_writes_a_table(tag: str, tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (20, 20)), Image.Exif()
    if tag == "ImageDescription":
        exif[ExifTags.Base.ImageDescription] = "a dog"
    xmp = XMP.format("a dog").encode() if tag == "Description" else b""
    image.save(tmp_path / "a.jpg", exif=exif, xmp=xmp)
    if tag == "Caption-Abstract":
        data = (tmp_path / "a.jpg").read_bytes()
        iptc = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\n\x1c\x02\x78\0\x05a dog"
        (tmp_path / "a.jpg").write_bytes(data[:2] + b"\xff\xed" + (len(iptc) + 2).to_bytes(2, "big") + iptc + data[2:])
    (said,) = PairFiles(tmp_path, max_bad_fraction=1).report.first["pictures that may hold captions of their own"]
    assert said == f"a.jpg: cd {tmp_path.name} && exiftool -csv -r -{tag} . > captions.csv writes a table to read"
    write(tmp_path / "captions.csv", f"SourceFile,{tag}\n./a.jpg,a dog\n")
    assert list(captions(PairFiles(tmp_path)).values()) == [["a dog"]]


def test_documents_in_parquet_say_what_to_do(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"images": ["http://x.com/a.jpg", None], "texts": [None, "a dog"]}] * 3
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "train-00000.parquet")
    with pytest.raises(ValueError, match=r"train-00000.parquet holds interleaved documents.*save it as .jsonl"):
        PairFiles(tmp_path / "train-00000.parquet")


@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("https://x.com/{}.png", "download the pictures, as img2dataset does"),
        ("data:image/png;base64,{}", "write each picture into a file"),
        ("../{}.png", "write paths relative to the manifest"),
    ],
)
def test_what_to_do_about_pictures_that_are_not_here(place: str, remedy: str, tmp_path: Path) -> None:
    write(tmp_path / "c.csv", "image,caption\n" + "".join(f"{place.format(i)},a dog {i}\n" for i in range(N)))
    (finding,) = [f for f in check(tmp_path, progress=False).findings if f.what == "refused path"]
    assert finding.remedy.startswith(remedy)
