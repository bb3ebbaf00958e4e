"""Pictures: fonts that cover Korean, galleries, heat maps, the HTML page, training curves."""

import hashlib
import html.parser
import io
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from mmtransformer.plots import (
    Card,
    CardCaption,
    curves,
    fonts,
    grid_box,
    heatmap,
    html_gallery,
    overlay,
    plot_gallery,
    plot_word_heatmaps,
    save_html_gallery,
    save_image,
    save_loss_curves,
    text,
)

KOREAN = "작은 빨간 별 세 개가 파란 원의 왼쪽에 있습니다."
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> &amp; \u202eevil\u0000 \ud800"
STYLE = text.Style(17)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without fonts of its own."""
    monkeypatch.setattr(fonts, "system_fonts", lambda: ())
    fonts.face_of.cache_clear()
    text.runs.cache_clear()
    yield
    fonts.face_of.cache_clear()
    text.runs.cache_clear()


def scene(size: tuple[int, int] = (97, 61)) -> Image.Image:
    image = Image.new("RGB", size, (250, 240, 220))
    ImageDraw.Draw(image).ellipse((11, 13, 47, 53), fill=(200, 40, 40))
    return image


def saved(cards: Sequence[Card], path: Path, **options: Any) -> Path:
    return save_image(plot_gallery(cards, **options), path)


def ink(line: str, size: int = 31) -> np.ndarray:
    image = Image.new("RGB", (round(text.width(line, text.Style(size))) + 20, 60), "white")
    text.draw(ImageDraw.Draw(image), (5, 5), line, text.Style(size, (0, 0, 0)))
    return 255 - np.asarray(image)[..., 0].astype(int)


# fonts


def test_embedded_font_has_every_syllable_and_a_name_of_its_own() -> None:
    points = fonts.coverage(fonts.EMBEDDED)
    assert set(range(0xAC00, 0xD7A4)) <= points
    assert set(range(0x3131, 0x3164)) <= points  # single jamo
    assert set(range(0x20, 0x7F)) <= points
    assert fonts.EMBEDDED.stat().st_size < 2_000_000
    data = fonts.EMBEDDED.read_bytes()
    assert ImageFont.truetype(fonts.EMBEDDED).getname() == ("MMT Hangul", "Regular")
    assert "Nanum".encode("utf-16-be") not in data  # reserved by the licence
    assert "NHN Corporation".encode("utf-16-be") in data
    licence = fonts.EMBEDDED.with_name("mmt-hangul-OFL.txt").read_text(encoding="utf-8")
    assert "SIL OPEN FONT LICENSE Version 1.1" in licence
    assert "Reserved Font Name Nanum" in licence


def test_korean_is_drawn_by_the_embedded_font_on_a_bare_machine(bare: None) -> None:
    assert fonts.font(20, KOREAN).path == str(fonts.EMBEDDED)
    assert fonts.missing(KOREAN) == []
    shapes = {ink(c).tobytes() for c in "빨간별원"}
    assert len(shapes) == 4  # boxes would all look alike


def test_decomposed_korean_is_drawn_as_composed() -> None:
    apart = unicodedata.normalize("NFD", KOREAN)
    assert len(apart) > len(KOREAN)
    assert np.array_equal(ink(apart), ink(KOREAN))


def test_accents_come_from_the_font_that_is_always_there(bare: None) -> None:
    line = "São Paulo, größerer Ärger"
    assert fonts.missing(line) == []
    assert fonts.font(20, line).path == str(fonts.dejavu())
    assert [run for run, _ in text.runs(line, 20)] == [line]  # one font for the whole line


def test_mixed_text_changes_font_between_words(bare: None) -> None:
    found = text.runs("빨간 Ärger 별", 20)
    assert "".join(run for run, _ in found) == "빨간 Ärger 별"
    assert [Path(str(face.path)).name for _, face in found] == ["mmt-hangul.ttf", "DejaVuSans.ttf", "mmt-hangul.ttf"]


def test_what_no_font_has_is_spelt_out(bare: None) -> None:
    assert fonts.missing("犬 a 猫 🐶") == ["犬", "猫", "🐶"]
    assert fonts.spelt("犬猫 빨간 🐶🍕") == "[U+72AC 732B] 빨간 :dog face: :slice of pizza:"
    assert "".join(run for run, _ in text.runs("犬", 20)) == "[U+72AC]"


def test_a_font_of_the_machine_is_used_for_what_the_others_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    other = tmp_path / "own.ttf"
    other.write_bytes(fonts.EMBEDDED.read_bytes())
    asked = ord("犬")
    real = fonts.coverage
    monkeypatch.setattr(fonts, "system_fonts", lambda: (tmp_path / "damaged.ttf", other))
    monkeypatch.setattr(fonts, "coverage", lambda p: real(p) | {asked} if p == other else real(p))
    fonts.face_of.cache_clear()
    assert fonts.font(20, "犬").path == str(other)
    assert fonts.missing("犬") == []
    fonts.face_of.cache_clear()


@pytest.mark.parametrize(
    "line",
    ["", " ", "\n\t", HOSTILE, "مرحبا بالعالم", "हिन्दी ไทย", "👨‍👩‍👧‍👦🇰🇷", "\u0301\u0301", "a" * 5000, "\U000e0001"],
)
def test_no_text_crashes(line: str, tmp_path: Path) -> None:
    said = CardCaption(line, line or None, [line], facts=[(line, False)])
    saved([Card(scene(), [said], line)], tmp_path / "sheet.png", title=line, subtitle=line)
    save_html_gallery([Card(scene(), [said], line)], tmp_path / "html_gallery.html", title=line, metrics={line: line})


# wrapping


def test_lines_fit_and_nothing_is_lost() -> None:
    for line in (KOREAN * 3, "a striped triangle inside a dotted square " * 3, "띄어쓰기없이" * 19, "x" * 257):
        wrapped = text.wrap(line, STYLE, 131)
        assert all(text.width(part, STYLE) <= 131 for part in wrapped)
        assert "".join(wrapped).replace(" ", "") == line.replace(" ", "")


def test_korean_breaks_at_spaces_when_it_can() -> None:
    wrapped = text.wrap(KOREAN, STYLE, 131)
    assert len(wrapped) > 1
    assert " ".join(wrapped) == KOREAN


def test_marks_stay_with_their_letter() -> None:
    assert text.clusters("q\u0301e") == ["q\u0301", "e"]


def test_cut_text_ends_in_dots() -> None:
    wrapped = text.wrap(KOREAN * 5, STYLE, 131, max_lines=3)
    assert len(wrapped) == 3
    assert wrapped[-1].endswith("…")
    assert text.width(wrapped[-1], STYLE) <= 131
    assert text.wrap("short", STYLE, 131, max_lines=1) == ["short"]


def test_bold_is_darker() -> None:
    plain, bold = (np.zeros((60, 300)) for _ in range(2))
    for target, heavy in ((plain, False), (bold, True)):
        image = Image.new("L", (300, 60), 0)
        canvas = ImageDraw.Draw(image)
        canvas.fontmode = "L"
        colour = Image.new("RGB", (300, 60))
        text.draw(ImageDraw.Draw(colour), (5, 5), "빨간 별", text.Style(23, (255, 255, 255), bold=heavy))
        target[:] = np.asarray(colour)[..., 0]
    assert bold.sum() > 1.1 * plain.sum()


# gallery


def cards(n: int = 5) -> list[Card]:
    grids = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(7))
    return [
        Card(
            scene((97 + 10 * i, 61)),
            [
                CardCaption("a red circle", "en", ["the circle is red"], -0.43, [("red circle", True)]),
                CardCaption(
                    "빨간 원", "ko", ["원이 빨갛다"] * 5, facts=[("파란 원", False)], words=["빨간", "원"], heat=grids
                ),
            ],
            f"scene-{i}",
        )
        for i in range(n)
    ]


def test_gallery_is_the_same_bytes_every_time_and_makes_its_folder(tmp_path: Path) -> None:
    first = saved(cards(), tmp_path / "new/folder/a.png", columns=3, title="장면", subtitle="facts 0.97")
    second = saved(cards(), tmp_path / "b.png", columns=3, title="장면", subtitle="facts 0.97")
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as sheet:
        assert sheet.width == 2 * 36 + 3 * 360 + 2 * 22
    assert sorted(p.name for p in first.parent.iterdir()) == ["a.png"]  # no litter


def test_gallery_shows_the_image_itself(tmp_path: Path) -> None:
    blue = Image.new("RGB", (50, 50), (7, 31, 211))
    path = saved([Card(blue, [CardCaption("a")])], tmp_path / "a.png")
    with Image.open(path) as sheet:
        assert sheet.getpixel((36 + 180, 36 + 180)) == (7, 31, 211)


def test_right_and_wrong_look_different() -> None:
    from mmtransformer.plots.gallery import BAD_TINT, GOOD_TINT

    def tints(ok: bool) -> set[tuple[int, ...]]:
        sheet = plot_gallery([Card(scene(), [CardCaption("a", facts=[("red", ok)])])])
        return {tuple(c) for c in np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)}

    assert GOOD_TINT in tints(True) - tints(False)
    assert BAD_TINT in tints(False) - tints(True)


def test_wrong_facts_beyond_a_few_are_counted() -> None:
    facts = [("right", True), *((f"wrong {i}", False) for i in range(11))]
    told = [text for text, _ in CardCaption("a", facts=facts).marks()]
    assert told == ["✗ 1/12 facts", *(f"✗ wrong {i}" for i in range(8)), "+ 3 more"]
    assert [text for text, _ in CardCaption("a", facts=facts[:9]).marks()][-1] == "✗ wrong 7"


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_gallery_in_other_formats(tmp_path: Path, suffix: str) -> None:
    with Image.open(saved(cards(2), tmp_path / f"a{suffix}")) as sheet:
        assert sheet.format in ("JPEG", "WEBP")


def test_gallery_refuses_by_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one card"):
        saved([], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.bmp: a picture can be written as .png"):
        saved(cards(1), tmp_path / "a.bmp")
    with pytest.raises(ValueError, match="columns must be at least 1, not 0"):
        saved(cards(1), tmp_path / "a.png", columns=0)
    with pytest.raises(ValueError, match=r"131 cards make a sheet \d+ px high \(at most 60000\)"):
        saved([Card(scene((10, 50)), [CardCaption("a")])] * 131, tmp_path / "a.png", columns=1)
    with pytest.raises(ValueError, match="is a folder"):
        saved(cards(1), _folder(tmp_path / "folder.png"))


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_extreme_images(tmp_path: Path) -> None:
    for size in ((1, 1), (3000, 2), (2, 3000)):
        image = Image.new("RGB", size, "red")
        saved([Card(image, [CardCaption("a")])], tmp_path / "a.png")
        plot_word_heatmaps(image, ["a"], torch.ones(1, 2, 3))
        save_html_gallery([Card(image, [CardCaption("a")])], tmp_path / "a.html", title="t")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(cards(1), tmp_path / "a.png")
    old = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        saved(cards(2), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


# heat maps


def test_heat_is_bright_where_the_model_looked() -> None:
    grey = Image.new("RGB", (70, 50), (90, 90, 90))
    heat = torch.zeros(5, 7)
    heat[1, 5] = 0.3
    warm = np.asarray(overlay(grey, heat)).astype(int)
    bright = warm.sum(axis=2)
    y, x = np.unravel_index(bright.argmax(), bright.shape)
    assert (y // 10, x // 10) == (1, 5)
    assert bright[45, 5] == bright.min()


def test_heat_lies_in_its_box() -> None:
    grey = Image.new("RGB", (100, 40), (90, 90, 90))
    warm = np.asarray(overlay(grey, torch.ones(2, 2), box=(0.3, 0.0, 0.7, 1.0))).astype(int)
    hot = warm[20] != warm[20, 0]
    assert hot.any(axis=1).nonzero()[0].tolist() == list(range(30, 70))


def test_grid_box() -> None:
    assert grid_box((200, 100), (64, 64), "squash") == (0, 0, 1, 1)
    assert grid_box((200, 100), (64, 64), "crop") == pytest.approx((0.25, 0, 0.75, 1))
    assert grid_box((200, 100), (64, 64), "letterbox") == pytest.approx((0, -0.5, 1, 1.5))
    assert grid_box((200, 100), (32, 64), "letterbox") == pytest.approx((0, 0, 1, 1))
    with pytest.raises(ValueError, match="not 'stretch'"):
        grid_box((200, 100), (64, 64), "stretch")


def test_words_share_one_scale() -> None:
    heat = torch.zeros(2, 3, 5)
    heat[0, 1, 1], heat[1, 1, 1] = 0.8, 0.1
    grey = Image.new("RGB", (100, 60), (90, 90, 90))
    sheet = np.asarray(plot_word_heatmaps(grey, ["강한", "weak"], heat, panel=100)).astype(int)
    where = [24 + 30 + i * (100 + 14) for i in range(3)]
    bare_, strong, weak = (sheet[24 + 30, x].sum() for x in where)
    assert bare_ == 270
    assert strong > weak + 100


def test_heat_takes_bf16_and_gradients_and_silence() -> None:
    heat = torch.zeros(1, 3, 5, dtype=torch.bfloat16, requires_grad=True)
    plot_word_heatmaps(scene(), ["a"], heat)  # no heat at all: no division by zero


def test_heat_refuses_by_number() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3, 5\) does not fit 3 words"):
        plot_word_heatmaps(scene(), ["a", "b", "c"], torch.ones(2, 3, 5))
    with pytest.raises(ValueError, match=r"smallest value is -0\.25"):
        overlay(scene(), torch.full((3, 5), -0.25))
    with pytest.raises(ValueError, match="15 values that are not finite"):
        overlay(scene(), np.full((3, 5), math.nan))
    with pytest.raises(ValueError, match=r"heat of shape \(2, 3, 5\) does not fit 1 words"):
        CardCaption("a", words=["a"], heat=torch.ones(2, 3, 5))
    with pytest.raises(ValueError, match="references must be a list"):
        CardCaption("a", references="the reference")


# the page


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_is_self_contained_and_the_same_every_time(tmp_path: Path) -> None:
    metrics = {"facts": {"en": 0.973, "ko": (0.951, 0.94, 0.96)}, "METEOR": {"en": None}, "images": 1200}
    first = save_html_gallery(cards(), tmp_path / "new/a.html", title="장면", metrics=metrics).read_bytes()
    assert first == save_html_gallery(cards(), tmp_path / "b.html", title="장면", metrics=metrics).read_bytes()
    source = first.decode("utf-8")
    outside = re.findall(r"(?:src|href|url\()\s*=?\s*[\"']?(?!data:)(?:https?:|//|\w+\.)[^\"')]*", source)
    assert outside == []
    reader = Reader(source)
    assert sum(tag == "img" and str(a["src"]).startswith("data:image/webp;base64,") for tag, a in reader.tags) == 5
    assert {a.get("lang") for tag, a in reader.tags if tag == "p"} >= {"en", "ko"}
    told = " ".join(reader.words)
    for figure in ("0.973", "0.951", "[0.940, 0.960]", "not computed", "1,200", "빨간", "원이 빨갛다"):
        assert figure in told


def test_captions_are_strangers(tmp_path: Path) -> None:
    said = CardCaption(HOSTILE, '"><script>', [HOSTILE], facts=[(HOSTILE, False)])
    heated = CardCaption(HOSTILE, "ko", words=[HOSTILE], heat=torch.ones(1, 2, 3))
    card = Card(scene(), [said, heated], HOSTILE)
    metrics = {HOSTILE: {HOSTILE: HOSTILE}}
    path = save_html_gallery([card], tmp_path / "a.html", title=HOSTILE, metrics=metrics)
    source = path.read_text(encoding="utf-8")
    reader = Reader(source)
    assert [tag for tag, _ in reader.tags].count("script") == 1  # ours
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert sum(tag == "img" for tag, _ in reader.tags) == 1
    assert "\u202e" not in source
    assert "alert('x')" in " ".join(reader.words)  # shown, not run


def test_policy_lets_only_the_page_s_own_script_run(tmp_path: Path) -> None:
    import base64

    source = save_html_gallery(cards(1), tmp_path / "a.html", title="t").read_text(encoding="utf-8")
    script = source.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in source
    assert "default-src 'none'" in source


def test_heat_reaches_the_page_to_a_byte(tmp_path: Path) -> None:
    import base64

    card = cards(1)[0]
    source = save_html_gallery([card], tmp_path / "a.html", title="t").read_text(encoding="utf-8")
    (said,) = [a for tag, a in Reader(source).tags if "data-heat" in a]
    assert said["data-grid"] == "3 5 0 0 1 1"
    grid = np.frombuffer(base64.b64decode(str(said["data-heat"])), np.uint8).reshape(2, 3, 5) / 255
    heat = card.captions[1].heat
    assert heat is not None
    top = heatmap.heat_top(heat.double().numpy())
    assert np.abs(grid - np.clip(heat.numpy() / top, 0, 1)).max() <= 0.5 / 255 + 1e-6


def test_page_stays_small_and_carries_the_korean_it_needs(tmp_path: Path) -> None:
    from fontTools.ttLib import TTFont

    noise = np.random.default_rng(3).integers(0, 255, (15, 20, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
    path = save_html_gallery([Card(photo, cards(1)[0].captions)] * 5, tmp_path / "a.html", title="t")
    assert path.stat().st_size < 400_000
    face = TTFont(io.BytesIO(fonts.subset("빨간 원 犬")))
    assert set(face.getBestCmap()) == {ord(c) for c in "빨간원"}


def test_images_are_embedded_whole() -> None:
    import base64

    drawing = scene()
    data = base64.b64decode(html_gallery.encode_image(drawing, 448).split(",")[1])
    with Image.open(io.BytesIO(data)) as back:
        assert np.array_equal(np.asarray(back.convert("RGB")), np.asarray(drawing))  # small ones stay lossless
    big = Image.new("RGB", (1000, 500), "red")
    data = base64.b64decode(html_gallery.encode_image(big, 448).split(",")[1])
    assert Image.open(io.BytesIO(data)).size == (448, 224)
    assert big.size == (1000, 500)  # the caller's picture is left alone


# curves

LOG = """epoch,lr-AdamW,step,train/loss,val/facts/en,val/facts/ko,val/loss
0,,0,3.5,,,
,0.001,1,,,,
0,,1,nan,,,
0,,2,2.5,,
0,,3,,0.25,0.125,2.75
1,,5,1.5,,,,
1,,7,inf,0.75,0.5,1.25
"""


def test_log_is_read_with_holes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(LOG)
    series, epochs = curves.read_log(path)
    assert series["train/loss"] == [(0, 3.5), (2, 2.5), (5, 1.5)]
    assert series["val/facts/ko"] == [(3, 0.125), (7, 0.5)]
    assert series["lr-AdamW"] == [(1, 0.001)]
    assert epochs[-1] == (7, 1)
    assert curves.group(series) == {
        "loss": ["train/loss", "val/loss"],
        "facts": ["val/facts/en", "val/facts/ko"],
        "learning rate": ["lr-AdamW"],
    }


def test_columns_find_their_panels() -> None:
    names = [
        "train_loss_step",
        "val_loss",
        "compositional/loss",
        "val_bleu4",
        "compositional/facts/ko",
        "val/facts/ko",
        "lr-group/pg1",
        "val/loss_blank_image",
        "val/loss_right_image",
        "seconds",
        "lr",
    ]
    assert list(curves.group({name: [] for name in names}).items()) == [
        ("loss", ["compositional/loss", "train_loss_step", "val_loss"]),
        ("is the picture used?", ["val/loss_blank_image", "val/loss_right_image"]),
        ("bleu4", ["val_bleu4"]),
        ("facts", ["compositional/facts/ko", "val/facts/ko"]),
        ("seconds", ["seconds"]),
        ("learning rate", ["lr", "lr-group/pg1"]),
    ]


def test_curves_are_drawn_without_pyplot_and_the_same_every_time(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    path = tmp_path / "metrics.csv"
    path.write_text(LOG)
    first = save_loss_curves(path, tmp_path / "new/c.png", title="장면 학습 $x_1 犬").read_bytes()
    assert first == save_loss_curves(path, tmp_path / "d.png", title="장면 학습 $x_1 犬").read_bytes()
    assert dict(matplotlib.rcParams) == before
    with Image.open(io.BytesIO(first)) as image:
        assert image.width > 1000


def test_smoothing_keeps_a_straight_line_and_calms_noise() -> None:
    assert curves._smooth([2.0] * 101) == pytest.approx([2.0] * 101)
    noise = np.random.default_rng(5).normal(size=997).tolist()
    assert np.std(curves._smooth(noise)) < 0.4


def test_curves_refuse_by_name(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    with pytest.raises(ValueError, match=r"metrics.csv: no such file"):
        save_loss_curves(path, tmp_path / "c.png")
    path.write_text("epoch,loss\n0,1\n")
    with pytest.raises(ValueError, match="no column 'step' among \\['epoch', 'loss'\\]"):
        save_loss_curves(path, tmp_path / "c.png")
    path.write_text("step,loss\n0,nan\n")
    with pytest.raises(ValueError, match="no number to draw"):
        save_loss_curves(path, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_the_page_begins_with_its_pictures_and_can_be_searched_and_sorted(tmp_path: Path) -> None:
    said = [CardCaption("a dog", score=-0.5), CardCaption("a cat", facts=[("red", True), ("big", False)], score=-9)]
    some = [Card(scene(), [said[0]], "one"), Card(scene(), said, "two"), Card(scene(), [CardCaption("?")], "three")]
    path = save_html_gallery(some, tmp_path / "a.html", title="t", metrics={"BLEU-4": "21.3"}, hint="say `mmt`")
    source = path.read_text("utf-8")
    body = source[source.index("<body") :]
    assert body.index("<form") < body.index("<main") < body.index("say <code>mmt") < body.index("<table")
    assert body.count('loading="lazy"') == 3
    assert re.findall(r"<article(.*)>", body) == [' data-rank="-0.5000"', ' data-rank="0.0000"', ""]
    assert 'class="controls" hidden' in body  # until a script is there to serve it
    for word in ("data-rank", "prefers-color-scheme: dark", "max-width: 40rem"):
        assert word.removeprefix("data-") in source
    assert "<form" not in save_html_gallery(some[:1], tmp_path / "b.html", title="t").read_text("utf-8")
