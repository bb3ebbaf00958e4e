"""The formats that image-text pairs come in: which one a root holds, and a reader for each.

- folder: pictures, each with a .txt or .caption of the same name (cat.jpg, cat.txt or cat.ko.txt), one caption a line
- csv: CSV, TSV and the like, with or without a header; also as .txt
- jsonl: one JSON object a line
- json: a list of such objects, or a mapping from picture to caption(s)
- coco: COCO captions: {"images": [...], "annotations": [...]}
- karpathy: Karpathy's {"images": [{"filename", "split", "sentences": [{"raw"}]}]}
- flickr: the authors' Flickr8k.token.txt ("name.jpg#0<TAB>caption") with its lists of splits
- parquet: a table with the pictures' bytes or paths
- arrow: the same as `datasets.save_to_disk` writes it
- excel: a workbook (.xlsx), its first sheet with such columns

Conversations with one question (LLaVA's, chats') and tasks of Label Studio are read as jsonl or json.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, get_args

from mmtransformer.data.files.archives import MAX_BYTES, FileError, Files
from mmtransformer.data.files.endings import IMAGES, PACKED_TEXTS, TABLES, TEXTS, plain_name
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.names import nfc
from mmtransformer.data.files.read_options import Format, Wanted
from mmtransformer.data.files.tables import (
    Columns,
    ManifestRow,
    bad_row,
    find_columns,
    read_captions,
    read_table,
    sniff,
)
from mmtransformer.data.files.text import CODES, SPLITS, lines, split_word
from mmtransformer.data.formats.columnar import read_columnar
from mmtransformer.data.formats.json_files import (
    json_format,
    json_lines,
    load_json,
    read_coco,
    read_karpathy,
    read_records,
)
from mmtransformer.data.formats.parquet import ARROW, COLUMNAR
from mmtransformer.data.loading.source import Caption

SUFFIXES = (*TEXTS, *PACKED_TEXTS, ".xlsx", ".parquet", *ARROW)
# files that lie beside manifests and hold no captions
OTHERS = re.compile(
    r"(^|/)(readme|licen[cs]e|notice|classes|labels|requirements|config|instances_|person_keypoints_|panoptic_|stuff_"
    r"|image_info_|dataset_?(info|dict)|state\.json|package|tokenizer|bad_images|(cache|tmp)[^/]*\.arrow)[^/]*$",
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


def overlooked(files: Files, images: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Tables and the like that lie among pictures and are not read, each with what can be done about it.

    Args:
        files: All files.
        images: The paths of the pictures; a file named like one belongs to it.
    """
    stems = {nfc(path).rpartition(".")[0] for path in images}
    for entry in files.entries:
        name = plain_name(entry.path)
        if (
            not name.endswith(SUFFIXES)
            or name.endswith((".txt", ".json"))
            or nfc(entry.path).rpartition(".")[0] in stems
        ):
            continue
        if OTHERS.search(name) and not name.endswith((*TABLES, ".xlsx")):
            continue
        way = f"if it holds the captions, give it as the root: {files.root.name}/{entry.path}"
        if name.endswith(TABLES):
            first = next((line.text for line in lines(files.read_text(entry)[:65536]) if line.text), "")
            cells = [cell.strip() for cell in first.split(sniff(first))]
            way = (
                f"its columns are {', '.join(cells[:8])}; {way}, and name its columns: --image-column, --caption-column"
            )
        yield entry.path, way


def find_manifests(files: Files, format: str = "auto", wanted: Wanted | None = None) -> list[Manifest]:
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
    wanted = wanted or Wanted()
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
    found = _candidates(files, in_folders, 0, format, wanted)
    if not found:
        found = [m for group in _by_archive(files) for m in _candidates(files, *group, format, wanted)]
    if not found and format == "auto":
        found = [Manifest(entry, "csv") for entry in in_folders if _is_table(files, entry, wanted)]
    if not found and format in ("auto", "parquet", "arrow"):
        found = [m for e in in_folders if (m := _columnar(files, e, wanted)) and format in ("auto", m.format)]
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


def _columnar(files: Files, entry: Entry, wanted: Wanted) -> Manifest | None:
    """A table of Parquet or Arrow, wherever it lies, if it has pictures and captions and is no log of a tar."""
    name = entry.path.lower()
    tar = f"{(files.root / entry.path).with_suffix('')}.tar"
    if not name.endswith(COLUMNAR) or OTHERS.search(name) or tar in files.archives:
        return None
    try:
        read_columnar(files, entry, wanted)
    except ValueError:
        return None
    return Manifest(entry, "arrow" if name.endswith(ARROW) else "parquet")


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


def _is_table(files: Files, entry: Entry, wanted: Wanted) -> bool:
    """Whether a file is a table with a column of pictures and one of captions: the user's, or known by their names."""
    if not plain_name(entry.path).endswith(TABLES) or entry.size > MAX_BYTES:
        return False
    first = next((line.text for line in lines(files.read_text(entry)[:65536]) if line.text), "")
    try:
        find_columns([cell.strip().strip('"') for cell in first.split(sniff(first))], wanted, entry.path)
    except ValueError:
        return False
    return True


