"""Where the model looked while it wrote each word: heat over the picture.

Shapes: gh gw rows and columns of the visual grid.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from mmtransformer.plots.cards import show_number
from mmtransformer.plots.text import Colour, Style, draw, draw_lines, width, wrap

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
PAPER: Colour = (18, 19, 24)
WORD = Style(17, (240, 241, 245), bold=True)
TITLE = Style(20, (240, 241, 245), bold=True)
SMALL = Style(13, (160, 166, 178))
MARGIN, GAP = 24, 14


def plot_word_heatmaps(
    image: Image.Image,
    words: Sequence[str],
    heat: Tensor | np.ndarray,
    *,
    box: Box = WHOLE,
    columns: int = 6,
    panel: int = 240,
    title: str = "",
    scale: str = "of a word's attention on one patch",
) -> Image.Image:
    """Draw one panel a word: the picture, with the heat of that word laid over it.

    The first panel is the bare picture. All words share one scale, written below the sheet, so they can be compared.

    Args:
        image: the picture.
        words: the words of the caption.
        heat: (words gh gw), zero or more; how much of the word's attention went to each patch.
        box: left, top, right and bottom of the grid as fractions of the picture (see `grid_box`).
        columns: panels a row.
        panel: pixels of a panel's width.
        title: a line above, such as the whole caption.
        scale: what the brightest colour's number is.

    Returns:
        The sheet.

    Raises:
        ValueError: if the heat does not fit the words, or holds negative or non-finite values.
    """
    heat = as_heat(heat, len(words))
    top = heat_top(heat)
    size = (panel, max(1, min(panel * 2, round(panel * image.height / image.width))))
    if size[1] == panel * 2:
        size = (max(1, round(panel * 2 * image.width / image.height)), panel * 2)
    small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    panels = [small, *(overlay(small, h, top=top, box=box) for h in heat)]
    labels = [["picture"], *(wrap(word, WORD, panel - 4, 2) for word in words)]
    columns = min(columns, len(panels))
    below = WORD.line_height * max(map(len, labels), default=1) + 10
    rows = math.ceil(len(panels) / columns)
    wide = 2 * MARGIN + columns * panel + (columns - 1) * GAP
    titles = wrap(title, TITLE, wide - 2 * MARGIN, 4) if title else []
    head = MARGIN + (len(titles) * TITLE.line_height + 12 if titles else 0)
    sheet = Image.new("RGB", (wide, head + rows * (size[1] + below + GAP) + 44), PAPER)
    canvas = ImageDraw.Draw(sheet)
    draw_lines(canvas, (MARGIN, MARGIN - 6), titles, TITLE)
    for i, (drawn, label) in enumerate(zip(panels, labels, strict=True)):
        x = MARGIN + i % columns * (panel + GAP)
        y = head + i // columns * (size[1] + below + GAP)
        sheet.paste(drawn, (x + (panel - size[0]) // 2, y))
        for j, line in enumerate(label):
            at = x + (panel - width(line, WORD)) / 2
            draw(canvas, (at, y + size[1] + 6 + j * WORD.line_height), line, WORD)
    draw_scale(sheet, top, scale, 180)
    return sheet


def overlay(
    image: Image.Image, heat: Tensor | np.ndarray, *, top: float | None = None, box: Box = WHOLE
) -> Image.Image:
    """Lay the heat of one word over a picture: bright where the model looked, dark and pale elsewhere.

    Args:
        image: the picture.
        heat: (gh gw), zero or more.
        top: the heat that gets the brightest colour; None takes the largest.
        box: left, top, right and bottom of the grid as fractions of the picture.

    Returns:
        A picture of the same size.
    """
    heat = as_heat(np.asarray(heat)[None] if isinstance(heat, np.ndarray) else heat[None], 1)
    level = np.clip(heat[0] / (heat_top(heat) if top is None else top), 0, 1)
    field = _spread(level, image.size, box)
    pixels = np.asarray(image.convert("RGB"), np.float32)
    pale = 0.55 * (0.45 * pixels + 0.55 * pixels.mean(axis=2, keepdims=True))
    colour = palette()[np.round(field * 255).astype(np.uint8)].astype(np.float32)
    strength = 0.72 * field[..., None]
    mixed = (pale + (pixels - pale) * np.sqrt(field)[..., None]) * (1 - strength) + colour * strength
    return Image.fromarray(np.clip(np.round(mixed), 0, 255).astype(np.uint8))


def as_heat(heat: Tensor | np.ndarray, words: int) -> np.ndarray:
    """Check the heat of some words and give it as float64 (words gh gw)."""
    array = (heat.detach().cpu().double().numpy() if isinstance(heat, Tensor) else np.asarray(heat)).astype(np.float64)
    if array.ndim != 3 or array.shape[0] != words or 0 in array.shape[1:]:
        raise ValueError(f"heat of shape {array.shape} does not fit {words} words; expected ({words}, rows, columns)")
    if not np.isfinite(array).all():
        raise ValueError(f"heat has {int((~np.isfinite(array)).sum())} values that are not finite")
    if array.size and array.min() < 0:
        raise ValueError(f"heat must be zero or more; the smallest value is {array.min():.4g}")
    return array


def heat_top(heat: np.ndarray) -> float:
    """The heat that gets the brightest colour: nearly the largest, so that one hot patch does not hide the rest."""
    if heat.size == 0 or heat.max() <= 0:
        return 1.0
    high = float(np.quantile(heat, 0.998))
    return high if high > 0 else float(heat.max())


def grid_box(image_size: tuple[int, int], input_size: tuple[int, int], resize: str) -> Box:
    """Where the grid of an encoder lies on the picture that it was given, as fractions of the picture.

    Args:
        image_size: width and height of the picture.
        input_size: height and width that the encoder takes.
        resize: how the picture was brought to that size: "squash", "crop", "letterbox" or "native".

    Returns:
        Left, top, right and bottom; below 0 and above 1 for the bars of a letterbox.
    """
    if resize in ("squash", "native"):
        return WHOLE
    (w, h), (high, wide) = image_size, input_size
    ratios = (wide / w, high / h)
    if resize == "crop":
        scale = max(ratios)
    elif resize == "letterbox":
        scale = min(ratios)
    else:
        raise ValueError(f"resize must be squash, crop, letterbox or native, not {resize!r}")
    part_w, part_h = wide / (w * scale), high / (h * scale)
    return (0.5 - part_w / 2, 0.5 - part_h / 2, 0.5 + part_w / 2, 0.5 + part_h / 2)


@cache
def palette() -> np.ndarray:
    """256 colours, even steps to the eye, from dark to bright: (256 3) bytes."""
    from matplotlib import colormaps

    return np.round(colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8)


def _spread(level: np.ndarray, size: tuple[int, int], box: Box) -> np.ndarray:
    """Stretch a grid over a picture, between patch centres in straight lines; nothing outside the box."""
    w, h = size
    left, top, right, bottom = (round(v * s) for v, s in zip(box, (w, h, w, h), strict=True))
    grid = Image.fromarray(level.astype(np.float32))
    grid = grid.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BILINEAR)
    field = Image.new("F", size, 0.0)
    field.paste(grid, (left, top))
    return np.clip(np.asarray(field), 0, 1)


def draw_scale(sheet: Image.Image, top: float, text: str, long: int) -> None:
    """Draw the colour scale, `long` pixels of it, at the foot of a sheet."""
    canvas = ImageDraw.Draw(sheet)
    x, y = MARGIN, sheet.height - 36
    bar = palette()[np.linspace(0, 255, long).astype(np.uint8)]
    sheet.paste(Image.fromarray(np.repeat(bar[None], 10, axis=0)), (x + 16, y + 5))
    draw(canvas, (x, y), "0", SMALL)
    draw(canvas, (x + 16 + long + 8, y), f"{show_number(top)} {text}", SMALL)
