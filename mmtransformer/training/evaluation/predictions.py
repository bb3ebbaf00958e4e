"""Captions of a split as a file that a second call goes on with, and the settings that they were made with."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.data.scenes.world import SceneWorld
from mmtransformer.generation.captions import CaptionResult
from mmtransformer.pipelines.base import write_json
from mmtransformer.serialization.pretrained import read_json
from mmtransformer.serialization.untrusted import settings_of
from mmtransformer.serialization.writing import check_place, naming, write_whole
from mmtransformer.training.evaluation.evaluation import Prediction

SCENES = "scenes.json"
"""In a model's folder, the drawn data that it was scored on."""


class PredictionFile:
    """JSON lines of predictions, to which predictions are added picture by picture.

    Args:
        path: The file; None keeps nothing.
        settings: What the captions depend on: model, data, generation.
        overwrite: Whether it starts anew, with the first predictions that are added: until then it is as it was.
            Otherwise what it holds stays, but for a last line that was cut off.

    Raises:
        ValueError: If the file holds something else, or predictions that were made with other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path = path
        self.settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self._found: dict[str, list[dict[str, Any]]] = {}
        self._anew: bytes | None = None  # what the file begins with, once there is more to write; None adds to it
        if path is None:
            return
        check_place(path, "--captions-out")
        if overwrite or not path.exists():
            self._anew = b""
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.split(b"\n")[:-1]:
            try:
                row = json.loads(line)
                made = row.get("settings")
                row = {key: row[key] for key in ("name", "language", "caption", "log_prob", "references")}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{path} is there, and holds no predictions; name another file, or --overwrite it"
                ) from None
            if made != self.settings:
                raise ValueError(
                    f"{path} holds captions of another model, of other data or settings of generation; name another "
                    f"file, or --overwrite it"
                )
            self._found.setdefault(row["name"], []).append(row)
        if len(whole) < len(data):
            self._anew = whole

    def get(self, index: int, name: str, languages: int) -> list[Prediction] | None:
        """The predictions of a picture, if they are there in so many languages."""
        rows = self._found.get(name, ())
        return [_prediction(index, row) for row in rows] if len(rows) == languages else None

    def add(self, predictions: Iterable[Prediction]) -> None:
        """Adds the predictions of one picture."""
        if self.path is not None:
            rows = (prediction.to_dict() | {"settings": self.settings} for prediction in predictions)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            data = text.encode("utf-8", "backslashreplace")
            if data and self._anew is not None:
                write_whole(self.path.resolve() if self.path.is_symlink() else self.path, self._anew + data)
                self._anew = None
                return
            with naming(self.path), self.path.open("ab") as file:
                file.write(data)


def _prediction(index: int, row: Mapping[str, Any]) -> Prediction:
    said = CaptionResult(row["caption"], row["language"], [], row["log_prob"], [], [], finished=True)
    return Prediction(index, row["name"], said, tuple(row["references"]))


def files_of(folder: Path) -> list[tuple[str, int, int]]:
    """What changes when a model's files do: their names, sizes and times."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def save_scenes(folder: Path, source: Scenes) -> None:
    """Writes into a model's folder which drawn data it is scored on."""
    write_json(folder / SCENES, source.to_dict())


def saved_scenes(folder: Path) -> Scenes | None:
    """The drawn data that a model was scored on; None if its folder does not say.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    path = folder / SCENES
    if not path.exists():
        return None
    values = read_json(path)
    world = values.get("world", {})
    if not isinstance(world, dict):
        raise ValueError(f"{path}: world is {world!r:.80}, not a JSON object")
    arguments: dict[str, Any] = values | {"world": settings_of(SceneWorld, world, str(path))}
    try:
        return Scenes(**arguments)
    except (TypeError, ValueError) as error:
        said = str(error).removeprefix(f"{path}: ").replace("Scenes.__init__() ", "")
        raise ValueError(f"{path}: {said}") from error
