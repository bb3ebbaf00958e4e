"""What is said of pictures as files: JSON lines, a table, or a text file a picture; each can be gone on with after it
was stopped.
"""

import csv
import dataclasses
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import dropwhile
from pathlib import Path
from typing import Any, Generic, TypeVar

from mmtransformer.data.image_files import ImageFiles
from mmtransformer.generation.captions import CaptionResult
from mmtransformer.serialization.printable import counted, json_text
from mmtransformer.serialization.writing import check_place, naming, one_at_a_time, write_whole

T = TypeVar("T")

SHOWN = ("text", "language", "log_prob", "tokens", "token_log_probs", "finished")
"""Of a caption, in a line of JSON."""

BESIDE = ("txt", "caption")
"""Endings of text files beside their pictures: what programs that train image generators look for."""


@dataclasses.dataclass(frozen=True)
class LineFormat(Generic[T]):
    """How what is said of a picture stands in lines.

    Attributes:
        key: Of a line of JSON, beside "image".
        columns: Of a table, behind "image"; the first tells it from other tables.
        kind: The column, and the key of a line of JSON, that tells results of one call from another's.
        to_json: What stands under the key.
        to_rows: The rows of a table, behind the picture's name.
    """

    key: str
    columns: tuple[str, ...]
    kind: str
    to_json: Callable[[T], list[dict[str, Any]]]
    to_rows: Callable[[T], Iterable[tuple[str, ...]]]

    def json_line(self, name: str, said: T) -> str:
        """What is said of a picture as one line of JSON."""
        return json_text({"image": name, self.key: self.to_json(said)})


CAPTIONS: LineFormat[Sequence[CaptionResult]] = LineFormat(
    "captions",
    ("caption", "language", "log_prob"),
    "language",
    lambda said: [{key: getattr(caption, key) for key in SHOWN} for caption in said],
    lambda said: ((" ".join(c.text.split()), c.language or "", f"{c.log_prob:.4f}") for c in said),
)
CLASSES: LineFormat[Sequence[tuple[str, float]]] = LineFormat(
    "classes",
    ("class", "score"),
    "class",
    lambda said: [{"class": label, "score": score} for label, score in said],
    lambda said: ((" ".join(label.split()), f"{score:.4f}") for label, score in said),
)


_LAST_CELL = re.compile(r"-?\d+\.\d{4}")  # of a row that was not cut off: its number is whole


class ResultFile(ABC, Generic[T]):
    """Where results go, picture by picture: whole ones only, whenever the program is stopped.

    Attributes:
        where: What it is called in messages.
        bad_list: The list of the pictures that could not be used.
        cut: The last line, where it was cut off, and so is not gone on with.
        way_on: What goes on after the program was stopped, in words.
        by_people: Whether what is there may be no call's.
        left_out: How many results were not written, as another process had written of their pictures meanwhile.
    """

    where: str
    bad_list: Path
    by_people = False
    cut = ""
    way_on = "the same call goes on with the others"
    left_out = 0

    @abstractmethod
    def has(self, i: int) -> bool:
        """Whether picture i has its results there, which are to stay."""

    @abstractmethod
    def keep(self, i: int) -> bool:
        """Lets picture i, which could not be used, have its earlier results; whether there are any."""

    def kind(self, i: int) -> str:
        """The language that captions of picture i are said to be in, or a class of it; "" where nothing says it."""
        return ""

    @abstractmethod
    def write(self, i: int, said: T) -> None:
        """Writes the results of picture i."""

    @abstractmethod
    def files(self) -> Iterable[Path]:
        """All that it may write."""


