"""CONTRIBUTING.md sends people to files that are there, and to tables that stand in them."""

import re
from pathlib import Path

from support.packages import PACKAGE, ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def place(path: str) -> Path:
    return next((home / path for home in (PACKAGE, ROOT) if (home / path).exists()), ROOT / path)


def test_files_that_are_named_are_there() -> None:
    named = {path for path in re.findall(r"`(\w+(?:/\w+)+\.(?:py|md|yaml))`", PAGE) if "NAME" not in path}
    assert len(named) > 40
    assert not [path for path in sorted(named) if not place(path).is_file()]


def test_tables_stand_in_the_files_that_are_named() -> None:
    tables = re.findall(r"`([A-Z_]{3,})` \(`(\w+(?:/\w+)+\.py)`", PAGE)
    assert len(tables) > 4
    lacking = [name for name, path in tables if not re.search(rf"^{name}\b.*=", place(path).read_text("utf-8"), re.M)]
    assert not lacking
