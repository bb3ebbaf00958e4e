"""Interleaved documents in files: JSON lines of texts with pictures anywhere in them. A `DocumentSource`.

One object a line, in any of three forms:

    {"text": "Tea <image> and coffee <image>.", "images": ["tea.jpg", "coffee.jpg"]}
    {"texts": ["Tea", null, "and coffee", null], "images": [null, "tea.jpg", null, "coffee.jpg"]}      (OBELICS)
    {"text_list": ["Tea.", "Coffee."], "image_info": [{"image_name": "tea.jpg", "matched_text_index": 0}]}   (MMC4)

with "id", "language" and "split" where the data says them. Pictures are files below the root or members of archives
there; a name that leaves the root is refused, and nothing is downloaded.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from mmtransformer.data.documents.document_records import MARK, LineError, LineNote, document_files, read_pieces
from mmtransformer.data.documents.documents import Document
from mmtransformer.data.files.archives import FileError, Files, remedy
from mmtransformer.data.files.finder import Finder
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.normalize import find_split, normalize_languages, normalize_splits
from mmtransformer.data.files.read_options import check_share
from mmtransformer.data.files.text import (
    CONTROLS,
    is_broken,
    is_missing,
    language_code,
    normalize_text,
    shown_controls,
    split_word,
)
from mmtransformer.data.formats.json.text import json_lines
from mmtransformer.data.loading.errors import Report, TooManyErrors
from mmtransformer.data.loading.source import Caption
from mmtransformer.images import ImageError, load
from mmtransformer.serialization.printable import counted


@dataclasses.dataclass(slots=True)
class _Read:
    """A document as it stands in its file, its pictures by name."""

    where: str
    name: str
    texts: tuple[str, ...]
    images: list[str]
    language: str | None
    split: str | None
    places: list[Entry] = dataclasses.field(default_factory=list)


class InterleavedSplit:
    """One split of `InterleavedFiles`: documents by index. Can be pickled for loader workers."""

    def __init__(self, files: Files, documents: list[_Read]):
        self._files, self._documents = files, documents

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._documents)

    def name(self, i: int) -> str:
        """The document's id, or file:line."""
        return self._documents[i].name

    def document(self, i: int) -> Document:
        """The document's text."""
        found = self._documents[i]
        return Document(found.texts, found.language)

    def fingerprint(self, i: int) -> str:
        """What changes when the bytes of one of its pictures do."""
        return " ".join(map(self._files.fingerprint, self._documents[i].places))

    def image_name(self, i: int, k: int) -> str:
        """The picture's path from the root."""
        return self._documents[i].places[k].path

    def image(self, i: int, k: int) -> Image.Image:
        """Picture k of document i as RGB.

        Raises:
            ImageError: If it can't be read or decoded; the message names the document, the file and the fault.
        """
        return self.scaled_image(i, k)

    def scaled_image(self, i: int, k: int, *, at_least: tuple[float, float] | None = None) -> Image.Image:
        """Picture k of document i, which may be decoded smaller; see `at_least` of `mmtransformer.images.load`."""
        found = self._documents[i]
        place = found.places[k]
        label = f"{place.path} (picture {k + 1} of {found.where})"
        try:
            data = self._files.read(place)
        except (OSError, FileError) as error:
            said = str(error).removeprefix(f"{place.path}: ")
            raise ImageError(f"{label}: can't be read ({said}); {remedy(error)}") from error
        return load(data, name=label, at_least=at_least)


