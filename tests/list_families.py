"""Writes the table of families in docs/weights.md, from weights/families.py: python tests/list_families.py."""

import re
from functools import partial
from pathlib import Path

from mmtransformer.weights.families import FAMILIES

PAGE = Path(__file__).parents[1] / "docs/weights.md"
MARKS = "<!-- families: written by tests/list_families.py -->", "<!-- end of families -->"


def name(function: object) -> str:
    """A function's name, also where some of its arguments are given."""
    return name(function.func) if isinstance(function, partial) else getattr(function, "__name__", "?")


def table() -> str:
    """The table, between its marks: one line for the families that come in and go out by the same two functions."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for family, way in FAMILIES.items():
        makes = " or ".join(f"`{kind.__name__}`" for kind in way.makes)
        rows.setdefault((f"`{name(way.load)}`", f"`{name(way.save)}`", f"a {makes}"), []).append(f"`{family}`")
    lines = ["| families | in | out | here it is |", "|---|---|---|---|"]
    lines += [f"| {', '.join(families)} | {' | '.join(row)} |" for row, families in rows.items()]
    return "\n".join([MARKS[0], *lines, MARKS[1]])


def with_families(text: str) -> str:
    """A page's text with its table of families written anew."""
    return re.sub(f"{MARKS[0]}.*{MARKS[1]}", lambda _: table(), text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_families(PAGE.read_text("utf-8")), "utf-8")
