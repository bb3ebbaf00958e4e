"""The page of a search: what is shown, in which order, and that strangers' names do nothing."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from mmtransformer.plots.search_page import Found, save_search_page

NASTY = '빨강 "><script>alert(1)</script>&\u202e.jpg'


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def some(count: int, **more) -> list[Found]:
    return [Found(Image.new("RGB", (60, 40), (20 * i, 0, 0)), f"{i}.jpg", 1 - i / 20, **more) for i in range(count)]


def test_the_page_shows_what_was_found(tmp_path: Path) -> None:
    found = [*some(9), Found(None, NASTY, 0.125, "a%20b.jpg", "same bytes")]
    asked = [Image.new("RGB", (30, 50), "blue")]
    path = save_search_page(
        [found], tmp_path / "page.html", title=NASTY, chips=[("without 사람", "bad")], asked=asked, hint="10 <pictures>"
    )
    source = path.read_text("utf-8")
    page = Tags(source)
    assert [data for data in page.text if re.fullmatch(r"\d+", data)] == [str(i) for i in range(1, 11)]
    assert "0.950" in page.text
    assert "0.125" in page.text
    assert page.text.count(NASTY.replace("\u202e", r"\u202e")) == 3, "title, heading and name"
    assert {"without 사람", "10 <pictures>", "same bytes", "cannot be shown"} <= set(page.text)
    assert len(page.all("script")) == 1
    assert "script-src 'sha256-" in str(page.all("meta"))
    assert [link["href"] for link in page.all("a")] == ["a%20b.jpg"]
    images = page.all("img")
    assert len(images) == 10
    assert [image.get("loading") for image in images].count("lazy") == 3, "the first rows are there at once"
    shown = [Image.open(io.BytesIO(base64.b64decode(str(image["src"]).partition(",")[2]))) for image in images]
    assert shown[0].size == (30, 50)
    reds = [np.asarray(image.convert("RGB"))[9, 9, 0] for image in shown[1:]]
    assert np.abs(reds - 20 * np.arange(9.0)).max() < 5
    assert "MMT Hangul" in source
    assert "http" not in re.sub(r"http-equiv", "", source)


def test_groups_stand_apart(tmp_path: Path) -> None:
    path = save_search_page([some(2), some(3)], tmp_path / "page.html", title="Near duplicates")
    page = Tags(path.read_text("utf-8"))
    assert [tag["class"] for tag in page.all("section")] == ["group", "group"]
    assert {"1 · 2 pictures", "2 · 3 pictures"} <= set(page.text)


def test_nothing_found_is_a_page_too(tmp_path: Path) -> None:
    for groups in ([], [[]]):
        source = save_search_page(groups, tmp_path / "page.html", title="Near duplicates").read_text("utf-8")
        assert "<form" not in source
        assert "<figure" not in source
        assert "Nothing was found." in source
