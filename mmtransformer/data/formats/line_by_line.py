"""Lists of pictures whose captions stand line by line in files beside them: Multi30k's, SBU's."""

import re
from collections.abc import Iterator

from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.cells import read_captions
from mmtransformer.data.files.columns import is_place
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.names import nfc
from mmtransformer.data.files.tables import ManifestRow, bad_row
from mmtransformer.data.files.text import CODES, lines
from mmtransformer.data.formats.lists import list_format

_PICTURES = re.compile(r"[._-]?(images?|urls?|files?|names)$")
_CAPTIONS = re.compile(r"[._-]?(captions?|texts?|sentences)$")


def line_files(files: Files, entry: Entry) -> list[tuple[Entry, str | None]]:
    """The files with the captions of a list of pictures, a line each, and their languages; [] if it is no such list.

    They are called like the list, but for the words for pictures and captions, and may end in a language: train.en and
    train.ko are those of train.txt, train_images.txt, and a_captions.txt that of a_urls.txt; in any folder.
    """
    head = [line.text for line in lines(files.read_text(entry)[:4096]) if line.text][:20]
    if not head or not all(is_place(text) and "\t" not in text for text in head[:-1] or head):
        return []
    name = _PICTURES.sub("", _plain(entry)[0])
    found: list[tuple[Entry, str | None]] = []
    for other in files.entries:
        stem, ending = _plain(other)
        code = ending if ending in CODES else None
        if (code or ending == "txt") and other.path != entry.path and _CAPTIONS.sub("", stem) == name:
            found.append((other, code))
    return [(other, code) for other, code in found if list_format(files.read_text(other)[:65536]) is None]


def read_line_by_line(files: Files, entry: Entry) -> Iterator[ManifestRow]:
    """The rows of a list of pictures, each with its line of every file of captions.

    Raises:
        ValueError: If no file of captions is there, or one has not as many lines.
    """
    names = list(lines(files.read_text(entry)))
    texts = [(other, code, list(lines(files.read_text(other)))) for other, code in line_files(files, entry)]
    if not texts:
        raise ValueError(f"{entry.path} lists pictures, and no file beside it has their captions line by line")
    for other, _, said in texts:
        if len(said) != len(names):
            raise ValueError(f"{entry.path} has {len(names)} lines and {other.path} {len(said)}: they go line by line")

    def rows() -> Iterator[ManifestRow]:
        for at, name in enumerate(names):
            where = f"{entry.path}:{at + 1}"
            if not name.text or not name.text.strip():
                yield bad_row(where, "no picture named", name.hint)
                continue
            errors: list[tuple[str, str]] = []
            captions = []
            for other, code, said in texts:
                if (text := said[at].text) is None:
                    errors.append(("not UTF-8", f"{other.path}:{at + 1}: {said[at].hint}"))
                else:
                    captions += read_captions(text, code, f"{other.path}:{at + 1}", errors)
            yield ManifestRow(name.text.strip(), tuple(captions), None, where, tuple(errors))

    return rows()


def _plain(entry: Entry) -> tuple[str, str]:
    """A file's name in lower case, without and of its ending."""
    stem, _, ending = nfc(entry.path).rpartition("/")[2].lower().rpartition(".")
    return stem, ending