def _candidates(files: Files, entries: Sequence[Entry], skip: int, format: str, wanted: Wanted) -> list[Manifest]:
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
        name = plain_name(parts[-1])
        inside = len(parts) == 1 or (
            len(parts) == 2 and (parts[0].lower() in ("annotations", "data") or parts[0].lower() in SPLITS)
        )
        if files.selected is not None:
            inside = inside or files.split_of(entry) is not None or name.endswith((".parquet", *ARROW))
        if inside and OTHERS.search(name):  # "labels.csv" may be the captions
            found += [Manifest(entry, "csv")] if format in ("auto", "csv") and _is_table(files, entry, wanted) else []
        elif inside and name.endswith(SUFFIXES):
            kind = _format_of(files, entry)
            if kind is not None and (format in ("auto", kind)):
                found.append(Manifest(entry, kind))
    return found


def _format_of(files: Files, entry: Entry, alone: bool = False) -> str | None:
    """The format of a file by its name and its content; None if it is no manifest."""
    name = plain_name(entry.path)
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(ARROW):
        return "arrow"
    if name.endswith(".xlsx"):
        return "excel"
    if name.endswith(TABLES):
        return "csv"
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    if name.endswith((".txt", ".token")):
        if "lemma" in name.rpartition("/")[2] or entry.size > 1 << 28:
            return None
        first = next((line.text for line in lines(files.read_text(entry)[:65536]) if line.text), "")
        if _TOKEN.fullmatch(first):
            return "flickr"
        try:
            # a .txt is a table if its first line names its columns
            find_columns([cell.strip() for cell in first.split(sniff(first))], Wanted(), name)
        except ValueError:
            return "csv" if alone else None
        return "csv"
    if not name.endswith(".json"):
        return "jsonl" if alone and files.read_text(entry)[:1] == b"{" else "csv" if alone else None
    return json_format(load_json(files, entry))


def read_manifest(files: Files, manifest: Manifest, wanted: Wanted) -> tuple[Columns | None, Iterator[ManifestRow]]:
    """Opens a manifest of any format.

    Returns:
        The columns it is read by (None where the format fixes them), and its rows.
    """
    entry, name = manifest.entry, manifest.entry.path
    if manifest.format == "csv":
        return read_table(files.read_text(entry), name, wanted)
    if manifest.format == "jsonl":
        return read_records(json_lines(files.read_text(entry), name), name, wanted)
    if manifest.format == "flickr":
        return None, _flickr(files, entry)
    if manifest.format in ("parquet", "arrow"):
        return read_columnar(files, entry, wanted)
    if manifest.format == "excel":
        from mmtransformer.data.formats.excel import read_excel

        return read_excel(files, entry, wanted)
    data = load_json(files, entry)
    if (found := json_format(data)) != manifest.format:
        raise ValueError(f"{name} is not {manifest.format}" + (f"; it looks like {found}" if found else ""))
    if manifest.format == "coco":
        return None, read_coco(data, name)
    if manifest.format == "karpathy":
        return None, read_karpathy(data, name)
    if isinstance(data, dict):
        data = [{"image": key, "captions": value} for key, value in data.items()]
    return read_records(((f"{name}[{i}]", item, "") for i, item in enumerate(data)), name, wanted)


def _flickr(files: Files, entry: Entry) -> Iterator[ManifestRow]:
    splits: dict[str, str] = {}
    for other in files.entries:
        if other.archive == entry.archive and (match := _SPLIT_LIST.search(other.path)):
            for line in lines(files.read_text(other)):
                splits[(line.text or "").strip()] = SPLITS[match[2].lower()]
    for line in lines(files.read_text(entry)):
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
        yield ManifestRow(match["name"], tuple(captions), split, where, tuple(errors))


def read_folder(files: Files) -> Iterator[ManifestRow]:
    """Pictures with a .txt of the same name beside them, in folders or archives."""
    texts: dict[str, list[tuple[Entry, str | None]]] = {}
    images: list[Entry] = []
    for entry in files.entries:
        stem, _, suffix = nfc(entry.path).rpartition(".")
        if f".{suffix.lower()}" in IMAGES:
            images.append(entry)
        elif suffix.lower() in ("txt", "caption") and not OTHERS.search(entry.path):
            plain, _, code = stem.rpartition(".")
            texts.setdefault(stem, []).append((entry, None))
            if code.lower() in CODES and "/" not in code:
                texts.setdefault(plain, []).append((entry, code.lower()))
    used: set[str] = set()
    for image in images:
        errors: list[tuple[str, str]] = []
        captions: list[Caption] = []
        beside = texts.get(nfc(image.path).rpartition(".")[0], [])
        for entry, language in beside:
            used.add(entry.path)
            try:
                data = files.read_text(entry)
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
        split = files.split_of(image)
        yield ManifestRow(image.path, tuple(captions), split, image.path, tuple(errors), key=image)
    for group in texts.values():
        for entry, _ in group:
            if entry.path not in used:
                used.add(entry.path)
                yield bad_row(entry.path, "missing picture", "a caption file without a picture")
