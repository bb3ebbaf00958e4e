"""Users' own pairs: every format, detected and read in place; splits, languages, columns; nothing lost in silence."""

import json
import pickle
import re
import unicodedata
import zipfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image

from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.loading.errors import TooManyErrors
from mmtransformer.data.loading.source import Caption, Pairs, PairSource
from mmtransformer.data.pairs import PairFiles
from mmtransformer.images import ImageError
from support.pair_files import NAMES, caption, colour, draw, everything, expected, jsonl, pack, png, rows_jsonl
from support.pair_formats import MAKERS, make_csv, make_flickr, make_karpathy

KOREAN = [f"{i}번 그림" for i in range(23)]


# Formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("packed", ["folder", "zip", "tar", "wrapped"])
def test_formats_are_detected_and_read_in_place(kind: str, packed: str, tmp_path: Path) -> None:
    make, folder, said = MAKERS[kind]
    inside = tmp_path / "made" / "data" if packed == "wrapped" else tmp_path / "made"
    inside.mkdir(parents=True)
    make(inside)
    root = tmp_path / "made"
    if packed in ("zip", "tar"):
        files = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        root = pack(tmp_path / f"made.{packed}", files, zipfile.ZIP_DEFLATED)
    source = PairFiles(root)
    assert isinstance(source, PairSource)
    assert isinstance(source.split("train"), Pairs)
    prefix = "data/" if packed == "wrapped" and kind == "folder" else ""
    assert everything(source) == expected(folder=prefix + folder)
    assert re.search(said.replace("annotations/", ".*annotations/"), source.describe().replace("data/", "")), (
        source.describe()
    )
    assert source.report.rows > 0
    assert source.report.bad_rows == 0
    assert not source.report.notes


@pytest.mark.parametrize(
    "kind", [kind for kind in MAKERS if kind not in ("folder", "coco")]
)  # whose pictures lie below it
def test_a_manifest_may_be_the_root(kind: str, tmp_path: Path) -> None:
    make, folder, _ = MAKERS[kind]
    make(tmp_path)
    manifest = next(p for p in sorted(tmp_path.iterdir()) if p.is_file() and p.suffix != ".png" and "readme" not in
                    p.name and "lemma" not in p.name and not p.name.startswith(("Expert", "Flickr_")))  # fmt: skip
    assert everything(PairFiles(manifest)) == expected(folder=folder)


def test_karpathy_restval_is_train_and_splits_hold(tmp_path: Path) -> None:
    make_karpathy(tmp_path)
    source = PairFiles(tmp_path)
    assert source.splits() == ("train", "val", "test")
    assert [len(source.split(s)) for s in source.splits()] == [12, 6, 5]
    assert source.split("val").name(1) == "val2014/p06.png"


def test_flickr_lists_are_the_splits_and_the_rest_is_left_out(tmp_path: Path) -> None:
    make_flickr(tmp_path)
    (tmp_path / "Flickr_8k.testImages.txt").write_text("\n".join(NAMES[20:]) + "\nplanted.png\n")
    source = PairFiles(tmp_path)
    assert [len(source.split(s)) for s in ("train", "val", "test")] == [13, 5, 3]
    assert source.report.notes == {"on none of the split lists, left out": 6}
    assert source.split("val").name(0) == "p13.png"


def test_coco_images_elsewhere_and_two_years(tmp_path: Path) -> None:
    for year, part in (("train2017", NAMES[:17]), ("val2017", NAMES[17:])):
        draw(tmp_path / "photos" / year, part)
        images = [{"id": i, "file_name": name} for i, name in enumerate(part)]
        notes = [{"image_id": i, "caption": caption(name)} for i, name in enumerate(part)]
        path = tmp_path / "texts" / f"captions_{year}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": notes}))
    source = PairFiles(tmp_path / "texts", ReadOptions(image_folder=tmp_path / "photos"))
    assert everything(source) == expected(1)
    assert [len(source.split(s)) for s in source.splits()] == [17, 6]
    with pytest.raises(TooManyErrors, match=r"23 of 23 rows can't be used \(100.0%(.|\n)*missing picture: 23"):
        PairFiles(tmp_path / "texts")


