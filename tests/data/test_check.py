"""`mmt check` finds what would hurt training, by number and by name, and nothing in sound data."""

import functools
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from PIL import Image
from tokenizers import models, pre_tokenizers

from mmtransformer import ImageTransform, Tokenizer
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.check import CheckReport, Finding, check
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.loading.errors import BadImages, TooManyErrors
from mmtransformer.data.loading.source import Caption
from mmtransformer.data.open_sources import open_pairs
from mmtransformer.data.pairs import PairFiles
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.images import ImageError
from support.cli import mmt

COUNT = 211


@functools.cache
def noise(seed: int, size: tuple[int, int] = (19, 23), kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def build(root: Path, **changes: dict[int, object]) -> Path:
    """211 sound pictures; `changes` replaces bytes, captions or splits by number."""
    rows = []
    for i in range(COUNT):
        (root / f"p{i}.png").write_bytes(changes.get("data", {}).get(i, noise(i)))  # type: ignore[arg-type]
        words = changes.get("caption", {}).get(i, f"picture number {i} of some size" + " and so on" * (i % 3))
        split = changes.get("split", {}).get(i, "val" if i >= 181 else "train")
        rows.append({"image": f"p{i}.png", "caption": words, "split": split})
    (root / "c.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return root


def finding(report: CheckReport, what: str) -> Finding:
    (found,) = [f for f in report.findings if f.what == what]
    return found


def look(root: Path, **options: object) -> CheckReport:
    return check(root, progress=False, threads=2, **options)  # type: ignore[arg-type]


def test_sound_data_has_no_findings(tmp_path: Path) -> None:
    report = look(build(tmp_path))
    assert not report.hurts
    assert report.findings == []
    assert report.images == {"train": 181, "val": 30}
    assert report.captions == {"train": 181, "val": 30}
    assert report.languages == {"unnamed": 211}
    assert report.words == {6: 71, 9: 70, 12: 70}
    assert report.sizes == {"smallest": (19, 23), "middle": (19, 23), "largest": (19, 23)}
    assert "Nothing is wrong." in str(report)
    assert "JSONL c.jsonl: 211 pictures" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["hurts"] is False


DAMAGED = noise(0)[:-40]
COPY = noise(5, kind="TIFF")  # the pixels of p5.png in another format
SHADE = io.BytesIO()
Image.new("RGB", (19, 23), (40, 50, 60)).save(SHADE, "PNG")
LONG = " ".join(["word"] * 63)

CASES = [
    ("corrupt pictures in train", "data", DAMAGED, range(3, 90), "p3.png"),
    ("pictures that are in two splits", "data", COPY, range(185, 211), "val/p185.png = train/p5.png"),
    ("pictures of a single colour", "data", SHADE.getvalue(), range(3, 90), "p3.png"),
    ("captions longer than 62 words, to be cut", "caption", LONG, range(3, 90), "p3.png: 63 words"),
    ("captions that say next to nothing", "caption", "- .", range(3, 90), "p3.png: '- .'"),
    ("captions that say next to nothing", "caption", "a", range(3, 90), "p3.png: 'a'"),
    ("captions with letters that were lost (U+FFFD)", "caption", "a r\ufffdd dog", range(3, 90), "p3.png: 'a r\ufffdd"),
    ("empty caption", "caption", "", range(3, 90), "c.jsonl:4: p3.png ''"),
    (
        "pictures under 16 pixels, or 8 times longer than wide",
        "data",
        noise(1, (3, 31)),
        range(3, 90),
        "p3.png: 3 x 31",
    ),
]


@pytest.mark.parametrize(("what", "field", "value", "where", "first"), CASES, ids=[c[0] + c[1] for c in CASES])
def test_trouble_is_counted_named_and_hurts_past_the_threshold(
    what: str, field: str, value: object, where: Sequence[int], first: str, tmp_path: Path
) -> None:
    for count in (1, 7):
        report = look(build(tmp_path, **{field: dict.fromkeys(where[:count], value)}))
        found = finding(report, what)
        assert found.count == count
        assert len(found.first) == min(count, 5)
        assert first in found.first[0]
        # 1 % of 30 held-out pictures or of 211 rows is one and two
        limit = 1 if "two splits" in what else 2
        assert found.hurts == report.hurts == (count > limit), str(report)
        assert (f"HURTS  {what}: {count}" in str(report)) == found.hurts
    assert look(tmp_path, max_bad_fraction=0.5).hurts is False
    assert look(tmp_path, max_bad_fraction=0).hurts is True
    with pytest.raises(ValueError, match=r"max_bad_fraction \(2\) must be a share"):
        look(tmp_path, max_bad_fraction=2)


def test_pictures_that_cannot_be_read_are_judged_split_by_split_as_training_does(tmp_path: Path) -> None:
    report = look(build(tmp_path, data=dict.fromkeys((7, 190, 191, 192), DAMAGED)), max_bad_fraction=0.05)
    assert "HURTS  corrupt pictures in val: 3 of 30 (10.00%)\n" in str(report)
    assert "note   corrupt pictures in train: 1 of 181 (0.55%)\n" in str(report)
    assert report.hurts
    bad = BadImages.of_split(tmp_path / "run", "val", 30, 0.05)
    bad.record("p190.png", OSError("cut"))
    with pytest.raises(TooManyErrors, match=r"2 of 30 pictures can't be read so far .* `mmt check` reads all"):
        bad.record("p191.png", OSError("cut"))


def test_missing_images_and_refused_paths(tmp_path: Path) -> None:
    build(tmp_path)
    for i in range(5):
        (tmp_path / f"p{i}.png").unlink()
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write('{"image": "../../x.png", "caption": "away", "split": "train"}\n')
    report = look(tmp_path)
    assert (finding(report, "missing picture").count, finding(report, "refused path").count) == (5, 1)
    assert finding(report, "missing picture").hurts
    assert "c.jsonl:212" in finding(report, "refused path").first[0]
    assert report.images["train"] == 176


def test_every_error_of_a_row_has_its_remedy_beside_it(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i:02d}.png").write_bytes(noise(i))
    lines = [f"{i:02d}.png,picture {i} of some size".encode() for i in range(40)]
    lines[3] = "03.png,빨간 별과 파란 점".encode("cp949")
    lines[7] = "07.png,파란 별".encode("cp949")
    lines[9] = b"09.png"
    lines[12], lines[13], lines[14] = b"12.png,", b"nowhere.png,a star", b",a star"
    (tmp_path / "c.csv").write_bytes(b"\n".join([b"image,caption", *lines]))
    report = look(tmp_path, max_bad_fraction=0.5)
    said = str(report)
    assert not report.hurts
    for what, count, remedy in (
        (
            "not UTF-8",
            2,
            "read them with --encoding cp949 (in `mmt fit`: --data.read.encoding cp949), or save the file as UTF-8",
        ),
        ("empty caption", 1, "write captions, or take the rows out"),
        ("missing picture", 1, "--image-folder FOLDER"),
        ("no picture named", 1, "--image-column NAME"),
        ("wrong number of cells", 1, "into double quotes"),
    ):
        assert finding(report, what).count == count, said
        assert finding(report, what).of == 40
        block = said[said.index(f"{what}: {count}") :]
        assert remedy in block[: block.index("->") + 120]
    assert sum(report.captions.values()) == 34
    assert sum(check(PairFiles(tmp_path, ReadOptions(encoding="cp949"), max_bad_fraction=1)).captions.values()) == 36


CONTROLS = "control characters in texts, such as NUL, taken out"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt", "json", "tar", "documents"])
def test_control_characters_are_counted_and_not_learnt(kind: str, tmp_path: Path) -> None:
    said = ["a r\0ed\x07 dog", "blue\x1b[31m 별", "a dog\n", "two\tdogs asleep", "['a \x7fcat', 'a cat']"]
    files = {f"{i}.png": noise(i) for i in range(5)}
    if kind == "csv":
        quoted = "".join(f'{i}.png,"{text}"\n' for i, text in enumerate(said))
        files["c.csv"] = f"image,caption\n{quoted}".encode()
    elif kind in ("jsonl", "json"):
        rows = [{"image": f"{i}.png", "caption": text} for i, text in enumerate(said)]
        text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
        files[f"c.{kind}"] = text.encode()
    elif kind == "documents":
        rows = [{"text": f"<image> {text}", "images": [f"{i}.png"]} for i, text in enumerate(said)]
        files["c.jsonl"] = "\n".join(map(json.dumps, rows)).encode()
    else:
        files |= {f"{i}.txt": text.encode() for i, text in enumerate(said)}
    root = tmp_path / "pairs"
    root.mkdir()
    for name, data in files.items():
        (root / name).write_bytes(data)
    if kind == "tar":
        with tarfile.open(tmp_path / "pairs.tar", "w") as box:
            for name in files:
                box.add(root / name, name)
        root = tmp_path / "pairs.tar"
    found = finding(look(root), CONTROLS)
    assert (found.count, found.hurts) == (3, False)
    assert r"'a r\x00ed\x07 dog'" in found.first[0].replace("<image> ", "")
    assert finding(look(root), CONTROLS).count == 3  # of a kept index, too
    source = open_pairs(root, ReadOptions(val_fraction=0))
    split = source.split("train")
    texts = {caption.text for i in range(len(split)) for caption in split.captions(i)}
    assert {"a red dog", "blue[31m 별", "a dog", "two dogs asleep"} < texts
    assert all(text.isprintable() for text in texts)


def test_the_remedy_for_copies_fits_how_the_splits_are_told(tmp_path: Path) -> None:
    what = "pictures that are in two splits"
    assert finding(look(build(tmp_path, data=dict.fromkeys(range(185, 195), COPY))), what).remedy == (
        "put copies into the same split, or take out all but one"
    )
    for path in tmp_path.glob("p*.png"):
        path.with_suffix(".txt").write_text(f"picture {path.stem}")
    (tmp_path / "c.jsonl").unlink()
    assert finding(look(tmp_path), what).remedy == (
        "name the splits, with copies in the same one: in a column split, or by folders train/ and val/"
    )
    for split, some in (("train", range(5, 100)), ("val", range(180, 211))):
        (tmp_path / split).mkdir()
        for i in some:
            for ending in ("png", "txt"):
                (tmp_path / f"p{i}.{ending}").rename(tmp_path / split / f"p{i}.{ending}")
    for path in tmp_path.glob("p*.*"):
        path.unlink()
    assert finding(look(tmp_path), what).remedy == "put copies into the same split, or take out all but one"


def test_a_copy_inside_a_split_is_only_a_note(tmp_path: Path) -> None:
    report = look(build(tmp_path, data=dict.fromkeys(range(6, 50), COPY)))
    found = finding(report, "the same picture again in its split")
    assert (found.count, found.hurts) == (44, False)
    assert found.first[0] == "train/p6.png = train/p5.png"


def test_one_caption_for_many_images(tmp_path: Path) -> None:
    report = look(build(tmp_path, caption=dict.fromkeys(range(40), "a photo")))
    assert finding(report, "pictures share one caption").count == 40
    assert not report.hurts
    assert look(build(tmp_path, caption=dict.fromkeys(range(140), "a photo"))).hurts


class Letters:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def test_tokens_are_counted_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    report = look(build(tmp_path, caption={7: "한" * 30}), tokenizer=Letters(), max_len=80)
    found = finding(report, "captions longer than 78 tokens, to be cut")
    assert found.first == ["p7.png: 90 tokens: " + "한" * 30 + "..."]
    assert look(tmp_path, max_len=80).findings == []


def test_words_that_the_tokenizer_cannot_write_hurt_and_fit_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    korean = {i: f"작은 사진 {i}" for i in range(0, 190, 2)}
    source = open_pairs(build(tmp_path, caption={**korean, 1: "🐕 number"}))
    tokenizer = word_pieces(["picture", "number", "of", "some", "size", "and", "so", "on"])
    report = check(source, tokenizer=tokenizer, progress=False)
    found = finding(report, "words that the tokenizer has no tokens for, and the model cannot learn, in ko")
    assert (found.hurts, found.count, found.of, found.first[:2]) == (
        True, 190, 285, ["p0.png: '작은'", "p0.png: '사진'"],
    )  # fmt: skip
    english = finding(report, found.what.replace("in ko", "in en"))
    assert (english.hurts, english.first) == (False, ["p1.png: '🐕'"])
    data = CaptionData(source, tokenizer=tokenizer, transform=ImageTransform(8))
    data.rows("train")
    assert "train: the tokenizer has no tokens for 12% of what the captions say" in caplog.text
    caplog.clear()
    assert CaptionData(source, tokenizer=bytewise(), transform=ImageTransform(8)).rows("train")
    assert caplog.text == ""


def word_pieces(words: Sequence[str]) -> Tokenizer:
    """As BERT's, of some words and digits."""
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "<|en|>", "<|ko|>", *words, *map(str, range(10))]
    pieces += [f"##{i}" for i in range(10)]
    model = models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    names = {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]"}
    return Tokenizer(backend, languages=("en", "ko"), **names)


def bytewise() -> Tokenizer:
    return Tokenizer.train(["a"], 300, ("en", "ko"))


def test_korean_words_of_one_syllable_are_captions(tmp_path: Path) -> None:
    report = look(build(tmp_path, caption={i: ["개", "소", "눈", "별", "말"][i % 5] for i in range(50)}))
    assert not report.hurts
    assert report.languages == {"en": 161, "ko": 50}


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    build(tmp_path, split=dict.fromkeys(range(COUNT), "test"))
    report = look(tmp_path)
    assert [f.what for f in report.findings if f.hurts] == ["no pictures in train", "no pictures in val"]
    for i in range(COUNT):
        (tmp_path / f"p{i}.png").unlink()
    report = look(tmp_path)
    assert report.hurts
    assert finding(report, "missing picture").count == 211
    assert report.images == {}
    assert str(report)
    with pytest.raises(ValueError, match="does not exist"):
        look(tmp_path / "no")


class Drawn:
    """Pairs that are no files."""

    languages: tuple[str, ...] = ("ko",)

    def __len__(self) -> int:
        return 11

    def splits(self) -> tuple[str, ...]:
        return ("train", "val")

    def split(self, name: str) -> "Drawn":
        return self

    def name(self, i: int) -> str:
        return f"drawn {i}"

    def image(self, i: int) -> Image.Image:
        if i == 3:
            raise ImageError("drawn 3: broken; draw it again")
        return Image.open(io.BytesIO(noise(i, (17, 29)))).convert("RGB")

    def captions(self, i: int) -> list[Caption]:
        return [Caption(f"그림 {i}", "ko")]


def test_any_source_of_pairs_can_be_checked(tmp_path: Path) -> None:
    report = check(Drawn(), progress=False)
    assert finding(report, "corrupt pictures in train").first == ["drawn 3: broken; draw it again"]
    assert finding(report, "pictures that are in two splits").count == 10
    assert report.languages == {"ko": 22}
    build(tmp_path)
    report = check(PairFiles(tmp_path, ReadOptions(val_fraction=0)), progress=False)
    assert report.findings == []


def test_interleaved_documents_and_shards_are_looked_at_as_well(tmp_path: Path) -> None:
    split = Scenes(image_size=32, train_size=12).split("train")
    documents = tmp_path / "documents"
    documents.mkdir()
    lines = []
    for i in range(12):
        split.image(i).save(documents / f"{i}.png")
        lines.append({"text": f"see <image> {split.captions(i)[0].text}", "images": [f"{i}.png"]})
    lines.append({"text": "two <image> marks <image> here", "images": ["0.png"]})
    (documents / "broken.png").write_bytes(b"nothing")
    lines.append({"text": "a <image> broken one", "images": ["broken.png"]})
    (documents / "d.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    report = check(documents, progress=False)
    assert "interleaved documents d.jsonl: 13 documents, 13 pictures" in report.source
    found = {finding.what: finding for finding in report.findings}
    assert found["marks and pictures differ in number"].count == 1
    assert "d.jsonl:13" in found["marks and pictures differ in number"].first[0]
    assert (
        "broken.png (picture 1 of d.jsonl:14)"
        in next(f for what, f in found.items() if what.startswith("corrupt")).first[0]
    )
    assert sum(report.captions.values()) == 13
    with tarfile.open(tmp_path / "a.tar", "w") as box:
        for i in range(12):
            (tmp_path / "c.txt").write_text(split.captions(i)[0].text)
            box.add(documents / f"{i}.png", f"{i}.png")
            box.add(tmp_path / "c.txt", f"{i}.txt")
    report = check(tmp_path / "a.tar", progress=False)
    assert "1 tar shard" in report.source
    assert sum(report.images.values()) == 12
    assert not report.hurts


def test_one_caption_of_a_million_letters_hides_no_others(tmp_path: Path) -> None:
    lines = str(look(build(tmp_path, caption={5: "word " * 200_000}))).splitlines()
    shown = lines[lines.index("  words     captions") + 1 :]
    shown = shown[: shown.index("")]
    assert len(shown) <= 12
    assert sum("#" in line for line in shown) >= 3
    assert shown[-1].split()[:2] == [shown[-1].split()[0], "1"]
    assert shown[-1].split()[0].endswith("+")


def test_folders_of_classes_without_captions_are_looked_at_as_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "classes"
    for place, numbers in {
        "train/cat": range(4),
        "train/개": range(4, 8),
        "val/cat": range(8, 10),
        "val/소": [3],
    }.items():
        (root / place).mkdir(parents=True)
        for i in numbers:
            (root / place / f"{i}.png").write_bytes(noise(i))
    (root / "train" / "cat" / "1.png").write_bytes(DAMAGED)
    (root / "train" / "개" / "5.png").write_bytes(DAMAGED)
    code, out, _ = mmt(capsys, "check", str(root), "--out", str(tmp_path / "found.json"))
    assert code == 1
    assert "mmt fit --config vit_classify" in out
    assert "no caption file" not in out
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert found["classes"] == {
        "cat": {"train": 4, "val": 2},
        "개": {"train": 4, "val": 0},
        "소": {"train": 0, "val": 1},
    }
    said = {
        f["what"]: (f["count"], f["hurts"], [line.partition(":")[0] for line in f["first"]]) for f in found["findings"]
    }
    assert said == {
        "corrupt pictures in train": (2, True, ["train/cat/1.png", "train/개/5.png"]),
        "classes without a picture in train": (1, True, ["소"]),
        "pictures that are in two splits": (1, False, ["val/val/소/3.png = train/train/cat/3.png"]),
    }
    (root / "captions.csv").write_text("image,caption\nnone.png,a cat\n", "utf-8")
    code, out, _ = mmt(capsys, "check", str(root))
    assert (code, "missing picture" in out) == (1, True)  # what was meant as pairs is looked at as pairs
    (root / "captions.csv").unlink()
    assert "no caption file" in mmt(capsys, "check", str(root), "--default-language", "en")[1]
