"""Writing a file whole or not at all."""

import io
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


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


def save_image(image: Image.Image, path: str | Path) -> Path:
    """Write a picture; the file's ending names the format (.png, .jpg, .webp).

    Args:
        image: the picture, RGB.
        path: where to; missing parent folders are made.

    Returns:
        The path.

    Raises:
        ValueError: if the ending is unknown, or the picture is too large for its format.
    """
    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path.name}: a picture can be written as {', '.join(FORMATS)}")
    if kind == "WEBP" and max(image.size) > 16_383:
        raise ValueError(f"a picture of {image.width} x {image.height} px is too large for WebP (16383); use .png")
    file = io.BytesIO()
    image.save(file, kind, quality=90)
    return write_whole(path, file.getvalue())


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Write a figure of matplotlib as a PNG, the same bytes every time."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return write_whole(path, file.getvalue())
