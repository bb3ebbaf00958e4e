"""Processes that compute together: one that is killed or frozen is named in a line, and no other waits for ever.

Each writes a file now and then, from a thread that goes on while the step is computed. So a slow process is not taken
for a lost one; and of a lost one the others know which it is, where the library that carries their sums only knows that
something did not come.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import lightning.pytorch as pl

from mmtransformer.serialization.printable import say
from mmtransformer.training.callbacks.saving import LastCheckpoint

BEAT = 2.0
"""Seconds between two signs of life."""
_LOST = re.compile(r"(?i)gloo|nccl|process ?group|connection (closed|reset|refused)|timed out|tcpstore|broken pipe")


class ProcessLost(ValueError):
    """A process of the run does not answer any more; the message names it and says what is saved."""


class Heartbeats:
    """The signs of life of a run's processes: a file each in a folder that all of them see.

    Args:
        folder: The folder.
        rank: This process.
        world: How many there are.
    """

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self._count = 0
        self._seen: dict[int, tuple[str, float]] = {}  # of each other: its last sign, and when it was new here
        folder.mkdir(parents=True, exist_ok=True)
        self.beat()

    def beat(self) -> bool:
        """Gives a sign; whether that could be done: on a disk that fails all others look lost."""
        self._count += 1
        try:
            (self.folder / f"{self.rank}.part").write_text(f"{self._count} {os.getpid()} {socket.gethostname()}")
            (self.folder / f"{self.rank}.part").replace(self.folder / str(self.rank))
        except OSError:
            return False
        return True

    def look(self) -> None:
        """Reads the signs of the others; clocks of other machines are not compared."""
        for rank in range(self.world):
            if rank != self.rank:
                with suppress(OSError):
                    said = (self.folder / str(rank)).read_text()
                    if said and self._seen.get(rank, ("",))[0] != said:
                        self._seen[rank] = (said, time.monotonic())

    def silent(self, seconds: float) -> list[str]:
        """The processes that gave no sign for so long, in words."""
        now, found = time.monotonic(), []
        for rank, (said, since) in sorted(self._seen.items()):
            if now - since >= seconds:
                _, pid, host = said.split(" ", 2)
                found.append(f"process {rank} (number {pid} on {host}), silent for {now - since:.0f} s")
        return found

    def forget(self) -> None:
        """Takes this process's file away, and the folder with the last one."""
        with suppress(OSError):
            (self.folder / str(self.rank)).unlink(missing_ok=True)
            self.folder.rmdir()


@contextmanager
def watched(
    trainer: pl.Trainer, folder: Path, timeout: float, last_checkpoint: LastCheckpoint | None
) -> Iterator[None]:
    """Where processes compute together: one that is lost ends the others in a line that names it.

    Args:
        trainer: The run's; of one process nothing is watched.
        folder: The run's folder.
        timeout: Most seconds that another process may give no sign of life; then this one ends. 0 waits for ever.
        last_checkpoint: What saves the last step before this process ends.

    Raises:
        ProcessLost: In place of the error that a lost process brings about here.
    """
    if trainer.world_size == 1:
        yield
        return

    def saved() -> str:
        """Saves the last step, which nobody else may be there to do, and says from where the run goes on."""
        if last_checkpoint is None:
            return "Nothing is saved"
        try:
            last_checkpoint.rescue()
        except (OSError, RuntimeError, ValueError) as error:
            say(f"the last step could not be saved: {error}", file=sys.stderr)
        return f"--resume goes on ({last_checkpoint.path})" if last_checkpoint.path.exists() else "Nothing is saved yet"

    signs = Heartbeats(folder / ".processes", trainer.global_rank, trainer.world_size)
    ended, signalled = threading.Event(), threading.Event()

    def watch() -> None:
        beats = 0  # since a signal, for a batch
        while not ended.wait(BEAT):
            alive = signs.beat()
            signs.look()
            # After a signal nobody waits: the step that was to be finished first never will be.
            limit = min(timeout or 5 * BEAT, 5 * BEAT) if signalled.is_set() else timeout
            lost = signs.silent(limit) if alive and limit else []
            beats = beats + 1 if signalled.is_set() and last_checkpoint is not None and last_checkpoint.waiting else 0
            if lost or beats > 2:
                text = f"error: {_line(lost, saved())}" if lost else f"no batch comes; this process ends. {saved()}"
                say(f"\nmmt: {text}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(128 + signalled.number if signalled.is_set() else 2)  # pyright: ignore[reportAttributeAccessIssue]

    with _told(signalled):
        thread = threading.Thread(target=watch, name="processes", daemon=True)
        thread.start()
        try:
            yield
        except RuntimeError as error:
            if not _LOST.search(f"{type(error).__name__} {error}"):
                raise
            late = time.monotonic() + 6 * BEAT
            while not (lost := signs.silent(2.5 * BEAT)) and time.monotonic() < late:
                time.sleep(BEAT / 4)
            raise ProcessLost(_line(lost or ["another process"], saved())) from error
        finally:
            ended.set()
            thread.join(2 * BEAT)
            signs.forget()


def _line(lost: list[str], saved: str) -> str:
    return f"{', '.join(lost)}: killed, frozen, or its machine is gone; this process ends too. {saved}"


@contextmanager
def _told(signalled: threading.Event) -> Iterator[None]:
    """Sets an event at SIGTERM and SIGINT at once: Python's own handlers wait until a sum of all processes is there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        with suppress(OSError):
            while data := ours.recv(1):
                if data[0] in (signal.SIGTERM, signal.SIGINT):
                    signalled.number = data[0]  # pyright: ignore[reportAttributeAccessIssue]
                    signalled.set()

    threading.Thread(target=listen, name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()
        ours.close()
