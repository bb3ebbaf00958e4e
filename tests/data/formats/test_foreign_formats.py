"""Data as other people and programs leave it: odd columns, ids, conversations, Excel, Windows, encodings."""

import json
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtransformer.data.check import check
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.open_sources import open_pairs
from mmtransformer.data.pairs import PairFiles
from mmtransformer.text.conversation import turns_of

N = 7


def draw(folder: Path, *, names: str = "{:03d}.jpg", n: int = N) -> list[str]:
    for i in range(n):
        path = folder / names.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (30 * i, 255 - 30 * i, 99)).save(path)
    return [names.format(i) for i in range(n)]


def captions(source: Any) -> dict[str, list[str]]:
    splits = [source.split(name) for name in source.splits()]
    return {s.name(i): [c.text for c in s.captions(i)] for s in splits for i in range(len(s)) if s.image(i)}


@pytest.mark.parametrize(
    ("header", "mark", "file"),
    [
        ("id,caption", ",", "labels.csv"), ("Bild;Beschreibung", ";", "x.csv"), ("filepath\ttitle", "\t", "y.tsv"),
        ("image_id,text", ",", "deep/er/table.csv"),
    ],
)  # fmt: skip
def test_unusual_columns_and_ids(tmp_path: Path, header: str, mark: str, file: str) -> None:
    names = draw(tmp_path / "photos")
    keys = [name[:-4] if "id" in header else name for name in names]
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("\n".join([header, *(f"{key}{mark}dog {key}" for key in keys)]), "utf-8")
    found = captions(open_pairs(tmp_path))
    assert len(found) == N
    assert {text for (text,) in found.values()} == {f"dog {key}" for key in keys}


def test_a_manifest_that_is_not_read_is_mentioned_and_its_columns_can_be_named(tmp_path: Path) -> None:
    names = draw(tmp_path)
    (tmp_path / "labels.csv").write_text("\n".join(["wer,was", *(f"{name},dog {name}" for name in names)]), "utf-8")
    report = check(tmp_path, progress=False)
    (finding,) = [f for f in report.findings if f.what == "a manifest that was not read"]
    assert "labels.csv" in finding.first[0]
    assert "wer, was" in finding.first[0]
    named = open_pairs(tmp_path, ReadOptions(image_column="wer", caption_column="was"))
    assert len(captions(named)) == N
    (tmp_path / "labels.csv").rename(tmp_path / "data.csv")
    with pytest.raises(ValueError, match=r"--image-column \.\.\. --caption-column .*data\.read\.image_column"):
        open_pairs(tmp_path)


def test_numbers_are_ids(tmp_path: Path) -> None:
    draw(tmp_path, names="{}.png")
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"id": i, "text": f"dog {i}"}) for i in range(N)), "utf-8")
    assert captions(open_pairs(tmp_path)) == {str(i): [f"dog {i}"] for i in range(N)}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "folder"])
