"""A run's folder, in which one run writes at a time; and a run that has ended: where its results belong."""

import errno
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mmtransformer.serialization.pretrained import Pretrained, refuse_unsaved
from mmtransformer.serialization.printable import counted

_OTHER = "take another folder: --trainer.default_root_dir=DIR"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Where a run writes into its folder, and no other run does.

    The system's lock of a file, `.lock`, which ends with the process that holds it, however it ends: a file that a
    killed run has left locks nothing. It holds between the nodes that share a disk, where the disk has locks at all.

    Args:
        folder: The run's folder; made if it is not there.

    Raises:
        ValueError: If another run writes there, naming its process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    handle = _held(path)
    try:
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)


def _held(path: Path) -> int | None:
    """The file, open and locked; None where a disk has no locks, which is said."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
        except OSError as error:
            who = os.read(handle, 200).decode("utf-8", "replace")
            os.close(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise ValueError(
                    f"{path.parent}: another run is writing there{who}. Wait for it, or {_OTHER}"
                ) from None
            warnings.warn(
                f"{path}: no locks on this disk ({error.strerror}): a second run is not kept out", stacklevel=4
            )
            return None
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            break
        os.close(handle)  # The run that has just ended took the file away.
    with suppress(OSError):  # a full disk: the lock holds without it
        os.truncate(handle, 0)
        since = time.strftime("%Y-%m-%d %H:%M")
        os.write(handle, f" (process {os.getpid()} on {socket.gethostname()}, since {since})".encode())
    return handle


def _lock(handle: int) -> None:
    """Locks an open file for this process alone; its children, the loading workers, do not hold it.

    Raises:
        OSError: If it cannot be had now, or at all.
    """
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 1 << 20, os.SEEK_SET)  # behind what others read
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        try:
            import fcntl
        except ImportError:
            raise OSError(errno.ENOLCK, "this Python cannot lock") from None

        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def refuse_begun(folder: Path) -> None:
    """Refuses to begin a run where another one has left checkpoints or scores.

    Raises:
        ValueError: Naming what is there, and what to do.
    """
    found = [*sorted((folder / "checkpoints").glob("*.ckpt")), *folder.glob("metrics.json")]
    if found:
        raise ValueError(
            f"{folder}: a run is there already ({found[0]}). --resume goes on with it; for a new run {_OTHER}"
        )


def refuse_unsaved_parts(module: nn.Module) -> None:
    """Refuses, before it is trained, a task whose models could not be saved when it ends.

    Raises:
        ValueError: Naming the part, and the remedy.
    """
    if getattr(getattr(module, "start", None), "processor", None) is not None:
        return  # a public model, which is written as it came
    for part in module.children():
        if isinstance(part, Pretrained):
            refuse_unsaved(part)


@dataclass(frozen=True)
class Run:
    """A training run that has ended, for `Task.finish`.

    Attributes:
        folder: Where its results belong.
        seconds: How long the training took.
        device: What it computed on.
        limit_batches: Most batches of a split that are to be evaluated; None = all.
        autocast: The number format to evaluate in; None computes in that of the weights.
    """

    folder: Path
    seconds: float
    device: torch.device
    limit_batches: int | None = None
    autocast: torch.dtype | None = None

    @property
    def title(self) -> str:
        """The folder's name, for the top of a picture."""
        return self.folder.resolve().name.replace("_", " ")

    def unread(self, unit: str = "picture") -> list[str]:
        """A line for each split in which the run met pictures that could not be read; `unit` is what it counts."""
        of = "" if unit == "picture" else "the pictures of "
        counts = {path: len(path.read_bytes().splitlines()) for path in sorted(self.folder.glob("bad_images_*.jsonl"))}
        return [
            f"{of}{counted(n, unit)} could not be read; they are named in {path}" for path, n in counts.items() if n
        ]


def device_name(device: torch.device) -> str:
    """What computes, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' * (threads != 1)}" if device.type == "cpu" else device.type
