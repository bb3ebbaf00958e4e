"""What files are by the endings of their names: pictures, archives, compressed texts, and what must be unpacked."""

import bz2
import gzip
import io
import lzma
import re
import zlib

from mmtransformer.data.files.names import nfc

ARCHIVES = (".zip", ".tar")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
IMAGES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm",
    ".pbm", ".pnm", ".jp2", ".j2k", ".heic", ".heif",
)  # fmt: skip
TABLES = (".csv", ".tsv", ".tab", ".psv")
TEXTS = (*TABLES, ".jsonl", ".ndjson", ".json", ".txt", ".token")
"""Files that may hold captions and are texts; they may be compressed each by itself."""
UNREAD = (
    ".xls", ".ods", ".numbers", ".hwp", ".hwpx", ".doc", ".docx", ".xml", ".yaml", ".yml", ".pkl", ".pickle", ".npy",
    ".npz", ".db", ".sqlite", ".sqlite3", ".h5", ".hdf5", ".mat", ".tfrecord", ".mdb", ".avro", ".orc", ".rtf",
)  # fmt: skip
"""Files that may hold captions and are not read."""
OTHERS = re.compile(
    r"(^|/)(readme|licen[cs]e|notice|classes|labels|requirements|config|instances_|person_keypoints_|panoptic_|stuff_"
    r"|image_info_|dataset_?(info|dict)|state\.json|\d+_stats\.json|package|tokenizer|bad_images|thumbs(_\w+)?\.db|(cache|tmp)[^/]*\.arrow)[^/]*$",
    re.IGNORECASE,
)
"""Files that lie beside manifests and hold no captions."""
SMALL_BYTES, MOST_RATIO = 1 << 26, 64  # bytes that any file may have, and how far a larger one may be packed
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED_TEXTS = tuple(text + ending for text in TEXTS for ending in _OPENERS)
_FOREIGN = {
    ".rar": "RAR", ".7z": "7-Zip", ".alz": "ALZip", ".egg": "ALZip", ".zipx": "ZIPX", ".lzh": "LHA", ".cab": "CAB",
    ".zst": "Zstandard", ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz",
}  # fmt: skip
# a picture's own file, named after all of it: cat.jpg.txt, Google's cat.jpg.supplemental-metadata.json (cut at 46)
_AFTER = re.compile(rf"({'|'.join(map(re.escape, IMAGES))})(?:\.s[a-z-]*)?(\(\d+\))?\Z", re.IGNORECASE)
_PART = re.compile(r"(.+\.(?:zip|tar|7z|rar|alz|egg|gz|tgz))\.(?:part)?\d+|(.+)\.(?:z\d\d|r\d\d|part\d+\.rar)")


def plain_name(path: str) -> str:
    """A path in lower case, a compressed text's without what says so: "a.csv" for "A.csv.gz"."""
    name = path.lower()
    return name.rpartition(".")[0] if name.endswith(PACKED_TEXTS) else name


def picture_of(path: str) -> str | None:
    """The picture that a file is named after with its ending: "a.jpg" for "a.jpg.txt"; None of others.

    Google's "a.jpg.supplemental-metadata(1).json" is that of "a(1).jpg".
    """
    stem = path.rpartition(".")[0]
    found = _AFTER.search(stem) if "." in stem else None
    return f"{stem[: found.start()]}{found[2] or ''}{found[1]}" if found else None


def own_stem(path: str) -> str:
    """The path, in composed Unicode, of what a file is named after, without ending: "a" for "a.txt" and "a.jpg.txt"."""
    path = nfc(path)
    return (picture_of(path) or path).rpartition(".")[0]


def unpack_hint(path: str) -> str | None:
    """Why an archive can't be read in place, with what to do; None of what is none, or can be."""
    name = path.lower().rpartition("/")[2]
    if name.endswith(COMPRESSED):
        return "compressed as a whole, so it can't be read in place: repack it as .tar or .zip"
    if part := _PART.fullmatch(name):
        whole = f"{part[1]}.part* > {part[1]}" if ".part" in name and part[1] else ""
        return "a part of an archive in several: put them together" + f" (cat {whole})" * bool(whole) + " and unpack it"
    kind = None if name.endswith(PACKED_TEXTS) else _FOREIGN.get(name[name.rfind(".") :] if "." in name else "")
    return None if kind is None else f"packed by {kind}, which can't be read in place: unpack it, or repack it as .zip"


def unpacked(data: bytes, path: str) -> bytes:
    """The bytes of a text, of a compressed one what it holds.

    Raises:
        ValueError: If it is damaged, cut short, or far larger than a text that is packed so small.
    """
    if not path.lower().endswith(PACKED_TEXTS):
        return data
    limit = max(SMALL_BYTES, MOST_RATIO * len(data))
    try:
        with _OPENERS[path[path.rfind(".") :].lower()](io.BytesIO(data)) as file:
            found = file.read(limit + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); get the file again") from None
    if len(found) > limit:
        raise ValueError(f"{path}: more than {limit:,} bytes out of {len(data):,}: a bomb, or nothing but one byte")
    return found
