"""Where the texts of a language model come from: any image-text data's captions, or files of text.

A split is by group: texts that describe one picture, or stand in one row of a table, are never divided between train
and val, and what val says word for word is left out of train.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.endings import plain_name
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.names import nfc
from mmtransformer.data.files.normalize import normalize_languages, normalize_splits, split_order
from mmtransformer.data.files.read_options import TextReadOptions, check_share
from mmtransformer.data.files.text import lines, normalize_text, without_controls
from mmtransformer.data.formats.manifests import find_manifests
from mmtransformer.data.formats.readers import FORMATS
from mmtransformer.data.loading.errors import Report
from mmtransformer.data.loading.source import Caption, PairSource
from mmtransformer.serialization.printable import counted

_PLAIN = (".txt", ".text", ".md")


class TextSource(Protocol):
    """Texts in named splits; each is a document of its own, with its language where that is known."""

    languages: tuple[str, ...]

    def splits(self) -> tuple[str, ...]:
        """The names of the splits there are."""
        ...

    def split(self, name: str) -> list[Caption]:
        """One split.

        Raises:
            ValueError: there is no such split; the message lists those there are.
        """
        ...


class GroupedTexts(TextSource, Protocol):
    """Texts in groups that belong together, such as the captions of one picture."""

    def groups(self, name: str) -> list[tuple[Caption, ...]]:
        """One split, group by group; `split` gives the same texts one after the other.

        Raises:
            ValueError: there is no such split; the message lists those there are.
        """
        ...


class CaptionTexts:
    """The captions of any image-text data, without its pictures: a language model of what people say of pictures.

    Args:
        pairs: The image-text data.
    """

    def __init__(self, pairs: PairSource) -> None:
        self.pairs = pairs
        self.languages: tuple[str, ...] = pairs.languages

    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return self.pairs.splits()

    def split(self, name: str) -> list[Caption]:
        """One split: all captions of its pictures, picture by picture."""
        return [caption for group in self.groups(name) for caption in group]

    def groups(self, name: str) -> list[tuple[Caption, ...]]:
        """One split, the captions of each picture together."""
        pairs = self.pairs.split(name)
        return [tuple(pairs.captions(i)) for i in range(len(pairs))]


class _Group(NamedTuple):
    """Texts that stay together."""

    name: str
    texts: list[Caption]
    split: str | None


class TextFiles:
    """Texts in files: plain text, JSONL, CSV and TSV, COCO's and Karpathy's caption JSON, Parquet; zips and tars too.

    A table's splits are kept where it names one for validation; in any other file `val_fraction` of the groups (rows,
    or pictures, or pieces of plain text) are for validation, chosen by a hash of what they are.

    Args:
        paths: Files, folders or archives; a folder holds one kind of table, or else plain text files.
        read: How they are read, such as the names of columns, where that is not to be detected.
        max_bad_fraction: Share of a table's rows that may be unusable.

    Attributes:
        repeated: Texts left out of train because val or test says the same.

    Raises:
        ValueError: If a path is missing, holds no text, or too many of its rows are unusable.
    """

    def __init__(
        self, paths: Sequence[str], read: TextReadOptions = TextReadOptions(), *, max_bad_fraction: float = 0.01
    ) -> None:
        if isinstance(paths, str):
            raise ValueError(f"paths must be a list: [{paths}]")
        if not paths:
            raise ValueError("no paths were given (0): name at least one file or folder of texts")
        check_share("max_bad_fraction", max_bad_fraction, whole=True)
        self.read, self.max_bad_fraction = read, max_bad_fraction
        found: dict[str, list[list[Caption]]] = {}
        for path in map(str, paths):
            groups = list(self._read(path))
            if not groups:
                raise ValueError(f"{path} holds no text")
            names, splits = [group.name for group in groups], [group.split for group in groups]
            members, _ = normalize_splits(names, splits, read.val_fraction, "texts")
            for split, some in members.items():
                found.setdefault(split, []).extend(groups[i].texts for i in some)
        self.languages: tuple[str, ...]
        self.languages, _ = normalize_languages(
            [group for some in found.values() for group in some], read.default_language
        )
        self._splits = {name: [tuple(group) for group in found[name]] for name in sorted(found, key=split_order)}
        self.repeated = self._drop_repeated()

    def splits(self) -> tuple[str, ...]:
        """The names of the splits that hold texts: train, val, test, then any others."""
        return tuple(self._splits)

    def split(self, name: str) -> list[Caption]:
        """One split."""
        return [text for group in self.groups(name) for text in group]

    def groups(self, name: str) -> list[tuple[Caption, ...]]:
        """One split, texts of one row, picture or piece of plain text together."""
        if name not in self._splits:
            raise ValueError(f"the texts have no split {name!r}; they have: {', '.join(self._splits)}")
        return self._splits[name]

    def describe(self) -> str:
        """What was found: "36,619 texts; splits train 31,000, val 5,619; languages en, ko"."""
        sizes = {name: len(self.split(name)) for name in self._splits}
        parts = [f"{counted(sum(sizes.values()), 'text')}"]
        parts.append("splits " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
        parts.append("languages " + ", ".join(self.languages) if self.languages else "no language named")
        if self.repeated:
            parts.append(f"{self.repeated:,} left out of train, which val or test has word for word")
        return "; ".join(parts)

    def _read(self, path: str) -> Iterator[_Group]:
        files = Files(path)
        asked = files.asked
        manifests = find_manifests(files)
        if asked is not None and plain_name(asked.path).endswith(_PLAIN) and manifests[0].format != "flickr":
            manifests = []
        if not manifests:
            texts = [asked] if asked else [e for e in files.entries if plain_name(e.path).endswith(_PLAIN)]
            for entry in texts:
                yield from self._plain(files, entry)
            return
        report = Report()
        for manifest in manifests:
            _, rows = FORMATS[manifest.format].read(files, manifest.entry, self.read.wanted)
            for row in rows:
                report.rows += 1
                for cause, what in row.errors:
                    report.error(cause, row.where, what)
                if row.captions:
                    name = row.image or "\n".join(caption.text for caption in row.captions)
                    yield _Group(name, list(row.captions), row.split or manifest.split)
        report.enforce(path, self.max_bad_fraction)

    def _plain(self, files: Files, entry: Entry) -> Iterator[_Group]:
        report, kept = Report(), list[str]()
        for line in lines(files.read_text(entry)):
            report.rows += 1
            if line.text is None:
                report.error("not UTF-8", f"{entry.path}:{line.number}", line.hint)
            kept.append(line.text or "")
        report.enforce(entry.path, self.max_bad_fraction)
        if self.read.unit == "line":
            texts = map(normalize_text, kept)
        else:
            whole = unicodedata.normalize("NFC", "\n".join(without_controls(line).rstrip() for line in kept)).strip()
            texts = [whole] if self.read.unit == "file" else map(str.strip, _paragraphs(whole))
        yield from (_Group(text, [Caption(text)], None) for text in texts if text)

    def _drop_repeated(self) -> int:
        """Takes out of train what another split says word for word; returns how many texts that were."""
        if "train" not in self._splits:
            return 0
        said = {_key(text) for name in self._splits if name != "train" for text in self.split(name)}
        before = len(self.split("train"))
        kept = [tuple(t for t in group if _key(t) not in said) for group in self._splits["train"]]
        self._splits["train"] = [group for group in kept if group]
        return before - len(self.split("train"))


def _paragraphs(text: str) -> Iterator[str]:
    held: list[str] = []
    for line in text.split("\n"):
        if line.strip():
            held.append(line)
        elif held:
            yield "\n".join(held)
            held = []
    if held:
        yield "\n".join(held)


def _key(text: Caption) -> str:
    return nfc(text.text).casefold()


Source = TypeVar("Source", bound=TextSource)


def open_texts(
    source: Source | str | list[str], read: TextReadOptions, *, max_bad_fraction: float
) -> "Source | TextFiles":
    """The texts of files, folders or archives; a source that is open already stays as it is."""
    paths = [source] if isinstance(source, str | Path) else source
    return TextFiles(paths, read, max_bad_fraction=max_bad_fraction) if isinstance(paths, list | tuple) else paths
