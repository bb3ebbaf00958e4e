"""What `--overwrite` replaces, and when: nothing before there is something new, and nothing of other pictures."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmtransformer import (
    ImageCaptioner,
    ImageClassifier,
    ImageTransform,
    TextDecoder,
    Tokenizer,
    VisionEncoderDecoder,
    ViT,
)
from mmtransformer.data.files.archives import Files
from mmtransformer.data.image_files import ImageFiles
from mmtransformer.images import ImageError
from mmtransformer.pipelines.caption_files import CAPTIONS, Lines
from support.cli import mmt

PICTURES = [f"photos/{i}.png" for i in range(5)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner and a classifier that have learnt nothing."""
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = Tokenizer.train(["a red dog", "한 마리 개"], 300, ("en", "ko"))
    decoder = TextDecoder(tokenizer.vocab_size, 16, 1, 2, max_len=64, context_dim=16)
    captioner = VisionEncoderDecoder(ViT(32, 8, 16, 1, 2, class_token=False, pool="mean"), decoder)
    ImageCaptioner(captioner, tokenizer, ImageTransform(32), device="cpu").save_pretrained(folder / "caption")
    for name, classes in (("classify", ["cat", "dog"]), ("others", ["a pig", "cow", "양"])):
        classifier = ViT(32, 8, 16, 1, 2, num_classes=len(classes))
        ImageClassifier(classifier, classes, ImageTransform(32), device="cpu").save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pictures below the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i, name in enumerate(PICTURES):
        Image.new("RGB", (20, 30), (40 * i, 0, 0)).save(name)


def rows(out: str) -> dict[str, list[str]]:
    """Picture -> its lines."""
    text, found = Path(out).read_text("utf-8-sig"), dict[str, list[str]]()
    if out.endswith(".csv"):
        for row in [*csv.reader(text.splitlines())][1:]:
            found.setdefault(row[0], []).append(",".join(row[1:]))
    else:
        for line in text.splitlines():
            found.setdefault(json.loads(line)["image"], []).append(line)
    return found


@pytest.mark.parametrize("out", ["c.csv", "c.jsonl"])
@pytest.mark.parametrize("command", ["caption", "classify"])
def test_rows_of_other_pictures_stay(capsys: pytest.CaptureFixture[str], saved: Path, command: str, out: str) -> None:
    many, few = (
        {"caption": ["--num-return-sequences", "2"], "classify": ["--top-k", "2"]}[command],
        {"caption": ["--prefix", "new"], "classify": ["--top-k", "1"]}[command],
    )
    words = ["--model", str(saved / command), "--out", out]
    assert mmt(capsys, command, "photos", *words, *many)[0] == 0
    before = rows(out)
    assert [*before] == PICTURES
    Path(PICTURES[2]).write_bytes(b"broken")
    code, _, err = mmt(capsys, command, *PICTURES[1:3], *words, *few, "--overwrite")
    after = rows(out)
    assert (code, "its earlier caption stays" in err) == (1, True), err
    assert {name for name in PICTURES if after[name] != before[name]} == {PICTURES[1]}
    assert len(after[PICTURES[1]]) == 1
    assert mmt(capsys, command, *PICTURES[:2], *words, *few, "--overwrite")[0] == 0
    assert {name: len(some) for name, some in rows(out).items()} == {name: len(after[name]) for name in PICTURES} | {
        PICTURES[0]: 1
    }


@pytest.mark.parametrize("out", ["c.csv", "c.jsonl"])
@pytest.mark.parametrize(
    "wrong",
    [
        ["photos", "--language", "kr"],
        ["photos", "--model", "nowhere"],
        ["photo"],
        ["photos/5.png", "photos/6.png"],
        ["photos", "--num-beams", "0"],
        ["photos", "--batch-size", "0"],
        ["photos", "--prompt", "a photo of"],
        ["photos", "--examples", "photos"],
    ],
)
def test_a_call_that_is_refused_leaves_the_file(
    capsys: pytest.CaptureFixture[str], saved: Path, out: str, wrong: list[str]
) -> None:
    words = ["--model", str(saved / "caption"), "--out", out]
    mmt(capsys, "caption", *wrong, *words[2 * ("--model" in wrong) :], "--overwrite")
    assert not Path(out).exists()
    assert mmt(capsys, "caption", "photos", *words)[0] == 0
    before = Path(out).read_bytes()
    for cut in (0, 3):  # a last line that was cut off stays, too
        Path(out).write_bytes(before[: len(before) - cut])
        code = mmt(capsys, "caption", *wrong, *words[2 * ("--model" in wrong) :], "--overwrite")[0]
        assert (code > 0, Path(out).read_bytes()) == (True, before[: len(before) - cut])


