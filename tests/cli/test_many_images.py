"""`mmt caption` and `ImageCaptioner.stream` on many pictures: what is taken, what is written, bad files, going on."""

import csv
import gc
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
import weakref
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmtransformer import ImageCaptioner, ImageTransform, TextDecoder, Tokenizer, VisionEncoderDecoder, ViT
from mmtransformer.data.image_files import ImageFiles
from mmtransformer.data.open_sources import open_pairs
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.images import ImageError
from mmtransformer.pipelines.framing import between
from mmtransformer.pipelines.many_images import devices_of, load_ahead
from mmtransformer.serialization.printable import counted, program
from support.cli import mmt

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "orange")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has learnt nothing, but to say other words of other pictures, saved."""
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("saved") / "model"
    source = Scenes(image_size=32, train_size=20).split("train")
    texts = [caption.text for i in range(20) for caption in source.captions(i)]
    tokenizer = Tokenizer.train(texts, 300, ("en", "ko"))
    decoder = TextDecoder(300, 16, 1, 2, max_len=64, context_dim=16)
    captioner = VisionEncoderDecoder(ViT(32, 8, 16, 1, 2, class_token=False, pool="mean"), decoder)
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    generation = GenerationConfig(min_new_tokens=3, max_new_tokens=6)
    ImageCaptioner(captioner, tokenizer, ImageTransform(32), generation=generation, device="cpu").save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven pictures in three folders, below the current one."""
    monkeypatch.chdir(tmp_path)
    for i, colour in enumerate(COLOURS):
        path = Path("photos", ("", "서울", "서울/밤")[i % 3], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 30), colour).save(path)
    Path("photos/notes.md").write_text("no picture")
    return Path("photos")


def names(out: str) -> list[str]:
    return [json.loads(line)["image"] for line in out.splitlines()]


ALL = [
    "photos/0.png", "photos/3.png", "photos/6.png", "photos/서울/1.png", "photos/서울/4.png", "photos/서울/밤/2.png",
    "photos/서울/밤/5.png",
]  # fmt: skip


def test_folders_patterns_archives_and_lists(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str, photos: Path
) -> None:
    options = ["--model", model, "--json", "--batch-size", "3"]
    code, out, err = mmt(capsys, "caption", "photos", *options)
    assert (code, names(out)) == (0, ALL)
    assert "7 pictures captioned; 1 other file left alone" in err
    said = {row["image"]: row["captions"] for row in map(json.loads, out.splitlines())}
    assert len({str(c) for c in said.values()}) > 1

    code, out, _ = mmt(capsys, "caption", "photos/**/*.png", *options)
    assert (code, sorted(names(out))) == (0, sorted(ALL))
    with zipfile.ZipFile("a.zip", "w") as zipped, tarfile.open("a.tar", "w") as tarred:
        for name in ALL:
            zipped.write(name)
            tarred.add(name)
    for archive in ("a.zip", "a.tar"):
        code, out, _ = mmt(capsys, "caption", archive, *options)
        assert (code, sorted(names(out))) == (0, sorted(f"{archive}/{name}" for name in ALL))
        rows = [json.loads(line) for line in out.splitlines()]
        assert {row["image"].partition("/")[2]: row["captions"] for row in rows} == said
    code, out, _ = mmt(capsys, "caption", f"a.zip/{ALL[4]}", ALL[1], ALL[1], *options)
    assert (code, names(out)) == (0, [f"a.zip/{ALL[4]}", ALL[1]])
    code, out, _ = mmt(
        capsys, "caption", ALL[0], "--model", model, "--detokenize", "--prefix", "a , b", "--suffix", "."
    )
    assert (code, out.startswith("a , b "), out.endswith(".\n")) == (0, True, True)

    listing = f"{ALL[5]}\n\n# a remark\na.tar/{ALL[0]}\r\n"
    Path("list.txt").write_text(listing, "utf-8")
    Path("wide.txt").write_text(listing, "utf-16")  # as PowerShell does
    Path("nul.txt").write_bytes(f"{ALL[5]}\0a.tar/{ALL[0]}\0".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listing.encode())))
    for place in ("-", "@list.txt", "@wide.txt", "@nul.txt"):
        code, out, _ = mmt(capsys, "caption", place, *options)
        assert (code, names(out)) == (0, [ALL[5], f"a.tar/{ALL[0]}"])
    for words, line in (
        (["nothing*.png"], "no file fits this pattern"),
        (["photos/notes.md"], "not a picture"),
        ([f"@{ALL[0]}"], f"{ALL[0]} is a picture, and a list of paths is read from there"),
        (["a.zip/b.png"], "not in a.zip"),
        (["photos", "--overwrite"], "--out"),
        (["photos", "--out", "x.xml"], "FILE.jsonl"),
        (["photos", "--json", "--out", "x.jsonl"], "--json"),
        (["photos", "--batch-size", "0"], "batch_size"),
        (["a.zip", "--out", "txt"], "lies in an archive"),
        (["photos", "--devices", "0"], "--devices"),
        (["photos", "--device", "cpu", "--devices", "999"], "--devices (999): a CPU takes a process for each"),
        (["photos", "--device", "cuda", "--devices", "65"], "GPU"),
    ):
        code, _, err = mmt(capsys, "caption", *words, "--model", model)
        assert (code, line in err.splitlines()[-1]) == (2, True), err
        assert err.count(line) == 1
    Path("empty").mkdir()
    assert "no pictures there" in mmt(capsys, "caption", "empty", "--model", model)[2]


