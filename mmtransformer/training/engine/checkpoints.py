"""Checkpoint files that are whole or not there: written beside their name, flushed to the disk, then renamed.

What is in them is plain data and tensors, so they are read without running anything (`weights_only=True`), and every
byte is compared with the check sums that stand in the file.
"""

import contextlib
import dataclasses
import enum
import errno
import math
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from mmtransformer.serialization.processes import lives

SUFFIX = ".ckpt"
FORMAT_VERSION = 6
"""What stands in a checkpoint and how; one more with every change after which a run could not go on."""
_SLACK = 1 << 20  # bytes of a checkpoint that are not tensors: names, numbers, the archive's directory
_NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_MOST_DEPTH, _MOST_VALUES = 60, 10_000_000
_KINDS: dict[str, Any] = {
    "format_version": int,
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "rows": int,
    "frozen": dict,
    "model": dict,
    "optim": dict,
    "seed": int | None,
    "seen": dict,
    "validation_means": dict,
    "seconds": int | float,
}
_NEEDED = ("epoch", "global_step", "pytorch-lightning_version")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), Tensor, torch.Size, torch.dtype, torch.device)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or must not be read; the message says which and why."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes and reads the checkpoints of a `Trainer`, as `Trainer(plugins=[AtomicCheckpointIO()])`.

    A process that is killed while it saves, or a disk that is full, leaves the checkpoint that was there before.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint, or leaves the one that is there.

        Args:
            checkpoint: What Lightning collected.
            path: The file.
            storage_options: None; there are no options.

        Raises:
            CheckpointError: If the disk is full, the folder cannot be written, or something in the checkpoint is
                not plain data.
        """
        if storage_options is not None:
            raise CheckpointError(f"storage_options ({storage_options}) must be None: there are none")
        data = plain(checkpoint) | {"format_version": FORMAT_VERSION}
        write_streamed(path, lambda file: torch.save(data, file), tensor_bytes(data) + _SLACK)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint; nothing in the file is ever run.

        Args:
            path: The file.
            map_location: Where its tensors go.
            weights_only: True or None; it is always so.

        Raises:
            CheckpointError: If there is none, it is damaged, of another format, or wants to run code.
        """
        if weights_only is False:
            raise CheckpointError(f"{path}: checkpoints are read with weights_only=True only")
        found = read(path, map_location)
        if "loops" in found and (missing := [key for key in _NEEDED if key not in found]):
            raise CheckpointError(f"{path}: not a checkpoint of a run (no {', '.join(missing)})")
        if not re.match(r"\d+\.\d+", found.get("pytorch-lightning_version", "2.0")):
            raise CheckpointError(f"{path}: not a checkpoint of a run (of no version of Lightning)")
        if (version := found.get("format_version")) != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: of format {version}, and this version of mmtransformer reads format {FORMAT_VERSION}: go on "
                f"with the version that wrote it, or start a new run, without --resume"
            )
        return found

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a checkpoint, if it is there."""
        Path(path).unlink(missing_ok=True)


def write_streamed(path: str | Path, write: Callable[[BinaryIO], object], size: int) -> None:
    """Writes a file in one piece: after a crash at any moment there is the old file or the new one.

    Args:
        path: The file; its folder is made if need be.
        write: Writes the content to an open file.
        size: About how many bytes that will be.

    Raises:
        CheckpointError: If there is no room, or no right to write.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(path.parent)
        if disk.total and disk.free < size:
            raise OSError(f"only {disk.free:,} bytes are free there")
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's archive writer makes RuntimeErrors of OSErrors
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), error)
        if not isinstance(cause, OSError):
            raise
        kept = "the file that was there is kept" if path.exists() else "nothing was written"
        raise CheckpointError(
            f"{path}: cannot write about {size:,} bytes: {cause.strerror or cause}; {kept}. Free some space, or set "
            f"trainer.default_root_dir to another disk, then go on with --resume"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def written_to(folder: Path, checkpoint: Path | None = None) -> Iterator[None]:
    """Where a run's results are written: what a full disk or a missing right stops is said with path and bytes.

    Args:
        folder: The run's folder.
        checkpoint: Where the trained weights are kept meanwhile, if they are.

    Raises:
        CheckpointError: In place of what the system says, which names no file that is open.
    """
    try:
        yield
    except OSError as error:
        named = Path(error.filename) if isinstance(error.filename, str) else None
        inside = named is not None and named.absolute().is_relative_to(folder.absolute())
        if not (inside or (named is None and error.errno in _NOT_WRITTEN)):
            raise  # a picture that cannot be read, say
        path = named or _latest(folder)
        size = path.stat().st_size if path.is_file() else 0
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        kept = checkpoint is not None and checkpoint.is_file()
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror}; {size:,} bytes of it are there, {free:,} bytes are free"
            + (f". The trained weights are whole in {checkpoint}: free some space, and --resume finishes" * kept)
        ) from error


