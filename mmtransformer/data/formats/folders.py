"""Pictures whose captions lie in files of the same name: beside them, or in a folder beside theirs."""

import html
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mmtransformer.data.files.archives import FileError, Files
from mmtransformer.data.files.cells import read_captions
from mmtransformer.data.files.columns import find_columns, looks_like_image
from mmtransformer.data.files.endings import IMAGES, OTHERS, picture_of
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.names import nfc
from mmtransformer.data.files.read_options import ColumnNames
from mmtransformer.data.files.tables import ManifestRow, bad_row
from mmtransformer.data.files.text import CODES, LANGUAGES, lines
from mmtransformer.data.formats.lists import read_splits
from mmtransformer.data.loading.source import Caption
from mmtransformer.images.files import kind_of

PARALLEL = "captions in a folder of their own"
ENDINGS = "captions in text files of different endings, all used"
_NUMBERS = re.compile(r"\s*[-+]?\d[\d.eE+-]*(?:[\s,;]+[-+]?\d[\d.eE+-]*)+\s*")
_TEXTS = (".txt", ".caption", ".json", ".xmp")
_XMP = re.compile(r"<dc:description>.*?<rdf:li[^>]*>(.*?)</rdf:li>", re.DOTALL)  # the first language
_MASK = re.compile(r"(.+)[_-](?:mask|masklabel|condlabel|depth|segmentation)", re.IGNORECASE)
_DEEP = 6  # levels of a JSON file that are looked through

_Texts = dict[str, list[tuple[Entry, str | None]]]


def read_folder(files: Files, images_in: Files, wanted: ColumnNames) -> Iterator[ManifestRow]:
    """Pictures with a .txt, .caption, .json or .xmp of the same name, in folders or archives.

    A picture that has none beside it takes the file of its name in another folder: images/001.jpg that of
    labels/001.txt, train/images/001.jpg that of train/labels/001.txt, and both of captions/en and captions/ko. Lists of
    names, train.txt and val.txt, say splits.

    Args:
        files: All files.
        images_in: What pictures are looked for in: the same, or the folder or archive that the user names.
        wanted: Columns that the user named, for what is JSON.
    """
    texts: _Texts = {}
    records: _Texts = {}
    images = [entry for entry in images_in.entries if entry.path.lower().endswith(IMAGES)]
    paths = [nfc(image.path) for image in images]
    for entry in files.entries:
        stem, _, suffix = nfc(entry.path).rpartition(".")
        if f".{suffix.lower()}" in _TEXTS:
            kind = records if suffix.lower() in ("json", "xmp") else texts
            plain, _, code = stem.rpartition(".")
            kind.setdefault(picture_of(nfc(entry.path)) or stem, []).append((entry, None))
            if code.lower() in CODES and "/" not in code:
                kind.setdefault(plain, []).append((entry, code.lower()))
    beside = [_stem(image) for image in images]
    there = {*paths}
    if lone := {stem for kind in (texts, records) for stem in kind} - {*beside}:  # their pictures may lack an ending
        for entry in images_in.entries:
            if (path := nfc(entry.path)) in lone and path not in there and kind_of(images_in.read(entry)[:64]):
                images.append(entry)
                beside.append(path)
                paths.append(path)
    elsewhere: _Texts = {}
    for kind in (texts, records):
        for keys in (beside, paths):  # "a.txt", then "a.jpg.txt"
            both = zip(keys, beside, paths, strict=True)
            known = (kind, texts, elsewhere)
            lone = [key for key, *own in both if not any(one in some for one in own for some in known)]
            elsewhere |= _elsewhere(lone, kind, {*keys})
    splits, lists = read_splits(files)
    used: set[str] = set()
    for image, stem, path in zip(images, beside, paths, strict=True):
        found = next((some[key] for some in (texts, elsewhere, records) for key in (stem, path) if key in some), [])
        if not found and (mask := _MASK.fullmatch(stem)) and mask[1] in texts:
            yield ManifestRow(None, (), None, image.path, notes=(("masks of other pictures, left out", ""),))
            continue
        if not found and images_in is not files:  # a folder that is named may hold others' pictures too
            yield ManifestRow(None, (), None, image.path, notes=(("pictures without a caption file, left out", ""),))
            continue
        used.update(entry.path for entry, _ in found)
        away = found[:1] if stem in elsewhere or path in elsewhere else []
        notes = [(PARALLEL, f"{entry.path} is of {image.path}") for entry, _ in away]
        plain = [entry.path for entry, language in found if language is None]
        if len({path.rpartition(".")[2].lower() for path in plain}) > 1:
            notes.append((ENDINGS, " and ".join(plain)))
        listed = splits.get(stem.rpartition("/")[2], "unlisted") if splits else None
        yield _row(files, image, images_in.split_of(image) or listed, found, notes, wanted)
    unread = {
        _stem(entry): entry.path for entry in images_in.entries if not entry.path.lower().endswith((*IMAGES, *_TEXTS))
    }
    for stem, group in texts.items():
        for entry, _ in group:
            if entry.path in lists:
                used.add(entry.path)
                yield ManifestRow(None, (), None, entry.path, notes=(("lists of pictures without captions", ""),))
            if entry.path not in used and not OTHERS.search(entry.path):
                used.add(entry.path)
                what = "a caption file without a picture"
                if (beside := unread.get(stem)) is not None:
                    what += f": {beside} is of no kind that is read; save it as JPEG or PNG"
                yield bad_row(entry.path, "missing picture", what)


