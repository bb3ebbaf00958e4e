"""JSON with captions in the shapes that people and programs write, and what is said of JSON that is none."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmtransformer.data.check import check
from mmtransformer.data.pairs import PairFiles
from support.pair_files import draw

N = 6
NAMES = [f"{i:03d}.png" for i in range(N)]
WANTED = {name: [f"a dog {i}"] for i, name in enumerate(NAMES)}
ROWS = [{"image": name, "caption": f"a dog {i}"} for i, name in enumerate(NAMES)]
BOTH = [*WANTED.items()]
IMAGES = [{"id": 10 + i, "file_name": name, "height": 5} for i, name in enumerate(NAMES)]


def captions(source: PairFiles) -> dict[str, list[str]]:
    splits = [source.split(name) for name in source.splits()]
    return {s.name(i): [c.text for c in s.captions(i)] for s in splits for i in range(len(s)) if s.image(i)}


SHAPES: dict[str, Any] = {
    "below a key": {"data": ROWS},
    "beside other keys": {"info": {"year": 2026}, "licenses": [{"id": 1, "name": "x"}], "annotations": ROWS},
    "pictures with captions": {"images": [image | {"caption": f"a dog {i}"} for i, image in enumerate(IMAGES)]},
    "no annotations": {"images": [i | {"caption": f"a dog {n}"} for n, i in enumerate(IMAGES)], "annotations": []},
    "deep": {"dataset": {"version": 1, "samples": ROWS}},
    "a key a split": {"train": ROWS[:4], "validation": ROWS[4:]},
    "by name": {name: said[0] for name, said in WANTED.items()},
    "by name, below a key": {"captions": dict(WANTED)},
    "by id": {name[:-4]: said for name, said in WANTED.items()},
    "by id, records": {name[:-4]: {"caption": said[0], "tags": ["x"]} for name, said in WANTED.items()},
    "pandas' columns": {key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ("image", "caption")},
    "lists by column": {key: [row[key] for row in ROWS] for key in ("image", "caption")},
    "pandas' split": {"columns": ["image", "caption"], "index": [*range(N)], "data": [[*r.values()] for r in ROWS]},
    "pandas' index": {str(i): row for i, row in enumerate(ROWS)},
    "pandas' table": {"schema": {"fields": [{"name": "image", "type": "string"}]}, "data": ROWS},
    "rows with a header": [["image", "caption"], *([*row.values()] for row in ROWS)],
    "pairs": [[*row.values()] for row in ROWS],
    "COCO's under another key": {
        "images": IMAGES,
        "captions": [{"image_id": 10 + i, "text": f"a dog {i}", "id": i} for i in range(N)],
    },
    "Label Studio's export below a key": {
        "tasks": [{"data": row, "annotations": [{"result": [{"value": {"text": [row["caption"]]}}]}]} for row in ROWS]
    },
    "a picture as an object": [
        {"image": {"width": 5, "path": f"/nas/{n}", "filename": n}, "text": c[0]} for n, c in BOTH
    ],
    "captions by language": [{"image": name, "captions": [{"english": said[0]}]} for name, said in BOTH],
    "VGG's annotator": {
        "_via_settings": {"core": {"filepath": {}}},
        "_via_img_metadata": {
            f"{name}123": {"filename": name, "size": 123, "regions": [], "file_attributes": {"caption": said[0]}}
            for name, said in BOTH
        },
    },
    "fields and responses": [
        {"id": name, "fields": {"image": name}, "responses": {"caption": [{"value": said[0]}]}} for name, said in BOTH
    ],
    "rows of a server": {
        "rows": [{"row_idx": 1, "row": {"image": {"src": name}, "text": said[0]}} for name, said in BOTH]
    },
    "posts": [{"media": [{"uri": name, "title": said[0], "size": 1}], "title": ""} for name, said in BOTH],
    "a post with a title of its own": [
        {"media": [{"uri": name, "title": ""}], "title": said[0]} for name, said in BOTH
    ],
    "regions": [{"id": i, "regions": [{"image_id": f"{i:03d}", "phrase": f"a dog {i}", "x": 1}]} for i in range(N)],
    "a list a class": {
        cls: [{"filename": name, "raw": said[0]} for name, said in BOTH[part]]
        for cls, part in (("airport", slice(0, 3)), ("beach", slice(3, 6)))
    },
    "lists a class of different length": {
        cls: [{"filename": name, "raw": said[0]} for name, said in BOTH[part]]
        for cls, part in (("airport", slice(0, 2)), ("beach", slice(2, 6)))
    },
    "ids with folders": {f"photos/{name[:-4]}": {"caption": said[0], "tags": "x"} for name, said in BOTH},
    "conversations below a key": {
        "data": [
            {"image": r["image"], "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": c}]}
            for r in ROWS
            for c in [r["caption"]]
        ]
    },
}


@pytest.mark.parametrize("place", ["captions.json", "json/deep/result.json"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, place: str, tmp_path: Path) -> None:
    draw(tmp_path, [f"photos/{name}" for name in NAMES])
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(SHAPES[shape]), "utf-8")
    for root in (tmp_path, path) if place == "captions.json" else (tmp_path,):
        source = PairFiles(root)
        found = {name.rpartition("/")[2]: said for name, said in captions(source).items()}
        found = {name if name.endswith(".png") else f"{name}.png": said for name, said in found.items()}
        assert found == WANTED
        if shape == "a key a split":
            assert {name: len(source.split(name)) for name in source.splits()} == {"train": 4, "val": 2}


def test_languages_of_coco(tmp_path: Path) -> None:
    draw(tmp_path, NAMES)
    notes = [{"image_id": 10 + i, "caption": f"a dog {i}", "caption_ko": f"개 {i}", "id": i} for i in range(N)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": IMAGES, "annotations": notes}), "utf-8")
    source = PairFiles(tmp_path)
    assert captions(source) == {name: [f"a dog {i}", f"개 {i}"] for i, name in enumerate(NAMES)}
    assert source.languages == ("en", "ko")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"version": "5", "shapes": [{"label": "dog"}]}, "its keys are version, shapes, and no list below"),
        ({"images": IMAGES, "annotations": [{"image_id": 1, "bbox": [1]}]}, "boxes and classes, with the keys images"),
        ({"a": ROWS, "b": ROWS}, "its keys are a, b, and no list below"),
        ([1, 2], "nothing in it names pictures"),
    ],
)
def test_what_is_not_read_is_mentioned(content: Any, said: str, tmp_path: Path) -> None:
    draw(tmp_path, NAMES)
    for name in NAMES:
        (tmp_path / name).with_suffix(".txt").write_text("a dog")
    (tmp_path / "other.json").write_text(json.dumps(content))
    (finding,) = [f for f in check(tmp_path, progress=False).findings if f.what == "a manifest that was not read"]
    assert said in finding.first[0]
    assert '[{"image": ..., "caption": ...}, ...]' in finding.first[0]
    with pytest.raises(ValueError, match=rf"other\.json: {said}"):
        PairFiles(tmp_path / "other.json")


GOOD = '[\n {"image": "000.png", "caption": "a dog"}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + ",\n]", r":[23] is not JSON: .* at column \d+ \(there is one comma too many\)"),
        ('[{"image": "000.png", "caption": "a dog",}]', "one comma too many"),
        ("[{'image': '000.png', 'caption': 'a dog'}]", r":1 is not JSON: .* at column 3 \(texts stand in double"),
        (GOOD + ',\n // mine\n {"image": "001.png"}]', r":3 is not JSON: .* at column 2 \(JSON knows no comments"),
        (GOOD + ',\n # mine\n {"image": "001.png"}]', r":3 is not JSON: .* \(JSON knows no comments"),
        ('[{"image": "000.png", "caption": None}]', r":1 is not JSON: .* at column 34 \(JSON has null, true and false"),
        ('[{"image": "C:\\Users\\000.png", "caption": "a"}]', r"is not JSON: Invalid .*\(in JSON a backslash"),
        ('[{"image": "000.png", "caption": "a\nb"}]', r"is not JSON: Invalid control .*\(line ends and tabs"),
        ('[{“image”: "000.png"}]', "straight quotes"),
        ('[{image: "000.png"}]', "keys stand in double quotes"),
        (GOOD, "it ends too early: the file is cut short"),
        ('[{"image": "000.png", "caption": "a do', "closing quote, or the file is cut short"),
        (GOOD + '\n {"image": "001.png"}]', r":3 is not JSON: .* \(a comma is missing"),
        ("", r"\(the file is empty\)"),
    ],
)
def test_what_is_wrong_with_json_is_said(text: str, said: str, tmp_path: Path) -> None:
    draw(tmp_path, NAMES)
    (tmp_path / "captions.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=said) as error:
        PairFiles(tmp_path)
    assert "captions.json:" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_wrong_with_a_line_of_json_is_said(tmp_path: Path) -> None:
    draw(tmp_path, NAMES)
    lines = [json.dumps(row) for row in ROWS]
    lines[2] = lines[2][:-1] + ",}"
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    (said,) = PairFiles(tmp_path).report.first["not JSON"]
    assert said.startswith("c.jsonl:3: ")
    assert "there is one comma too many" in said
