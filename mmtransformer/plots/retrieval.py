"""What a model finds: a text with its nearest pictures, a picture with its nearest texts, on one sheet."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

from mmtransformer.plots.gallery import (
    BAD,
    BAD_TINT,
    BLUE,
    BLUE_TINT,
    CARD,
    EDGE,
    GAP,
    GOOD,
    GOOD_TINT,
    GREY,
    MARGIN,
    PAD,
    PAPER,
    draw_chips,
    draw_frame,
    draw_head,
)
from mmtransformer.plots.text import Colour, Style, draw_lines, wrap

Mark = Literal["own", "true", "other"]
"""What was found: the one that belongs to it; another one that is true as well, as far as is known; neither."""

QUERY = Style(18, bold=True, leading=1.36)
FOUND = Style(14, leading=1.36)
NOTE = Style(13, GREY)
MARK_INKS: dict[Mark, tuple[str, Colour, Colour]] = {
    "own": ("✓", GOOD, GOOD_TINT),
    "true": ("also true", BLUE, BLUE_TINT),
    "other": ("", GREY, CARD),
}
WIDE, SIDE = 700, 124


@dataclass(frozen=True)
class FoundImages:
    """A text, with the pictures that came first.

    Args:
        text: what was looked for.
        images: the nearest pictures, best first.
        marks: what each of them is.
        rank: the place of the text's own picture, from 1.
        language: the text's language code.
    """

    text: str
    images: Sequence[Image.Image]
    marks: Sequence[Mark]
    rank: int
    language: str | None = None


@dataclass(frozen=True)
class FoundTexts:
    """A picture, with the texts that came first.

    Args:
        image: what was looked for.
        texts: the nearest texts, best first.
        marks: what each of them is.
        rank: the place of the first text of its own, from 1.
        language: the texts' language code.
    """

    image: Image.Image
    texts: Sequence[str]
    marks: Sequence[Mark]
    rank: int
    language: str | None = None


def plot_searches(
    by_text: Sequence[FoundImages], by_image: Sequence[FoundTexts], *, title: str = "", subtitle: str = ""
) -> Image.Image:
    """Draw searches: texts with the pictures they found on the left, pictures with their texts on the right.

    Args:
        by_text: searches by text.
        by_image: searches by picture.
        title: the sheet's title.
        subtitle: a line or two below the title, such as the recall.

    Returns:
        The sheet.

    Raises:
        ValueError: if there is nothing to show, or marks do not fit.
    """
    columns = [[_images(found) for found in by_text], [_texts(found) for found in by_image]]
    columns = [column for column in columns if column]
    if not columns:
        raise ValueError("a sheet needs at least one search")
    total = 2 * MARGIN + len(columns) * WIDE + (len(columns) - 1) * GAP
    head = draw_head(title, subtitle, total)
    tall = max(sum(panel.height + GAP for panel in column) for column in columns)
    sheet = Image.new("RGB", (total, head.height + tall - GAP + MARGIN), PAPER)
    sheet.paste(head, (0, 0))
    for i, column in enumerate(columns):
        y = head.height
        for panel in column:
            draw_frame(sheet, (MARGIN + i * (WIDE + GAP), y), panel)
            y += panel.height + GAP
    return sheet


def _images(found: FoundImages) -> Image.Image:
    if len(found.marks) != len(found.images):
        raise ValueError(f"{len(found.images)} pictures were found, but {len(found.marks)} are marked")
    panel = Image.new("RGB", (WIDE, 2000), CARD)
    canvas = ImageDraw.Draw(panel)
    y = draw_lines(canvas, (PAD, PAD - 4), wrap(found.text, QUERY, WIDE - 2 * PAD, 4), QUERY)
    y = _chips(canvas, y, found.language, found.rank, found.marks) + 8
    for i, (image, mark) in enumerate(zip(found.images, found.marks, strict=True)):
        x = PAD + i * (SIDE + 10)
        word, ink, _ = MARK_INKS[mark]
        box = (x, round(y), x + SIDE, round(y) + SIDE)
        canvas.rectangle(box, outline=EDGE if mark == "other" else ink, width=1 if mark == "other" else 4)
        small = _fitted(image, SIDE - 10)
        panel.paste(small, (x + (SIDE - small.width) // 2 + 1, round(y) + (SIDE - small.height) // 2 + 1))
        draw_lines(canvas, (x, y + SIDE + 2), [f"{i + 1}  {word}"], NOTE(ink))
    return panel.crop((0, 0, WIDE, round(y) + SIDE + NOTE.line_height + PAD))


def _texts(found: FoundTexts) -> Image.Image:
    if len(found.marks) != len(found.texts):
        raise ValueError(f"{len(found.texts)} texts were found, but {len(found.marks)} are marked")
    panel = Image.new("RGB", (WIDE, 3000), CARD)
    canvas = ImageDraw.Draw(panel)
    side = SIDE + 40
    panel.paste(_fitted(found.image, side), (PAD, PAD))
    x, room = PAD + side + 16, WIDE - side - 16 - 2 * PAD
    y = _chips(canvas, PAD - 8, found.language, found.rank, found.marks, left=x) + 6
    for i, (text, mark) in enumerate(zip(found.texts, found.marks, strict=True)):
        word, ink, tint = MARK_INKS[mark]
        line = f"{i + 1}  {text}" + (f"  ({word})" if mark == "true" else f"  {word}")
        lines = wrap(line, FOUND, room - 12, 3)
        bottom = y + len(lines) * FOUND.line_height + 6
        canvas.rounded_rectangle((x - 6, y, WIDE - PAD, bottom), radius=5, fill=tint)
        draw_lines(canvas, (x, y + 3), lines, FOUND if mark == "other" else FOUND(ink))
        y = bottom + 4
    return panel.crop((0, 0, WIDE, max(round(y), PAD + side) + PAD - 4))


def _fitted(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _chips(
    canvas: ImageDraw.ImageDraw, y: float, language: str | None, rank: int, marks: Sequence[Mark], left: float = PAD
) -> float:
    """The language, and the place of what belongs to it; gives where they end."""
    chips = [(language, BLUE, BLUE_TINT)] if language else []
    own = rank <= len(marks)
    chips.append((f"its own: place {rank}", GOOD if own else BAD, GOOD_TINT if own else BAD_TINT))
    return draw_chips(canvas, y + 5, chips, WIDE - PAD - left, left)