def test_folder_splits_and_languages_by_name(tmp_path: Path) -> None:
    for split, part in (("train", NAMES[:11]), ("val", NAMES[11:18]), ("test", NAMES[18:])):
        draw(tmp_path / split, part)
        for name in part:
            (tmp_path / split / name).with_suffix(".en.txt").write_text(caption(name))
            (tmp_path / split / name).with_suffix(".ko.txt").write_text("그림 하나")
    source = PairFiles(tmp_path)
    assert {s: len(source.split(s)) for s in source.splits()} == {"train": 11, "val": 7, "test": 5}
    assert source.languages == ("en", "ko")
    pair = source.split("test").captions(0)
    assert set(pair) == {Caption(caption("p18.png"), "en"), Caption("그림 하나", "ko")}


def test_shards_with_the_same_names_stay_apart(tmp_path: Path) -> None:
    for shard in range(2):  # as tars of numbered samples are
        files = {}
        for i in range(11):
            files[f"{i:05d}.png"] = png(f"{i}.png")
            files[f"{i:05d}.txt"] = f"shard {shard} sample {i}".encode()
        pack(tmp_path / f"{shard:05d}.tar", files)
    found = everything(PairFiles(tmp_path))
    assert len(found) == 22
    assert found["00001.tar/00007.png"] == ["shard 1 sample 7"]


def test_images_in_zips_beside_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text(rows_jsonl(folder="images/"))
    pack(tmp_path / "any-0.zip", {f"images/{n}": png(n) for n in NAMES[:7]})
    pack(tmp_path / "sub" / "any-1.tar", {f"images/{n}": png(n) for n in NAMES[7:19]})
    draw(tmp_path / "images", NAMES[19:])
    assert everything(PairFiles(tmp_path)) == expected(folder="images/")