class Lines(ResultFile[T]):
    """A file of lines, to which lines are added: JSON lines, or a table (`.csv`).

    Until the first results are written the file is as it was. It is left with those of other pictures, without a last
    line that was cut off. Of a picture that another process has written of meanwhile, nothing is added.

    Args:
        path: The file.
        form: What its lines hold.
        images: The pictures.
        overwrite: Whether what it holds of these pictures is replaced.

    Raises:
        ValueError: If the file holds something else, or nothing can be written there.
    """

    def __init__(self, path: Path, form: LineFormat[T], images: ImageFiles, *, overwrite: bool) -> None:
        check_place(path, "--out")
        self.where, self._path, self._form, self._images = str(path), path, form, images
        self._overwrite, self._table = overwrite, path.suffix.lower() == ".csv"
        self.bad_list = path.with_name(f"bad_images_{path.stem}.txt")
        given = {images.name(i) for i in range(len(images))} if overwrite else set[str]()
        self._header = ["image", *form.columns]  # of the table that is there, which people may have changed
        self._seen = self._state()  # before it is read: what comes in between is looked at again
        header, rows, cut = self._read(path.read_bytes() if path.exists() else b"")
        self.cut = cut or ""
        self._done = {name: kind for name, kind, _ in rows if name not in given and kind is not None}
        self._theirs: set[str] = set()
        self._earlier: dict[str, str] = {}
        for name, _, row in rows:
            if name in given:
                self._earlier[name] = self._earlier.get(name, "") + self._line(row)
        self._anew: str | None = None  # what the file begins with, once there is more to write; None adds to it
        if overwrite or cut is not None or not rows:
            self._anew = header + "".join(self._line(row) for name, _, row in rows if name not in given)

    def has(self, i: int) -> bool:
        """Whether picture i has a line."""
        return self._images.name(i) in self._done

    def keep(self, i: int) -> bool:
        """Puts the earlier lines of picture i back."""
        if lines := self._earlier.pop(self._images.name(i), ""):
            if self._anew is None:
                self._add(self._images.name(i), lines)
            else:
                self._anew += lines
        return bool(lines)

    def kind(self, i: int) -> str:
        """What the last line of picture i says."""
        return self._done.get(self._images.name(i), "")

    def write(self, i: int, said: T) -> None:
        """Adds the lines of picture i."""
        name = self._images.name(i)
        if self._table:
            rows = (dict(zip(self._form.columns, row, strict=True)) for row in self._form.to_rows(said))
            cells = ([({"image": name} | row).get(column, "") for column in self._header] for row in rows)
            self._add(name, "".join(map(self._line, cells)))
        else:
            self._add(name, self._line(self._form.json_line(name, said)))

    def files(self) -> Iterable[Path]:
        """The file, and the list of bad pictures."""
        return self._path, self.bad_list

    def _add(self, name: str, text: str) -> None:
        with naming(self._path), one_at_a_time(self._path.parent):
            self._look_again()
            if name in self._theirs:
                self.left_out += 1
                return
            # What no UTF-8 can hold, such as a name in an old encoding, is written as JSON writes it.
            data = ((self._anew or "") + text).encode("utf-8", "backslashreplace")
            if self._anew is not None:
                write_whole(self._path.resolve() if self._path.is_symlink() else self._path, data)
                self._anew = None
                if self._overwrite:
                    self.way_on = "the same call without --overwrite goes on with the others"
            else:
                with self._path.open("ab") as file:
                    file.write(data)
            self._seen = self._state()

    def _state(self) -> tuple[int, int]:
        """Which file it is, and its size in bytes; none at all, (0, 0)."""
        found = self._path.stat() if self._path.exists() else None
        return (found.st_ino, found.st_size) if found is not None else (0, 0)

    def _look_again(self) -> None:
        """Reads what other processes have written since: it stays, and its pictures are `_theirs`."""
        (file, size), now = self._seen, self._state()
        if now == self._seen:
            return
        if not now[1]:  # it was taken away, or emptied
            self._anew = self._anew or self._read(b"")[0]
            return
        whole = self._anew is not None or now[0] != file or now[1] < size
        with self._path.open("rb") as lines:
            lines.seek(0 if whole else size)
            data = lines.read()
        header = self._line(self._header).encode() if self._table else b""
        begun, rows, _ = self._read(data if whole else header + data)
        told = [(name, kind, self._line(row)) for name, kind, row in rows]
        told = [each for each in told if each[2] not in self._earlier.get(each[0], "")]
        self._theirs |= {name for name, kind, _ in told if name not in self._done and kind is not None}
        if self._anew is not None:
            self._anew = begun + "".join(line for _, _, line in told)

    @staticmethod
    def _line(row: str | Sequence[str]) -> str:
        if isinstance(row, str):
            return f"{row}\n"
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(row)
        return text.getvalue()

    def _read(self, data: bytes) -> tuple[str, Sequence[tuple[str, str | None, str | Sequence[str]]], str | None]:
        """The first line of a table; of each other line the picture, its kind (None where it has no results) and the
        line itself; what was cut off at the end: "" where the last line only lacks its end, as editors leave it.
        """
        whole, own = data[: data.rfind(b"\n") + 1], ["image", *self._form.columns]
        cut = data[len(whole) :].decode("utf-8", "replace") or None
        # A table begins with the mark that tells spreadsheets it is UTF-8: Korean is letters there, then.
        start = "\ufeff" + self._line(own) if self._table else '{"image": '
        begun = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
        key, first = self._form.key, start.removeprefix("\ufeff")
        try:
            if not (whole or begun.startswith(first) or first.startswith(begun)):
                raise ValueError("its only line has no end")
            text = whole.decode("utf-8-sig")
            if self._table:
                header, *rows = csv.reader(io.StringIO(text, newline="")) if text else [own]
                if header[:2] != own[:2]:
                    raise ValueError(f"its first columns are {', '.join(header[:2])}, not {', '.join(own[:2])}")
                rows = [row for row in rows if row]
                cut = cut if text else None  # of a header that was cut off nothing is lost
                self._header = header
                last = next(csv.reader([cut or ""]), [])
                if len(last) == len(header) and (header[-1] not in own or _LAST_CELL.fullmatch(last[-1])):
                    rows, cut = [*rows, last], ""
                elif last:  # of a picture with several rows all go
                    names = {row[0] for row in rows if row[0].startswith(last[0])} if len(last) == 1 else {last[0]}
                    rows = [*dropwhile(lambda row: row[0] in names, reversed(rows))][::-1]
                at = header.index(self._form.kind) if self._form.kind in header else len(header)
                told = [(row[0], "".join(row[at : at + 1]), row) for row in rows]
                return "\ufeff" + self._line(header), told, cut
            with suppress(ValueError):
                json.loads(cut or "")
                text, cut = text + str(cut), ""
            lines = [(json.loads(line), line) for line in text.split("\n") if line.strip()]
            told = [(said["image"], _kind(said[key], self._form.kind), line) for said, line in lines]
            return "", told, cut
        except UnicodeDecodeError as error:
            from mmtransformer.data.files.text import guess_encoding, utf_16  # Data are no part of captioning else.

            guess = "UTF-16" if utf_16(data) else guess_encoding(data)[0]
            raise ValueError(
                f"{self.where} is there, and is not UTF-8 (it may be {guess}): save it as UTF-8 to go on with it, or "
                f"name another file"
            ) from error
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            reason = f"a line has no image or no {key}" if isinstance(error, KeyError | TypeError) else error
            raise ValueError(
                f"{self.where} is there, and holds no {key} to go on with ({reason}); name another file"
            ) from error