def _latest(folder: Path) -> Path:
    """The file that was written last, of those that are results."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != SUFFIX]
    return max(files, key=lambda path: path.stat().st_mtime_ns, default=folder)


def _sync_folder(folder: Path) -> None:
    """The new name is on the disk too (not on every system can a folder be synchronised)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Deletes what writers that were killed have left; files of a process that lives on this machine stay.

    Args:
        folder: A folder of checkpoints.

    Returns:
        What was deleted.
    """
    swept, here = [], socket.gethostname()
    for litter in Path(folder).glob(f".*{SUFFIX}.*.part"):
        host, _, number = litter.name.removesuffix(".part").rpartition(f"{SUFFIX}.")[2].rpartition("-")
        if host == here and lives(number):
            continue
        with contextlib.suppress(OSError):
            litter.unlink()
            swept.append(litter)
    return swept


def read(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's content; only tensors and plain data are read, nothing is run.

    Args:
        path: The file.
        map_location: Where its tensors go.

    Raises:
        CheckpointError: If there is no such file, it is damaged, or it holds something else.
    """
    path = Path(path)
    if problem := damage(path):
        raise CheckpointError(f"{path}: {problem}")
    try:
        found = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()
        line = next((x.strip() for x in reason if "GLOBAL" in x or "Unsupported" in x), reason[0] if reason else "")
        raise CheckpointError(
            f"{path}: refused, as it holds more than tensors and plain data ({line[:200]}); nothing of it was run"
        ) from None
    if not isinstance(found, dict) or "state_dict" not in found:
        raise CheckpointError(f"{path}: not a checkpoint of a run (no state_dict)")
    if problem := _nonsense(found):
        raise CheckpointError(f"{path}: not a checkpoint of a run ({problem})")
    return found


def _nonsense(found: dict[Any, Any]) -> str | None:
    """What no run can have written, in words; None if everything is of the kind that it should be."""
    for key, kind in _KINDS.items():
        if key in found and (not isinstance(found[key], kind) or isinstance(found[key], bool)):
            return f"{key} is a {type(found[key]).__name__}"
    if odd := [key for key in found if not isinstance(key, str)]:
        return f"{odd[0]!r:.80} is no name"
    if any(found.get(key, 0) < 0 for key in ("global_step", "epoch", "rows")):
        return "a count below 0"
    for name, value in found["state_dict"].items():
        if isinstance(name, str) and name.rpartition(".")[2] == "_extra_state":
            continue  # of a module of somebody's own, which may keep any plain data there
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            return f"the weight {name!r:.80} is a {type(value).__name__}"
        if value.layout != torch.strided or value.device.type == "meta":
            return f"the weight {name!r:.80} is no plain tensor"
    todo, count = [(found, 0)], 0
    while todo:  # What is small in the file can be there many times over.
        item, depth = todo.pop()
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple, set)) else ()
        todo += [(value, depth + 1) for value in inner]
        count += 1
        if depth > _MOST_DEPTH or count > _MOST_VALUES:
            return f"nested more than {_MOST_DEPTH} deep, or more than {_MOST_VALUES:,} values"
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's file, in words; None if every byte is as it was written."""
    if not path.is_file():
        return "no such checkpoint"
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                return "not a checkpoint: its parts are compressed, and could be of any size"
            broken = archive.testzip()
    except Exception as error:  # Flipped bits in the archive's directory bring out almost any.
        return f"not a whole checkpoint ({error})"
    if broken:
        return f"damaged: {broken} is not what was written"
    try:
        _lazily(path)
    except RuntimeError as error:  # torch reads the archive's directory more strictly than Python does
        return f"not a whole checkpoint ({str(error).splitlines()[0]:.200})" if "StreamReader" in str(error) else None
    except Exception:  # No damage: `read` says what it holds.
        return None
    return None


def _lazily(path: Path) -> Any:
    """A checkpoint's content, whose tensors stay in the file; nothing is run."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def newest(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a folder: that of the latest step, as a file's time may be anything.

    Args:
        folder: The folder.

    Returns:
        The file, or None if there is none; and what is wrong with newer ones.
    """
    files = [path for path in Path(folder).glob(f"*{SUFFIX}") if not path.name.startswith(".")]
    problems = []
    for path in sorted(files, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True):
        if (problem := damage(path)) is None:
            return path, problems
        problems.append(f"{path}: {problem}")
    return None, problems


def _step(path: Path) -> float:
    """The step of a checkpoint, without reading its tensors; infinite if the file does not tell it."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                return math.inf
        step = _lazily(path)["global_step"]
    except Exception:  # It is damaged, and `damage` says how.
        return math.inf
    return step if isinstance(step, int) else math.inf


def plain(value: Any, where: str = "") -> Any:
    """The same as tensors and plain data: paths become text, named things their values, numpy's numbers Python's.

    Args:
        value: What is to be saved.
        where: Its place, for errors.

    Raises:
        CheckpointError: Naming the place of something that could not be read back safely.
    """
    if type(value) in _PLAIN or isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        return {plain(k, where): plain(v, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return set(items) if isinstance(value, (set, frozenset)) else items if type(value) is list else tuple(items)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, enum.Enum):
        return plain(value.value, where)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    for kind in (bool, int, float, str):  # subclasses of them
        if isinstance(value, kind):
            return kind(value)
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint must not hold: it could "
        f"not be read back without running code; keep tensors and plain data"
    )


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested data, shared storage once."""
    found: dict[int, int] = {}
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, (list, tuple, set)):
            todo += item
    return sum(found.values())