@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_parquet(kind: str, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    draw(tmp_path)
    image = {"bytes": [png(n) for n in NAMES], "struct": [{"bytes": png(n), "path": n} for n in NAMES], "path": NAMES}[
        kind
    ]
    texts = [[caption(n, k) for k in range(3)] for n in NAMES]
    table = pa.table({"image": image, "caption": texts, "split": ["train"] * 19 + ["validation"] * 4})
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet", row_group_size=5)
    source = PairFiles(tmp_path)
    assert source.splits() == ("train", "val")
    assert len(source.split("val")) == 4
    val = pickle.loads(pickle.dumps(source.split("val")))
    assert [val.image(i).getpixel((0, 0)) for i in range(4)] == [colour(n) for n in NAMES[19:]]
    assert val.captions(3) == [Caption(caption("p22.png", k)) for k in range(3)]
    if kind != "bytes":
        assert val.name(3) == "p22.png"
    data = bytearray((tmp_path / "train-00000-of-00001.parquet").read_bytes())
    data[4:-400] = bytes(len(data) - 404)
    (tmp_path / "bad.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"bad.parquet is (not Parquet|damaged in row group 0)"):
        PairFiles(tmp_path / "bad.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="is not Parquet"):
        PairFiles(tmp_path / "bad.parquet")


# Columns, splits, languages -----------------------------------------------------------------------------


def test_columns_can_be_named(tmp_path: Path) -> None:
    draw(tmp_path)
    rows = [{"f": n, "image": "x", "kurz": caption(n), "l": "Korean", "teil": "dev"} for n in NAMES]
    (tmp_path / "a.jsonl").write_text(jsonl(rows))
    with pytest.raises(ValueError, match="no column looks like the caption; its columns are: f, image, kurz, l, teil"):
        PairFiles(tmp_path)
    with pytest.raises(ValueError, match="has no column 'kurtz'; its columns are: f, image, kurz"):
        PairFiles(tmp_path, ReadOptions(caption_column="kurtz"))
    source = PairFiles(
        tmp_path, ReadOptions(image_column="f", caption_column="kurz", language_column="l", split_column="teil")
    )
    assert "columns image=f caption=kurz language=l split=teil" in source.describe()
    assert source.splits() == ("val",)
    assert source.languages == ("ko",)


def test_captions_in_many_shapes(tmp_path: Path) -> None:
    draw(tmp_path, NAMES[:7])
    shapes = [
        "one",
        ["two", "three"],
        {"en": "four", "ko": ["다섯", "여섯"]},
        [{"raw": "seven", "tokens": []}, {"text": "여덟", "language": "ko-KR"}],
        '["nine", "ten"]',
        "  el\u200beven\t twelve\n\u2028thirteen\x00 ",
        unicodedata.normalize("NFD", "열넷"),
    ]
    (tmp_path / "a.jsonl").write_text(jsonl([{"image": n, "caption": s} for n, s in zip(NAMES, shapes, strict=False)]))
    assert list(everything(PairFiles(tmp_path, ReadOptions(val_fraction=0))).values()) == [
        ["one"], ["two", "three"], ["four", "다섯", "여섯"], ["seven", "여덟"], ["nine", "ten"],
        ["el\u200beven twelve thirteen"], ["열넷"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "language", "languages"),
    [
        (["a dog"] * 23, None, ()),
        (["a dog"] * 23, "de", ("de",)),
        (KOREAN, None, ("ko",)),
        (["a dog"] * 11 + KOREAN[11:], None, ("en", "ko")),
        (["ein Hund"] * 11 + KOREAN[11:], "de", ("de", "ko")),
        (['a sign that says "안녕" to us'] * 23, None, ()),
    ],
)
def test_languages_need_no_configuration(
    texts: list[str], language: str | None, languages: tuple[str, ...], tmp_path: Path
) -> None:
    draw(tmp_path)
    (tmp_path / "a.jsonl").write_text(jsonl([{"image": n, "caption": t} for n, t in zip(NAMES, texts, strict=True)]))
    source = PairFiles(tmp_path, ReadOptions(default_language=language, val_fraction=0))
    assert source.languages == languages
    for i in range(23):
        text, code, _ = source.split("train").captions(i)[0]
        assert code == (None if not languages else "ko" if "번 그림" in text else languages[0])


def test_a_few_captions_in_another_script_make_no_language(tmp_path: Path) -> None:
    names = [f"p{i}.png" for i in range(211)]
    draw(tmp_path, names)
    for texts, languages in ((["a dog"] * 210 + ["개"], ()), (["개 한 마리"] * 210 + ["KTX"], ("ko",))):
        (tmp_path / "a.jsonl").write_text(
            jsonl([{"image": n, "caption": t} for n, t in zip(names, texts, strict=True)])
        )
        assert PairFiles(tmp_path).languages == languages


def test_a_column_for_each_language(tmp_path: Path) -> None:
    draw(tmp_path)
    rows = [
        {"image": n, "captions": ["a key"], "captions_ko": [k], "tags": ["x"], "caption_id": 3}
        for n, k in zip(NAMES, KOREAN, strict=True)
    ]
    (tmp_path / "a.jsonl").write_text(jsonl(rows))
    source = PairFiles(tmp_path)
    assert source.split("train").captions(0) == [Caption("a key", "en"), Caption("0번 그림", "ko")]
    assert "columns image=image caption=captions+captions_ko" in source.describe()
    assert "languages en 23, ko 23 (en where nothing says otherwise)" in source.describe()


@pytest.mark.parametrize("header", ["image\ten\tko", "사진\t영어\t한국어", "file_name\tcaption_en\tcaption_korean"])
def test_columns_named_by_language_alone(header: str, tmp_path: Path) -> None:
    draw(tmp_path)
    (tmp_path / "a.tsv").write_text(header + "\n" + "".join(f"{n}\ta key\t열쇠\n" for n in NAMES))
    assert PairFiles(tmp_path, ReadOptions(val_fraction=0)).split("train").captions(22) == [
        Caption("a key", "en"), Caption("열쇠", "ko")]  # fmt: skip


def test_folders_of_splits_each_with_its_manifest(tmp_path: Path) -> None:
    for split, part in (("train", NAMES[:13]), ("validation", NAMES[13:])):  # as "imagefolder" on the hub
        draw(tmp_path / split, part)
        lines = [f"{n},{caption(n)}" for n in part]
        (tmp_path / split / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    source = PairFiles(tmp_path)
    assert everything(source) == expected(1)
    assert [(s, len(source.split(s))) for s in source.splits()] == [("train", 13), ("val", 10)]


def test_what_a_download_tool_leaves_beside_its_shards(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    for shard in range(3):  # of each sample a picture, a text, a record; of each shard a table and figures
        files = {}
        for i in range(5):
            name = f"{shard:05d}{i:04d}"
            files[f"{name}.png"] = png(f"{i}.png")
            files[f"{name}.txt"] = b"a dog"
            files[f"{name}.json"] = b'{"url": "http://x/y.png", "caption": "a dog"}'
        pack(tmp_path / f"{shard:05d}.tar", files)
        pq.write_table(pa.table({"url": ["http://x"], "caption": ["x"]}), tmp_path / f"{shard:05d}.parquet")
        (tmp_path / f"{shard:05d}_stats.json").write_text('{"count": 5}')
    source = PairFiles(tmp_path)
    assert "pictures with text files: 15 pictures, 15 captions" in source.describe()
    assert source.report.bad_rows == 0


def test_hash_split_is_fixed_by_name(tmp_path: Path) -> None:
    names = [f"p{i}.png" for i in range(401)]
    draw(tmp_path, names)
    (tmp_path / "a.csv").write_text("image,caption\n" + "".join(f"{n},{caption(n)}\n" for n in names))

    def val(root: Path) -> set[str]:
        split = PairFiles(root).split("val")
        return {split.name(i) for i in range(len(split))}

    first = val(tmp_path)
    assert 20 < len(first) < 65
    assert {"p5.png", "p19.png"} & first == {n for n in ("p5.png", "p19.png") if n in first}
    (tmp_path / "a.csv").write_text("image,caption\n" + "".join(f"{n},y\n" for n in reversed(names[:307])))
    assert val(tmp_path) == first & set(names[:307])
    pack(tmp_path / "z" / "a.zip", {n: png(n) for n in names} | {"a.csv": (tmp_path / "a.csv").read_bytes()})
    assert val(tmp_path / "z") == first & set(names[:307])


def test_val_is_never_empty_and_named_splits_win(tmp_path: Path) -> None:
    draw(tmp_path)
    (tmp_path / "a.csv").write_text("image,caption\n" + "".join(f"{n},{caption(n)}\n" for n in NAMES[:2]))
    source = PairFiles(tmp_path)
    assert [len(source.split(s)) for s in ("train", "val")] == [1, 1]
    assert PairFiles(tmp_path, ReadOptions(val_fraction=0)).splits() == ("train",)
    splits = ["train"] * 17 + ["test"] * 6
    (tmp_path / "a.csv").write_text(
        "image,caption,split\n"
        + "".join(f"{n},{caption(n)} x,{s}\n" for n, s in zip(NAMES, splits, strict=True)).replace(", words", "")
    )
    source = PairFiles(tmp_path)
    assert len(source.split("test")) == 6
    assert len(source.split("train")) + len(source.split("val")) == 17
    with pytest.raises(ValueError, match="no split 'held'; it has: train, val, test"):
        source.split("held")
    with pytest.raises(ValueError, match=r"val_fraction \(1\)"):
        PairFiles(tmp_path, ReadOptions(val_fraction=1))


def test_a_split_without_any_image_is_left_out_and_said(tmp_path: Path) -> None:
    draw(tmp_path, NAMES[:17])
    splits = ["train"] * 13 + ["val"] * 4 + ["test"] * 6
    rows = [{"image": n, "caption": "x y", "split": s} for n, s in zip(NAMES, splits, strict=True)]
    (tmp_path / "a.jsonl").write_text(jsonl(rows))
    source = PairFiles(tmp_path)
    assert source.splits() == ("train", "val")
    assert source.report.notes == {"split test has no pictures here, left out": 6}
    (tmp_path / NAMES[22]).write_bytes(png(NAMES[22]))
    with pytest.raises(TooManyErrors, match="5 of 23 rows"):
        PairFiles(tmp_path)


def test_one_image_named_in_two_splits_is_a_fault(tmp_path: Path) -> None:
    draw(tmp_path)
    rows = [{"image": n, "caption": "x y", "split": s} for n in NAMES[:3] for s in ("train", "val")]
    (tmp_path / "a.jsonl").write_text(jsonl(rows))
    with pytest.raises(TooManyErrors, match=r"picture in two splits: 3(.|\n)*a.jsonl:2: 'p00.png' is in train already"):
        PairFiles(tmp_path)


def test_several_manifests_must_belong_together(tmp_path: Path) -> None:
    make_csv(tmp_path)
    (tmp_path / "more.jsonl").write_text(rows_jsonl())
    with pytest.raises(ValueError, match=r"2 manifests .* captions.csv \(csv\), more.jsonl \(jsonl\).* or the format"):
        PairFiles(tmp_path)
    assert "JSONL" in PairFiles(tmp_path, ReadOptions(format="jsonl")).describe()
    assert everything(PairFiles(tmp_path / "captions.csv")) == expected()
    with pytest.raises(ValueError, match="holds no coco manifest"):
        PairFiles(tmp_path, ReadOptions(format="coco"))
    with pytest.raises(ValueError, match='format: unknown value "cvs"; choose one of auto, folder, csv'):
        PairFiles(tmp_path, ReadOptions(format="cvs"))  # type: ignore[arg-type]
    (tmp_path / "more.jsonl").unlink()
    (tmp_path / "captions.csv").rename(tmp_path / "train.csv")
    (tmp_path / "valid.csv").write_text("filepath,title\np00.png,again\n")
    with pytest.raises(TooManyErrors, match="1 of 70 rows"):
        PairFiles(tmp_path, max_bad_fraction=0)
    (tmp_path / "q77.png").write_bytes(png("q1.png"))
    (tmp_path / "valid.csv").write_text("filepath,title\nq77.png,again\n")
    assert [len(PairFiles(tmp_path).split(s)) for s in ("train", "val")] == [23, 1]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        PairFiles(tmp_path / "no")
    with pytest.raises(ValueError, match="holds no pictures and no manifest with captions"):
        PairFiles(tmp_path)
    draw(tmp_path)
    with pytest.raises(TooManyErrors, match=r"23 of 23 rows .*(.|\n)*no caption file: 23"):
        PairFiles(tmp_path)


# Finding the picture that is meant, and no other ---------------------------------------------------------


def test_folders_too_many_or_too_few_in_the_manifest(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "b")
    (tmp_path / "c.jsonl").write_text(rows_jsonl())
    assert everything(PairFiles(tmp_path)) == expected()
    (tmp_path / "c.jsonl").write_text(rows_jsonl(folder="set/images/a/b/"))
    assert everything(PairFiles(tmp_path)) == expected(folder="set/images/a/b/")
    (tmp_path / "c.jsonl").write_text(rows_jsonl(folder="a\\\\b\\\\".replace("\\\\", "\\")))
    assert everything(PairFiles(tmp_path)) == expected(folder="a/b/")


def test_a_name_that_may_mean_two_images_means_none(tmp_path: Path) -> None:
    draw(tmp_path / "big", NAMES[:2])
    draw(tmp_path / "small", NAMES[:1])
    (tmp_path / "c.jsonl").write_text(rows_jsonl(NAMES[:2]))
    source = PairFiles(tmp_path, max_bad_fraction=0.5)
    assert list(everything(source)) == ["p01.png"]
    assert source.report.errors == {"ambiguous name": 1}
    assert source.report.first["ambiguous name"] == ["c.jsonl:1: 'p00.png' may be big/p00.png or small/p00.png"]


def test_a_missing_image_is_not_replaced_by_a_namesake(tmp_path: Path) -> None:
    draw(tmp_path / "cats", NAMES[:5])
    draw(tmp_path / "dogs" / "thumbs", NAMES[5:6])
    rows = [{"image": f"cats/{n}", "caption": "a cat"} for n in NAMES[:5]]
    rows.append({"image": f"dogs/{NAMES[5]}", "caption": "a dog"})
    (tmp_path / "c.jsonl").write_text(jsonl(rows))
    source = PairFiles(tmp_path)
    assert source.report.errors == {"missing picture": 1}
    assert len(everything(source)) == 5
    rows = [{"image": "cats/p01.png", "caption": "a cat"}, {"image": "dogs/p01.png", "caption": "a dog"}]
    (tmp_path / "only").mkdir()
    draw(tmp_path / "only", NAMES[1:2])
    (tmp_path / "only" / "c.jsonl").write_text(jsonl(rows))
    with pytest.raises(TooManyErrors, match="2 of 2 rows"):
        PairFiles(tmp_path / "only")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_korean_file_names_in_either_form(form: Literal["NFC", "NFD"], tmp_path: Path) -> None:
    other: Literal["NFC", "NFD"] = "NFD" if form == "NFC" else "NFC"
    names = [f"고양이 사진{i}.png" for i in range(5)]
    draw(tmp_path / "그림", [unicodedata.normalize(form, n) for n in names])
    rows = [{"사진": unicodedata.normalize(other, f"그림/{n}"), "설명": "고양이"} for n in names]
    (tmp_path / "자료.jsonl").write_text(jsonl(rows))
    assert len(everything(PairFiles(tmp_path, ReadOptions(val_fraction=0)))) == 5
    (tmp_path / "z").mkdir()
    # names in CP949 and without the flag for UTF-8, as Korean Windows packs them: zipfile can't write that, so the
    # names are put in afterwards, in the place of others that are as long in bytes
    stand_ins = {n: n.encode("cp949").decode("latin-1").encode("ascii", "replace").decode() for n in names}
    path = pack(tmp_path / "z" / "a.zip", {stand_ins[n]: png(n) for n in names})
    data = path.read_bytes()
    for name in names:
        data = data.replace(stand_ins[name].encode(), name.encode("cp949"))
    path.write_bytes(data)
    (tmp_path / "z" / "a.jsonl").write_text(jsonl([{"image": n, "caption": "고양이"} for n in names]))
    assert len(everything(PairFiles(tmp_path / "z", ReadOptions(val_fraction=0)))) == 5


def _pixel(split: Pairs, i: int) -> object:
    return split.image(i).getpixel((0, 0))


def test_workers_read_the_same_archive(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(rows_jsonl())
    pack(tmp_path / "a.zip", {n: png(n) for n in NAMES}, zipfile.ZIP_DEFLATED)
    split = PairFiles(tmp_path, ReadOptions(val_fraction=0)).split("train")
    split.image(0)  # opened before the fork
    whole = [colour(n) for n in NAMES]
    with get_context("fork").Pool(2) as pool:
        assert pool.starmap(_pixel, [(split, i) for i in range(23)] * 3) == whole * 3
    with ThreadPoolExecutor(5) as threads:
        assert list(threads.map(lambda i: _pixel(split, i % 23), range(69))) == whole * 3
    sent = pickle.loads(pickle.dumps(split))  # as to spawned workers
    assert [_pixel(sent, i) for i in range(23)] == whole


def test_what_fails_later_is_an_image_error_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(rows_jsonl(NAMES[:3]))
    draw(tmp_path, NAMES[:3])
    split = PairFiles(tmp_path, ReadOptions(val_fraction=0)).split("train")
    (tmp_path / NAMES[0]).unlink()
    (tmp_path / NAMES[1]).write_bytes(b"")
    with pytest.raises(ImageError, match=r"p00.png"):
        split.image(0)
    with pytest.raises(ImageError, match=r"p01.png"):
        split.image(1)
    assert split.image(2).size == (7, 5)


@pytest.mark.parametrize("name", ["val", "validation", "dev", "Valid"])
def test_a_split_has_several_names(name: str, tmp_path: Path) -> None:
    draw(tmp_path)
    (tmp_path / "c.jsonl").write_text(rows_jsonl())
    source = PairFiles(tmp_path)
    assert len(source.split(name)) == len(source.split("val")) > 0
    with pytest.raises(ValueError, match="has no split 'test'; it has: train, val"):
        source.split("test")


def test_of_one_picture_alone_the_error_says_how_to_train_on_it(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("빨강", "utf-8")
    pairs = PairFiles(str(tmp_path))
    with pytest.raises(ValueError, match=r"no split 'val'; it has: train; .* with --data\.splits\.val=\[train\]$"):
        pairs.split("val")
    with pytest.raises(ValueError, match=r"no split 'test'; it has: train$"):
        pairs.split("test")
