"""The formats that image-text pairs come in, and which one a root holds; `readers` has a reader for each.

- folder: pictures, each with a .txt, .caption or .json of the same name (cat.jpg, cat.txt or cat.ko.txt), one caption
  a line, beside it or in a folder beside its own
- csv: CSV, TSV and the like, with or without a header; also as .txt
- jsonl: one JSON object a line
- json: a list of such objects, also below a key ({"data": [...]}) or a key a split; a mapping from picture to
  caption(s); a table by column, as data frames write it
- coco: COCO captions: {"images": [...], "annotations": [...]}
- karpathy: Karpathy's {"images": [{"filename", "split", "sentences": [{"raw"}]}]}
- flickr: the authors' Flickr8k.token.txt ("name.jpg#0<TAB>caption") with its lists of splits
- list: other lists without a header: "name.jpg<TAB>caption", "name.jpg caption", "name.jpg|0|caption"
- lines: a list of pictures alone, and beside it files with their captions line by line: train_images.txt, train.en
- parquet: a table with the pictures' bytes or paths
- arrow: the same as `datasets.save_to_disk` writes it
- excel: a workbook (.xlsx), all of its sheets with such columns

Conversations with one question (LLaVA's, chats') and tasks of Label Studio are read as jsonl or json.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, get_args

from mmtransformer.data.files.archives import MAX_BYTES, Files
from mmtransformer.data.files.columns import find_columns
from mmtransformer.data.files.endings import IMAGES, OTHERS, TABLES, UNREAD, own_stem, plain_name
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.names import nfc
from mmtransformer.data.files.read_options import ColumnNames, Format
from mmtransformer.data.files.tables import sniff, split_cells
from mmtransformer.data.files.text import SPLITS, lines, split_word
from mmtransformer.data.formats.columnar import read_columnar
from mmtransformer.data.formats.json.shapes import fits, json_shape
from mmtransformer.data.formats.json.text import json_lines, load_json
from mmtransformer.data.formats.line_by_line import line_files
from mmtransformer.data.formats.lists import list_format
from mmtransformer.data.formats.overlooked import download_logs, keys_of, unread
from mmtransformer.data.formats.parquet import ARROW, COLUMNAR
from mmtransformer.data.formats.readers import BY_SUFFIX, SUFFIXES

# in the names of files that say what those without it say: Flickr8k.lemma.token.txt
_AGAIN = re.compile(r"[._-](lemma|tokeni[sz]ed|gt|meta)(?=[._-][^/]*$)", re.IGNORECASE)


class Manifest(NamedTuple):
    """One file that names pictures and captions.

    Attributes:
        entry: The file.
        format: One of `FORMATS`.
        split: The split that its own name says, if it is one of several.
    """

    entry: Entry
    format: str
    split: str | None = None

    @property
    def base(self) -> str:
        """The folder, or archive, that its names are relative to."""
        return self.entry.path.rpartition("/")[0]


def find_manifests(files: Files, format: str = "auto", wanted: ColumnNames | None = None) -> list[Manifest]:
    """The manifests in the root, or in a lone folder inside it, or else inside its archives; [] for a folder of pairs.

    Looked at: the top level, and the folders annotations/, data/ and those with the name of a split; where nothing lies
    there, all folders, for a table with a column of pictures and one of captions, or for Parquet and Arrow.

    Args:
        files: All files.
        format: The format that is asked for.
        wanted: Columns that the user named: a table that has them is meant, whatever it is called.

    Raises:
        ValueError: If there are several that don't belong together, or the asked format isn't there.
    """
    wanted = wanted or ColumnNames()
    if format not in get_args(Format):
        raise ValueError(f'format: unknown value "{format}"; choose one of {", ".join(get_args(Format))}')
    if format == "folder":
        return []
    if files.asked is not None:
        name = plain_name(files.asked.path)
        if name.endswith(IMAGES):
            way = "give the folder that it lies in with its captions, or the table that names it"
            raise ValueError(
                f"{files.root / files.asked.path} is a picture, and pairs are pictures with captions: {way}"
            )
        if name.endswith(UNREAD) and not name.endswith(SUFFIXES):
            raise ValueError(f"{files.root / files.asked.path}: {unread(name)}")
        kind = _format_of(files, files.asked, wanted, alone=True) if format == "auto" else format
        if kind is None:
            path = files.root / files.asked.path
            if plain_name(path.name).endswith(".json"):
                raise ValueError(f"{path}: {keys_of(files, files.asked)}")
            raise ValueError(f"{path} holds no captions of a known format; name it: format=...")
        return [Manifest(files.asked, kind)]
    in_folders = [entry for entry in files.entries if entry.archive < 0]
    logs = download_logs(files)
    found = _candidates(files, in_folders, 0, format, wanted)
    if not found:
        found = [m for group in _by_archive(files) for m in _candidates(files, *group, format, wanted)]
    if not found and format == "auto":
        found = [m for entry in in_folders if (m := _anywhere(files, entry, wanted)) is not None]
    if not found and format in ("auto", "parquet", "arrow"):
        tables = [m for e in in_folders if e.path not in logs and (m := _columnar(files, e, wanted))]
        found = [m for m in tables if format in ("auto", m.format)]
    found = _meant(files, found, wanted) if len(found) > 1 else found
    if format != "auto" and not found:
        raise ValueError(f"{files.root} holds no {format} manifest")
    if len(found) < 2:
        return [m._replace(split=files.split_of(m.entry)) for m in found]
    if len({m.format for m in found}) == 1:
        named = [m._replace(split=files.split_of(m.entry) or _own_split(m)) for m in found]
        if all(m.split for m in named) or found[0].format in ("parquet", "arrow"):
            return named
    listing = ", ".join(f"{m.entry.path} ({m.format})" for m in found[:8])
    raise ValueError(
        f"{files.root} holds {len(found)} manifests that don't belong together: {listing}. Give one of them as the root"
        + (", or the format" if len({m.format for m in found}) > 1 else "")
    )


def _meant(files: Files, found: list[Manifest], wanted: ColumnNames) -> list[Manifest]:
    """Those of several that are meant: none without captions, and none that says those of another once more."""
    paths = {m.entry.path for m in found}
    again = {m.entry.path for m in found if (plain := _AGAIN.sub("", m.entry.path)) != m.entry.path and plain in paths}
    files.refused |= dict.fromkeys(again, "what another file says, once more: as words, or with notes")
    found = [m for m in found if m.entry.path not in again]
    told = [m for m in found if _says(files, m, wanted)] or found
    files.refused |= dict.fromkeys((m.entry.path for m in found if m not in told), "names no pictures with captions")
    return told


def _says(files: Files, manifest: Manifest, wanted: ColumnNames) -> bool:
    """Whether a manifest names pictures and captions by its content, where its format may be that of something else."""
    if manifest.format == "csv":
        return _has_columns(files.read_text(manifest.entry)[:65536], wanted)
    if manifest.format != "json":
        return True
    shape = json_shape(load_json(files, manifest.entry), wanted, files.image_ids)
    return shape is not None and fits(shape.data, wanted)


def _columnar(files: Files, entry: Entry, wanted: ColumnNames) -> Manifest | None:
    """A table of Parquet or Arrow, wherever it lies, if it has pictures and captions and is no log of a tar."""
    name = entry.path.lower()
    if not name.endswith(COLUMNAR) or OTHERS.search(name):
        return None
    try:
        read_columnar(files, entry, wanted)
    except ValueError:
        return None
    return Manifest(entry, "arrow" if name.endswith(ARROW) else "parquet")


def _own_split(manifest: Manifest) -> str | None:
    """The split that a manifest's name says, or that of the nearest folder that says one."""
    return next(filter(None, map(split_word, reversed(manifest.entry.path.split("/")))), None)


