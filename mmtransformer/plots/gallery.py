"""A sheet of cards: pictures with captions, as one picture to look at."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from mmtransformer.plots.cards import Card, CardCaption
from mmtransformer.plots.text import Colour, Style, draw, draw_lines, width, wrap

PAPER: Colour = (243, 244, 247)
CARD: Colour = (255, 255, 255)
EDGE: Colour = (222, 225, 231)
MAT: Colour = (232, 234, 239)
INK: Colour = (24, 27, 33)
GREY: Colour = (104, 111, 124)
GOOD: Colour = (16, 124, 72)
GOOD_TINT: Colour = (221, 243, 231)
BAD: Colour = (190, 40, 44)
BAD_TINT: Colour = (252, 228, 228)
BLUE: Colour = (44, 82, 160)
BLUE_TINT: Colour = (226, 234, 250)

INKS = {"language": (BLUE, BLUE_TINT), "good": (GOOD, GOOD_TINT), "bad": (BAD, BAD_TINT), "": (GREY, MAT)}
"""Kind of a mark -> its letters and its ground."""

TITLE = Style(30, INK, bold=True)
SUBTITLE = Style(17, GREY)
HEADING = Style(13, GREY)
CAPTION = Style(19, INK, bold=True, leading=1.36)
REFERENCE = Style(14, GREY)
CHIP = Style(13, INK, bold=True)

MARGIN, GAP, PAD = 36, 22, 18
MAX_HEIGHT = 60_000


def plot_gallery(
    cards: Sequence[Card],
    *,
    columns: int = 4,
    title: str = "",
    subtitle: str = "",
    card_width: int = 360,
    max_references: int = 3,
    max_lines: int = 8,
) -> Image.Image:
    """Draw a sheet of cards; `save_image` writes it to a file.

    Args:
        cards: the pictures with their captions; each goes to the column that is shortest so far.
        columns: cards a row.
        title: the sheet's title.
        subtitle: a line or two below the title, such as the metrics.
        card_width: pixels of a card.
        max_references: how many references a caption shows.
        max_lines: lines of a caption or reference before it is cut off with "…".

    Raises:
        ValueError: if there is no card, or the sheet would be too high.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    if not cards:
        raise ValueError("a gallery needs at least one card")
    columns = min(columns, len(cards))
    total = 2 * MARGIN + columns * card_width + (columns - 1) * GAP
    head = draw_head(title, subtitle, total)
    panels = [_panel(card, card_width, max_references, max_lines) for card in cards]
    feet = [head.height] * columns
    places: list[tuple[int, int]] = []
    for panel in panels:
        column = feet.index(min(feet))
        places.append((MARGIN + column * (card_width + GAP), feet[column]))
        feet[column] += panel.height + GAP
    height = max(feet) - GAP + MARGIN
    if height > MAX_HEIGHT:
        raise ValueError(
            f"{len(cards)} cards make a sheet {height} px high (at most {MAX_HEIGHT}); "
            f"show fewer cards or more than {columns} columns"
        )
    sheet = Image.new("RGB", (total, height), PAPER)
    sheet.paste(head, (0, 0))
    for place, panel in zip(places, panels, strict=True):
        draw_frame(sheet, place, panel)
    return sheet


def draw_head(title: str, subtitle: str, total: int) -> Image.Image:
    """Draw the top of a sheet that is `total` pixels wide."""
    room = total - 2 * MARGIN
    titles = wrap(title, TITLE, room, 3) if title else []
    subtitles = wrap(subtitle, SUBTITLE, room, 6) if subtitle else []
    text = len(titles) * TITLE.line_height + len(subtitles) * SUBTITLE.line_height
    head = Image.new("RGB", (total, MARGIN + text + (20 if text else 0)), PAPER)
    canvas = ImageDraw.Draw(head)
    y = draw_lines(canvas, (MARGIN, MARGIN - 6), titles, TITLE)
    draw_lines(canvas, (MARGIN, y + 2), subtitles, SUBTITLE)
    return head