@pytest.mark.parametrize("out", ["c.csv", "c.jsonl"])
def test_a_call_that_is_interrupted_at_once_leaves_the_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, saved: Path, out: str
) -> None:
    words = ["caption", "photos", "--model", str(saved / "caption"), "--out", out, "--batch-size", "1"]
    assert mmt(capsys, *words)[0] == 0
    before = Path(out).read_bytes()

    def killed(self: ImageFiles, i: int) -> Image.Image:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        raise AssertionError

    monkeypatch.setattr(ImageFiles, "image", killed)
    code, _, err = mmt(capsys, *words, "--overwrite")
    assert (code, Path(out).read_bytes()) == (130, before)
    assert "after 0 of 5 pictures: what is done is in " in err
    assert "and the same call goes on with the others" in err


@pytest.mark.parametrize("out", ["c.csv", "c.jsonl"])
@pytest.mark.parametrize("text", ["id,price\n1,2\n", '{"annotations": []}', "image,caption", "no line"])
def test_a_file_of_something_else_is_not_replaced(
    capsys: pytest.CaptureFixture[str], saved: Path, out: str, text: str
) -> None:
    Path(out).write_text(text)
    code, _, err = mmt(capsys, "caption", "photos", "--model", str(saved / "caption"), "--out", out, "--overwrite")
    if (out, text) == ("c.csv", "image,caption"):  # nothing but the beginning of a table of captions
        assert code == 0
        return
    assert (code, "; name another file" in err, Path(out).read_text()) == (2, True, text), err


def test_a_language_that_the_model_does_not_know_is_no_reason_to_overwrite(
    capsys: pytest.CaptureFixture[str], saved: Path
) -> None:
    words = ["caption", "photos", "--model", str(saved / "caption"), "--out", "c.csv"]
    assert mmt(capsys, *words, "--language", "ko")[0] == 0
    code, _, err = mmt(capsys, *words, "--language", "kr")
    assert (code, 'does not know the language "kr"' in err, "--overwrite" in err) == (2, True, False), err


@pytest.mark.parametrize("out", ["c.csv", "c.jsonl"])
def test_classes_of_another_model_are_no_results_of_this_one(
    capsys: pytest.CaptureFixture[str], saved: Path, out: str
) -> None:
    words = ["classify", "photos", "--out", out]
    assert (
        mmt(capsys, *words[:1], *PICTURES[:2], *words[2:], "--model", str(saved / "classify"), "--top-k", "2")[0] == 0
    )
    before = Path(out).read_bytes()
    code, _, err = mmt(capsys, *words, "--model", str(saved / "others"))
    assert (code, Path(out).read_bytes()) == (2, before)
    assert f"{out} holds classes of these pictures that {saved / 'others'} does not know (" in err
    assert "): --overwrite writes them anew, or name another file" in err
    assert mmt(capsys, "classify", PICTURES[4], "--model", str(saved / "others"), "--out", out)[0] == 0  # of others
    code, _, err = mmt(capsys, *words, "--model", str(saved / "others"), "--overwrite")
    assert (code, [*rows(out)]) == (0, PICTURES), err
    code, _, err = mmt(capsys, *words, "--model", str(saved / "others"))
    assert (code, "5 had classes there already (by the options" in err) == (0, True), err


@pytest.mark.parametrize("out", ["c.csv", "c.jsonl"])
def test_a_last_line_that_lacks_its_end_alone_stays(capsys: pytest.CaptureFixture[str], saved: Path, out: str) -> None:
    words = ["--model", str(saved / "caption"), "--out", out]
    assert mmt(capsys, "caption", *PICTURES[:2], *words)[0] == 0
    written = Path(out).read_text("utf-8")
    mine = {
        "c.csv": f"{PICTURES[2]},나의 말,ko,-1.0000",
        "c.jsonl": f'{{"image": "{PICTURES[2]}", "captions": [{{"text": "나"}}]}}',
    }
    for line in (mine[out], written.splitlines()[-1].replace(PICTURES[1], PICTURES[2])):
        Path(out).write_text(written + line, "utf-8")
        code, _, err = mmt(capsys, "caption", *PICTURES[2:4], *words)
        assert (code, "cut off" in err, [*rows(out)]) == (0, False, PICTURES[:4]), err
        assert Path(out).read_text("utf-8").startswith(f"{written}{line}\n")
    for line in (mine[out][:-7], mine[out][:9]):  # of a picture's name the beginning, too
        Path(out).write_text(written + line, "utf-8")
        code, _, err = mmt(capsys, "caption", *PICTURES[2:4], *words)
        assert (code, [*rows(out)]) == (0, PICTURES[:4]), err
        assert Path(out).read_text("utf-8").startswith(written)
        assert f"the last line there, without an end, was taken for cut off: {line}" in err


