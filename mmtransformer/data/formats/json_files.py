"""Manifests in JSON: lists of records, COCO's and Karpathy's files, conversations, and what Label Studio writes."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.cells import read_captions
from mmtransformer.data.files.endings import IMAGES
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.read_options import Wanted
from mmtransformer.data.files.tables import Columns, ManifestRow, bad_row, find_columns, make_row
from mmtransformer.data.files.text import SPLITS, lines
from mmtransformer.data.formats.conversations import NoCaption, as_records


def json_format(data: Any) -> str | None:
    """The format of what a JSON file holds; None if it is no manifest."""
    if isinstance(data, list):
        return "json" if data and isinstance(data[0], dict) else None
    if not isinstance(data, dict) or not data:
        return None
    images, notes = data.get("images"), data.get("annotations")
    if isinstance(images, list) and isinstance(notes, list):
        return "coco" if any(isinstance(note, dict) and "caption" in note for note in notes[:10]) else None
    if isinstance(images, list):
        return "karpathy" if images and isinstance(images[0], dict) and "sentences" in images[0] else None
    return "json" if all(str(key).lower().endswith(IMAGES) for key in list(data)[:10]) else None


def load_json(files: Files, entry: Entry) -> Any:
    """What a JSON file holds; of JSON lines under another name, their list.

    Raises:
        ValueError: If it is not UTF-8 or not JSON, with the line.
    """
    try:
        text = files.read_text(entry).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = files.read_text(entry)[: error.start].count(b"\n") + 1
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
        raise ValueError(f"{entry.path}:{error.lineno} is not JSON: {error.msg} at column {error.colno}") from None
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
            except (ValueError, RecursionError) as error:
                yield where, None, f"not JSON: {error}"


def read_records(
    records: Iterator[tuple[str, Any, str]], name: str, wanted: Wanted
) -> tuple[Columns, Iterator[ManifestRow]]:
    """The columns and rows of records: objects with keys, conversations, or tasks."""
    everything, left = [], {}
    for where, record, error in records:
        try:
            found, rest = as_records(record)
        except NoCaption as reason:
            found, rest = [], str(reason)
        everything += [(where, record, error) for record in found]
        left |= {where: rest} if rest else {}
    if left and not everything:
        raise ValueError(
            f"{name}: not one conversation asks something of one picture and answers it ({next(iter(left.values()))})"
        )
    keys: dict[str, None] = {}
    for _, record, _ in everything[:1000]:
        keys |= dict.fromkeys(record) if isinstance(record, dict) else {}
    if not keys:
        first = next((f": {where} is {error}" for where, _, error in everything if error), "")
        raise ValueError(f"{name} holds no JSON objects{first}")
    some = [record for _, record, _ in everything[:20] if isinstance(record, dict)]
    columns = find_columns(list(keys), wanted, name, some)

    def rows() -> Iterator[ManifestRow]:
        for where, record, error in everything:
            if isinstance(record, dict):
                yield make_row(record, columns, where)
            else:
                cause, _, what = (error or f"not a JSON object: {record!r:.60}").partition(": ")
                yield bad_row(where, cause, what)
        for where, what in left.items():
            yield ManifestRow(None, (), None, where, notes=(("conversations, left out", what),))

    return columns, rows()


def _image_row(name: str, said: Iterable[tuple[Any, str]], split: Any, where: str) -> ManifestRow:
    """A picture with its captions, each with what errors call it."""
    errors: list[tuple[str, str]] = []
    notes: list[tuple[str, str]] = []
    captions = [caption for value, of in said for caption in read_captions(value, None, of, errors, notes)]
    if not captions and not errors:
        errors.append(("no caption", name))
    split = SPLITS.get(split.casefold(), split) if isinstance(split, str) else None
    return ManifestRow(name, tuple(captions), split, where, tuple(errors), tuple(notes))


def read_coco(data: dict[str, Any], name: str) -> Iterator[ManifestRow]:
    """The rows of COCO's captions: pictures by id, and annotations that name one."""
    found: dict[Any, list[tuple[int, Any]]] = {}
    for at, note in enumerate(data["annotations"]):
        if isinstance(note, dict) and isinstance(note.get("image_id"), str | int):
            found.setdefault(note["image_id"], []).append((at, note.get("caption")))
        else:
            yield bad_row(f"{name}: annotations[{at}]", "no picture named", f"{note!r:.60}")
    for at, image in enumerate(data["images"]):
        where = f"{name}: images[{at}]"
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
            yield bad_row(where, "no picture named", f"{image!r:.60}")
            continue
        path, key = image["file_name"], image.get("id")
        notes = found.pop(key, ()) if isinstance(key, str | int) else ()
        said = ((value, f"{path} (annotations[{i}])") for i, value in notes)
        yield _image_row(path, said, image.get("split"), where)
    for key, orphans in found.items():
        where = f"{name}: annotations[{orphans[0][0]}]"
        yield bad_row(where, "no picture named", f"image_id {key!r} is not among the images")


def read_karpathy(data: dict[str, Any], name: str) -> Iterator[ManifestRow]:
    """The rows of Karpathy's JSON: pictures with their sentences and their split."""
    for at, image in enumerate(data["images"]):
        where = f"{name}: images[{at}]"
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            yield bad_row(where, "no picture named", f"{image!r:.60}")
            continue
        folder, sentences = image.get("filepath"), image.get("sentences")
        path = f"{folder}/{image['filename']}" if folder and isinstance(folder, str) else image["filename"]
        said = [(_sentence(sentence), path) for sentence in (sentences if isinstance(sentences, list) else ())]
        yield _image_row(path, said, image.get("split"), where)


def _sentence(sentence: Any) -> Any:
    """One of Karpathy's sentences, of which some files hold the words alone."""
    if isinstance(sentence, dict) and "raw" not in sentence and isinstance(sentence.get("tokens"), list):
        return " ".join(map(str, sentence["tokens"]))
    return sentence