def _kind(said: Any, key: str) -> str | None:
    """What results in a line of JSON say under a key; "" where they say nothing, None where there are none."""
    first = said[0] if isinstance(said, list) and said else None
    return None if said is None else str(first.get(key) or "") if isinstance(first, dict) else ""


class SidecarFiles(ResultFile[Sequence[CaptionResult]]):
    """A text file a picture, with a caption a line: beside the pictures, or below a folder under their paths.

    Args:
        images: The pictures.
        folder: The folder; None = beside the pictures.
        suffix: "txt" or "caption".
        overwrite: Whether texts that are there are replaced.

    Raises:
        ValueError: If two pictures would have the same text file, or one lies in an archive and has nothing beside it.
    """

    by_people = True

    def __init__(self, images: ImageFiles, folder: Path | None, suffix: str, *, overwrite: bool) -> None:
        self._images, self._folder, self._suffix, self._overwrite = images, folder, suffix, overwrite
        if overwrite:
            self.way_on = "the same call writes all of them anew"
        self.where = f".{suffix} files " + ("beside the pictures" if folder is None else f"in {folder}")
        self.bad_list = (folder or Path()) / "bad_images.txt"
        of: dict[Path, int] = {}
        pairs: list[tuple[int, int]] = []
        for i in range(len(images)):
            if folder is None and images.in_archive(i):
                raise ValueError(f"{images.name(i)} lies in an archive: there is no place beside it; use --out FOLDER")
            if (other := of.setdefault(self._path(i), i)) != i:
                pairs.append((other, i))
        if pairs:
            (one, other), more = pairs[0], len(pairs) - 1
            also = f", and so would {counted(more, 'more pair')}" if more else ""
            raise ValueError(
                f"{images.name(one)} and {images.name(other)} would both be captioned in {self._path(one)}{also}; "
                f"use --out FILE.jsonl, or rename one{' of each' if more else ''}"
            )
        self._files = {*of, self.bad_list}

    def _path(self, i: int) -> Path:
        name = self._images.name(i) if self._folder is None else self._images.inner_name(i)
        return (self._folder or Path()) / Path(name).with_suffix(f".{self._suffix}")

    def has(self, i: int) -> bool:
        """Whether picture i has its text, which is to stay."""
        return not self._overwrite and self.keep(i)

    def files(self) -> Iterable[Path]:
        """The text of every picture, and the list of bad ones."""
        return self._files

    def keep(self, i: int) -> bool:
        """Whether picture i has its text; an empty file is none, as a reader of pairs has it."""
        path = self._path(i)
        return path.exists() and path.stat().st_size > 0

    def write(self, i: int, said: Sequence[CaptionResult]) -> None:
        """Writes the text of picture i."""
        text = "".join(" ".join(caption.text.split()) + "\n" for caption in said)
        write_whole(self._path(i), text.encode("utf-8", "replace"))


