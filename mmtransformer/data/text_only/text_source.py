"""Where the texts of a language model come from: any image-text data's captions, or files of text.

A split is by group: texts that describe one picture, or stand in one row of a table, are never divided between train
and val, and what val says word for word is left out of train.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

from mmtransformer.data.files.archives import Entry, Files, nfc
from mmtransformer.data.files.manifests import find_manifests, read_manifest
from mmtransformer.data.files.tables import Wanted
from mmtransformer.data.files.text import draw, fold, is_korean, lines
from mmtransformer.data.loading.errors import Report
from mmtransformer.data.loading.source import Caption, PairSource

Unit = Literal["line", "paragraph", "file"]
_PLAIN = (".txt", ".text", ".md")
_ORDER = {"train": 0, "val": 1, "test": 2}


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
    texts: tuple[Caption, ...]
    split: str | None


class TextFiles:
    """Texts in files: plain text, JSONL, CSV and TSV, COCO's and Karpathy's caption JSON, Parquet; zips and tars too.

    A table's splits are kept where it names one for validation; in any other file `val_fraction` of the groups (rows,
    or pictures, or pieces of plain text) are for validation, chosen by a hash of what they are.

    Args:
        paths: Files, folders or archives; a folder holds one kind of table, or else plain text files.
        unit: What a document is in a plain text file: a line, a paragraph (between empty lines) or the file.
        text_column: Column, or columns, with the texts of tables; else those whose name says so.
        language_column: Column with the language of a row's texts.
        split_column: Column with the split.
        language: The language of texts that neither the data nor their script tells; None names none, unless some
            of the texts are Korean or have a language named: the others then are English.
        val_fraction: Share of the groups for validation where the data names none.
        max_bad: Share of a table's rows that may be unusable.

    Attributes:
        repeated: Texts left out of train because val or test says the same.

    Raises:
        ValueError: If a path is missing, holds no text, or too many of its rows are unusable.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        unit: Unit = "line",
        text_column: str | Sequence[str] | None = None,
        language_column: str | None = None,
        split_column: str | None = None,
        language: str | None = None,
        val_fraction: float = 0.05,
        max_bad: float = 0.01,
    ) -> None:
        if isinstance(paths, str):
            raise ValueError(f"paths must be a list: [{paths}]")
        if not paths:
            raise ValueError("no paths were given (0): name at least one file or folder of texts")
        if unit not in ("line", "paragraph", "file"):
            raise ValueError(f'unit must be "line", "paragraph" or "file", not "{unit}"')
        if not 0.0 <= val_fraction < 1.0:
            raise ValueError(f"val_fraction ({val_fraction}) must be at least 0 and below 1")
        self.unit, self.val_fraction, self.max_bad = unit, val_fraction, max_bad
        columns = (text_column,) if isinstance(text_column, str) else text_column
        self._wanted = Wanted(None, columns, language_column, split_column, images=False)
        groups = [group for path in paths for group in self._normalize_splits(str(path))]
        self._splits = _normalize_languages(groups, language)
        self.repeated = self._drop_repeated()
        found = {text.language for name in self._splits for text in self.split(name)} - {None}
        self.languages: tuple[str, ...] = tuple(sorted(code for code in found if code))

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
        parts = [f"{sum(sizes.values()):,} texts"]
        parts.append("splits " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
        parts.append("languages " + ", ".join(self.languages) if self.languages else "no language named")
        if self.repeated:
            parts.append(f"{self.repeated:,} left out of train, which val or test has word for word")
        return "; ".join(parts)

    def _normalize_splits(self, path: str) -> Iterator[_Group]:
        """The groups of one path, each with its split."""
        groups = list(self._read(path))
        if not groups:
            raise ValueError(f"{path} holds no text")
        if any(group.split == "val" for group in groups):
            yield from (group._replace(split=group.split or "train") for group in groups)
            return
        draws = {group.name: draw(group.name) for group in groups if group.split in (None, "train")}
        held_out = {name for name, value in draws.items() if value < self.val_fraction}
        if self.val_fraction and len(draws) > 1:  # neither train nor val is empty, however few the groups are
            held_out = held_out or {min(draws, key=lambda name: draws[name])}
            held_out -= {max(draws, key=lambda name: draws[name])}
        for group in groups:
            held = group.split in (None, "train") and group.name in held_out
            yield group._replace(split="val" if held else group.split or "train")

    def _read(self, path: str) -> Iterator[_Group]:
        files = Files(path)
        asked = files.asked
        manifests = find_manifests(files)
        if asked is not None and asked.path.lower().endswith(_PLAIN) and manifests[0].format != "flickr":
            manifests = []
        if not manifests:
            texts = [asked] if asked else [e for e in files.entries if e.path.lower().endswith(_PLAIN)]
            for entry in texts:
                yield from self._plain(files, entry)
            return
        report = Report()
        for manifest in manifests:
            _, rows = read_manifest(files, manifest, self._wanted)
            for row in rows:
                report.rows += 1
                for cause, what in row.errors:
                    report.error(cause, row.where, what)
                if row.captions:
                    name = row.image or "\n".join(caption.text for caption in row.captions)
                    yield _Group(name, row.captions, row.split or manifest.split)
        report.enforce(path, self.max_bad)

    def _plain(self, files: Files, entry: Entry) -> Iterator[_Group]:
        report, kept = Report(), list[str]()
        for line in lines(files.read(entry)):
            report.rows += 1
            if line.text is None:
                report.error("not UTF-8", f"{entry.path}:{line.number}", line.hint)
            kept.append(line.text or "")
        report.enforce(entry.path, self.max_bad)
        if self.unit == "line":
            texts = map(fold, kept)
        else:
            whole = unicodedata.normalize("NFC", "\n".join(line.rstrip() for line in kept)).strip()
            texts = [whole] if self.unit == "file" else map(str.strip, _paragraphs(whole))
        yield from (_Group(text, (Caption(text),), None) for text in texts if text)

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


def _normalize_languages(
    groups: Sequence[_Group], language: str | None
) -> dict[str, list[tuple[Caption, ...]]]:
    """The splits, every text with its language: as the data says, or its script, or `language`."""
    texts = [text for group in groups for text in group.texts]
    counts = Counter("ko" if is_korean(t.text) else "" for t in texts if t.language is None)
    named = any(text.language for text in texts)
    rest = language
    if rest is None and (named or 100 * counts["ko"] >= counts.total() > 0):
        rest = "en" if named or 100 * counts[""] >= counts.total() else "ko"

    def settled(text: Caption) -> Caption:
        if text.language is not None or rest is None:
            return text
        return Caption(text.text, "ko" if is_korean(text.text) else rest)

    splits: dict[str, list[tuple[Caption, ...]]] = {}
    for group in groups:
        splits.setdefault(group.split or "train", []).append(tuple(map(settled, group.texts)))
    return dict(sorted(splits.items(), key=lambda item: (_ORDER.get(item[0], 3), item[0])))