def _fitted(image: Image.Image, card_width: int) -> tuple[int, int]:
    """Width and height of a picture in a card: as wide as the card, at most a quarter higher than wide."""
    scale = min(card_width / image.width, card_width * 1.25 / image.height)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _panel(card: Card, card_width: int, max_references: int, max_lines: int) -> Image.Image:
    """A card without its rounded frame: the picture, the text below."""
    size = _fitted(card.image, card_width)
    image = card.image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    room = card_width - 2 * PAD
    frame = size[1]
    panel = Image.new("RGB", (card_width, frame + _most_height(card, max_references, max_lines)), CARD)
    panel.paste(MAT, (0, 0, card_width, frame))
    panel.paste(image, ((card_width - size[0]) // 2, 0))
    canvas = ImageDraw.Draw(panel)
    y = frame + PAD - 4.0
    if card.heading:
        y = draw_lines(canvas, (PAD, y), wrap(card.heading, HEADING, room, 2), HEADING) + 4
    for i, said in enumerate(card.captions):
        if i:
            canvas.line((PAD, y + 7, card_width - PAD, y + 7), EDGE)
            y += 16
        y = _caption(canvas, y, said, room, max_references, max_lines)
    return panel.crop((0, 0, card_width, round(y) + PAD - 4))


def _most_height(card: Card, max_references: int, max_lines: int) -> int:
    """Pixels that the text of a card can take at most."""
    references = (max_references + 1) * (max_lines * REFERENCE.line_height + 8)
    marks = sum((len(said.facts) + 3) * (CHIP.line_height + 12) for said in card.captions)
    return 200 + marks + len(card.captions) * (max_lines * CAPTION.line_height + references + 40)


def _caption(
    canvas: ImageDraw.ImageDraw, y: float, said: CardCaption, room: float, max_references: int, max_lines: int
) -> float:
    """Draw a caption, its marks and its references; give where they end."""
    lines = wrap(said.text, CAPTION, room, max_lines) or ["(empty)"]
    y = draw_lines(canvas, (PAD, y), lines, CAPTION)
    if chips := [(text, *INKS[kind]) for text, kind in said.marks()]:
        y = draw_chips(canvas, y + 5, chips, room) + 3
    for reference in said.references[:max_references]:
        lines = wrap(reference, REFERENCE, room - 14, max_lines) or ["(empty)"]
        top = y + 6
        y = draw_lines(canvas, (PAD + 14, top), lines, REFERENCE)
        canvas.rectangle((PAD, top + 3, PAD + 2, y - 3), fill=EDGE)
    if (more := len(said.references) - max_references) > 0:
        y = draw_lines(canvas, (PAD + 14, y + 4), [f"+ {more} more"], REFERENCE)
    return y


def draw_chips(
    canvas: ImageDraw.ImageDraw, y: float, chips: list[tuple[str, Colour, Colour]], room: float, left: float = PAD
) -> float:
    """Draw marks (text, ink, tint) beside each other from `left` on, and give where they end."""
    x, height = float(left), CHIP.line_height + 4
    for text, ink, tint in chips:
        text = (wrap(text, CHIP, room - 20, 1) or ["?"])[0]
        wide = width(text, CHIP) + 16
        if x > left and x + wide > left + room:
            x, y = left, y + height + 5
        canvas.rounded_rectangle((x, y, x + wide, y + height), radius=height / 2, fill=tint)
        draw(canvas, (x + 8, y + 2), text, CHIP(ink))
        x += wide + 6
    return y + height


def draw_frame(sheet: Image.Image, place: tuple[int, int], panel: Image.Image) -> None:
    """Lay a card on the sheet with rounded corners and a fine edge."""
    w, h = panel.size
    mask = Image.new("L", (w * 2, h * 2), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, w * 2 - 1, h * 2 - 1), radius=24, fill=255)
    sheet.paste(panel, place, mask.resize(panel.size, Image.Resampling.LANCZOS))
    x, y = place
    ImageDraw.Draw(sheet).rounded_rectangle((x, y, x + w - 1, y + h - 1), radius=12, outline=EDGE)
