"""Writing a file, or a folder, whole or not at all."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path

from mmtransformer.serialization.processes import ended_as_by_exit, lives


def write_whole(path: str | Path, data: bytes | Iterable[bytes | memoryview]) -> Path:
    """Write a file in one step: whoever looks sees the old file or the whole new one, never half of one.

    Args:
        path: where to; missing parent folders are made.
        data: the file's bytes, or one part after the other.

    Returns:
        The path.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # an error of a file that is open names none
            error.filename = str(path)
        raise
    return path


def made_folder(folder: str | Path) -> Path:
    """The folder that a model is saved in, made if it is not there.

    Raises:
        ValueError: if a file is in its place.
    """
    folder = Path(folder)
    if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise ValueError(f"{folder}: a model is saved in a folder, and {file} is a file; name another")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other process is in here for the same folder; on disks and systems without locks it does not."""
    if os.name == "nt":
        yield
        return
    import fcntl

    with ExitStack() as stack:
        with suppress(OSError):  # a folder that may be written to, but not read
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Writes a folder whole or not at all: an error on the way leaves nothing, nor do Ctrl+C and SIGTERM.

    What a process that was killed has left is cleared away by the next that writes the same folder.

    Args:
        folder: where to; there is none, or an empty one.

    Yields:
        a folder of the same name to write into, in a hidden one beside it.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name[:40]}.{socket.gethostname()}-"
    for litter in folder.parent.glob(f"{escape(prefix)}*.part"):
        if not lives(litter.name.removeprefix(prefix).partition(".")[0]):
            shutil.rmtree(litter, ignore_errors=True)
    with ended_as_by_exit():
        place = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{prefix}{os.getpid()}.", suffix=".part"))
        inside = place / folder.name
        try:
            inside.mkdir()
            yield inside
            if folder.exists():  # it may be the current one, or a disk's: filled, not replaced
                for item in inside.iterdir():
                    item.rename(folder / item.name)
            else:
                inside.rename(folder)
        except OSError as error:
            if isinstance(error.filename, str):
                error.filename = error.filename.replace(str(inside), str(folder))
            raise
        finally:
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Lets errors of a file that is open, such as a full disk's, name it.

    Args:
        path: the file.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def check_place(path: str | Path, what: str) -> None:
    """Refuses a file that cannot be written, before long work is begun.

    Args:
        path: the file; it need not be there.
        what: what an error begins with, such as the option that names it.

    Raises:
        ValueError: if it is a folder, or its folder cannot be made or written into.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{what} {path} is a folder; name a file in it")
    place = path if path.exists() else next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(place, os.W_OK) or (place != path and not place.is_dir()):
        raise ValueError(f"{what} {path}: nothing can be written there; name another place")


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Holds a lock file, if that can be done; the system lets go of it when the process ends, however it ends.

    Args:
        path: the file, which is made; where it or its lock cannot be, nobody waits, and False is given.
    """
    with ExitStack() as stack:
        held = False  # where there are no locks, the last writer wins, with a whole file
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(stack.enter_context(path.open("w")), fcntl.LOCK_EX)
            held = True
        yield held