def test_splits_by_folder_in_every_format(tmp_path: Path, kind: str) -> None:
    names = [name for split in ("train", "validation", "test") for name in draw(tmp_path, names=split + "/{}.png", n=4)]
    rows = [{"file_name": name, "text": f"a {name}"} for name in names]
    if kind == "csv":
        text = "\n".join(["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows)])
        (tmp_path / "metadata.csv").write_text(text)
    elif kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        (tmp_path / "captions.json").write_text(json.dumps(rows))
    else:
        for name in names:
            (tmp_path / name).with_suffix(".caption").write_text(f"a {name}")
    source = PairFiles(tmp_path)
    assert source.splits() == ("train", "val", "test")
    assert {name: len(source.split(name)) for name in source.splits()} == {"train": 4, "val": 4, "test": 4}
    assert "splits by their folders: train 4, val 4, test 4" in source.describe()
    assert source.split("test").name(0).startswith("test/")


def test_describe_says_which_rule_made_the_splits(tmp_path: Path) -> None:
    names = draw(tmp_path)
    rows = [f"{name},a dog,{'train' if i else 'test'}" for i, name in enumerate(names)]
    (tmp_path / "c.csv").write_text("\n".join(["image,caption,split", *rows]))
    assert "splits by the column split: " in PairFiles(tmp_path).describe()


def conversation(i: int, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"a dog {i}"}]
    return {"id": i, "image": f"{i}.png", "conversations": turns} | more


def chat(i: int) -> dict[str, Any]:
    asked = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "Describe."}]
    said = [{"type": "text", "text": f"a dog {i}"}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def chat_beside(i: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": "<image>Describe."}, {"role": "assistant", "content": f"a dog {i}"}]
    return {"messages": turns, "images": [f"{i}.png"]}


def task(i: int) -> dict[str, Any]:
    result = {"from_name": "caption", "to_name": "image", "type": "textarea", "value": {"text": [f"a dog {i}"]}}
    return {"id": i, "data": {"image": f"/data/upload/3/0a1b2c3{i}-{i}.png"}, "annotations": [{"result": [result]}]}


def task_min(i: int) -> dict[str, Any]:
    return {"image": f"/data/local-files/?d=my%20photos/{i}.png", "id": i, "caption": f"a dog {i}", "lead_time": 2.5}


@pytest.mark.parametrize("record", [conversation, chat, chat_beside, task, task_min], ids=lambda f: f.__name__)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_conversations_and_label_studio(tmp_path: Path, record: Any, ending: str) -> None:
    draw(tmp_path, names="my photos/{}.png")
    rows = [record(i) for i in range(N)]
    text = json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"data.{ending}").write_text(text)
    source = PairFiles(tmp_path)
    found = captions(source)
    assert sorted(found.values()) == [[f"a dog {i}"] for i in range(N)]
    assert all(f"{texts[0][-1]}.png" in name for name, texts in found.items())
    notes = " ".join(source.report.notes)
    splits = [source.split(name) for name in source.splits()]
    asked = {caption.question for split in splits for i in range(len(split)) for caption in split.captions(i)}
    assert asked == {{conversation: "What is it?", chat: "Describe.", chat_beside: "Describe."}.get(record)}
    assert ("question=question" in source.describe()) == (record in (conversation, chat, chat_beside))
    assert ("Label Studio" in notes) == (record in (task, task_min))


def test_label_studios_table(tmp_path: Path) -> None:
    draw(tmp_path, names="{}.png")
    rows = [f"/data/upload/1/0a1b2c3{i}-{i}.png,{i},a dog {i},1" for i in range(N)]
    (tmp_path / "project.csv").write_text("\n".join(["image,id,caption,annotator", *rows]))
    assert sorted(captions(PairFiles(tmp_path)).values()) == [[f"a dog {i}"] for i in range(N)]


def test_each_answer_of_a_conversation_is_a_caption_behind_the_turns_before_it(tmp_path: Path) -> None:
    draw(tmp_path, names="{}.png")
    rows = [conversation(i) for i in range(N)]
    more = [("human", "Why\nso?"), ("gpt", "it barks"), ("human", "Is it"), ("human", "<image> old?")]
    rows[2]["conversations"] += [{"from": who, "value": text} for who, text in more]
    rows[3]["conversations"] += [{"from": who, "value": text} for who, text in [*more, ("gpt", "no")]]
    rows[4].pop("image")
    rows[5]["conversations"] = rows[5]["conversations"][:1]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    source = PairFiles(tmp_path)
    found: dict[str, list[tuple[str, Any]]] = {}
    for split in map(source.split, source.splits()):
        for i in range(len(split)):
            [caption] = split.captions(i)
            found.setdefault(split.name(i).partition("?")[0], []).append((caption.text, caption.question))
        first = split.without_follow_ups()
        assert [first.name(i).partition("?")[0] for i in range(len(first))] == [
            *dict.fromkeys(split.name(i).partition("?")[0] for i in range(len(split)))
        ]
    assert len(found) == N - 2
    assert found["1.png"] == [("a dog 1", "What is it?")]
    turns = ("What is it?", "a dog 3", "Why so?", "it barks", "Is it old?")
    assert [text for text, _ in found["3.png"]] == ["a dog 3", "it barks", "no"]
    assert [turns_of(asked) for _, asked in found["3.png"]] == [turns[:1], turns[:3], turns]
    assert turns_of(pickle.loads(pickle.dumps(found["3.png"][2][1]))) == turns
    assert [text for text, _ in found["2.png"]] == ["a dog 2", "it barks"]
    left = source.report.first["conversations, left out"]
    assert source.report.notes["conversations, left out"] == len(left) == 3
    assert [line.partition(": ")[2] for line in sorted(left)] == [
        "a last question without an answer: Is it old?", "no picture", "no answer"
    ]  # fmt: skip
    (tmp_path / "llava.json").write_text(json.dumps(rows[4:6]))
    with pytest.raises(ValueError, match=r"llava.json: not one conversation asks .* picture and answers it"):
        PairFiles(tmp_path)


@pytest.mark.parametrize("header", ["image,question,answer", "그림,질문,답", "id;Question;Answers;caption"])
def test_what_is_asked_of_a_picture_stands_with_its_answer(tmp_path: Path, header: str) -> None:
    draw(tmp_path / "photos", names="{}.jpg")
    mark, more = (";", ";a caption") if ";" in header else (",", "")
    rows = [f"{i}.jpg{mark}what is {word}?{mark}{word} {i}{more}" for i in range(N) for word in ("left", "right")]
    rows += [rows[0].replace("left 0", "west 0")]  # a second answer to the same question
    (tmp_path / "vqa.csv").write_text("\n".join([header, *rows]), "utf-8")
    source = PairFiles(tmp_path)
    found = {}
    for name in source.splits():
        split = source.split(name)
        for i in range(len(split)):
            found[split.name(i)] = {(c.question, c.text) for c in split.captions(i)}
            assert split.image(i)
    assert len(found) == 2 * N
    asked = found["photos/0.jpg?what is left?" if "photos/0.jpg?what is left?" in found else "0.jpg?what is left?"]
    assert asked == {("what is left?", "left 0"), ("what is left?", "west 0")}
    splits = {name: source.split(name) for name in source.splits()}
    of = {k: {split.name(i).partition("?")[0] for i in range(len(split))} for k, split in splits.items()}
    assert not of["train"] & of["val"]  # all that is asked of a picture is on one side
    report = check(source, progress=False)
    assert not any("again in its split" in finding.what for finding in report.findings)


def test_windows_paths_mean_the_file_with_the_longest_end(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        draw(tmp_path, names=folder + "/{}.png", n=3)
    rows = [f"C:\\Users\\Kim\\Bilder\\{folder}\\{i}.png,{folder} dog {i}" for folder in "ab" for i in range(3)]
    (tmp_path / "c.csv").write_text("\n".join(["image,caption", *rows]))
    source = PairFiles(tmp_path)
    assert captions(source) == {f"{folder}/{i}.png": [f"{folder} dog {i}"] for folder in "ab" for i in range(3)}
    assert source.report.notes == {"Windows paths, found by their ends": 6}
    (tmp_path / "c.csv").write_text("image,caption\nD:\\x\\0.png,which one?\nD:\\x\\none.png,nothing\n")
    with pytest.raises(ValueError, match=r"may be a/0\.png or b/0\.png(.|\n)*no file here ends like it"):
        PairFiles(tmp_path)


def test_encodings_are_named_and_the_guess_is_said(tmp_path: Path) -> None:
    names = draw(tmp_path)
    text = "\n".join(["파일명,캡션", *(f"{name},빨간 개 {i}" for i, name in enumerate(names))])
    (tmp_path / "c.csv").write_bytes(text.encode("cp949"))
    said = (
        r"it may be CP949.*--encoding cp949 .in `mmt fit`: --data\.read\.encoding cp949; .*Options\(encoding='cp949'\)"
    )
    for name in (None, "utf8", "UTF-8", "utf-8-sig"):  # what is read unless told
        with pytest.raises(ValueError, match=said):
            PairFiles(tmp_path, ReadOptions(encoding=name))
    source = PairFiles(tmp_path, ReadOptions(encoding="cp949"))
    assert sorted(captions(source).values()) == [[f"빨간 개 {i}"] for i in range(N)]
    assert source.languages == ("ko",)
    (tmp_path / "c.csv").write_bytes("image,caption\n000.jpg,ein Hund läuft\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"it may be Latin-1.*--encoding latin-1"):
        PairFiles(tmp_path, max_bad_fraction=0)
    assert captions(PairFiles(tmp_path, ReadOptions(encoding="latin-1"))) == {"000.jpg": ["ein Hund läuft"]}
    (tmp_path / "c.csv").write_text("image,caption\n000.jpg,ein Hund läuft\n", "utf-8")
    assert captions(PairFiles(tmp_path, ReadOptions(encoding="latin-1"))) == {"000.jpg": ["ein Hund läuft"]}
    (tmp_path / "c.csv").write_bytes(b"image,caption\n000.jpg,\xff\xff\n")
    with pytest.raises(ValueError, match=r"neither UTF-8 nor cp949 .line 2, byte 0xff"):
        PairFiles(tmp_path, ReadOptions(encoding="cp949"))
    with pytest.raises(ValueError, match=r"encoding .kp949. is unknown"):
        ReadOptions(encoding="kp949")


def test_kohyas_captions(tmp_path: Path) -> None:
    for i, name in enumerate(draw(tmp_path)):
        (tmp_path / name).with_suffix(".caption").write_text(f"a dog {i}\n")
    assert sorted(captions(PairFiles(tmp_path)).values()) == [[f"a dog {i}"] for i in range(N)]


def test_excel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    draw(tmp_path, names="{}.png")
    book = openpyxl.Workbook()
    book.active.append(["notes"])
    sheet = book.create_sheet("captions")
    sheet.append(["id", "caption_ko"])
    for i in range(N):
        sheet.append([float(i), f"빨간 개 {i}"])
    sheet.append([])
    book.save(tmp_path / "captions.xlsx")
    found = PairFiles(tmp_path)
    assert sorted(captions(found).values()) == [[f"빨간 개 {i}"] for i in range(N)]
    assert found.describe().startswith("Excel captions.xlsx: 7 pictures")
    whole = (tmp_path / "captions.xlsx").read_bytes()
    (tmp_path / "captions.xlsx").write_bytes(whole[:-200])
    with pytest.raises(ValueError, match=r"captions\.xlsx: not a whole Excel workbook"):
        PairFiles(tmp_path)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ValueError, match=r'needs openpyxl, which is not installed .the extra "excel"'):
        PairFiles(tmp_path)


def test_heic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    for i in range(3):
        image = Image.new("RGB", (64, 48), (80 * i, 90, 200))
        heif.from_pillow(image).save(tmp_path / f"IMG_{i}.HEIC", quality=90)
        (tmp_path / f"IMG_{i}.txt").write_text(f"a dog {i}")
    source = PairFiles(tmp_path)
    (split, *_) = source.splits()
    assert source.split(split).image(0).size == (64, 48)
    assert len(captions(source)) == 3
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_heif.as_plugin", None)
    report = check(tmp_path, progress=False)
    finding = next(f for f in report.findings if f.what.startswith("corrupt pictures in "))
    assert "a HEIC picture, as iPhones take them, which needs pillow-heif" in finding.first[0]


def test_captions_are_detokenized_where_that_is_asked_for(tmp_path: Path) -> None:
    for name in draw(tmp_path):
        (tmp_path / name).with_suffix(".txt").write_text("a man 's dog .")
    assert set(map(tuple, captions(open_pairs(tmp_path)).values())) == {("a man 's dog .",)}
    read = ReadOptions(normalize="detokenize")
    assert set(map(tuple, captions(open_pairs(tmp_path, read)).values())) == {("a man's dog.",)}
    with pytest.raises(ValueError, match=r"encoding .cp949. would have no effect on tar shards"):
        open_pairs(tmp_path / "part-{0..3}.tar", ReadOptions(encoding="cp949"))


def test_html_is_named_and_taken_out_where_that_is_asked_for(tmp_path: Path) -> None:
    for name in draw(tmp_path / "photos"):
        (tmp_path / "photos" / name).with_suffix(".txt").write_text("Tom &amp; Jerry&#39;s dog .<br>")
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for path in sorted((tmp_path / "photos").iterdir()):
            archive.add(path, path.name)
    for root in (tmp_path / "photos", tmp_path / "shard.tar"):
        (finding,) = [f for f in check(root, progress=False).findings if "HTML" in f.what]
        assert (finding.count, finding.of, finding.hurts) == (N, N, False)
        assert "--normalize html (data.read.normalize)" in finding.remedy
        for how, said in (
            (None, "Tom &amp; Jerry&#39;s dog .<br>"),
            ("html", "Tom & Jerry's dog ."),
            (["detokenize", "html"], "Tom & Jerry's dog."),
        ):
            source = open_pairs(root, ReadOptions(normalize=how))  # pyright: ignore
            assert set(map(tuple, captions(source).values())) == {(said,)}
            assert any("HTML" in f.what for f in check(source, progress=False).findings) == (how is None)
    with pytest.raises(ValueError, match='normalize: unknown value "lower"; choose one of detokenize, html'):
        ReadOptions(normalize="lower")  # pyright: ignore


def test_a_caption_of_html_alone_is_none(tmp_path: Path) -> None:
    names = draw(tmp_path)
    (tmp_path / "c.csv").write_text("\n".join(["image,caption", f"{names[0]},<br>&nbsp;", f"{names[1]},a dog"]))
    source = PairFiles(tmp_path, ReadOptions(normalize="html"), max_bad_fraction=1)
    assert captions(source) == {names[1]: ["a dog"]}
    assert source.report.errors == {"empty caption": 1}


@pytest.mark.parametrize("root", ["/kaggle/input/data", "/content/drive/My Drive", "~/사진", "//server/share", "D:\\"])
def test_absolute_paths_of_another_machine_are_found_by_their_ends(tmp_path: Path, root: str) -> None:
    draw(tmp_path / "sub", names="{}.jpg")
    slash = "\\" if root.endswith("\\") else "/"
    rows = [f"{root.rstrip(slash)}{slash}sub{slash}{i}.jpg,a dog {i}" for i in range(N)]
    (tmp_path / "df.csv").write_text("\n".join(["image,caption", *rows, "/etc/passwd,no"]), "utf-8")
    source = PairFiles(tmp_path, max_bad_fraction=0.5)
    assert captions(source) == {f"sub/{i}.jpg": [f"a dog {i}"] for i in range(N)}
    assert source.report.errors == {"refused path": 1}
    (note,) = [note for note in source.report.notes if note.endswith("found by their ends")]
    assert source.report.notes[note] == N


@pytest.mark.parametrize("ending", ["csv", "json", "xlsx"])
def test_a_column_whose_cells_end_like_pictures_has_the_pictures(tmp_path: Path, ending: str) -> None:
    names = draw(tmp_path)
    header, rows = ["Nr", "어느 것", "설명"], [[i, name, f"a dog {i}"] for i, name in enumerate(names)]
    if ending == "xlsx":
        openpyxl = pytest.importorskip("openpyxl")
        book = openpyxl.Workbook()
        for row in (header, *rows):
            book.active.append(row)
        book.save(tmp_path / "표.xlsx")
        (tmp_path / "~$표.xlsx").write_bytes(b"of an open workbook")
    elif ending == "json":
        (tmp_path / "c.json").write_text(json.dumps([dict(zip(header, row, strict=True)) for row in rows]))
    else:
        text = "\n".join(",".join(map(str, row)) for row in (header, *rows))
        (tmp_path / "c.csv").write_bytes(text.encode("utf-8"))
    source = PairFiles(tmp_path)
    assert "columns image=어느 것 caption=설명" in source.describe()
    assert captions(source) == {name: [f"a dog {i}"] for i, name in enumerate(names)}


def test_a_picture_of_which_several_things_are_asked_is_one(tmp_path: Path) -> None:
    draw(tmp_path, names="{}.png")
    rows = [f"{i}.png,{asked}?,{asked} {i}" for i in range(N) for asked in ("what", "who")]
    (tmp_path / "vqa.csv").write_text("\n".join(["image,question,answer", *rows]))
    source = PairFiles(tmp_path)
    assert f": {N} pictures, {2 * N} captions; " in source.describe()
    assert repr(source) == f"PairFiles({source.describe()})"
    assert repr(source.split("train")).startswith("PairSplit(")
    report = check(source, progress=False)
    assert sum(report.images.values()) == N
    assert sum(report.captions.values()) == 2 * N
