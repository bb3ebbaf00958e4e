"""`mmt search` by a small dual encoder that has learnt nothing: what is said, written, gone on with and refused."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmtransformer import CLIP, ImageIndex, ImageTextEmbedder, ImageTransform, TextTower, Tokenizer, ViT
from mmtransformer.cli import search
from support.cli import mmt
from support.public import noisy

COLOURS = ("red", "green", "blue", "white", "black", "yellow")


def save_model(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(["a red star", "빨간 별"] * 3, 300, ["en", "ko"])
    model = noisy(CLIP(ViT(16, 8, 24, 2, 4), TextTower(300, 20, 2, 2, max_len=24), embed_dim=13))
    ImageTextEmbedder(model, tokenizer, ImageTransform(16), device="cpu").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("saved") / "model", 0)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six pictures in folders below the current one, and one that is cut."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i, colour in enumerate(COLOURS):
        path = Path("photos", ("", "서울")[i % 2], f"{colour}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(path)
    data = Path("photos/red.png").read_bytes()
    Path("photos/cut.png").write_bytes(data[:50])
    return Path("photos")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_stopped_index_is_kept_and_that_is_said(
    number: int, model: str, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = (
        "search",
        "red",
        "--images",
        "photos/",
        "--model",
        model,
        "--batch-size",
        "1",
        "--index-file",
        "i.safetensors",
    )
    encode = ImageTextEmbedder.encode_images
    seen = []

    def killed(self: ImageTextEmbedder, *args: Any, **options: Any) -> Any:
        seen.append(None)
        if len(seen) == 4:
            os.kill(os.getpid(), number)
        return encode(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ImageTextEmbedder, "encode_images", killed)
        code, _, err = mmt(capsys, *ask)
    word, wanted = ("interrupted", 130) if number == signal.SIGINT else ("terminated", 143)
    way = "before all was in the index: what is done is in i.safetensors, and the same call goes on"
    assert (code, err.splitlines()[-1]) == (wanted, f"mmt: {word} {way}")
    assert re.search(r"\([123] new, ", mmt(capsys, *ask)[2])


def test_words_find_pictures(model: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(photos.rglob("*"))
    ask = ("search", "빨간 별", "--images", "photos/", "--model", model)
    code, out, err = mmt(capsys, *ask, "--top-k", "4")
    assert code == 1, "a picture could not be used"
    assert len(out.splitlines()) == 4
    assert all(re.fullmatch(r"-?0\.\d{3}  photos/(서울/)?\w+\.png", line) for line in out.splitlines()), out
    assert "cut.png" in err.splitlines()[0]
    (index,) = Path("cache/mmtransformer/search").iterdir()
    assert err.splitlines()[1] == f"6 pictures (6 new, 1 could not be used); index: {index.resolve()}"
    assert sorted(photos.rglob("*")) == before, "nothing is written beside the pictures"

    again, said, err = mmt(capsys, *ask, "--top-k", "4", "--json")
    (photos / ".h").mkdir()
    Image.new("RGB", (9, 9)).save(photos / ".h" / "a.png")
    assert again == 1, "it still cannot be used, and is not tried again"
    assert err == f"6 pictures (1 could not be used); index: {index.resolve()}\n"
    rows = [json.loads(line) for line in said.splitlines()]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]
    assert [f"{row['score']:.3f}  {row['image']}" for row in rows] == out.splitlines()
    told = ImageIndex.build(ImageTextEmbedder.from_pretrained(model), photos, on_error=lambda *_: None).search(
        "빨간 별", top_k=4
    )
    assert [round(match.score, 4) for match in told] == [round(row["score"], 4) for row in rows]

    Image.new("RGB", (16, 16), "pink").save("photos/pink.png")
    Path("photos/red.png").unlink()
    _, _, err = mmt(capsys, *ask)
    assert err.startswith("6 pictures (1 new, 1 gone, 1 could not be used, 1 hidden and left out)")
    Image.new("RGB", (16, 16), "cyan").save("photos/cyan.png")
    _, out, err = mmt(capsys, *ask, "--no-update")
    assert (len(out.splitlines()), err) == (6, "")


def test_pictures_find_pictures(model: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "cut.png").unlink()
    ask = ("search", "--images", "photos", "--model", model)
    code, out, _ = mmt(
        capsys, *ask, "--like", "photos/red.png", "--like", "photos/서울/green.png", "a star", "--not", "별"
    )
    assert code == 0
    assert len(out.splitlines()) == 4
    shutil.copy("photos/red.png", "elsewhere.png")
    _, out, _ = mmt(capsys, *ask, "--like", "elsewhere.png", "--top-k", "1")
    assert out == "1.000  photos/red.png\n"


def test_duplicates(model: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy("photos/red.png", "photos/서울/다시.png")
    ask = ("search", "--images", "photos", "--model", model, "--duplicates")
    _, out, err = mmt(capsys, *ask, "--threshold", "1")
    assert out == "1.000  photos/red.png\n1.000  photos/서울/다시.png  (same bytes)\n"
    assert err.splitlines()[-1] == "1 group of 2 pictures that are alike"
    _, out, _ = mmt(capsys, *ask, "--threshold", "1", "--json")
    (row,) = map(json.loads, out.splitlines())
    assert [(image["image"], image["same_bytes"]) for image in row["images"]] == [
        ("photos/red.png", False),
        ("photos/서울/다시.png", True),
    ]
    _, out, _ = mmt(capsys, *ask, "--threshold", "0.01", "--out", "dup.html")
    assert "\n\n" in out or len(out.splitlines()) == 7
    assert "Near duplicates" in Path("dup.html").read_text("utf-8")
    Path("photos/서울/다시.png").unlink()
    _, out, err = mmt(capsys, *ask, "--threshold", "1", "--out", "dup.png")
    assert (out, err.splitlines()[-1]) == ("", "dup.png: not drawn, since nothing was found")
    assert not Path("dup.png").exists()


def test_the_threshold_is_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    from mmtransformer.pipelines.search.image_index import ALIKE

    _, out, _ = mmt(capsys, "search", "--help")
    assert f"({ALIKE})" in " ".join(out.split())


def test_the_answer_in_pictures(model: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ("search", "빨간 별", "--images", "photos", "--model", model, "--like", "photos/red.png")
    Path("pages").mkdir()
    _, _, err = mmt(capsys, *ask, "--not", "star", "--out", "pages/page.html")
    assert err.splitlines()[-1] == "pages/page.html: the answer in pictures"
    page = Path("pages/page.html").read_text("utf-8")
    assert page.count("<figure>") == 5
    assert 'href="../photos/%EC%84%9C%EC%9A%B8/' in page
    assert "without star" in page
    assert '<h1 dir="auto">빨간 별</h1>' in page
    mmt(capsys, *ask, "--out", "sheet.png")
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 1000


@pytest.mark.parametrize("asked", [["red"], ["--duplicates", "--threshold", "0.01"]])
def test_the_answer_in_pictures_is_there_though_what_is_printed_is_cut(
    asked: list[str], model: str, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*words: str, file: object = None) -> None:
        if file is None:
            raise BrokenPipeError

    monkeypatch.setattr("mmtransformer.cli.search.say", cut)
    with pytest.raises(BrokenPipeError):
        search.run("search", [*asked, "--images", str(photos), "--model", model, "--out", "page.html"])
    assert Path("page.html").is_file()


def test_an_index_in_a_file(model: str, photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = mmt(
        capsys, "search", "red", "--images", "photos", "--model", model, "--index-file", "kept/my.safetensors"
    )
    assert (code, err.splitlines()[-1]) == (1, "6 pictures (6 new, 1 could not be used); index: kept/my.safetensors")
    assert not list(Path("cache").rglob("*.safetensors"))
    _, first, _ = mmt(capsys, "search", "red", "--index-file", "kept/my.safetensors", "--model", model)
    assert len(first.splitlines()) == 6
    other = save_model(tmp_path / "other", 1)
    for ask in (("--index-file", "kept/my.safetensors"), ("--images", "photos", "--index-file", "kept/my.safetensors")):
        code, _, err = mmt(capsys, "search", "red", *ask, "--model", other)
        assert code == 2
        assert "kept/my.safetensors: made by another model" in err
        assert "delete this one, and it is made anew" in err
        assert len(err.splitlines()) == 1
    assert mmt(capsys, "search", "red", "--images", "photos", "--model", other)[0] == 1, "in the cache each has its own"
    whole = Path("kept/my.safetensors").read_bytes()
    Path("kept/my.safetensors").write_bytes(whole[:-7])
    code, _, err = mmt(capsys, "search", "red", "--index-file", "kept/my.safetensors", "--model", model)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "kept/my.safetensors: cut short" in err


def test_a_model_that_compares_nothing(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmtransformer import ImageCaptioner, TextDecoder, VisionEncoderDecoder

    captioner = VisionEncoderDecoder(ViT(16, 8, 8, 1, 2), TextDecoder(300, 8, 1, 2, max_len=16, context_dim=8))
    tokenizer = Tokenizer.train(["a red star"] * 3, 300, ["en"])
    ImageCaptioner(captioner, tokenizer, ImageTransform(16), device="cpu").save_pretrained(tmp_path / "captioner")
    code, _, err = mmt(capsys, "search", "red", "--images", "photos", "--model", str(tmp_path / "captioner"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "VisionEncoderDecoder" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "there is nothing to look for: give a TEXT, --like IMAGE or --duplicates"),
        (("--not", "red"), "--not takes off what is looked for, and nothing is"),
        ((" ",), "a text is empty"),
        (("red", "--not", ""), "a text is empty"),
        (("red", "--duplicates"), "leave out TEXT, --like and --not"),
        (("red", "--threshold", "0.9"), "--threshold says how near duplicates are: it goes with --duplicates"),
        (("--duplicates", "--threshold", "0"), "--threshold must be above 0 and at most 1, not 0"),
        (("--duplicates", "--threshold", "nan"), "not nan"),
        (("red", "--top-k", "0"), "--top-k must be a whole number, at least 1, not 0"),
        (("red", "--batch-size", "0"), "--batch-size must be a whole number, at least 1, not 0"),
        (("red", "--out", "a.pdf"), "--out a.pdf: the answer is a page or a picture"),
        (("red", "--out", "folder.html"), "--out folder.html is a folder"),
        (("red", "--index-file", "a.npy"), "--index-file a.npy: an index is a safetensors file"),
        (("red", "--index-file", "folder.safetensors"), "--index-file folder.safetensors is a folder"),
        (("--like", "missing.png"), "missing.png: cannot be read (No such file or directory)"),
        (("--like", "photos/cut.png"), "photos/cut.png: damaged PNG"),
        (("red", "--images", "empty"), "empty: no pictures there"),
        (("red", "--images", "missing"), "missing: cannot be read (No such file or directory)"),
        (("red", "--images", "*.gif"), "no file fits this pattern"),
        (("red", "--images", "photos/cut.png"), "photos/cut.png: damaged PNG"),
        (("red", "--index-file", "missing.safetensors"), "missing.safetensors: no such index; add --images FOLDER"),
        (("red", "--index-file", "text.safetensors"), "text.safetensors: cut short, or no safetensors file"),
        (("red", "--images", "a.safetensors"), "--images a.safetensors is an index, which knows its pictures: give it"),
        (("red", "--index", "photos"), 'did you mean "--images"?'),
        (("red", "--images", "photos", "--no-update"), "--no-update: there is no index of photos by this model yet"),
        (("red", "--images", "photos", "--device", "warp"), "device warp is unknown to torch"),
        (("red", "--images", "photos", "--model", "nowhere/at/all"), "nowhere/at/all: no such folder"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    words: tuple[str, ...], said: str, model: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("empty", "folder.html", "folder.safetensors"):
        Path(folder).mkdir()
    Path("text.safetensors").write_text("no index")
    images = () if {"--images", "--index-file"} & {*words} else ("--images", "photos")
    code, out, err = mmt(capsys, "search", *images, *(() if "--model" in words else ("--model", model)), *words)
    assert (code, out) == (2, ""), err
    assert said in err
    assert len([line for line in err.splitlines() if line.startswith("mmt search: error: ")]) == 1
    assert not Path("cache/mmtransformer/search").exists() or not list(Path("cache/mmtransformer/search").iterdir())


def test_a_search_without_a_place_is_refused(model: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = mmt(capsys, "search", "red", "--model", model)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "say where to look: --images PLACE, or --index-file FILE" in err


def test_what_is_wrong_is_said_once(model: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for places in (("photos/cut.png",), ("photos/cut.png", "photos/cut.png")):
        images = [word for place in places for word in ("--images", place)]
        code, out, err = mmt(capsys, "search", "red", *images, "--model", model)
        assert (code, out) == (2, "")
        assert err.count("cut.png") == 1, err
        assert err.splitlines()[-1] == "mmt search: error: not one of 1 picture can be used"
    code, _, err = mmt(capsys, "search", "--like", "photos/cut.png", "--images", "photos", "--model", model)
    assert code == 2
    assert err.count("cut.png") == 1, err
