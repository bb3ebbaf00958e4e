"""Pictures and figures as files, each written whole or not at all."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from mmtransformer.serialization.writing import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


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
