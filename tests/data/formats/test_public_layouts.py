"""Columns, names and chats as public data sets, shops and annotation tools write them."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmtransformer.data.check import check
from mmtransformer.data.pairs import PairFiles
from support.pair_files import draw

N = 6
NAMES = [f"photos/{i:03d}.png" for i in range(N)]


def captions(source: PairFiles) -> dict[str, list[str]]:
    """By the last part of the picture's name, without its ending."""
    splits = [source.split(name) for name in source.splits()]
    found = {s.name(i): [c.text for c in s.captions(i)] for s in splits for i in range(len(s)) if s.image(i)}
    return {name.rpartition("/")[2].partition(".")[0]: said for name, said in found.items()}


def table(path: Path, header: str, row: str, mark: str = ",") -> None:
    path.write_text("\n".join([header, *(row.format(i=i, n=f"{i:03d}") for i in range(N))]).replace("|", mark), "utf-8")


TABLES = {
    "a shop's feed": ("id|title|link|image_link", "{i}|a dog {i}|https://shop.com/{i}|https://cdn.com/{n}.png?v=3"),
    "Shopify": ("Handle|Title|Image Src", "dog-{i}|a dog {i}|https://cdn.com/files/{n}.png?v=163"),
    "styles.csv": ("id|season|productDisplayName", "{n}|Fall|a dog {i}"),
    "an address beside a file": ("url|local_path|caption", "https://x.com/p?id={i}|photos/{n}.png|a dog {i}"),
    "an address beside a name": ("url|image_id|caption", "https://x.com/a{i}.jpg|{n}.png|a dog {i}"),
    "a prompt": ("file_name|prompt|negative_prompt", "{n}.png|a dog {i}|blurry"),
    "exiftool": ("SourceFile|ImageDescription|Caption Writer Id", "./photos/{n}.png|a dog {i}|7"),
    "TextCaps": ("image_id|caption_id|caption_str|caption_tokens", "{n}|{i}|a dog {i}|a"),
    "a report": ("id|report|image_path", "{i}|a dog {i}|photos/{n}.png"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_columns_of_public_tables(kind: str, tmp_path: Path) -> None:
    draw(tmp_path, NAMES)
    table(tmp_path / "table.csv", *TABLES[kind])
    assert captions(PairFiles(tmp_path)) == {f"{i:03d}": [f"a dog {i}"] for i in range(N)}


def test_a_row_is_no_header(tmp_path: Path) -> None:
    """Columns that can't be told are named; no row below is taken for the header, its language for a caption."""
    draw(tmp_path, NAMES)
    wit = "language|image_url|caption_reference_description|caption_alt_text_description"
    table(tmp_path / "wit.tsv", wit, "ko|https://x.org/1/{n}.png|개 {i}|", "\t")
    with pytest.raises(
        ValueError, match=r"no column looks like the caption; its columns are: language, image_url, cap"
    ):
        PairFiles(tmp_path)
    table(tmp_path / "wit.tsv", "a title|of it", "ko|photos/{n}.png|a dog {i}", "\t")
    with pytest.raises(ValueError, match=r"no column looks like the image or the caption; its columns are: a title"):
        PairFiles(tmp_path)


def test_a_table_of_addresses_says_that_nothing_is_downloaded(tmp_path: Path) -> None:
    table(tmp_path / "gcc.tsv", "a dog|https://x.com/photo?w=300", "a dog {i}|https://x.com/photo{i}", "\t")
    with pytest.raises(ValueError, match=r"is a URL, and nothing is downloaded: fetch the pictures first .img2dataset"):
        PairFiles(tmp_path)


@pytest.mark.parametrize("place", ["data:image/png;base64,{}", "{}"])
def test_a_picture_in_base64_is_called_one(place: str, tmp_path: Path) -> None:
    rows = [{"image": place.format("/9j/" + "4AAQSkZJRgABAQAAAQABAAD" * 20), "caption": f"a dog {i}"} for i in range(N)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="is a picture itself, in base64: write it into a file"):
        PairFiles(tmp_path)


def test_long_cells_do_not_fill_the_screen(tmp_path: Path) -> None:
    (tmp_path / "ofa.tsv").write_text(f"0\t1\ta dog\t{'A' * 5000}\n" * 3)
    with pytest.raises(ValueError, match=r"its columns are: 0, 1, a dog, A{80}\.\.\.\. Name it"):
        PairFiles(tmp_path)


CHATS: dict[str, Any] = {
    "Gemini's": {
        "contents": [
            {"role": "user", "parts": [{"fileData": {"fileUri": "gs://b/photos/{n}.png"}}, {"text": "What is it?"}]},
            {"role": "model", "parts": [{"text": "a dog {i}"}]},
        ]
    },
    "Qwen-VL's": {
        "conversations": [
            {"from": "user", "value": "Picture 1: <img>photos/{n}.png</img>\nWhat is it?"},
            {"from": "assistant", "value": "a dog {i}"},
        ]
    },
    "a query": {"query": "<image>What is it?", "response": "a dog {i}", "images": ["photos/{n}.png"]},
    "an instruction": {"instruction": "What is it? <image>", "output": "a dog {i}", "images": ["photos/{n}.png"]},
}


@pytest.mark.parametrize("kind", CHATS)
def test_chats_of_public_trainers(kind: str, tmp_path: Path) -> None:
    draw(tmp_path, NAMES)
    text = json.dumps(CHATS[kind])
    rows = [text.replace("{i}", str(i)).replace("{n}", f"{i:03d}") for i in range(N)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    source = PairFiles(tmp_path)
    assert captions(source) == {f"{i:03d}": [f"a dog {i}"] for i in range(N)}
    split = source.split("train")
    assert {c.question for i in range(len(split)) for c in split.captions(i)} == {"What is it?"}


def test_captions_by_picture_and_language(tmp_path: Path) -> None:
    draw(tmp_path, NAMES)
    rows = [
        {
            "en": {"caption": ["a dog", f"dog {i}"]},
            "ko": {"caption": [f"개 {i}"]},
            "image/key": f"{i:03d}",
            "image/locale": "ar",
        }
        for i in range(N)
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = PairFiles(tmp_path)
    assert captions(source) == {f"{i:03d}": ["a dog", f"dog {i}", f"개 {i}"] for i in range(N)}
    assert source.languages == ("en", "ko")


def test_folders_that_are_called_otherwise(tmp_path: Path) -> None:
    """All folders of the names, each as one other folder; never a single picture, nor where two may be meant."""
    draw(tmp_path, NAMES)
    table(tmp_path / "c.csv", "image_path|caption", "train/{n}.png|a dog {i}")
    source = PairFiles(tmp_path)
    assert captions(source) == {f"{i:03d}": [f"a dog {i}"] for i in range(N)}
    assert source.report.notes == {"folders that are called otherwise here": N}
    table(tmp_path / "c.csv", "image_path|caption", "{i}/{n}.png|a dog {i}")  # all in one
    with pytest.raises(ValueError, match="missing picture: 6"):
        PairFiles(tmp_path)
    table(tmp_path / "c.csv", "image_path|caption", "photos/{n}.png|a dog {i}")
    (tmp_path / "c.csv").write_text((tmp_path / "c.csv").read_text() + "\ntrain/000.png|a cat".replace("|", ","))
    assert PairFiles(tmp_path).report.errors == {"missing picture": 1}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("ending", ["csv", "json"])
def test_utf_16_without_a_mark(encoding: str, ending: str, tmp_path: Path) -> None:
    draw(tmp_path, NAMES)
    rows = [(f"{i:03d}.png", f"개 {i}") for i in range(N)]
    text = "image,caption\n" + "\n".join(",".join(row) for row in rows)
    if ending == "json":
        text = json.dumps([{"image": image, "caption": caption} for image, caption in rows], ensure_ascii=False)
    (tmp_path / f"table.{ending}").write_bytes(text.encode(encoding))
    assert captions(PairFiles(tmp_path)) == {f"{i:03d}": [f"개 {i}"] for i in range(N)}


@pytest.mark.parametrize(
    ("text", "codec", "name"),
    [
        ("白いテーブルの上に赤い四角がある。", "cp932", "Shift-JIS.*--encoding cp932"),
        ("草地上有两只狗在奔跑", "gb18030", "GB18030.*--encoding gb18030"),
        ("모자를 쓴 남자가 말을 탄다.", "cp949", "CP949.*--encoding cp949"),
        ("une forêt à côté", "latin-1", "Latin-1.*--encoding latin-1"),
    ],
)
def test_the_encoding_that_is_guessed(text: str, codec: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes(f"image,caption\na.png,{text}\nb.png,{text}".encode(codec))
    with pytest.raises(ValueError, match=name):
        PairFiles(tmp_path)
    remedy = next(finding.remedy for finding in check(tmp_path, progress=False).findings if finding.what == "not UTF-8")
    assert f"--encoding {codec}" in remedy
