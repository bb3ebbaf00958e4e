"""Rows of JSON: lists of records, COCO's and Karpathy's files, conversations, and what Label Studio writes."""

from collections.abc import Iterable, Iterator
from typing import Any

from mmtransformer.data.files.cells import read_captions
from mmtransformer.data.files.columns import Columns, find_columns, image_columns
from mmtransformer.data.files.read_options import ColumnNames
from mmtransformer.data.files.tables import ManifestRow, bad_row, make_row
from mmtransformer.data.files.text import split_word
from mmtransformer.data.formats.json.conversations import NoCaption, as_records, laid_open


def read_records(
    records: Iterator[tuple[str, Any, str]], name: str, wanted: ColumnNames
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
    try:
        columns = find_columns(list(keys), wanted, name, some)
    except ValueError:
        everything = [(where, laid_open(record), error) for where, record, error in everything]
        some = [laid_open(record) for record in some]
        columns = find_columns([*dict.fromkeys(key for record in some for key in record)], wanted, name, some)

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
    split = split_word(split) or split if isinstance(split, str) else None
    return ManifestRow(name, tuple(captions), split, where, tuple(errors), tuple(notes))


def read_coco(data: dict[str, Any], name: str, wanted: ColumnNames) -> Iterator[ManifestRow]:
    """The rows of COCO's captions: pictures by id, and annotations that name one."""
    found: dict[Any, list[tuple[int, Any]]] = {}
    keys = dict.fromkeys(key for note in data["annotations"][:1000] if isinstance(note, dict) for key in note)
    columns = find_columns([*keys], wanted._replace(images=False, image=None, language=None, split=None), name)
    for at, note in enumerate(data["annotations"]):
        if isinstance(note, dict) and isinstance(note.get("image_id"), str | int):
            found.setdefault(note["image_id"], []).append((at, note))
        else:
            yield bad_row(f"{name}: annotations[{at}]", "no picture named", f"{note!r:.60}")
    for at, image in enumerate(data["images"]):
        where = f"{name}: images[{at}]"
        named = ["file_name", *image_columns([*image])] if isinstance(image, dict) else []
        path = next((image[key] for key in named if isinstance(image.get(key), str)), None)
        if path is None:
            yield bad_row(where, "no picture named", f"{image!r:.60}")
            continue
        key = image.get("id", image.get("image_id"))
        notes = found.pop(key, ()) if isinstance(key, str | int) else ()
        said = [(value, f"{path} (annotations[{i}])") for i, note in notes for value in _values(note, columns)]
        yield _image_row(path, said, image.get("split"), where)
    for key, orphans in found.items():
        where = f"{name}: annotations[{orphans[0][0]}]"
        yield bad_row(where, "no picture named", f"image_id {key!r} is not among the images")


def _values(note: dict[str, Any], columns: Columns) -> list[Any]:
    """The captions of one annotation, with the languages that the names of several columns say."""
    found = [(note.get(name), language) for name, language in columns.captions]
    found = [pair for pair in found if pair[0] is not None] or found[:1]
    return [value if language is None else {language: value} for value, language in found]


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
