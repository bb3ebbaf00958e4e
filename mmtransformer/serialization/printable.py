r"""Strangers' text (captions, names of files and folders) where it is shown: nothing in it is obeyed.

What would move a terminal's cursor, colour it or turn its letters round is written out as `\x1b`; on pages and in model
cards tags are text. `say` is what commands and runs print with.
"""

import json
import re
import shutil
import sys
from html import escape
from pathlib import Path
from shlex import quote
from typing import Any, TextIO

# Control characters but line end and tab, direction overrides, and broken halves of characters.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Returns a text (a file's name, a caption) with escapes as `\x1b` in place of what a terminal would obey."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: str = "", *, file: TextIO | None = None) -> None:
    """Prints lines for people, escapes written out.

    Args:
        text: The lines.
        file: Where to; the standard output unless given.
    """
    print(printable(text), file=file or sys.stdout)


def program() -> str:
    """How the command line is called from here: "mmt", or where it lies if that is not in the path; or as a module of
    Python, if it was called so.
    """
    here = str(Path.cwd()) + "/"
    python = quote(sys.executable.removeprefix(here))
    if Path(sys.argv[0]).parts[-2:] in (("mmtransformer", "__main__.py"), ("cli", "__main__.py")):
        found = shutil.which("python")
        return f"{'python' if found and Path(found).samefile(sys.executable) else python} -m mmtransformer"
    if shutil.which("mmt") is not None:
        return "mmt"
    beside = Path(sys.executable).with_name("mmt")
    return quote(str(beside).removeprefix(here)) if beside.is_file() else f"{python} -m mmtransformer"


def seen_from(path: Path) -> str:
    """Of a path that is not there and begins with "..", where it was looked for, behind what is said of it."""
    return f"; a relative path begins where the command runs, here {Path.cwd()}" if path.parts[:1] == ("..",) else ""


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number with what it counts: "1 picture", "2,000 pictures".

    Args:
        count: The number.
        one: What one of them is called.
        many: What several are called; `one` with an s unless told.
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def json_text(value: Any) -> str:
    """A value as one line of JSON that a terminal may show: other alphabets as they are, escapes as JSON has them."""
    text = json.dumps(value, ensure_ascii=False)
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def markup(text: str) -> str:
    """A line for HTML and Markdown: tags, and what Markdown begins a block with, are text."""
    return escape(printable(" ".join(text.splitlines()))).replace("`", "&#96;")


def fenced(text: str, language: str = "") -> str:
    """Lines as a block of code in Markdown, which they cannot end."""
    return f"```{language}\n{printable(text).replace('```', chr(39) * 3)}\n```"