def _by_archive(files: Files) -> list[tuple[list[Entry], int]]:
    """The files of each archive, and how many of their path parts are the archive's own path."""
    archives: dict[int, list[Entry]] = {}
    for entry in files.entries:
        if entry.archive >= 0:
            archives.setdefault(entry.archive, []).append(entry)
    return [(group, group[0].path.count("/") - group[0].inner.count("/")) for group in archives.values()]


def _anywhere(files: Files, entry: Entry, wanted: ColumnNames) -> Manifest | None:
    """A table, a list or JSON in any folder, if its own content says that it has pictures and captions."""
    name = plain_name(entry.path)
    if _is_table(files, entry, wanted):
        return Manifest(entry, "csv")
    if OTHERS.search(name):
        kind = _of_labels(files, entry, wanted)
        return Manifest(entry, kind) if kind else None
    if not name.endswith((".txt", ".json", ".jsonl", ".ndjson")) or entry.size > MAX_BYTES:
        return None
    if nfc(entry.path).rpartition("/")[2].partition(".")[0] in files.image_ids:
        return None
    if name.endswith(".txt"):
        found = list_format(files.read_text(entry)[:65536], files.image_ids)
        found = "lines" if found is None and line_files(files, entry) else found
        return Manifest(entry, found) if found else None
    try:
        if not name.endswith(".json"):
            return Manifest(entry, "jsonl") if _of_lines(files, entry, wanted) else None
        shape = json_shape(load_json(files, entry), wanted, files.image_ids)
    except ValueError:
        return None
    sure = shape is not None and (shape.format != "json" or fits(shape.data, wanted))
    return Manifest(entry, shape.format) if shape and sure else None


def _is_table(files: Files, entry: Entry, wanted: ColumnNames) -> bool:
    """Whether a file is a table with a column of pictures and one of captions: the user's, or known by their names."""
    if not plain_name(entry.path).endswith(TABLES) or entry.size > MAX_BYTES:
        return False
    return _has_columns(files.read_text(entry)[:65536], wanted)