class InterleavedFiles:
    """Documents as people keep them, in JSON lines beside their pictures, in folders, zips and tars.

    Files. The root is one file or a folder; of a folder all files .jsonl and .ndjson at its top are read, and a name
    such as val.jsonl says the split of its documents that say none themselves.

    Splits. Where the data says none, or has no val, the documents whose name hashes below `val_fraction` are val: a
    document is always in the same split, whatever is added.

    Languages. A document's "language" wins; then texts in Hangul are "ko" and the others are `default_language`,
    without it "en" where the data also holds Korean or named languages, and None where it doesn't.

    Nothing is skipped in silence: a document whose marks and pictures differ in number, with a missing picture, a path
    that leaves the root, no text or no picture is counted in `report`, and more than `max_bad_fraction` of them are an
    error.

    Args:
        root: A folder, an archive, or one file.
        image_folder: Folder or archive with the pictures, if not at or below the root.
        mark: What stands for a picture in a text.
        min_similarity: Pictures of MMC4 whose "matched_sim" with their sentence is less are left out; OpenFlamingo took
            0.24.
        default_language: The language of documents that neither the data nor their script tells.
        val_fraction: Share of the documents for val where the data names none; 0 for no val.
        max_bad_fraction: Share of documents that may be unusable; one always may, unless this is 0.

    Raises:
        ValueError: If there are no documents, or too many of them are bad.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_folder: str | Path | None = None,
        mark: str = MARK,
        min_similarity: float = 0.0,
        default_language: str | None = None,
        val_fraction: float = 0.05,
        max_bad_fraction: float = 0.01,
    ):
        check_share("val_fraction", val_fraction)
        check_share("max_bad_fraction", max_bad_fraction, whole=True)
        if not mark.strip():
            raise ValueError(f"mark ({mark!r}) must be a word that stands for a picture, such as {MARK}")
        self.root, self.mark, self.report = Path(root).expanduser(), mark, Report()
        self.min_similarity = min_similarity
        files = Files(root)
        manifests = document_files(files)
        if not manifests:
            raise ValueError(f"{self.root} holds no documents: no .jsonl file with a text and a list of pictures")
        images_in = files if image_folder is None else Files(files.folder(image_folder))
        documents: list[_Read] = []
        for entry in manifests:
            split = split_word(entry.path.rpartition("/")[2]) if len(manifests) > 1 else None
            split = files.split_of(entry) or split
            found = list(self._read(files.read(entry), entry.path, split))
            base = entry.path.rpartition("/")[0]
            self._find(found, Finder(images_in, base, (name for d in found for name in d.images), files))
            documents += [document for document in found if document.places]
        listing = ", ".join(entry.path for entry in manifests[:3]) + (", ..." if len(manifests) > 3 else "")
        self._said = [f"interleaved documents {listing}"]
        for path, reason in files.refused.items():
            self.report.note("file left out", path, reason)
        self.report.enforce(f"{self.root} ({self._said[0]})", max_bad_fraction)
        if not documents:
            raise TooManyErrors(
                f"{self.root}: not one of {counted(self.report.rows, 'document')} can be used:\n{self.report}"
            )
        self._files = images_in
        _unique(documents)
        texts = [[Caption(" ".join(document.texts), document.language)] for document in documents]
        self.languages: tuple[str, ...]
        self.languages, said = normalize_languages(texts, default_language)
        self._said.append(said)
        for document, (text,) in zip(documents, texts, strict=True):
            document.language = text.language
        names, splits = [d.name for d in documents], [d.split for d in documents]
        members, said = normalize_splits(names, splits, val_fraction, "documents")
        self._said += [said] if said else []
        self._splits = {split: [documents[i] for i in some] for split, some in members.items()}

    def splits(self) -> tuple[str, ...]:
        """The names of the splits that hold documents: train, val, test, then any others."""
        return tuple(self._splits)

    def split(self, name: str) -> InterleavedSplit:
        """One split.

        Raises:
            ValueError: If there is no such split; the message lists those there are.
        """
        return InterleavedSplit(self._files, self._splits[find_split(name, self._splits, str(self.root))])

    def describe(self) -> str:
        """What was found: "interleaved documents d.jsonl: 120 documents, 301 pictures; splits ...; languages ..."."""
        documents = [document for split in self._splits.values() for document in split]
        images = sum(len(document.places) for document in documents)
        splits = ", ".join(f"{name} {len(split)}" for name, split in self._splits.items())
        head = f"{self._said[0]}: {counted(len(documents), 'document')}, {counted(images, 'picture')}"
        return "; ".join([head, *self._said[1:], f"splits {splits}"])

    def _read(self, data: bytes, name: str, split: str | None) -> Iterator[_Read]:
        """The documents of a file whose lines make sense; what is wrong with the others is counted."""
        for where, record, error in json_lines(data, name):
            self.report.rows += 1
            try:
                if not isinstance(record, dict):
                    raise LineError(*(error or f"not a JSON object: {record!r:.60}").split(": ", 1))
                texts, images = read_pieces(record, self.mark, self.min_similarity)
                yield self._document(record, where, texts, images, split)
            except LineError as found:
                self.report.error(found.cause, where, found.what)
            except LineNote as note:
                self.report.rows -= 1
                self.report.note(str(note), where)

    def _document(
        self, record: dict[str, Any], where: str, texts: tuple[str, ...], images: list[str], split: str | None
    ) -> _Read:
        if any(map(is_broken, texts)):
            raise LineError("not valid Unicode", f"{''.join(texts)[:60]!a}")
        if (shown := shown_controls("".join(texts))) is not None:
            self.report.note(CONTROLS, where, shown)
        texts = tuple("\n".join(filter(None, map(normalize_text, text.split("\n")))) for text in texts)
        if not images:
            raise LineError("no picture", f"{''.join(texts)[:60]!r}")
        if is_missing("".join(texts)):
            raise LineError("no text", f"{counted(len(images), 'picture')}")
        try:
            language = language_code(str(record.get("language") or record.get("lang") or ""))
        except ValueError as error:
            raise LineError("not a language", str(error)) from None
        said = record.get("split")
        if isinstance(said, str) and not is_missing(said.strip()):
            split = split_word(said) or said.strip().casefold()
        name = next((record[key] for key in ("id", "key", "name") if isinstance(record.get(key), str | int)), where)
        return _Read(where, str(name), texts, images, language, split)

    def _find(self, documents: list[_Read], finder: Finder) -> None:
        """Looks the pictures up; a document of which one is missing is left out, as its text speaks of it."""
        for document in documents:
            places: list[Entry] = []
            for k, name in enumerate(document.images):
                found, said = finder.find(name)
                if isinstance(found, Entry):
                    places.append(found)
                else:
                    self.report.error(found, document.where, f"picture {k + 1} of {len(document.images)}: {said}")
            if len(places) == len(document.images):
                document.places = places


def _unique(documents: list[_Read]) -> None:
    """Ids that come twice are not names: such documents are called by file and line."""
    often = Counter(document.name for document in documents)
    for document in documents:
        if often[document.name] > 1:
            document.name = document.where
