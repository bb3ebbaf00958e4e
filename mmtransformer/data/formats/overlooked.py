"""Files that lie among pictures and are not read, and what is said of them."""

from collections.abc import Container, Iterable, Iterator

from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.endings import IMAGES, OTHERS, TABLES, UNREAD, own_stem, plain_name
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.names import nfc
from mmtransformer.data.files.tables import sniff
from mmtransformer.data.files.text import lines
from mmtransformer.data.formats.json.text import load_json
from mmtransformer.data.formats.parquet import COLUMNAR
from mmtransformer.data.formats.readers import SUFFIXES

_LOOKED = 8  # pictures that are looked into
# by what stands in a file: XMP, IPTC and EXIF (Motorola's order of bytes, and Intel's), as exiftool calls them
_INSIDE = {
    (b"dc:description",): "Description",
    (b"8BIM", b"\x1c\x02\x78"): "Caption-Abstract",
    (b"Exif", b"\x01\x0e\x00\x02"): "ImageDescription",
    (b"Exif", b"\x0e\x01\x02\x00"): "ImageDescription",
}


def overlooked(files: Files, images: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Tables and the like that lie among pictures and are not read, each with what can be done about it.

    Of JSON in the files of single pictures, and of texts, nothing is said here.

    Args:
        files: All files.
        images: The paths of pictures, also of those without an ending; a file named like one belongs to it.
    """
    pictures = {*images, *(entry.path for entry in files.entries if entry.path.lower().endswith(IMAGES))}
    names = [nfc(path).rpartition(".")[0] for path in pictures]
    stems = {*names, *(name.rpartition("/")[2] for name in names)}
    logs = download_logs(files)
    for entry in files.entries:
        name = plain_name(entry.path)
        stem = own_stem(entry.path)
        if name.endswith(UNREAD) and not name.endswith(SUFFIXES) and not OTHERS.search(name) and stem not in stems:
            yield entry.path, unread(name)
        if (
            not name.endswith(SUFFIXES)
            or name.endswith(".txt")
            or stem in stems
            or (name.endswith(".json") and stem.rpartition("/")[2] in stems)
            or entry.path in logs
        ):
            continue
        if OTHERS.search(name) and not name.endswith((*TABLES, ".xlsx")):
            continue
        way = f"if it holds the captions, give it as the root: {files.root.name}/{entry.path}"
        if name.endswith(".json"):
            way = keys_of(files, entry)
        if name.endswith(TABLES):
            first = next((line.text for line in lines(files.read_text(entry)[:65536]) if line.text), "")
            cells = [cell.strip() for cell in first.split(sniff(first))]
            way = (
                f"its columns are {', '.join(cells[:8])}; {way}, and name its columns: --image-column, --caption-column"
            )
        yield entry.path, way


def unlisted(files: Files, images_in: Files, listed: Container[str]) -> list[str]:
    """The paths of pictures that no table lists, where tables were read.

    Of one table that was asked for by its name, none where another lies beside it, which may list them: val.csv.

    Args:
        files: What tables were looked for in.
        images_in: What pictures were looked for in.
        listed: The paths of pictures that a row names, in composed form.
    """
    if files.asked is not None and any(_may_list(files, entry) for entry in files.entries if entry != files.asked):
        return []
    found = [path for path in images_in.by_path if path not in listed and path.lower().endswith(IMAGES)]
    if not images_in.archives:
        return found
    # a picture that lies unpacked beside its archive, too
    unpacked = {path.rpartition("/")[2] for path, entry in images_in.by_path.items() if entry.archive < 0}
    return [p for p in found if images_in.by_path[p].archive < 0 or p.rpartition("/")[2] not in unpacked]


def _may_list(files: Files, entry: Entry) -> bool:
    """Whether a file may be a table, or JSON, of many pictures, by its name."""
    name = plain_name(entry.path)
    if not name.endswith(SUFFIXES) or name.endswith(".txt") or OTHERS.search(name):
        return False
    return own_stem(entry.path).rpartition("/")[2] not in files.image_ids


def keys_of(files: Files, entry: Entry) -> str:
    """What a JSON file in which no captions are found has for keys, and what to write."""
    try:
        data = load_json(files, entry)
    except ValueError as error:
        return str(error)
    keys = [str(key) for key in list(data)[:8]] if isinstance(data, dict) else []
    way = '; write [{"image": ..., "caption": ...}, ...]'
    notes = data.get("annotations") if isinstance(data, dict) else None
    if isinstance(notes, list) and notes and isinstance(notes[0], dict) and "bbox" in notes[0]:
        return f"boxes and classes, with the keys {', '.join(keys)}, and no captions{way}"
    what = f"its keys are {', '.join(keys)}, and no list below" if keys else "nothing in it"
    return f"{what} names pictures with captions{way}"


def unread(name: str) -> str:
    """What is said of a file of a kind that may hold captions and is not read.

    Args:
        name: Its name, in lower case.
    """
    return f"{name[name.rfind('.') :]} is not read: if it holds the captions, save them as CSV, JSON or .xlsx"


def download_logs(files: Files) -> set[str]:
    """Tables that a download tool wrote of each tar, or folder of pictures with texts, beside it and of its name."""
    tables = [entry.path for entry in files.entries if entry.archive < 0 and entry.path.lower().endswith(COLUMNAR)]
    if not tables:
        return set()
    tars = {path.removesuffix(".tar") for path in files.archives if path.endswith(".tar")}
    stems = {own_stem(e.path) for e in files.entries if e.archive < 0 and e.path.lower().endswith((".txt", ".json"))}
    pictures = [nfc(e.path).rpartition(".")[0] for e in files.entries if e.path.lower().endswith(IMAGES)]
    tars |= {str(files.root / stem.rpartition("/")[0]) for stem in pictures if "/" in stem and stem in stems}
    return {path for path in tables if str((files.root / path).with_suffix("")) in tars}


def captions_inside(files: Files) -> Iterator[tuple[str, str]]:
    """One of the first pictures, where these may hold descriptions of their own, and how to get at them."""
    for entry in [entry for entry in files.entries if entry.path.lower().endswith(IMAGES)][:_LOOKED]:
        head = files.read(entry)[:65536]
        if tag := next((tag for marks, tag in _INSIDE.items() if all(mark in head for mark in marks)), None):
            yield entry.path, f"cd {files.root.name} && exiftool -csv -r -{tag} . > captions.csv writes a table to read"
            return
