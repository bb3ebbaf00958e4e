"""Conversations, and lists of pictures, in Parquet and Arrow: read as JSON is."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.open_sources import open_pairs
from mmtransformer.text.conversation import turns_of
from support.pair_files import colour, png

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

N = 12
Talk = list[tuple[str, str]]
TALKS: list[Talk] = [
    [("What is it?", f"a dog {i}")] + [("Why\nso?", "it barks"), ("Old?", "no")] * (i % 3) for i in range(N)
]


def cauldron(talk: Talk) -> dict[str, Any]:
    return {"texts": [{"user": asked, "assistant": said, "source": "x"} for asked, said in talk]}


def llava(talk: Talk) -> dict[str, Any]:
    turns = [pair for asked, said in talk for pair in (("human", f"<image>\n{asked}"), ("gpt", said))]
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


def chat(talk: Talk) -> dict[str, Any]:
    turns = [pair for asked, said in talk for pair in (("user", asked), ("assistant", said))]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def parts(talk: Talk) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    for asked, said in talk:
        asks = [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": asked, "index": None}]
        turns += [{"role": "user", "content": asks[bool(turns) :]}]
        turns += [{"role": "assistant", "content": [{"type": "text", "text": said, "index": None}]}]
    return {"messages": turns}


PICTURES = {
    "image": lambda i: {"image": {"bytes": png(f"{i}"), "path": f"{i}.png"}},
    "images": lambda i: {"images": [{"bytes": png(f"{i}"), "path": f"{i}.png"}]},
    "no names": lambda i: {"images": [{"bytes": png(f"{i}"), "path": None}]},
    "no paths": lambda i: {"images": [png(f"{i}")]},
    "bytes": lambda i: {"jpg": png(f"{i}")},
    "paths": lambda i: {"images": [f"{i}.png"]},
    "a path": lambda i: {"image": f"{i}.png"},
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A table in groups of five rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=5)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    return path


def read(path: Path) -> Any:
    return open_pairs(path, ReadOptions(val_fraction=0), max_bad_fraction=1.0)


def said(source: Any) -> list[tuple[int, str, tuple[str, ...], str | None]]:
    """What each sample is: its picture's number, its caption, the turns before it, its language."""
    found = []
    for split in map(source.split, source.splits()):
        split = pickle.loads(pickle.dumps(split))
        for i in range(len(split)):
            [caption] = split.captions(i)
            red = split.image(i).getpixel((0, 0))[0]
            found.append((red // 11, caption.text, turns_of(caption.question or ""), caption.language))
    return sorted(found)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("form", [cauldron, llava, chat, parts], ids=lambda f: f.__name__)
def test_conversations_are_read_as_those_of_json_are(form: Any, pictures: str, ending: str, tmp_path: Path) -> None:
    for i in range(N):
        (tmp_path / f"{i}.png").write_bytes(png(f"{i}"))
    rows = [form(talk) | PICTURES[pictures](i) | {"split": "train"} for i, talk in enumerate(TALKS)]
    found = read(write(tmp_path / f"talks.{ending}", rows))
    (tmp_path / "talks.json").write_text(
        json.dumps([form(talk) | {"image": f"{i}.png"} for i, talk in enumerate(TALKS)])
    )
    as_json = read(tmp_path / "talks.json")
    assert said(found) == said(as_json)
    assert len(said(found)) == sum(map(len, TALKS))
    assert said(found)[-1][2] == (
        "What is it?",
        "a dog 11",
        "Why so?",
        "it barks",
        "Old?",
        "no",
        "Why so?",
        "it barks",
        "Old?",
    )
    assert [len(found.split("train").without_follow_ups()), len(found.split("train"))] == [N, len(said(found))]
    assert f"{N} pictures" in found.describe()
    assert not found.report.errors


def test_conversations_without_one_picture_or_an_answer_are_counted(tmp_path: Path) -> None:
    picture = {"bytes": png("3"), "path": "3.png"}
    rows = [
        cauldron([("What?", "a dog")]) | {"images": [picture]},
        cauldron([("What?", "two dogs")]) | {"images": [picture, picture]},
        cauldron([("Who am I?", "you")]) | {"images": []},
        cauldron([("Who am I?", "you")]) | {"images": None},
        cauldron([]) | {"images": [picture]},
        {"texts": None, "images": [picture]},
    ]
    source = read(write(tmp_path / "t.parquet", rows))
    assert [text for _, text, _, _ in said(source)] == ["a dog"]
    left = [line.rpartition("t.parquet:")[2] for line in source.report.first["conversations, left out"]]
    assert left == ["2: 2 pictures", "3: no picture", "4: no picture", "5: no answer", "6: no answer"]


def test_a_list_with_one_picture_is_that_picture(tmp_path: Path) -> None:
    pictures = [[{"bytes": png(str(i)), "path": f"{i}.png"}] for i in range(3)]
    rows = [{"images": found, "caption": f"a dog {i}"} for i, found in enumerate(pictures)]
    rows += [{"images": pictures[0] + pictures[1], "caption": "two"}, {"images": [], "caption": "nobody"}]
    source = read(write(tmp_path / "t.parquet", rows))
    assert [(number, text) for number, text, _, _ in said(source)] == [(i, f"a dog {i}") for i in range(3)]
    assert source.report.errors == {"several pictures": 1, "no picture named": 1}


def test_named_columns_are_taken_in_place_of_conversations(tmp_path: Path) -> None:
    rows = [chat([("What?", "a dog")]) | {"mine": png(str(i)), "words": f"a cat {i}"} for i in range(3)]
    path = write(tmp_path / "t.parquet", rows)
    source = open_pairs(path, ReadOptions(image_column="mine", caption_column="words", val_fraction=0))
    assert [text for _, text, _, _ in said(source)] == [f"a cat {i}" for i in range(3)]
    assert [text for _, text, _, _ in said(open_pairs(path, ReadOptions(image_column="mine", val_fraction=0)))] == [
        "a dog"
    ] * 3


def test_what_is_no_conversation_stays_what_it_is(tmp_path: Path) -> None:
    rows = [{"image": png(str(i)), "texts": [f"a dog {i}", f"an animal {i}"]} for i in range(3)]
    split = read(write(tmp_path / "t.parquet", rows)).split("train")
    assert [caption.text for caption in split.captions(1)] == ["a dog 1", "an animal 1"]
    assert split.image(1).getpixel((0, 0)) == colour("1")


def test_a_picture_is_read_with_its_row_group_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [cauldron(talk) | PICTURES["images"](i) for i, talk in enumerate(TALKS)]
    path = write(tmp_path / "t.parquet", rows)
    asked: list[tuple[int, list[str]]] = []
    whole = pq.ParquetFile.read_row_group

    def watched(file: Any, group: int, columns: list[str], **more: Any) -> Any:
        asked.append((group, columns))
        return whole(file, group, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    split = read(path).split("train")
    assert [group for group, _ in asked] == [0, 1, 2]
    assert all("bytes" not in name and name != "images" for _, columns in asked for name in columns)
    asked.clear()
    split.image(next(i for i in range(len(split)) if split.name(i).startswith("11.png")))
    assert asked == [(2, ["images"])]
