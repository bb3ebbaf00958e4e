"""Writing a file whole or not at all."""

import os
import tempfile
from pathlib import Path


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write a file in one step: whoever looks sees the old file or the whole new one, never half of one.

    Args:
        path: where to; missing parent folders are made.
        data: the file's bytes.

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
            file.write(data)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # an error of a file that is open names none
            error.filename = str(path)
        raise
    return path
