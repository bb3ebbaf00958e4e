"""metrics.csv: what a run logs, in rows that a killed and resumed run neither loses nor repeats."""

import csv
import io
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from mmtransformer.training.engine.checkpoints import CheckpointError, write_streamed


class MetricsLog(Logger):
    """Writes metrics.csv into the run's folder, a row for each time that something is logged.

    A checkpoint holds the number of rows, and a run that goes on goes on behind that row: Lightning's `CSVLogger` would
    begin another file, or repeat the rows that a killed run wrote after its last checkpoint.

    Args:
        folder: The run's folder.
        every_seconds: Most seconds until a row is in the file.
    """

    def __init__(self, folder: str | Path, *, every_seconds: float = 5.0) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.every_seconds = every_seconds
        self.columns: list[str] = []
        self.rows = 0
        """Rows that are in the file."""
        self._waiting: list[dict[str, Any]] = []
        self._saved = time.monotonic()
        self._kept: list[dict[str, Any]] = []  # of an earlier run's file, where it is gone on with
        self._begun = False

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Nothing: a run has one log."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml says it all."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds a row."""
        self._waiting.append({**metrics, "step": self.rows + len(self._waiting) if step is None else step})
        if time.monotonic() - self._saved > self.every_seconds:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Writes the rows that wait."""
        self._saved = time.monotonic()
        if not self._waiting:
            return
        if not self._begun:  # and not before: a run that is refused leaves the file as it is
            self._write(self._kept) if self._kept else self.path.unlink(missing_ok=True)
            self._kept, self._begun = [], True
        rows, self._waiting = self._waiting, []
        new = sorted({key for row in rows for key in row} - set(self.columns))
        self.rows += len(rows)
        if new:
            self.columns += new
            self._write(self._read() + rows)
        else:
            text = io.StringIO(newline="")
            csv.DictWriter(text, self.columns, restval="").writerows(rows)
            self._append(text.getvalue().encode())

    @rank_zero_only
    def resume(self, rows: int) -> None:
        """Goes on behind so many rows of an earlier run's file."""
        self._kept = self._read()[:rows]
        self.columns = list(self._kept[0]) if self._kept else []
        self.rows, self._waiting, self._begun = len(self._kept), [], False

    def written(self, steps: int) -> int:
        """How many rows of the first so many steps the file has, without the validation that follows the last."""
        rows = [row for row in self._read() if int(row["step"]) < steps]
        while rows and int(rows[-1]["step"]) == steps - 1 and not any(rows[-1][k] for k in rows[-1] if "train/" in k):
            rows.pop()
        return len(rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """As `save`."""
        self.save()

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            return [{k: v for k, v in row.items() if k is not None} for row in csv.DictReader(file)]

    def _append(self, data: bytes) -> None:
        try:
            with self.path.open("ab") as file:
                file.write(data)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot add {len(data):,} bytes: {error.strerror or error}. Free some space, then go on "
                f"with --resume"
            ) from error

    def _write(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode()
        write_streamed(self.path, lambda file: file.write(data), len(data))