def _stem(entry: Entry) -> str:
    return nfc(entry.path).rpartition(".")[0]


def _row(
    files: Files,
    image: Entry,
    split: str | None,
    texts: Sequence[tuple[Entry, str | None]],
    notes: list[tuple[str, str]],
    wanted: ColumnNames,
) -> ManifestRow:
    """A picture with what its files say."""
    errors: list[tuple[str, str]] = []
    captions: list[Caption] = []
    for entry, language in texts:
        try:
            data = files.read_text(entry)
        except FileError as error:
            errors.append(("caption file that can't be read", str(error)))
            continue
        if entry.path.lower().endswith(".json"):
            captions += _captions_of_json(data, entry.path, language, wanted, errors, notes)
            continue
        if entry.path.lower().endswith(".xmp"):
            for text in _XMP.findall(data.decode("utf-8", "replace")):
                captions += read_captions(html.unescape(text), language, entry.path, errors, notes)
            continue
        said = [line for line in lines(data) if line.text is None or line.text.strip()]
        if said and all(line.text and _NUMBERS.fullmatch(line.text) for line in said):
            errors.append(("boxes or classes in the place of captions", f"{entry.path} holds numbers alone"))
            continue
        for line in said:
            if line.text is None:
                errors.append(("not UTF-8", f"{entry.path}:{line.number}: {line.hint}"))
            else:
                captions += read_captions(line.text, language, f"{entry.path}:{line.number}", errors, notes)
    if not captions and not errors:
        errors.append(("empty caption", f"{texts[0][0].path} is empty") if texts else ("no caption file", ""))
    return ManifestRow(image.path, tuple(captions), split, image.path, tuple(errors), tuple(notes), key=image)


def _elsewhere(images: Sequence[str], texts: _Texts, beside: set[str]) -> _Texts:
    """For pictures without a file beside them, those in other folders that can mean them alone.

    Args:
        images: The pictures' paths without endings.
        texts: The files by theirs.
        beside: What has a picture beside it.
    """
    by_last: dict[str, list[str]] = {}
    for stem in texts if images else ():
        if stem not in beside:
            by_last.setdefault(stem.rpartition("/")[2], []).append(stem)
    found: dict[str, list[str]] = {}
    taken: dict[str, list[tuple[int, str]]] = {}  # text -> the pictures that it may be of
    for image in dict.fromkeys(images):
        near = [(_shared(image, text), text) for text in by_last.get(image.rpartition("/")[2], ())]
        best = [text for score, text in near if score == max(near)[0]]
        if len(best) == 1 or (best and len({_language(text) for text in best} - {None}) == len(best)):
            found[image] = best
            for text in best:
                taken.setdefault(text, []).append((max(near)[0], image))
    meant = {text: max(some)[1] for text, some in taken.items() if [at for at, _ in some].count(max(some)[0]) == 1}
    chosen: _Texts = {}
    for image, best in found.items():
        if all(meant.get(text) == image for text in best):
            told = {text: _language(text) if len(best) > 1 else None for text in best}
            chosen[image] = [(entry, said or told[text]) for text in best for entry, said in texts[text]]
    return chosen


def _shared(image: str, text: str) -> int:
    """How many folders two paths share at their beginnings and their ends."""
    a, b = image.split("/")[:-1], text.split("/")[:-1]
    most = min(len(a), len(b))
    front = next((i for i in range(most) if a[i] != b[i]), most)
    back = next((i for i in range(most - front) if a[-1 - i] != b[-1 - i]), most - front)
    return front + back


def _language(stem: str) -> str | None:
    """The language that the nearest folder of a path says."""
    words = [part.casefold() for part in reversed(stem.split("/")[:-1])]
    return next((LANGUAGES.get(word, word) for word in words if word in LANGUAGES or word in CODES), None)


def _captions_of_json(
    data: bytes,
    name: str,
    language: str | None,
    wanted: ColumnNames,
    errors: list[tuple[str, str]],
    notes: list[tuple[str, str]],
) -> list[Caption]:
    """The captions of a picture's own JSON file: those of the first level with a key that is called like one."""
    try:
        level = [json.loads(data)]
    except (ValueError, RecursionError) as error:
        errors.append(("not JSON", f"{name}: {error}"))
        return []
    texts: list[str] = []  # their keys
    wanted = wanted._replace(images=False, image=None, language=None, split=None)
    for _ in range(_DEEP):
        records = [value for value in level if isinstance(value, dict)]
        texts += [key for record in records for key, value in record.items() if isinstance(value, str)]
        found: list[Caption] = []
        for record in records:
            try:
                keys = [key for key, value in record.items() if value is not None and not _is_name(value)]
                columns = find_columns(keys, wanted, name)
            except ValueError:
                continue
            for key, said in columns.captions:
                if isinstance(record[key], (str, list)):
                    found += read_captions(record[key], said or language, f"{name} ({key})", errors, notes)
        if found or errors:
            return found
        level = [inner for value in level for inner in _inside(value)]
    way = f": --caption-column names one of {', '.join(dict.fromkeys(texts))[:200]}" if texts else ""
    errors.append(("no caption", f"{name} has no key that is called like one{way}"))
    return []


def _is_name(value: Any) -> bool:
    """Whether a text is the picture's own name, as in the titles of Google's exports."""
    return isinstance(value, str) and looks_like_image(value)


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.values()]
    return value if isinstance(value, list) else []