def _candidates(files: Files, entries: Sequence[Entry], skip: int, format: str, wanted: ColumnNames) -> list[Manifest]:
    tops = {entry.path.split("/")[skip] for entry in entries}
    lone = len(tops) == 1 and bool(entries) and all(entry.path.count("/") > skip for entry in entries)
    # a file named like a picture belongs to it; a table named like a tar is the log of a download tool
    stems = {nfc(e.path).rpartition(".")[0] for e in entries if e.path.lower().endswith(IMAGES)}
    own = files.image_ids  # of pictures, which have files of their names elsewhere, as in another archive
    several = sum(own_stem(e.path).rpartition("/")[2] in own for e in entries if e.path.lower().endswith(".json")) > 1
    logs = download_logs(files)
    found: list[Manifest] = []
    for entry in entries:
        stem = own_stem(entry.path)
        if stem in stems or stem.rpartition(".")[0] in stems or entry.path in logs:
            continue
        parts = entry.path.split("/")[skip + lone :]
        name = plain_name(parts[-1])
        if (len(parts) > 1 or several) and name.endswith((".txt", ".json")) and stem.rpartition("/")[2] in own:
            continue
        inside = len(parts) == 1 or (
            len(parts) == 2 and (parts[0].lower() in ("annotations", "data") or parts[0].lower() in SPLITS)
        )
        if files.selected is not None:
            inside = inside or files.split_of(entry) is not None or name.endswith((".parquet", *ARROW))
        if inside and OTHERS.search(name):  # "labels.csv" may be the captions
            kind = "csv" if _is_table(files, entry, wanted) else _of_labels(files, entry, wanted)
            found += [Manifest(entry, kind)] if kind is not None and format in ("auto", kind) else []
        elif inside and name.endswith(SUFFIXES):
            kind = _format_of(files, entry, wanted)
            if kind is not None and (format in ("auto", kind)):
                found.append(Manifest(entry, kind))
    return found


def _of_labels(files: Files, entry: Entry, wanted: ColumnNames) -> str | None:
    """The format of JSON called like something else ("labels.json") that gives captions to pictures without texts."""
    name = plain_name(entry.path)
    if not name.endswith((".json", ".jsonl", ".ndjson")) or entry.size > MAX_BYTES or files.own_texts:
        return None
    if not name.endswith(".json"):
        return _of_lines(files, entry, wanted)
    try:
        data = load_json(files, entry)
    except ValueError:
        return None
    shape = json_shape(data, wanted, files.image_ids)
    if shape is None or (shape.format == "json" and not fits(shape.data, wanted)):
        return None
    if shape.format == "json" and isinstance(data, dict) and not shape.key:  # its own keys are pictures, or columns
        named = {str(key).rpartition("/")[2].rpartition(".")[0] for key in map(nfc, data)}
        if len(named & files.image_ids) * 2 < len(named):
            return None
    return shape.format


def _of_lines(files: Files, entry: Entry, wanted: ColumnNames) -> str | None:
    """The format "jsonl", of lines of which the first names a picture and its caption."""
    first = next((value for _, value, error in json_lines(files.read_text(entry)[:65536], "") if not error), 0)
    return "jsonl" if fits([first], wanted) else None


def _format_of(files: Files, entry: Entry, wanted: ColumnNames, alone: bool = False) -> str | None:
    """The format of a file by its name and its content; None if it is no manifest."""
    name = plain_name(entry.path)
    if (known := next((suffix for suffix in BY_SUFFIX if name.endswith(suffix)), None)) is not None:
        return BY_SUFFIX[known]
    if name.endswith(TABLES):
        return _table_format(files.read_text(entry)[:65536])
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    if name.endswith((".txt", ".token")):
        if "lemma" in name.rpartition("/")[2] or entry.size > 1 << 28:
            return None
        head = files.read_text(entry)[:65536]
        if (found := list_format(head, files.image_ids)) is not None:
            return found
        if line_files(files, entry):
            return "lines"
        # a .txt is a table if its first line names its columns
        return "csv" if alone or _has_columns(head, wanted) else None
    if not name.endswith(".json"):
        return "jsonl" if alone and files.read_text(entry)[:1] == b"{" else "csv" if alone else None
    shape = json_shape(load_json(files, entry), wanted, files.image_ids)
    return shape and shape.format


def _table_format(head: bytes) -> str:
    """Whether a table is one, or a list without a header whose captions, not in quotes, have its mark in them."""
    first = next((line.text for line in lines(head) if line.text), "")
    cells = split_cells(first, sniff(first))
    return (cells is not None and len(cells) > 2 and list_format(head)) or "csv"


def _has_columns(head: bytes, wanted: ColumnNames) -> bool:
    """Whether the first line of a text names a column of pictures and one of captions."""
    first = next((line.text for line in lines(head) if line.text), "")
    try:
        find_columns([cell.strip().strip('"') for cell in first.split(sniff(first))], wanted, "")
    except ValueError:
        return False
    return True