def test_bad_pictures_are_named_and_the_others_captioned(
    capsys: pytest.CaptureFixture[str], model: str, photos: Path
) -> None:
    (photos / "1bad.jpg").write_bytes(b"\xff\xd8\xff broken")
    (photos / "서울/gone.png").symlink_to("nowhere.png")
    code, out, err = mmt(capsys, "caption", "photos", "--model", model, "--out", "captions.jsonl", "--batch-size", "2")
    assert (code, out) == (1, "")
    rows = [json.loads(line) for line in Path("captions.jsonl").read_text("utf-8").splitlines()]
    assert [row["image"] for row in rows] == ALL
    listed = Path("bad_images_captions.txt").read_text("utf-8").splitlines()
    assert listed[1::2] == ["photos/서울/gone.png", "photos/1bad.jpg"]
    assert all(line.startswith("# photos/") for line in listed[::2])
    assert "2 could not be used: bad_images_captions.txt names them" in err
    assert err.count("1bad.jpg") == 1

    assert mmt(capsys, "caption", ALL[0], "--model", model, "--out", "captions.jsonl")[0] == 0
    assert Path("bad_images_captions.txt").read_text("utf-8").splitlines() == listed  # what was not tried stays
    Image.new("RGB", (20, 20), "pink").save(photos / "1bad.jpg")
    again = ["@bad_images_captions.txt", "--model", model, "--out", "captions.jsonl"]
    code, _, err = mmt(capsys, "caption", *again)
    assert code == 1
    assert "1 picture captioned in captions.jsonl; 1 could not be used" in err
    (photos / "서울/gone.png").unlink()
    Image.new("RGB", (20, 20), "pink").save(photos / "서울/gone.png")
    assert mmt(capsys, "caption", *again)[0] == 0
    assert not Path("bad_images_captions.txt").exists()
    code, _, err = mmt(capsys, "caption", "photos", "--model", model, "--out", "captions.jsonl")
    assert code == 0
    assert "0 pictures captioned in captions.jsonl; 9 had captions there already" in err
    assert len(names(Path("captions.jsonl").read_text("utf-8"))) == 9


@pytest.mark.parametrize("words", ["@list.txt", "some", "some/*.png", "some/1bad.png some/none.png", "some.zip"])
def test_bad_pictures_alone_are_named_and_counted_too(
    words: str, capsys: pytest.CaptureFixture[str], model: str, photos: Path
) -> None:
    Path("some").mkdir()
    Path("some/1bad.png").write_bytes(b"broken")
    Path("list.txt").write_text("some/1bad.png\n")
    with zipfile.ZipFile("some.zip", "w") as zipped:
        zipped.write("some/1bad.png", "1bad.png")
    code, out, err = mmt(capsys, "caption", *words.split(), "--model", model, "--language", "en")
    count = len(words.split())
    assert (code, out, err.splitlines()[-1]) == (1, "", f"0 pictures captioned; {count} could not be used"), err
    assert err.count("1bad.png: ") == 1
    assert err.startswith("mmt caption: ")
    code, _, err = mmt(
        capsys, "caption", "some/1bad.png", "--model", model, "--language", "en"
    )  # the one that was named itself
    assert (code, err.startswith("mmt caption: error: some/1bad.png: "), err.count("\n")) == (2, True, 1)


