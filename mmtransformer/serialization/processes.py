"""Processes that are told to end, and that have ended: what they were writing is cleared away."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ended_as_by_exit() -> Iterator[None]:
    """SIGTERM ends the program by an exception, as Ctrl+C does, so that it clears away what is half done.

    Where somebody handles it already, as a training run does, that stays.

    Raises:
        SystemExit: With 143, where SIGTERM has come.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def lives(number: str) -> bool:
    """Whether there is a process of this number on this machine, other than this one."""
    try:
        os.kill(int(number), 0)
    except (ValueError, ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return int(number) != os.getpid()
