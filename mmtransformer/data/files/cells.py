"""Captions out of one cell of a table: texts, lists of texts, also as pandas and numpy print them, and mappings."""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from mmtransformer.data.files.text import (
    CODES,
    CONTROLS,
    LANGUAGES,
    is_broken,
    is_missing,
    language_code,
    normalize_text,
    shown_controls,
)
from mmtransformer.data.loading.source import Caption

LISTED = "cells that hold a list as text, read as its captions"
_TEXTS = ("raw", "caption", "text", "sentence", "answer", "value")  # keys of one caption in a mapping
_NESTED = 16  # lists inside lists of captions
_MOST_LITERAL, _MOST_BRACKETS = 1 << 16, 256  # letters and brackets of a Python literal that is parsed
_STRING = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_ITEM = rf"(?:np\.str_\((?:{_STRING})\)|{_STRING}|None|nan|null|<NA>)"
# ['a', 'b'] and ('a', 'b') of Python; ['a' 'b'] of numpy, which Python itself would read as one text
_PRINTED = re.compile(rf"(?:\[\s*|\(\s*(?=.*,)){_ITEM}(?:(?:\s*,\s*|\s+){_ITEM})*\s*,?\s*[\])]", re.DOTALL)
_QUOTED = re.compile(rf"(?P<text>{_STRING})|None|nan|null|<NA>", re.DOTALL)
_ARRAY = re.compile(r"array\((\[.*\])(?:,\s*dtype=[^\]]*)?\)", re.DOTALL)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4}|.)", re.DOTALL)


def read_captions(
    value: Any,
    language: str | None,
    of: str,
    errors: list[tuple[str, str]],
    notes: list[tuple[str, str]] | None = None,
    depth: int = 0,
) -> list[Caption]:
    """Captions out of one cell: a text, a list, a mapping {"en": ..., "ko": ...}, or COCO's {"raw": ...}.

    Args:
        value: The cell. A text that is a list or mapping as JSON, Python or numpy write it is read as that.
        language: The captions' language, if it is known.
        of: What errors call the cell.
        errors: Is given what is wrong: (cause, what).
        notes: Is given what is worth saying.
        depth: How many lists it lies in.
    """
    if depth > _NESTED:
        errors.append(("a caption that is nested too deeply", of))
        return []
    if isinstance(value, str):
        if (inner := as_list(value)) is not None:
            if notes is not None:
                notes.append((LISTED, f"{of} {value[:60]}"))
            return read_captions(inner, language, of, errors, notes, depth + 1)
        if is_broken(value):
            errors.append(("not valid Unicode", f"{of} {value[:60]!a}"))
            return []
        text = normalize_text(value)
        if is_missing(text):
            errors.append(("empty caption", f"{of} {value.strip()[:20]!r}"))
            return []
        if notes is not None and (shown := shown_controls(value)) is not None:
            notes.append((CONTROLS, f"{of} {shown}"))
        return [Caption(text, language)]
    if isinstance(value, dict):
        text = next((value[key] for key in _TEXTS if key in value), None)
        if text is not None:
            try:
                own = language_code(str(value.get("language") or value.get("lang") or ""))
            except ValueError as error:
                errors.append(("not a language", str(error)))
                return []
            return read_captions(text, own or language, of, errors, notes, depth + 1)
        codes = [LANGUAGES.get(str(key).casefold(), key) for key in value]
        if value and all(code in CODES for code in codes):
            both = zip(codes, value.values(), strict=True)
            return [c for code, item in both for c in read_captions(item, code, of, errors, notes, depth + 1)]
    if isinstance(value, list | tuple) and value:
        return [c for item in value for c in read_captions(item, language, of, errors, notes, depth + 1)]
    if value is None or value != value or isinstance(value, list | tuple):  # NaN is not itself
        errors.append(("empty caption", of))
    else:
        errors.append(("a caption that is not text", f"{of} {value!r:.60}"))
    return []


def as_list(text: str) -> list[Any] | dict[Any, Any] | None:
    """The captions, or mappings with captions, that a text is the list of; None for a text that says something itself.

    A data frame whose cells are lists writes them into CSV as Python or numpy print them, other programs as JSON.
    """
    text = text.strip()
    if text[:1] not in ("[", "(", "{", "a") or text[-1:] not in ("]", ")", "}"):
        return None
    if array := _ARRAY.fullmatch(text):
        text = array[1]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if _PRINTED.fullmatch(text):
            return [found["text"] and _unquoted(found["text"]) for found in _QUOTED.finditer(text)]
        value = _literal(text)
    return value if isinstance(value, list | dict) and value and _are_captions(value) else None


def _unquoted(text: str) -> str:
    """A string as Python prints it, as it was."""

    def letter(match: re.Match[str]) -> str:
        code = match[1]
        return chr(int(code[1:], 16)) if len(code) > 1 else {"n": "\n", "t": "\t", "r": "\r"}.get(code, code)

    return _ESCAPE.sub(letter, text[1:-1])


def _literal(text: str) -> Any:
    """What Python's own way of writing lists and mappings says; None if it is none."""
    if "{" not in text or len(text) > _MOST_LITERAL or sum(map(text.count, "[({")) > _MOST_BRACKETS:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of escapes
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None


def _are_captions(value: Any, depth: int = 0) -> bool:
    if isinstance(value, list | tuple):
        return depth < _NESTED and any(item is not None for item in value) and all(
            item is None or isinstance(item, str) or _are_captions(item, depth + 1) for item in value
        )  # fmt: skip
    if isinstance(value, Mapping):
        said = any(isinstance(value.get(key), str) for key in _TEXTS)
        return said or (bool(value) and all(key in CODES and isinstance(item, str) for key, item in value.items()))
    return False