def test_the_command_that_tries_again_empties_no_file(
    capsys: pytest.CaptureFixture[str], model: str, photos: Path
) -> None:
    (photos / "1bad.jpg").write_bytes(b"broken")
    for out in ("c.jsonl", "texts/"):
        _, _, err = mmt(capsys, "caption", "photos", "--model", model, "--out", out, "--overwrite")
        (command,) = re.findall(rf"`{re.escape(program())} (caption .*)` tries them again", err)
        mmt(capsys, *shlex.split(command))
    assert names(Path("c.jsonl").read_text("utf-8")) == ALL


def test_the_command_that_tries_again_is_called_as_this_one_was(model: str, photos: Path) -> None:
    (photos / "1bad.jpg").write_bytes(b"broken")
    words = ["caption", "photos/1bad.jpg", ALL[0], "--model", model, "--out", "c.jsonl"]
    environment = {**os.environ, "PATH": "/nowhere", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-m", "mmtransformer", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (command,) = re.findall(r"`(.*)` tries them again", done.stderr)
    assert shlex.split(command)[:3] == [sys.executable, "-m", "mmtransformer"]
    Image.new("RGB", (20, 20), "pink").save(photos / "1bad.jpg")
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "1 picture captioned" in done.stderr) == (0, True), done.stderr


