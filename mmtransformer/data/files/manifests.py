"""The formats that image-text pairs come in: which one a root holds, and a reader for each.

- folder: pictures, each with a .txt of the same name (cat.jpg, cat.txt or cat.ko.txt), one caption a line
- csv: CSV, TSV and the like, with or without a header; also as .txt
- jsonl: one JSON object a line
- json: a list of such objects, or a mapping from picture to caption(s)
- coco: COCO captions: {"images": [...], "annotations": [...]}
- karpathy: Karpathy's {"images": [{"filename", "split", "sentences": [{"raw"}]}]}
- flickr: the authors' Flickr8k.token.txt ("name.jpg#0<TAB>caption") with its lists of splits
- parquet: a table with the pictures' bytes or paths
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

from mmtransformer.data.files.archives import IMAGES, Entry, FileError, Files, nfc
from mmtransformer.data.files.read_options import Format, Wanted
from mmtransformer.data.files.tables import (
    Columns,
    Row,
    bad_row,
    find_columns,
    make_row,
    read_captions,
    read_table,
    sniff,
)
from mmtransformer.data.files.text import CODES, SPLITS, lines, split_word
from mmtransformer.data.loading.source import Caption

_TABLES = (".csv", ".tsv", ".tab", ".psv")
_SUFFIXES = (*_TABLES, ".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".token")
# files that lie beside manifests and hold no captions
_OTHERS = re.compile(
    r"(^|/)(readme|licen[cs]e|notice|classes|labels|requirements|config|instances_|person_keypoints_|panoptic_|stuff_"
    r"|image_info_|dataset_?info|package|tokenizer|bad_images)[^/]*$",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"(?P<name>[^\t]+\.\w{3,4})(?:\.\d)?#(?P<index>\d+)\t(?P<text>.*)", re.DOTALL)
_SPLIT_LIST = re.compile(r"(^|[._])(train|dev|val|test)_?images\.txt$", re.IGNORECASE)


class Manifest(NamedTuple):
    """One file that names pictures and captions.

    Attributes:
        entry: The file.
        format: One of `Format`, but for "auto".
        split: The split that its own name says, if it is one of several.
    """

    entry: Entry
    format: str
    split: str | None = None

    @property
    def base(self) -> str:
        """The folder, or archive, that its names are relative to."""
        return self.entry.path.rpartition("/")[0]


def find_manifests(files: Files, format: str = "auto") -> list[Manifest]:
    """The manifests in the root, or in a lone folder inside it, or else inside its archives; [] for a folder of pairs.

    Looked at: the top level, and the folders annotations/, data/ and those with the name of a split.

    Raises:
        ValueError: If there are several that don't belong together, or the asked format isn't there.
    """
    if format not in get_args(Format):
        raise ValueError(f"format={format!r} is none of {', '.join(get_args(Format))}")
    if format == "folder":
        return []
    if files.asked is not None:
        kind = _format_of(files, files.asked, alone=True) if format == "auto" else format
        if kind is None:
            path = files.root / files.asked.path
            raise ValueError(f"{path} holds no captions of a known format; name it: format=...")
        return [Manifest(files.asked, kind)]
    in_folders = [entry for entry in files.entries if entry.archive < 0]
    found = _candidates(files, in_folders, 0, format)
    if not found:
        found = [m for group in _by_archive(files) for m in _candidates(files, *group, format)]
    if format != "auto" and not found:
        raise ValueError(f"{files.root} holds no {format} manifest")
    if len(found) < 2:
        return found
    if len({m.format for m in found}) == 1:
        named = [m._replace(split=_own_split(m)) for m in found]
        if all(m.split for m in named) or found[0].format == "parquet":
            return named
    listing = ", ".join(f"{m.entry.path} ({m.format})" for m in found[:8])
    raise ValueError(
        f"{files.root} holds {len(found)} manifests that don't belong together: {listing}. Give one of them as the root"
        + (", or the format" if len({m.format for m in found}) > 1 else "")
    )


def _own_split(manifest: Manifest) -> str | None:
    folder, _, name = manifest.entry.path.rpartition("/")
    return split_word(name) or split_word(folder.rpartition("/")[2])


def _by_archive(files: Files) -> list[tuple[list[Entry], int]]:
    """The files of each archive, and how many of their path parts are the archive's own path."""
    archives: dict[int, list[Entry]] = {}
    for entry in files.entries:
        if entry.archive >= 0:
            archives.setdefault(entry.archive, []).append(entry)
    return [(group, group[0].path.count("/") - group[0].inner.count("/")) for group in archives.values()]


