"""Captions with HTML in them as plain text."""

import pytest

from mmtransformer.text.markup import find_markup, strip_markup


@pytest.mark.parametrize(
    ("markup", "plain", "sign"),
    [
        ("Tom &amp; Jerry&#39;s<br>", "Tom & Jerry's", "&amp;"),
        ("a &amp;quot;b&amp;quot;", 'a "b"', "&amp;quot;"),
        ("& quot ; hi & quot ;", '" hi "', "& quot ;"),
        ("&nbsp;a&nbsp;dog", "a dog", "&nbsp;"),
        ("caf&eacute; &#x41;", "café A", "&eacute;"),
        ("a<br/>b <b>c</b> <!-- d -->e", "a b c e", "<br/>"),
        ('<a href="x.html">개</a>', "개", '<a href="x.html">'),
    ],
)
def test_markup_is_found_and_taken_out(markup: str, plain: str, sign: str) -> None:
    assert strip_markup(markup) == plain
    assert find_markup(markup) == sign
    assert find_markup(plain) is None


@pytest.mark.parametrize(
    "text",
    [
        "R&D; a < b > c",
        "AT&T",
        "salt & pepper; sugar",
        "&copy",
        "<person> runs",
        "&ampamp;",
        "&#0;",
        "I <3 you",
        "a  b",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert strip_markup(text) == text
    assert find_markup(text) is None
