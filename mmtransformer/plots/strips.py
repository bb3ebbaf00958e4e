"""How a picture comes out of the noise: the steps side by side, or as an animation."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mmtransformer.serialization.printable import counted
from mmtransformer.serialization.writing import write_whole


def save_strip(images: Sequence[Image.Image], path: str | Path, *, side: int = 128) -> Path:
    """Saves the steps of a drawing.

    Args:
        images: the picture after each step.
        path: a PNG with at most twelve of them side by side, evenly over the steps, or a GIF with all.
        side: height of each, px.

    Returns:
        The file's path.

    Raises:
        ValueError: if there is no step, or the name ends otherwise.
    """
    kind = Path(path).suffix.lower()
    if not images or kind not in (".png", ".gif"):
        raise ValueError(f"{path}: a strip of {counted(len(images), 'step')} is saved as .png or .gif")
    width = max(1, round(side * images[0].width / images[0].height))
    large = [image.convert("RGB").resize((width, side), Image.Resampling.NEAREST) for image in images]
    file = io.BytesIO()
    if kind == ".gif":
        large[0].save(
            file, "GIF", save_all=True, append_images=large[1:], duration=[120] * (len(large) - 1) + [1500], loop=0
        )
        return write_whole(path, file.getvalue())
    shown = min(len(large), 12)
    chosen = [large[(k + 1) * len(large) // shown - 1] for k in range(shown)]
    sheet = Image.new("RGB", (shown * (width + 4) - 4, side), "white")
    for k, image in enumerate(chosen):
        sheet.paste(image, (k * (width + 4), 0))
    sheet.save(file, "PNG")
    return write_whole(path, file.getvalue())
