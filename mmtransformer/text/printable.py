"""Strangers' text for a terminal: what would move its cursor, colour it or turn its letters round is written out."""

import re

# Control characters but line end and tab, direction overrides, and broken halves of characters.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Returns a text (a file's name, a caption) with escapes as `\x1b` in place of what a terminal would obey."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)
