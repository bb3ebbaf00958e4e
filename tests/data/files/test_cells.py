"""Cells that hold several captions: lists as data frames, numpy and JSON write them into one text."""

import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmtransformer.data.check import check
from mmtransformer.data.files.cells import LISTED, as_list, read_captions
from mmtransformer.data.pairs import PairFiles


def texts(value: object) -> list[str]:
    return [caption.text for caption in read_captions(value, None, "x", [])]


@pytest.mark.parametrize(
    ("cell", "wanted"),
    [
        ("['a dog', 'a cat']", ["a dog", "a cat"]),
        ('["a dog", "a cat"]', ["a dog", "a cat"]),
        ("""["a dog's ball", 'a "cat"']""", ["a dog's ball", 'a "cat"']),
        ("['a dog' 'a cat']", ["a dog", "a cat"]),  # numpy: Python itself would join them
        ("['a dog'\n 'a cat']", ["a dog", "a cat"]),
        ("array(['a dog', 'a cat'], dtype=object)", ["a dog", "a cat"]),
        ("[np.str_('a dog'), np.str_('a cat')]", ["a dog", "a cat"]),
        ("('a dog', 'a cat')", ["a dog", "a cat"]),
        ("('a dog',)", ["a dog"]),
        ("['a dog']", ["a dog"]),
        ("['a dog', None, nan]", ["a dog"]),
        ('["a dog", null]', ["a dog"]),
        (r"['it\'s a dog', 'tab\there', '\uac1c', 'a \d']", ["it's a dog", "tab here", "개", "a d"]),
        ("[{'raw': 'a dog', 'id': 3}, {'raw': 'a cat'}]", ["a dog", "a cat"]),
        ("{'en': 'a dog', 'ko': '개'}", ["a dog", "개"]),
        ('{"caption": "a dog"}', ["a dog"]),
        ("[['a dog'], ['a cat']]", ["a dog", "a cat"]),
    ],
)
def test_lists_as_text_are_read(cell: str, wanted: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if cell.startswith("[["):
            cell = cell.replace("'", '"')
        assert texts(cell) == wanted


@pytest.mark.parametrize(
    "text",
    ["[laughs]", "(a dog)", "('a dog')", "[1, 2]", "a dog (left) and [right]", "['a dog", "[]", "{}", "['a' + 'b']",
     "{a dog}", "array of dogs]", "[__import__('os')]", "[" * 900 + "]" * 900, "{" + "[" * 300 + "]" * 300 + "}"],
)  # fmt: skip
def test_what_only_looks_like_a_list_is_a_text(text: str) -> None:
    assert as_list(text) is None
    assert texts(text) == [text]


@given(st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1), min_size=1, max_size=4))
def test_python_and_json_lists_come_back(items: list[str]) -> None:
    assert as_list(repr(items)) == items
    assert as_list(json.dumps(items)) == items


@given(st.text("[]{}()'\", \\:abn1", max_size=40))
def test_no_text_breaks_it(text: str) -> None:
    as_list(text)
    assert as_list(f"[{text}]") != []


def test_long_cells_cost_little() -> None:
    for cell in ("['" + "a\\'" * 50_000 + "]", "[" + "'a' " * 50_000 + "x]", "(" + "'a'," * 50_000 + "x)"):
        assert as_list(cell) is None


def test_it_is_said(tmp_path: Path) -> None:
    rows = ["image,captions"]
    for i in range(7):
        Image.new("RGB", (20, 20), (30 * i, 200 - 30 * i, 99)).save(tmp_path / f"{i}.jpg")
        rows.append(f"{i}.jpg,\"['a dog {i}', 'an animal {i}']\"")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    source = PairFiles(tmp_path)
    assert "7 pictures, 14 captions" in source.describe()
    assert f"{LISTED}: 7" in str(check(tmp_path, progress=False))


def test_nan_in_json_is_no_caption(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "0.jpg")
    (tmp_path / "c.json").write_text('[{"image": "0.jpg", "caption": "a dog"}, {"image": "1.jpg", "caption": NaN}]')
    assert PairFiles(tmp_path, max_bad_fraction=1).report.errors == {"empty caption": 1}
