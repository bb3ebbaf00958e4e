"""Lists of pictures without a header: a name, what divides it from its caption, and the caption, a line each."""

import re
from collections.abc import Collection, Iterator

from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.cells import read_captions
from mmtransformer.data.files.columns import looks_like_image
from mmtransformer.data.files.endings import IMAGES, own_stem
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.names import nfc
from mmtransformer.data.files.tables import ManifestRow, bad_row
from mmtransformer.data.files.text import SPLITS, lines, split_word

_TOKEN = re.compile(r"(?P<name>[^\t]+\.\w{3,4})(?:\.\d)?#(?P<index>\d+)\t(?P<text>.*)", re.DOTALL)
_ENDS = "|".join(ending[1:] for ending in IMAGES)
_LINE = re.compile(
    rf"(?P<name>[^\t\"]*?[^\t\"/\\]\.(?:{_ENDS}))(?:\.\d)?(?:\s*#\s*\d+)?(?:\s*[\t|]\s*#?\d+(?=\s*[\t|]))?"
    r"(?P<mark>\s*[\t|,;:]\s*|\s+)(?P<text>\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_ID = re.compile(r"(?P<name>[^\t,|/\\ ]+?)(?:#\d+)?(?P<mark>\t)\s*(?P<text>[^\t]*\S[^\t]*)")  # with no ending
_SPLIT_LIST = re.compile(r"(^|[._])(train|dev|val|test)_?images\.txt$", re.IGNORECASE)
_SOME = 20  # lines that tell what a file is


def list_format(head: bytes, ids: Collection[str] = ()) -> str | None:
    """Whether a text, by its first lines, is "flickr" ("name.jpg#0<TAB>caption") or another "list"; None if neither.

    Every line of a list begins with the name of a picture, and words follow: numbers alone (of classes, or boxes) are
    no captions, nor are single words behind a space (names of classes). Columns in the middle, but for a caption's
    number, make a table that needs a header. In a list with tabs, the names may lack their endings.

    Args:
        head: The beginning of the text.
        ids: The names of the pictures there are, without their endings.
    """
    some = [line.text for line in lines(head) if line.text and line.text.strip()][:_SOME]
    if some and _TOKEN.fullmatch(some[0]):
        return "flickr"
    by_id = [match for line in some if (match := _ID.fullmatch(line))]
    if some and len(by_id) == len(some) and sum(match["name"] in ids for match in by_id) * 2 >= len(some):
        words = sum(" " in match["text"] or not match["text"].isascii() for match in by_id)
        return "list" if 2 * words >= len(some) else None
    found = [match for line in some if (match := _LINE.fullmatch(line))]
    if not found or 10 * len(found) < 9 * len(some) or not _LINE.fullmatch(some[0]):
        return None
    marks, texts = [match["mark"].strip(" ") for match in found], [match["text"].strip() for match in found]
    words = sum(sum(map(str.isalpha, text)) > 1 and not looks_like_image(text) for text in texts)
    if 2 * words < len(texts):
        return None
    if not any(marks):
        return "list" if 2 * sum(" " in text for text in texts) >= len(texts) else None
    mark = max(marks, key=marks.count)
    cells = {len(re.findall(re.escape(mark) + "(?! )", text)) for text in texts if '"' not in text}  # "a dog, asleep"
    return None if mark and cells == {min(cells, default=0)} != {0} else "list"


def read_splits(files: Files) -> tuple[dict[str, str], set[str]]:
    """The splits that lists of pictures say, a name a line: train.txt and val.txt, Flickr_8k.trainImages.txt.

    Returns:
        The splits by the pictures' names, without folders and endings; and the paths of the lists, also of those whose
        names say no split. No splits at all, unless one of several is that for training.
    """
    splits: dict[str, str] = {}
    lists: set[str] = set()
    for entry in files.entries:
        last = nfc(entry.path).rpartition("/")[2]
        stem = own_stem(last)
        if not last.lower().endswith(".txt") or {stem, stem.rpartition(".")[0]} & files.image_ids:
            continue  # a.txt and a.ko.txt of a.jpg
        match, split = _SPLIT_LIST.search(last), split_word(last)
        head = [_id(line.text) for line in lines(files.read_text(entry)[:4096]) if line.text][:_SOME]
        if not head or (match is None and not all(name in files.image_ids for name in head[:-1] or head)):
            continue
        lists.add(entry.path)
        if match is not None or split is not None:
            names = (_id(line.text) for line in lines(files.read_text(entry)) if line.text)
            splits |= dict.fromkeys(names, SPLITS[match[2].lower()] if match else split or "")
    return splits if "train" in splits.values() and len({*splits.values()}) > 1 else {}, lists


def _id(line: str) -> str:
    name = line.strip().replace("\\", "/").rpartition("/")[2]
    return name.rpartition(".")[0] if looks_like_image(name) else name


def read_list(files: Files, entry: Entry) -> Iterator[ManifestRow]:
    """The rows of a list; lists of splits beside it, as Flickr8k's authors hand them out, count."""
    splits, _ = read_splits(files)
    for line in lines(files.read_text(entry)):
        where = f"{entry.path}:{line.number}"
        match = next(filter(None, (form.fullmatch(line.text or "") for form in (_TOKEN, _LINE, _ID))), None)
        if match is None:
            if line.text is None or line.text.strip():
                cause = ("not UTF-8", line.hint) if line.text is None else ("not name<TAB>caption", line.text)
                yield bad_row(where, *cause)
            continue
        errors: list[tuple[str, str]] = []
        notes: list[tuple[str, str]] = []
        name, text = match["name"].strip(), match["text"].strip()
        if len(text) > 1 and text[0] == text[-1] == '"':
            text = text[1:-1].replace('""', '"')
        captions = read_captions(text, None, name, errors, notes)
        # with lists of splits, what is on none of them is left out on purpose, as in every published result
        split = splits.get(_id(name), "unlisted") if splits else None
        yield ManifestRow(name, tuple(captions), split, where, tuple(errors), tuple(notes))