def test_scores_that_are_refused_leave_their_captions(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    Path("data.csv").write_text("image,caption\n" + "".join(f"{name},a red dog\n" for name in PICTURES))
    words = ["evaluate", "--model", str(saved / "caption"), "--data", "data.csv", "--split", "train"]
    words += ["--captions-out", "said.jsonl"]
    assert mmt(capsys, *words)[0] == 0
    before = Path("said.jsonl").read_bytes()
    for wrong in (["--batch-size", "0"], ["--num-shots", "999"], ["--max-new-tokens", "0"]):
        code, _, _ = mmt(capsys, *words, "--overwrite", *wrong)
        assert (code, Path("said.jsonl").read_bytes()) == (2, before)
    assert mmt(capsys, *words, "--overwrite", "--num-beams", "2")[0] == 0
    assert len(Path("said.jsonl").read_bytes().splitlines()) == len(before.splitlines())


@pytest.mark.parametrize("out", ["c.csv", "c.jsonl"])
def test_two_calls_at_once_write_of_each_picture_once(saved: Path, out: str) -> None:
    images, found = ImageFiles(["photos"]), ImageCaptioner.from_pretrained(saved / "caption", device="cpu")
    said = found([f"photos/{i}.png" for i in range(5)])
    first, second = (Lines(Path(out), CAPTIONS, images, overwrite=False) for _ in range(2))  # both find no file
    turns = (0, first), (1, second), (1, first), (2, first), (2, second), (0, second), (3, second), (3, first)
    for i, file in turns:
        file.write(i, said[i])
    assert {name: len(lines) for name, lines in rows(out).items()} == dict.fromkeys(PICTURES[:4], 1)
    assert (first.left_out, second.left_out) == (2, 2)
    again = Lines(Path(out), CAPTIONS, ImageFiles([PICTURES[0]]), overwrite=True)
    others = Lines(Path(out), CAPTIONS, ImageFiles(PICTURES[1:3]), overwrite=True)
    before = rows(out)
    others.write(0, said[4])
    again.write(0, said[4])
    others.write(1, said[4])
    after = rows(out)
    assert {name: len(lines) for name, lines in after.items()} == dict.fromkeys(after, 1)
    assert {name for name in PICTURES[:4] if after[name] != before[name]} == {*PICTURES[:3]}
    Path(out).unlink()  # under our hands
    first.write(4, said[4])
    assert [*rows(out)] == [PICTURES[4]]


def test_a_line_without_captions_is_of_no_other_call(saved: Path) -> None:
    said = ImageCaptioner.from_pretrained(saved / "caption", device="cpu")(PICTURES)
    images = ImageFiles(["photos"])
    first, second = (Lines(Path("c.jsonl"), CAPTIONS, images, overwrite=False) for _ in range(2))
    Path("c.jsonl").write_text(f'{{"image": "{PICTURES[0]}", "captions": null}}\n')
    second.write(1, said[1])
    first.write(0, said[0])
    assert [len(lines) for lines in rows("c.jsonl").values()] == [2, 1]
    assert first.left_out == second.left_out == 0


def test_a_path_without_a_file_is_told_once_and_stays_in_no_list(
    capsys: pytest.CaptureFixture[str], saved: Path
) -> None:
    options = ["--model", str(saved / "caption"), "--out", "c.jsonl"]
    Path("photos/1.png").write_bytes(b"broken")
    code, _, err = mmt(capsys, "caption", "photos/0.png", "photos/1.png", "photos/typo.png", *options)
    assert (code, "1 could not be used: bad_images_c.txt names them" in err) == (1, True)
    assert err.endswith("; 1 path without a file, in no list\n")
    assert Path("bad_images_c.txt").read_text().splitlines()[1::2] == ["photos/1.png"]
    Path("photos/1.png").unlink()
    code, _, err = mmt(capsys, "caption", "@bad_images_c.txt", *options)
    assert (code, "photos/1.png: " in err, "1 path without a file" in err) == (1, True, True)
    assert not Path("bad_images_c.txt").exists()
    code, _, err = mmt(capsys, "caption", "photos", *options)
    assert (code, "3 pictures captioned" in err) == (0, True), err


def test_what_options_are_called_elsewhere_is_hinted_at(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    model = str(saved / "caption")
    captioner = ImageCaptioner.from_pretrained(model, device="cpu")
    for name, mine in (("max_length", "max_new_tokens"), ("lang", "language"), ("beams", "num_beams")):
        with pytest.raises(TypeError, match=f'has no "{name}"; did you mean "{mine}"'):
            captioner(PICTURES[0], **{name: 5})
    for command, word, mine in (
        ("caption", "--max-length", "--max-new-tokens"),
        ("caption", "--lang", "--language"),
        ("check", "--max-length", "--max-len"),
    ):
        _, _, err = mmt(capsys, command, "photos", *(["--model", model] * (command == "caption")), word, "5")
        assert f'did you mean "{mine}"' in err


def test_a_picture_that_may_not_be_read_names_its_permissions(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Files, "_read", refused)
    with pytest.raises(ImageError, match=r"can't be read \(Permission denied\); check its permissions"):
        ImageFiles(["photos"]).data(0)
