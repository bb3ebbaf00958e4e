"""What is wrong with users' data: counted by cause, the first offenders named, and past a threshold an error.

`Report` is for manifests, read once at the start. `BadImages` is for pictures that fail to decode while a model
trains: it works from every DataLoader worker through one JSON-lines file.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmtransformer.serialization.printable import counted
from mmtransformer.serialization.writing import write_whole

FIRST = 5  # offenders named for each cause


class TooManyErrors(ValueError):
    """More of the data is unusable than the threshold allows."""


def allowed(total: int, fraction: float) -> int:
    """How many of `total` may be bad: one always, unless `fraction` is 0, so that one never stops a run."""
    return max(1, int(total * fraction)) if fraction > 0 else 0


def _more(bad: int, total: int, beyond: str = "") -> str:
    """Which key allows so many, and what it would have to be; and what is to be said of more of them."""
    if bad >= total:
        return "without them nothing is left"
    percent = next((n for n in range(1, 100) if allowed(total, n / 100) >= bad), 100)
    share = f"{percent / 100:g}"
    return (
        f"`--data.loader.max_bad_fraction {share}` in `mmt fit`, `--max-bad-fraction {share}` in `mmt evaluate`, "
        f"max_bad_fraction={share} in Python allow as many{beyond}"
    )


class Report:
    """Errors and notes found in a data set, counted by cause, with the first offenders of each.

    Attributes:
        rows: Rows looked at.
        bad_rows: Rows with at least one error; each is counted once.
        errors: Cause -> how often.
        notes: Remarks that cost no data (a stray quote kept as text, say) -> how often.
        first: Cause or note -> the first offenders, as "captions.csv:7: 'b.jpg'".
    """

    def __init__(self) -> None:
        self.rows = 0
        self.bad_rows = 0
        self.errors: dict[str, int] = {}
        self.notes: dict[str, int] = {}
        self.first: dict[str, list[str]] = {}
        self._bad: set[str] = set()

    def error(self, cause: str, where: str, what: str = "") -> None:
        """Counts one error of the row at `where`."""
        self.errors[cause] = self.errors.get(cause, 0) + 1
        if where not in self._bad:
            self.bad_rows += 1
            self._bad.add(where)
        self._name(cause, where, what)

    def note(self, cause: str, where: str, what: str = "") -> None:
        """Counts one remark that costs no data."""
        self.notes[cause] = self.notes.get(cause, 0) + 1
        self._name(cause, where, what)

    def _name(self, cause: str, where: str, what: str) -> None:
        named = self.first.setdefault(cause, [])
        if len(named) < FIRST:
            named.append(f"{where}: {what[:200]}" if what else where)

    def enforce(self, name: str, max_bad_fraction: float) -> None:
        """Raises when more rows are bad than allowed.

        Raises:
            TooManyErrors: With the numbers, every cause and its first offenders.
        """
        if self.bad_rows > allowed(self.rows, max_bad_fraction):
            share = self.bad_rows / max(1, self.rows)
            raise TooManyErrors(
                f"{name}: {self.bad_rows:,} of {counted(self.rows, 'row')} can't be used ({share:.1%}, more than "
                f"{max_bad_fraction:.1%} allowed by max_bad_fraction; {_more(self.bad_rows, self.rows)}):\n{self}"
            )

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        keys = ("rows", "bad_rows", "errors", "notes", "first")
        return {key: getattr(self, key) for key in keys}

    def __str__(self) -> str:
        lines: list[str] = []
        for counts in (self.errors, self.notes):
            for cause, count in counts.items():
                lines.append(f"  {cause}: {count}")
                lines += [f"    {offender}" for offender in self.first[cause]]
                if count > FIRST:
                    lines.append(f"    ... and {count - FIRST} more")
        return "\n".join(lines)


def _line(name: str, error: str) -> str:
    return json.dumps({"image": name, "error": error}, ensure_ascii=False) + "\n"


def _can(load: Callable[[], Any]) -> bool:
    try:
        load()
    except (OSError, ValueError):
        return False
    return True


class BadImages:
    """Pictures that failed to decode in a run: each is counted once, named in a file, and too many stop the run.

    Every worker process appends to the same JSON-lines file and counts what all of them have written, so the
    threshold holds over all workers, epochs and resumed runs. Picklable; creates nothing until a picture fails.

    Args:
        path: The report, such as "runs/x/bad_images.jsonl".
        total: Pictures in the data set.
        max_fraction: Share of them that may fail; one always may, unless this is 0.
        unit: What they are, where it is not pictures: questions, several of which may be about one.
    """

    def __init__(self, path: str | Path, total: int, max_fraction: float = 0.01, unit: str = "picture"):
        self.path = Path(path)
        self.unit = unit
        self.total = total
        self.max_fraction = max_fraction
        self._seen: set[str] = set()

    @classmethod
    def of_split(cls, folder: Path, split: str, total: int, max_fraction: float, unit: str = "picture") -> "BadImages":
        """The report of a split, bad_images_SPLIT.jsonl in a folder."""
        return cls(folder / f"bad_images_{split}.jsonl", total, max_fraction, unit)

    def record(self, name: str, error: Exception) -> None:
        """Adds a picture to the report, if it isn't there yet.

        Raises:
            TooManyErrors: If now more pictures have failed than `max_fraction` allows.
        """
        if name in self._seen:
            return
        found = self.names()
        if name not in found:
            line = _line(name, f"{type(error).__name__}: {error}")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # one write with O_APPEND is atomic between processes
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(handle, line.encode("utf-8", "replace"))
            finally:
                os.close(handle)
            found = self.names()
        self._seen.add(name)
        if len(found) > allowed(self.total, self.max_fraction):
            first = "\n".join(f"  {key}: {text}" for key, text in list(found.items())[:FIRST])
            share = len(found) / max(1, self.total)
            raise TooManyErrors(
                f"{'' if self.unit == 'picture' else 'the pictures of '}{len(found):,} of "
                f"{counted(self.total, self.unit)} can't be read so far ({share:.1%}, more than "
                f"{self.max_fraction:.1%} allowed by max_bad_fraction). {self.path} names these; `mmt check` reads "
                f"all pictures and counts the others too. The first:\n"
                f"{first}\n"
                f"Repair or remove them; {_more(len(found), self.total, '; others that come need more')}"
            )

    def names(self) -> Mapping[str, str]:
        """Every picture in the report -> its error."""
        found: dict[str, str] = {}
        if self.path.exists():
            for line in self.path.read_bytes().split(b"\n"):
                try:
                    row = json.loads(line)
                    found.setdefault(row["image"], row["error"])
                except (ValueError, KeyError, TypeError):
                    continue  # an empty last line, or one cut by a full disk
        return found

    def keep(self, loads: Mapping[str, Callable[[], Any]]) -> None:
        """Forgets what is not among these pictures, and those of them that can be read by now.

        Args:
            loads: Pictures of the report that are still in the data, each with what loads it.
        """
        listed = self.names()
        still = [name for name, load in loads.items() if name in listed and not _can(load)]
        if not still:
            self.reset()
        elif len(still) < len(listed):
            self._seen.clear()
            lines = (_line(name, listed[name]) for name in still)
            write_whole(self.path, "".join(lines).encode("utf-8", "replace"))

    def reset(self) -> None:
        """Forgets an earlier run's report."""
        self.path.unlink(missing_ok=True)
        self._seen.clear()