def _candidates(files: Files, entries: Sequence[Entry], skip: int, format: str) -> list[Manifest]:
    tops = {entry.path.split("/")[skip] for entry in entries}
    lone = len(tops) == 1 and bool(entries) and all(entry.path.count("/") > skip for entry in entries)
    # a file named like a picture belongs to it; a table named like a tar is the log of a download tool
    stems = {nfc(e.path).rpartition(".")[0] for e in entries if e.path.lower().endswith(IMAGES)}
    tars = {archive.removesuffix(".tar") + ".parquet" for archive in files.archives if archive.endswith(".tar")}
    found: list[Manifest] = []
    for entry in entries:
        stem = nfc(entry.path).rpartition(".")[0]
        if stem in stems or stem.rpartition(".")[0] in stems or str(files.root / entry.path) in tars:
            continue
        parts = entry.path.split("/")[skip + lone :]
        inside = len(parts) == 1 or (
            len(parts) == 2 and (parts[0].lower() in ("annotations", "data") or parts[0].lower() in SPLITS)
        )
        name = parts[-1].lower()
        if inside and name.endswith(_SUFFIXES) and not _OTHERS.search(name):
            kind = _format_of(files, entry)
            if kind is not None and (format in ("auto", kind)):
                found.append(Manifest(entry, kind))
    return found


def _format_of(files: Files, entry: Entry, alone: bool = False) -> str | None:
    """The format of a file by its name and its content; None if it is no manifest."""
    name = entry.path.lower()
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(_TABLES):
        return "csv"
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    if name.endswith((".txt", ".token")):
        if "lemma" in name.rpartition("/")[2] or entry.size > 1 << 28:
            return None
        first = next((line.text for line in lines(files.read(entry)[:65536]) if line.text), "")
        if _TOKEN.fullmatch(first):
            return "flickr"
        try:
            # a .txt is a table if its first line names its columns
            find_columns([cell.strip() for cell in first.split(sniff(first))], Wanted(), name)
        except ValueError:
            return "csv" if alone else None
        return "csv"
    if not name.endswith(".json"):
        return "jsonl" if alone and files.read(entry)[:1] == b"{" else "csv" if alone else None
    return _json_format(_load_json(files, entry))


def _json_format(data: Any) -> str | None:
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


def _load_json(files: Files, entry: Entry) -> Any:
    try:
        text = files.read(entry).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = files.read(entry)[: error.start].count(b"\n") + 1
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


def read_manifest(files: Files, manifest: Manifest, wanted: Wanted) -> tuple[Columns | None, Iterator[Row]]:
    """Opens a manifest of any format.

    Returns:
        The columns it is read by (None where the format fixes them), and its rows.
    """
    entry, name = manifest.entry, manifest.entry.path
    if manifest.format == "csv":
        return read_table(files.read(entry), name, wanted)
    if manifest.format == "jsonl":
        return _read_records(json_lines(files.read(entry), name), name, wanted)
    if manifest.format == "flickr":
        return None, _flickr(files, entry)
    if manifest.format == "parquet":
        from mmtransformer.data.files.parquet import read_parquet

        return read_parquet(files, entry, wanted)
    data = _load_json(files, entry)
    if (found := _json_format(data)) != manifest.format:
        raise ValueError(f"{name} is not {manifest.format}" + (f"; it looks like {found}" if found else ""))
    if manifest.format == "coco":
        return None, _coco(data, name)
    if manifest.format == "karpathy":
        return None, _karpathy(data, name)
    if isinstance(data, dict):
        data = [{"image": key, "captions": value} for key, value in data.items()]
    return _read_records(((f"{name}[{i}]", item, "") for i, item in enumerate(data)), name, wanted)


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


