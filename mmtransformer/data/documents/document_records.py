"""One line of an interleaved file: the three forms that documents come in, and what can be wrong with each."""

import json
from pathlib import Path
from typing import Any

from mmtransformer.data.documents.documents import cut_at_marks, join_pieces
from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.text import is_missing
from mmtransformer.serialization.printable import counted

MARK = "<image>"
SUFFIXES = (".jsonl", ".ndjson")
_MOST_LINE = 1 << 20  # bytes of the first line
_LISTS = ("images", "pictures", "image_paths", "image", "이미지", "사진")
_NAMES = ("image_name", "path", "file_name", "filename", "filepath", "image", "name")


class LineError(Exception):
    """What is wrong with one line."""

    def __init__(self, cause: str, what: str = ""):
        super().__init__(cause)
        self.cause, self.what = cause, what


class LineNote(Exception):
    """Why a line that nothing is wrong with is left out."""


def document_files(files: Files) -> list[Entry]:
    """The files below a root that hold interleaved documents: the one that was asked for, or those at the top."""
    if files.asked is not None:
        return [files.asked]
    found = [entry for entry in files.entries if entry.path.lower().endswith(SUFFIXES)]
    found = [entry for entry in found if "/" not in entry.inner or files.split_of(entry) is not None]
    return [entry for entry in found if is_document(files.read(entry)[:_MOST_LINE])]


def holds_documents(path: Path) -> bool:
    """Whether a file on disk is JSON lines of interleaved documents, as its first line tells; no more of it is read."""
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return is_document(file.read(_MOST_LINE))
    except OSError:  # whoever reads it says why
        return False


def is_document(start: bytes) -> bool:
    """Whether the first line of what a file starts with is an interleaved document, well-formed or not."""
    first = start.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0]
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return False
    if not isinstance(record, dict):
        return False
    listed = any(isinstance(record.get(key), list) for key in _LISTS)
    texts = record.get("texts")
    plain = isinstance(texts, list) and not any(isinstance(text, dict) for text in texts)  # else a conversation
    forms = ("text_list" in record and "image_info" in record, plain and listed)
    return any(forms) or (isinstance(record.get("text"), str) and listed)


def read_pieces(record: dict[str, Any], mark: str, min_similarity: float = 0.0) -> tuple[tuple[str, ...], list[str]]:
    """The texts and the pictures' names of a document in any of the three forms.

    Args:
        record: The line.
        mark: What stands for a picture in a text.
        min_similarity: MMC4's pictures that match their sentence less are left out.

    Raises:
        LineError: If it is in none of them, or its marks and its pictures differ in number.
    """
    if "text_list" in record and "image_info" in record:
        return _matched(record["text_list"], record["image_info"], min_similarity)
    key = next((key for key in _LISTS if key in record), None)
    if key is None:
        raise LineError("no list of pictures", f"its keys are {', '.join(record)[:80]}")
    images, texts = record[key], record.get("texts", record.get("text"))
    if isinstance(images, str | dict):
        images = [images]
    if not isinstance(images, list):
        raise LineError("no list of pictures", f"{key} is {images!r:.60}")
    if isinstance(texts, list):
        return _parallel(texts, images)
    if not isinstance(texts, str):
        raise LineError("no text", f"{texts!r:.60}")
    pieces = cut_at_marks(texts, mark)
    if len(pieces) - 1 != len(images):
        raise LineError(
            "marks and pictures differ in number",
            f"{len(pieces) - 1} {mark} in the text, {len(images)} in {key}: {texts[:60]!r}",
        )
    return pieces, [_image_name(image) for image in images]


def _parallel(texts: list[Any], images: list[Any]) -> tuple[tuple[str, ...], list[str]]:
    if len(texts) != len(images):
        raise LineError("lists of different length", f"{counted(len(texts), 'text')}, {counted(len(images), 'image')}")
    both = [i for i, (t, p) in enumerate(zip(texts, images, strict=True)) if bool(t) == bool(p)]
    if both:
        raise LineError(
            "neither a text nor a picture", f"place {both[0]} of the lists must have exactly one of the two"
        )
    if odd := [text for text in texts if text and not isinstance(text, str)]:
        raise LineError("a text that is not text", f"{odd[0]!r:.60}")
    return join_pieces([text or None for text in texts]), [_image_name(p) for p in images if p]


def _matched(texts: Any, infos: Any, least: float) -> tuple[tuple[str, ...], list[str]]:
    """MMC4's form: each picture stands before the sentence that it was matched with."""
    if not (isinstance(texts, list) and isinstance(infos, list) and all(isinstance(t, str) for t in texts)):
        raise LineError("no text", "text_list must be a list of texts and image_info a list of pictures")
    before: dict[int, list[str]] = {}
    for info in infos:
        at = info.get("matched_text_index") if isinstance(info, dict) else None
        if not isinstance(at, int) or not 0 <= at < len(texts):
            raise LineError("a picture without its text", f"matched_text_index {at!r} of {counted(len(texts), 'text')}")
        similar = info.get("matched_sim", 0)
        if least and not isinstance(similar, int | float):
            raise LineError("a similarity that is no number", f"{similar!r:.60}")
        if not least or similar >= least:
            before.setdefault(at, []).append(_image_name(info))
    if infos and not before:
        raise LineNote(f"no picture matches its sentence by {least}, left out")
    pieces: list[str | None] = []
    for at, text in enumerate(texts):
        pieces += [None] * len(before.get(at, ())) + [text]
    return join_pieces(pieces), [name for at in sorted(before) for name in before[at]]


def _image_name(value: Any) -> str:
    if isinstance(value, dict):
        value = next((value[key] for key in _NAMES if key in value), None)
    if not isinstance(value, str) or is_missing(value.strip()):
        raise LineError("no picture named", f"{value!r:.60}")
    return value