@pytest.mark.parametrize(
    ("out", "more", "way"),
    [
        ("c.jsonl", [], "what is done is in c.jsonl, and the same call goes on with the others"),
        (
            "c.csv",
            ["--overwrite"],
            "what is done is in c.csv, and the same call without --overwrite goes on with the others",
        ),
        ("texts/", [], "what is done is in .txt files in texts, and the same call goes on with the others"),
        ("", [], ""),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_stopped_call_says_how_far_it_came_and_what_goes_on(
    out: str, more: list[str], way: str, number: int, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, model: str, photos: Path,
) -> None:  # fmt: skip
    words = [
        "caption",
        "photos",
        "--model",
        model,
        "--language",
        "en",
        "--batch-size",
        "1",
        *more,
        *(["--out", out] if out else []),
    ]
    image = ImageFiles.image
    before = signal.getsignal(signal.SIGTERM)

    def killed(self: ImageFiles, i: int) -> Image.Image:
        if i == 6:
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # in a thread, while the main one is stopped
        return image(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFiles, "image", killed)
        code, _, err = mmt(capsys, *words)
    word, wanted = ("interrupted", 130) if number == signal.SIGINT else ("terminated", 143)
    assert code == wanted
    said = re.fullmatch(rf"mmt: {word} after ([0-6]) of 7 pictures{re.escape(f': {way}' if out else '')}\n", err)
    assert said, err
    assert signal.getsignal(signal.SIGTERM) == before
    if out:
        code, _, err = mmt(capsys, *(word for word in words if word != "--overwrite"))
        done = int(said[1])
        assert (code, err.startswith(f"{counted(7 - done, 'picture')} captioned in ")) == (0, True), err
        assert bool(re.search(f"; {done} (had captions|text files? (was|were)) there already", err)) == (done > 0)


@pytest.mark.parametrize("out", ["결과 1.jsonl", "내 캡션/"])
def test_the_command_that_tries_again_is_one_that_runs(
    out: str, capsys: pytest.CaptureFixture[str], model: str, photos: Path
) -> None:
    (photos / "1bad.jpg").write_bytes(b"\xff\xd8\xff broken")
    options = ["--model", model, "--language", "ko", "--out", out, "--prefix", "my style,"]
    code, _, err = mmt(capsys, "caption", *options, "--", "photos")
    assert code == 1
    (command,) = re.findall(rf"`{re.escape(program())} (caption .*)` tries them again", err)
    assert shlex.split(command)[2:] == options  # so that those captions are no others than these
    Image.new("RGB", (20, 20), "pink").save(photos / "1bad.jpg")
    code, _, err = mmt(capsys, *shlex.split(command))
    assert (code, "1 picture captioned" in err) == (0, True), err


@pytest.mark.parametrize("out", ["captions.jsonl", "captions.csv"])
def test_a_second_call_goes_on(capsys: pytest.CaptureFixture[str], model: str, photos: Path, out: str) -> None:
    words = ["--model", model, "--out", out, "--num-return-sequences", "2"]
    assert mmt(capsys, "caption", "photos", *words)[0] == 0
    whole = Path(out).read_bytes()
    for cut in (len(whole) - 9, len(whole) // 2, 0):
        Path(out).write_bytes(whole[:cut])
        assert mmt(capsys, "caption", "photos", *words)[0] == 0
        assert Path(out).read_bytes() == whole
    assert mmt(capsys, "caption", "photos", *words, "--prefix", "new")[0] == 0
    assert Path(out).read_bytes() == whole
    code, _, err = mmt(capsys, "caption", "photos", *words, "--overwrite", "--prefix", "new", "--suffix", ", sharp")
    assert code == 0
    assert "7 pictures" in err
    assert Path(out).read_bytes() != whole
    pairs = open_pairs(out)
    splits = [pairs.split(name) for name in pairs.splits()]
    texts = [c.text for split in splits for i in range(len(split)) for c in split.captions(i)]
    assert len(texts) == 14
    assert all(text.startswith("new ") and text.endswith(", sharp") for text in texts)
    Path(out).write_text("something else\n", "utf-8")
    code, _, err = mmt(capsys, "caption", "photos", *words)
    assert (code, "holds no captions to go on with" in err) == (2, True)
    assert Path(out).read_text("utf-8") == "something else\n"


@pytest.mark.parametrize("out", ["captions.jsonl", "captions.csv"])
def test_captions_of_an_earlier_call_say_by_what_they_were_written(
    capsys: pytest.CaptureFixture[str], model: str, photos: Path, out: str
) -> None:
    words = ["--model", model, "--out", out]
    assert mmt(capsys, "caption", *ALL[:3], *words, "--language", "ko")[0] == 0
    whole = Path(out).read_bytes()
    code, _, err = mmt(capsys, "caption", "photos", *words, "--language", "en")
    said = f"{out} holds captions in ko of 3 pictures, which would have none in en: --overwrite writes them anew, or"
    assert (code, said in err, Path(out).read_bytes()) == (2, True, whole)
    assert mmt(capsys, "caption", *ALL[3:], *words, "--language", "en")[0] == 0  # other pictures
    code, _, err = mmt(capsys, "caption", "photos", *words, "--prefix", "my style,")
    assert "; 7 had captions there already (in en, in ko, by the options of an earlier call; --overwrite" in err
    assert mmt(capsys, "caption", "photos", *words, "--language", "en", "--overwrite")[0] == 0


def test_text_files(capsys: pytest.CaptureFixture[str], model: str, photos: Path) -> None:
    (photos / "0.txt").write_text("mine", "utf-8")
    before = set(photos.rglob("*"))
    assert mmt(capsys, "caption", "photos", "--model", model, "--out", "texts/")[0] == 0
    assert set(photos.rglob("*")) == before
    found = {str(path.relative_to("texts")) for path in Path("texts").rglob("*.txt")}
    assert found == {name.removeprefix("photos/").replace(".png", ".txt") for name in ALL}
    code, _, err = mmt(capsys, "caption", "photos", "--model", model, "--out", "txt")
    assert code == 0
    kept = "1 text file was there already and is kept as it is; --overwrite replaces it; 1 other file left alone"
    assert f"6 pictures captioned in .txt files beside the pictures; {kept}" in err
    words = ["caption", "photos", "--model", model, "--out", "txt", "--prefix", "a style,"]
    kept = "7 text files were there already and are kept as they are (no prefix was added); --overwrite replaces them"
    assert f"0 pictures captioned in .txt files beside the pictures; {kept}; 1 other file" in mmt(capsys, *words)[2]
    assert (photos / "0.txt").read_text("utf-8") == "mine"
    assert (photos / "서울/밤/5.txt").read_bytes() == Path("texts/서울/밤/5.txt").read_bytes()
    (photos / "0.png").write_bytes(b"broken")
    code, _, err = mmt(capsys, "caption", "photos", "--model", model, "--out", "txt", "--overwrite", "--prefix", "a:")
    assert code == 1
    assert "photos/0.png" in Path("bad_images.txt").read_text("utf-8")
    assert "its earlier caption stays" in err
    assert (photos / "0.txt").read_text("utf-8") == "mine"
    assert (photos / "3.txt").read_text("utf-8").startswith("a: ")
    Image.new("RGB", (9, 9)).save(photos / "3.jpg")
    code, _, err = mmt(capsys, "caption", "photos", "--model", model, "--out", "caption")
    two = "photos/3.jpg and photos/3.png would both be captioned in photos/3.caption"
    assert (code, f"{two}; use --out FILE.jsonl, or rename one\n" in err) == (2, True)
    Image.new("RGB", (9, 9)).save(photos / "6.jpg")
    _, _, err = mmt(capsys, "caption", "photos", "--model", model, "--out", "caption")
    assert f"{two}, and so would 1 more pair; use" in err
    assert "or rename one of each\n" in err


def test_its_own_files_are_no_others(capsys: pytest.CaptureFixture[str], model: str, photos: Path) -> None:
    (photos / "7.png").write_bytes(b"broken")
    for out in ("photos/captions.jsonl", "photos/captions.csv", "photos/texts/"):
        for again in (False, True):
            code, _, err = mmt(capsys, "caption", "photos", "--model", model, "--out", out)
            assert (code, again or "7 pictures captioned" in err) == (1, True)
            others = {"photos/captions.jsonl": 1, "photos/captions.csv": 2, "photos/texts/": 4}[out]
            assert f"; {others} other file{'s' if others > 1 else ''} left alone" in err


def test_hidden_pictures_are_counted(capsys: pytest.CaptureFixture[str], model: str, photos: Path) -> None:
    for name in (".h/deep/a.png", ".h/.b.png", ".c.png", "._0.png", "__MACOSX/0.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(photos / name)
    (photos / ".h/notes.txt").write_text("no picture")
    said = "7 pictures captioned; 1 other file left alone; 3 hidden pictures left out, such as photos/.c.png"
    assert said in mmt(capsys, "caption", "photos", "--model", model)[2]
    with zipfile.ZipFile("a.zip", "w") as zipped:
        for path in (*photos.rglob("*.png"),):
            zipped.write(path, path.relative_to(photos))
    assert "3 hidden pictures left out, such as a.zip/" in mmt(capsys, "caption", "a.zip", "--model", model)[2]


def test_an_empty_text_file_is_no_caption(capsys: pytest.CaptureFixture[str], model: str, photos: Path) -> None:
    (photos / "0.txt").write_text("")
    (photos / "3.txt").write_text("a dog\n")
    code, _, err = mmt(capsys, "caption", "photos", "--model", model, "--out", "txt")
    assert (code, "6 pictures captioned" in err, "1 text file was there already" in err) == (0, True, True), err
    assert (photos / "0.txt").read_text() != ""
    assert (photos / "3.txt").read_text() == "a dog\n"


def test_processes_share_the_pictures(capfd: pytest.CaptureFixture[str], model: str, photos: Path) -> None:
    (photos / "1bad.jpg").write_bytes(b"broken")
    for out, devices in (("one.csv", "1"), ("two.csv", "2")):
        words = ["--model", model, "--device", "cpu", "--devices", devices, "--out", out, "--batch-size", "1"]
        code, _, err = mmt(capfd, "caption", "photos", *words)
        assert (code, err.count("captions are in en; --language says another (ko)")) == (1, 1), err
    one, two = ([*csv.reader(Path(out).read_text("utf-8-sig").splitlines())] for out in ("one.csv", "two.csv"))
    assert [row[:3] for row in one] == [row[:3] for row in two]
    assert [row[0] for row in two[1:]] == ALL
    assert devices_of("cpu", 2) == ["cpu", "cpu"]


def test_memory_holds_a_few_batches_of_any_number(model: str) -> None:
    captioner = ImageCaptioner.from_pretrained(model, device="cpu")
    alive: list[weakref.ref[Image.Image]] = []
    most, made = 0, 0

    def endless() -> Iterator[Image.Image]:
        nonlocal most, made
        while True:
            image = Image.new("RGB", (40, 40), COLOURS[made % 7])
            alive.append(weakref.ref(image))
            made += 1
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
            yield image

    stream = captioner.stream(endless(), batch_size=2)
    first = [next(stream)[0].text for _ in range(70)]
    assert first[:7] * 10 == first
    assert first[:7] == [row[0].text for row in captioner([Image.new("RGB", (40, 40), c) for c in COLOURS])]
    assert most <= 24
    assert made <= 70 + 24


def test_stream_of_paths_keeps_the_order(model: str, photos: Path) -> None:
    captioner = ImageCaptioner.from_pretrained(model, device="cpu")
    bad = photos / "bad.jpg"
    bad.write_bytes(b"broken")
    paths = [Path(ALL[0]), bad, *map(Path, ALL[1:])]
    seen = []
    rows = list(captioner.stream(paths, on_error=lambda path, error: seen.append((path, str(error))), batch_size=2))
    assert rows[1] == []
    assert [row[0].text for row in rows if row] == [row[0].text for row in captioner(ALL)]
    assert [path for path, _ in seen] == [bad]
    many = captioner.stream(paths)
    assert next(many)
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        next(many)
    assert "".join(captioner.stream_text(str(paths[0]))) == rows[0][0].text
    with pytest.raises(ValueError, match=r"give \[picture\], or write one's caption by stream_text\(picture\)"):
        captioner.stream(str(paths[0]))
    assert len(next(captioner.stream(paths, num_beams=3, num_return_sequences=2))) == 2


def test_loading_is_stopped_with_the_reader() -> None:
    lock, taken = threading.Lock(), []

    def make(i: int) -> int:
        with lock:
            taken.append(i)
        return i

    made = load_ahead(make, iter(range(10**9)), threads=3, ahead=5)
    assert [next(made) for _ in range(4)] == [0, 1, 2, 3]
    made.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    assert len(taken) <= 9
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]


def test_heat_maps_beside_captions_in_threads(model: str, photos: Path) -> None:
    captioner = ImageCaptioner.from_pretrained(model, device="cpu")
    must: dict[str, Any] = {"force_words": ("star",), "max_new_tokens": 12}
    said = [row[0] for row in captioner(ALL, **must)]
    want = [captioner.heatmap(name, caption) for name, caption in zip(ALL, said, strict=True)]
    fresh = ImageCaptioner.from_pretrained(model, device="cpu")  # prepacked by whichever comes first

    def work(turn: int) -> bool:
        i = turn % 7
        if turn % 2:
            return fresh(ALL[i], **must)[0][0].text == said[i].text
        return bool((fresh.heatmap(ALL[i], said[i]) - want[i]).abs().max() < 1e-4)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(96)))


def test_words_around_a_caption() -> None:
    assert between("", "a dog", "") == "a dog"
    assert between("sks style,", "a dog", "sharp") == "sks style, a dog sharp"
    assert between("sks, ", "a dog", ", sharp") == "sks, a dog, sharp"
    assert between("", "a dog", "(photo)") == "a dog (photo)"


def test_a_killed_call_leaves_whole_lines(model: str, photos: Path) -> None:
    script = (
        f"from mmtransformer.cli import main; main(['caption', 'photos', '--model', {model!r}, '--out', 'c.jsonl'])"
    )
    script = "import os, mmtransformer.pipelines.caption_files as f; w = f.Lines.write; n = []\n" + (
        "def write(self, i, captions):\n    n.append(i) or len(n) < 4 or os._exit(9)\n    w(self, i, captions)\n"
        f"f.Lines.write = write\n{script}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 9
    assert names(Path("c.jsonl").read_text("utf-8")) == ALL[:3]


def test_a_file_that_reads_as_an_option_is_named(capsys: pytest.CaptureFixture[str], model: str, photos: Path) -> None:
    (photos / "0.png").rename("-dash.png")
    for words in (["-dash.png", "--model", model], ["--model", model, "-dash.png", "photos"]):
        code, _, err = mmt(capsys, "caption", *words)
        assert (code, err) == (2, "mmt caption: error: -dash.png is read as an option: write ./-dash.png\n")
    assert mmt(capsys, "caption", "./-dash.png", "--model", model)[0] == 0


def test_captions_without_a_word_are_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path, photos: Path) -> None:
    tokenizer = Tokenizer.train(["a red dog"], 260)
    captioner = VisionEncoderDecoder(ViT(32, 8, 16, 1, 2), TextDecoder(260, 16, 1, 2, max_len=64, context_dim=16))
    with torch.no_grad():
        captioner.decoder.last_norm.weight.zero_()
        captioner.decoder.last_norm.bias.fill_(1.0)
        captioner.decoder.lm_head.weight.zero_()[tokenizer.eos_id] = 1.0
    ImageCaptioner(captioner, tokenizer, ImageTransform(32), device="cpu").save_pretrained(tmp_path / "blank")
    code, out, err = mmt(capsys, "caption", "photos/0.png", "--model", str(tmp_path / "blank"))
    assert (code, out) == (0, "\n")
    assert "1 of 1 caption without a word: the model ended" in err
    code, _, err = mmt(capsys, "caption", "photos", "--model", str(tmp_path / "blank"), "--min-new-tokens", "3")
    assert (code, "without a word" in err) == (0, False)
