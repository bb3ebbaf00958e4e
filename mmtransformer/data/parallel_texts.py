"""Texts with their translations: descriptions of the embedded scenes in two languages, or a table of one's own."""

import csv
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from mmtransformer.data.files.normalize import normalize_splits
from mmtransformer.data.files.text import LANGUAGES as CODE_OF
from mmtransformer.data.files.text import is_missing, normalize_text, split_word
from mmtransformer.data.scenes.grammar import LANGUAGES
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.data.scenes.world import Scene


class Parallel(NamedTuple):
    """A text and its translation.

    Attributes:
        name: what it is called in messages and files.
        source: the text to translate.
        source_language: its language code.
        text: the translation.
        language: its language code.
        scene: what both speak of, where that is known.
    """

    name: str
    source: str
    source_language: str
    text: str
    language: str
    scene: Scene | None = None

    @property
    def direction(self) -> str:
        """Like "en-ko"."""
        return f"{self.source_language}-{self.language}"


class ParallelSource(Protocol):
    """Texts with translations in named splits."""

    languages: tuple[str, ...]

    def splits(self) -> tuple[str, ...]:
        """The names of the splits there are."""
        ...

    def split(self, name: str) -> list[Parallel]:
        """One split.

        Raises:
            ValueError: there is no such split; the message lists those there are.
        """
        ...


class _NoChance(random.Random):
    """Always the first choice."""

    def random(self) -> float:
        return 0.0


def plain_caption(scene: Scene, language: str) -> str:
    """The one caption of a scene that leaves nothing to chance: its plainest sentence, always in the same words.

    Args:
        scene: what to describe.
        language: "en" or "ko".
    """
    return LANGUAGES[language].phrases(scene)[0](scene, _NoChance())


class SceneTranslations:
    """Descriptions of the embedded scenes, put into the other language.

    A source is phrased in any of the ways that `Scenes` has; its translation is always the scene's `plain_caption`, so
    that there is one right answer, word for word.

    Args:
        scenes: The scenes; their `phrasings` say how many sources each has in each direction, in train and elsewhere.
        directions: Such as "en-ko".

    Raises:
        ValueError: If a direction is not two different languages of the scenes.
    """

    def __init__(self, scenes: Scenes, *, directions: Sequence[str] = ("en-ko", "ko-en")) -> None:
        if isinstance(directions, str) or not directions:
            raise ValueError(f"directions must be a list such as [en-ko, ko-en], not {directions!r}")
        pairs = [tuple(direction.split("-")) for direction in directions]
        for direction, pair in zip(directions, pairs, strict=True):
            if len(pair) != 2 or len(set(pair) & set(scenes.languages)) != 2:
                raise ValueError(
                    f'direction "{direction}" is not two of the scenes\' languages ({", ".join(scenes.languages)})'
                )
        self.scenes, self.directions = scenes, tuple(directions)
        self._pairs = [(pair[0], pair[1]) for pair in pairs]
        self.languages: tuple[str, ...] = scenes.languages

    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return self.scenes.splits()

    def split(self, name: str) -> list[Parallel]:
        """One split, scene by scene; outside of train each source is said in one way."""
        scenes, known = self.scenes.split(name), name != "train"
        rows = []
        for i in range(len(scenes)):
            scene, said = scenes.scene(i), scenes.captions(i)
            plain = {code: plain_caption(scene, code) for _, code in self._pairs}
            for source, target in self._pairs:
                texts = [caption.text for caption in said if caption.language == source]
                rows += [
                    Parallel(scenes.name(i), text, source, plain[target], target, scene if known else None)
                    for text in (texts[:1] if known else texts)
                ]
        return rows


class ParallelTable:
    """Translations of one's own: a CSV, TSV or JSONL with a column for each language.

    Args:
        path: The file; its columns (keys) are named by languages (ko, Korean, 한국어), and perhaps one is "split".
        directions: Such as "en-ko": from which column to which.
        val_fraction: Share of the rows for validation, one at least, where no column "split" names some for it, chosen
            by a hash of the row.

    Raises:
        ValueError: If the file or a column is missing, or a split would be empty.
    """

    def __init__(
        self, path: str, *, directions: Sequence[str] = ("en-ko", "ko-en"), val_fraction: float = 0.05
    ) -> None:
        if isinstance(directions, str) or any(direction.count("-") != 1 for direction in directions):
            raise ValueError(f"directions must be a list such as [en-ko, ko-en], not {directions!r}")
        pairs = [(d.partition("-")[0], d.partition("-")[2]) for d in directions]
        self.languages: tuple[str, ...] = tuple(dict.fromkeys(code for pair in pairs for code in pair))
        self.incomplete = 0
        keys, said, found = list[str](), list[str | None](), list[list[Parallel]]()
        for number, row in _read_table(Path(path)):
            named = {CODE_OF.get(column.strip().casefold(), column): column for column in row}
            named |= {column: column for column in row}  # its own name before what another one means
            if missing := [code for code in self.languages if code not in named]:
                raise ValueError(
                    f"{path}:{number}: no column {missing[0]!r} among {', '.join(row)}; name each column by its "
                    f"language in the first line (the keys of each object in JSONL), or say other directions than "
                    f"{', '.join(directions)}: --data.source={type(self).__module__}.{type(self).__name__} "
                    f"--data.source.path={path} --data.source.directions=[de-ko]"
                )
            texts = {code: normalize_text(row[named[code]]) for code in self.languages}
            if any(is_missing(text) for text in texts.values()):
                self.incomplete += 1
                continue
            keys.append("\n".join(texts.values()))
            split = row.get("split", "").strip()
            said.append(split_word(split) or split or None)
            found.append([Parallel(f"row {number}", texts[a], a, texts[b], b) for a, b in pairs])
        members, _ = normalize_splits(keys, said, val_fraction, "rows")
        self._splits = {name: [pair for i in some for pair in found[i]] for name, some in members.items()}
        if not self._splits.get("train") or not self._splits.get("val"):
            counts = ", ".join(f"{name} {len(rows)}" for name, rows in self._splits.items()) or "no rows"
            raise ValueError(
                f"{path}: train and val both need rows, there are: {counts}; add more, or set val_fraction above 0"
            )

    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self._splits)

    def split(self, name: str) -> list[Parallel]:
        """One split."""
        if name not in self._splits:
            raise ValueError(f"the table has no split {name!r}; there are {', '.join(self._splits)}")
        return self._splits[name]


def _whole(digits: str) -> int | str:
    return int(digits) if len(digits) < 4000 else digits  # Python refuses longer numbers


def _read_table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The number and the cells of each row."""
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder; name a table in it' if path.is_dir() else 'no such file'}")
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"{path}: translations are read from .csv, .tsv and .jsonl files")
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            if kind != ".jsonl":
                rows = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",", restval="")
                yield from ((n, {k: v for k, v in row.items() if isinstance(v, str)}) for n, row in enumerate(rows, 2))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line, parse_int=_whole)
                    if not isinstance(row, dict):
                        raise ValueError(f"{path}:{number}: not an object")
                    yield number, {key: "" if value is None else str(value) for key, value in row.items()}
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8: save it as UTF-8") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON in every line: {error}") from error
        except csv.Error as error:
            raise ValueError(f"{path}: not a table in every line: {error}") from error
