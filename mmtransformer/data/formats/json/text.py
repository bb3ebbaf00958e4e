"""Text that is to be JSON: read, or said where and why it is not."""

import json
import re
from collections.abc import Iterator
from typing import Any

from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.text import lines, utf_16

_PYTHON = re.compile(r"(None|True|False|undefined|nan|inf)\b")
_BY_MESSAGE = {
    "Illegal trailing comma": "there is one comma too many",
    "Unterminated string": "a text lacks its closing quote, or the file is cut short",
    "Invalid \\": "in JSON a backslash is written \\\\ (in a path / does too)",
    "Invalid control character": "line ends and tabs inside a text are written \\n and \\t",
    "Expecting ',' delimiter": 'a comma is missing, or a quote inside a text that is written \\"',
    "Expecting ':' delimiter": "a colon is missing between key and value",
    "Extra data": "there is more behind the end: several values stand in a list, [..., ...], or one a line in .jsonl",
}


def load_json(files: Files, entry: Entry) -> Any:
    """What a JSON file holds; of JSON lines under another name, their list.

    Raises:
        ValueError: If it is not UTF-8 or not JSON, with the line, the column and what is likely wrong there.
    """
    data = files.read_text(entry)
    try:
        text = data.decode(utf_16(data) or "utf-8-sig")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{entry.path}:{number} is not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{entry.path} is nested too deeply to be captions") from None
    except json.JSONDecodeError as error:
        if text.lstrip()[:1] == "{" and error.msg == "Extra data":  # JSON lines under another name
            found = list(json_lines(text.encode(), entry.path))
            if wrong := next((f"{where} is {what}" for where, _, what in found if what), ""):
                raise ValueError(wrong) from None
            return [value for _, value, _ in found]
        raise ValueError(f"{entry.path}:{error.lineno} is not JSON: {json_fault(error)}") from None
    except ValueError as error:  # a number of 5,000 digits
        raise ValueError(f"{entry.path} is not JSON: {error}") from None


def json_lines(data: bytes, name: str) -> Iterator[tuple[str, Any, str]]:
    """Each line of a JSON-lines file: where it is, the value, and what is wrong with it ("" if nothing)."""
    for line in lines(data):
        where = f"{name}:{line.number}"
        if line.text is None:
            yield where, None, f"not UTF-8: {line.hint}"
        elif line.text.strip():
            try:
                yield where, json.loads(line.text), ""
            except json.JSONDecodeError as error:
                yield where, None, f"not JSON: {json_fault(error)}"
            except (ValueError, RecursionError) as error:
                yield where, None, f"not JSON: {error}"


def json_fault(error: json.JSONDecodeError) -> str:
    """What is wrong with a text that is no JSON, the column, and what to do about it where that can be told."""
    hint = _hint(error.msg, error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip())
    return f"{error.msg} at column {error.colno}" + f" ({hint})" * bool(hint)


def _hint(message: str, before: str, after: str) -> str:
    if not before and not after:
        return "the file is empty"
    if after.startswith(("//", "/*", "#")):
        return "JSON knows no comments: take them out"
    if before[-1:] == "," and after[:1] in ("]", "}"):
        return "there is one comma too many"
    if after[:1] == "'":
        return 'texts stand in double quotes, "..."; json.dumps writes what print does not'
    if after[:1] in ("“", "”", "‘", "’"):
        return 'texts stand in straight quotes, "..."'
    if _PYTHON.match(after):
        return "JSON has null, true and false, and no other such words"
    if not after:
        return "it ends too early: the file is cut short"
    if message.startswith("Expecting property name") and (after[0].isalnum() or after[0] == "_"):
        return "keys stand in double quotes"
    return next((hint for begins, hint in _BY_MESSAGE.items() if message.startswith(begins)), "")