def result_file(out: str, form: LineFormat[Any], images: ImageFiles, *, overwrite: bool = False) -> ResultFile[Any]:
    """Where results go, by its name: FILE.jsonl or FILE.csv; captions also a folder, or "txt" or "caption" (beside the
    pictures).

    Raises:
        ValueError: If the name says none of these, or what is there cannot be gone on with.
    """
    path = Path(out)
    if path.suffix.lower() in (".jsonl", ".csv") and not path.is_dir():
        return Lines(path, form, images, overwrite=overwrite)
    if form is not CAPTIONS:
        raise ValueError(f"--out {out}: give FILE.jsonl or FILE.csv")
    if out in BESIDE:
        return SidecarFiles(images, None, out, overwrite=overwrite)
    if out.endswith("/") or path.is_dir():
        return SidecarFiles(images, path, "txt", overwrite=overwrite)
    raise ValueError(
        f'--out {out}: give FILE.jsonl, FILE.csv, a folder ("{out}/"), or txt or caption for text files beside the '
        f"pictures"
    )


def write_bad(path: Path, tried: Iterable[str], errors: Mapping[str, str]) -> bool:
    """Writes the pictures that could not be used, one a line, each below what is wrong with it ("# ...").

    `mmt caption @FILE` and the like try them again. What an earlier call wrote stays, but for the pictures of this one;
    a list that would be empty is removed.

    Args:
        path: The list.
        tried: The names of the pictures of this call.
        errors: Names and errors of those that could not be used.

    Returns:
        Whether there are any.
    """
    names = {_plain(name) for name in tried}
    old = path.read_text("utf-8", "surrogateescape").splitlines() if path.exists() else []
    pairs = [pair for pair in zip(old[::2], old[1::2], strict=False) if pair[1] not in names]
    pairs += [(f"# {error}".replace("\n", " "), _plain(name)) for name, error in errors.items()]
    if pairs:
        text = "".join(f"{error}\n{name}\n" for error, name in pairs)
        write_whole(path, text.encode("utf-8", "surrogateescape"))
    else:
        path.unlink(missing_ok=True)
    return bool(errors)


def _plain(name: str) -> str:
    return f"./{name}" if name.startswith(("#", "@")) else name
