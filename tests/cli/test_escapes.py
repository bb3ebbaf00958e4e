"""What a file, a caption or a folder is called is never obeyed: not by a terminal, a page or a model card."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from torch import nn

from mmtransformer import ImageGenerationConfig
from mmtransformer.cli import main
from mmtransformer.pipelines.base import write_card
from mmtransformer.plots import Card, CardCaption, save_html_gallery
from mmtransformer.serialization.printable import fenced, json_text, markup

BAD = "서울\x1b[2J\x9b31m\u202e<script>alert(1)</script>"
SHOWN = r"서울\x1b[2J\x9b31m\u202e<script>alert(1)</script>"
FILE = "그림\x1b[2J\u202e.png"
PACKAGE = Path(__file__).parents[2] / "mmtransformer"


def mmt(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    assert not re.search("[\x1b\x9b\u202e]", out + err)
    return code, out, err


def test_nothing_is_written_to_a_terminal_past_the_one_function() -> None:
    """`print` is refused by the linter; here what writes to the two streams itself."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for line in re.findall(r"(?:std(?:out|err)|bar|tqdm)\.write\((?!printable).*", path.read_text("utf-8")):
            found.add((path.name, line.partition(".")[2][:30]))
    assert {name for name, _ in found} == {"saving.py", "progress.py", "base.py"}, found


def test_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mmtransformer import ImageCaptioner, ImageClassifier, ImageGenerator, Translator
    from mmtransformer.cli import plan

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(FILE)
    names = ["--model", "m"]

    def stand_in(door: Any, model: Any) -> None:
        monkeypatch.setattr(door, "from_pretrained", lambda *_, **__: model)

    stand_in(Translator, lambda texts, *_, **__: [BAD for _ in texts])
    assert mmt(capsys, "translate", "a", "--language", "ko", *names)[1] == f"{SHOWN}\n"
    out = mmt(capsys, "translate", BAD, "--language", "ko", "--json", *names)[1]
    assert json.loads(out) == {"text": BAD, "language": "ko", "translation": BAD}

    class Classifier:
        def stream(self, things: Any, load: Any, **_: Any) -> Any:
            return ((thing, [(BAD, 0.5)]) for thing in things)

    stand_in(ImageClassifier, Classifier())
    Image.new("RGB", (8, 8)).save("b.png")
    out = mmt(capsys, "classify", FILE, "b.png", *names)[1]
    assert out.splitlines() == [rf"그림\x1b[2J\u202e.png: {SHOWN} 50.0%", f"b.png: {SHOWN} 50.0%"]
    assert json.loads(mmt(capsys, "classify", FILE, "--json", *names)[1])["image"] == FILE

    class Painter:
        generation = ImageGenerationConfig()

        def __call__(self, *_: Any, **__: Any) -> list[list[Image.Image]]:
            return [[Image.new("RGB", (8, 8))]]

    stand_in(ImageGenerator, Painter())
    assert mmt(capsys, "draw", "a", "--out", f"new{FILE}", *names)[1] == "new그림\\x1b[2J\\u202e.png\n"
    stand_in(ImageCaptioner, SimpleNamespace(processor=None, model=None, tokenizer=None, transform=None))
    monkeypatch.setattr("mmtransformer.weights.captioner_folders.export_captioner", lambda *_, **__: "blip")
    assert mmt(capsys, "export", "m", FILE[:-4])[1].startswith("그림\\x1b[2J\\u202e: a blip, as ")
    monkeypatch.setattr(plan, "plan", lambda words: (SimpleNamespace(table=lambda *_: BAD), 1, "pictures"))
    assert mmt(capsys, "plan", "caption_scenes")[1] == f"{SHOWN}\n"


@pytest.mark.parametrize(
    "words",
    [
        (BAD,),
        ("check", FILE),
        ("evaluate", "--model", FILE, "--data", FILE),
        ("search", FILE, "--model", FILE, "--images", FILE),
        ("draw", "a", "--model", FILE),
        ("translate", "a", "--language", "ko", "--model", FILE),
        ("classify", FILE, "--model", FILE),
        ("export", FILE, "out"),
        ("rehash", FILE),
        ("fit", "--config", FILE),
        ("plan", FILE),
        ("caption", "x", "--model", "m", "--no\x1b[2J"),
    ],
    ids=lambda words: words[0][:8] if words[0].isascii() else "no such command",
)
def test_errors(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    try:
        code = main(words)
    except SystemExit as stop:  # of the parser
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert not re.search("[\x1b\x9b\u202e]", out + err)
    assert r"\x1b[2J" in err


def test_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    from mmtransformer.cli import search

    args: Any = SimpleNamespace(json=False, out=None, top_k=9, threshold=0.9)
    match: Any = SimpleNamespace(path=BAD, score=0.5, exact=True)
    index: Any = ()
    search._show_found(index, [match], args)
    search._show_groups(index, [[match]], args)
    assert capsys.readouterr().out == f"0.500  {SHOWN}\n0.500  {SHOWN}  (same bytes)\n"
    args.json = True
    search._show_found(index, [match], args)
    out = capsys.readouterr().out
    assert json.loads(out)["image"] == BAD
    assert not re.search("[\x1b\x9b\u202e]", out)


def test_a_gallery_and_a_model_card(tmp_path: Path) -> None:
    said = CardCaption(BAD, "ko", [BAD], facts=[(BAD, True)])
    page = save_html_gallery([Card(Image.new("RGB", (8, 8)), [said], heading=BAD)], tmp_path / "a.html", title=BAD)
    text = page.read_text("utf-8")
    assert not re.search("[\x1b\x9b\u202e]", text)
    assert text.count("<script>") == 1
    folder = tmp_path / 'run`\n```\n<script>"\x1b' / 'model"`'
    for place in (folder.parent / "model", folder):
        place.mkdir(parents=True)
        scores = fenced("```\n<script>")
        write_card(place, nn.Linear(1, 1), task="x", about="A", usage='load("FOLDER")', note=scores)
        card = (place / "README.md").read_text("utf-8")
        assert card.count("\n```") == 4  # two blocks
        blocks = re.split("(?m)^```.*$", card)
        assert all("<script" not in text for text in blocks[::2])
        assert "\x1b" not in card
        code = compile(blocks[1], "card", "exec")
        called: list[str] = []
        exec(code, {"load": called.append})
        assert called == [place.name]


def test_as_json_and_as_markup() -> None:
    assert json.loads(json_text({BAD: "한글"})) == {BAD: "한글"}
    assert "한글" in json_text("한글")
    assert markup("a\n# `b` & <i>") == "a # &#96;b&#96; &amp; &lt;i&gt;"