def _read_records(records: Iterator[tuple[str, Any, str]], name: str, wanted: Wanted) -> tuple[Columns, Iterator[Row]]:
    everything = list(records)
    keys: dict[str, None] = {}
    for _, record, _ in everything[:1000]:
        keys |= dict.fromkeys(record) if isinstance(record, dict) else {}
    if not keys:
        first = next((f": {where} is {error}" for where, _, error in everything if error), "")
        raise ValueError(f"{name} holds no JSON objects{first}")
    columns = find_columns(list(keys), wanted, name)

    def rows() -> Iterator[Row]:
        for where, record, error in everything:
            if isinstance(record, dict):
                yield make_row(record, columns, where)
            else:
                cause, _, what = (error or f"not a JSON object: {record!r:.60}").partition(": ")
                yield bad_row(where, cause, what)

    return columns, rows()


def _image_row(name: str, said: Iterable[tuple[Any, str]], split: Any, where: str) -> Row:
    """A picture with its captions, each with what errors call it."""
    errors: list[tuple[str, str]] = []
    captions = [caption for value, of in said for caption in read_captions(value, None, of, errors)]
    if not captions and not errors:
        errors.append(("no caption", name))
    split = SPLITS.get(split.casefold(), split) if isinstance(split, str) else None
    return Row(name, tuple(captions), split, where, tuple(errors))


def _coco(data: dict[str, Any], name: str) -> Iterator[Row]:
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


def _karpathy(data: dict[str, Any], name: str) -> Iterator[Row]:
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


def _flickr(files: Files, entry: Entry) -> Iterator[Row]:
    splits: dict[str, str] = {}
    for other in files.entries:
        if other.archive == entry.archive and (match := _SPLIT_LIST.search(other.path)):
            for line in lines(files.read(other)):
                splits[(line.text or "").strip()] = SPLITS[match[2].lower()]
    for line in lines(files.read(entry)):
        where = f"{entry.path}:{line.number}"
        match = _TOKEN.fullmatch(line.text or "")
        if match is None:
            if line.text is None or line.text.strip():
                cause = ("not UTF-8", line.hint) if line.text is None else ("not name#number<TAB>caption", line.text)
                yield bad_row(where, *cause)
            continue
        errors: list[tuple[str, str]] = []
        captions = read_captions(match["text"], None, match["name"], errors)
        # with lists of splits, what is on none of them is left out on purpose, as in every published result
        split = splits.get(match["name"], "unlisted") if splits else None
        yield Row(match["name"], tuple(captions), split, where, tuple(errors))


def read_folder(files: Files) -> Iterator[Row]:
    """Pictures with a .txt of the same name beside them, in folders or archives; the top folders may be splits."""
    texts: dict[str, list[tuple[Entry, str | None]]] = {}
    images: list[Entry] = []
    for entry in files.entries:
        stem, _, suffix = entry.path.rpartition(".")
        if f".{suffix.lower()}" in IMAGES:
            images.append(entry)
        elif suffix.lower() == "txt" and not _OTHERS.search(entry.path):
            plain, _, code = stem.rpartition(".")
            texts.setdefault(stem, []).append((entry, None))
            if code.lower() in CODES and "/" not in code:
                texts.setdefault(plain, []).append((entry, code.lower()))
    used: set[str] = set()
    tops = {word: SPLITS[word.lower()] for e in images for word in e.inner.split("/")[:-1] if word.lower() in SPLITS}
    for image in images:
        errors: list[tuple[str, str]] = []
        captions: list[Caption] = []
        beside = texts.get(image.path.rpartition(".")[0], [])
        for entry, language in beside:
            used.add(entry.path)
            try:
                data = files.read(entry)
            except FileError as error:
                errors.append(("caption file that can't be read", str(error)))
                continue
            for line in lines(data):
                if line.text is None:
                    errors.append(("not UTF-8", f"{entry.path}:{line.number}: {line.hint}"))
                elif line.text.strip():
                    captions += read_captions(line.text, language, f"{entry.path}:{line.number}", errors)
        if not captions and not errors:
            cause = ("empty caption", f"{beside[0][0].path} is empty") if beside else ("no caption file", "")
            errors.append(cause)
        split = None
        if "train" in tops.values():
            split = next((tops[word] for word in image.inner.split("/")[:-1] if word in tops), None)
        yield Row(image.path, tuple(captions), split, image.path, tuple(errors), key=image)
    for group in texts.values():
        for entry, _ in group:
            if entry.path not in used:
                used.add(entry.path)
                yield bad_row(entry.path, "missing picture", "a caption file without a picture")
