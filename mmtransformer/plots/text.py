"""Text on a picture: measured, wrapped and drawn in any language."""

import unicodedata
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmtransformer.plots import fonts

Colour = tuple[int, int, int]

FINE = 4
"""Text is drawn so many times larger and then averaged: small letters keep their spacing and their weight."""


@dataclass(frozen=True)
class Style:
    """How a text looks.

    Args:
        size: pixels of an em.
        colour: red, green, blue from 0 to 255.
        bold: thicken the strokes (the fonts have one weight).
        leading: height of a line in ems.
    """

    size: float = 16
    colour: Colour = (24, 26, 31)
    bold: bool = False
    leading: float = 1.4

    @property
    def line_height(self) -> int:
        """Pixels from one line to the next."""
        return round(self.size * self.leading)

    @property
    def stroke(self) -> float:
        """Pixels added around each stroke."""
        return self.size / 40 if self.bold else 0.0

    def __call__(self, colour: Colour) -> "Style":
        """Give the same style in another colour."""
        return replace(self, colour=colour)


def width(text: str, style: Style) -> float:
    """Pixels that a line of text takes."""
    return sum(face.getlength(run) for run, face in runs(text, style.size)) / FINE + 2 * style.stroke


@lru_cache(maxsize=4096)
def runs(text: str, size: float) -> tuple[tuple[str, ImageFont.FreeTypeFont], ...]:
    """Cut a line into runs of one font each, the fonts `FINE` times larger than the size.

    One font for the whole line if there is one; else one a word; else one a character; characters that no font has
    are spelt out.
    """
    text = fonts.spelt(fonts.clean(text))
    if (path := _face_for(text)) is not None:
        return ((text, _load(path, size)),) if text else ()
    pieces: list[tuple[str, Path]] = []
    for i, word in enumerate(text.split(" ")):
        word = f" {word}" if i else word
        if (path := _face_for(word)) is not None:
            pieces.append((word, path))
        else:
            pieces += [(part, _face_for(part) or fonts.EMBEDDED) for part in clusters(word)]
    joined: list[tuple[str, Path]] = []
    for piece, path in pieces:
        if joined and joined[-1][1] == path:
            joined[-1] = (joined[-1][0] + piece, path)
        else:
            joined.append((piece, path))
    return tuple((piece, _load(path, size)) for piece, path in joined)


def _load(path: Path, size: float) -> ImageFont.FreeTypeFont:
    """A face at the fine size; DejaVu is cut large, so it is taken smaller to sit well beside the Korean."""
    return fonts.load(path, round(FINE * size * (0.92 if path == fonts.dejavu() else 1.0), 2))


def _face_for(text: str) -> Path | None:
    needed = fonts.characters(text)
    return next((path for path in fonts.faces(needed) if needed <= fonts.coverage(path)), None)


def clusters(text: str) -> list[str]:
    """Cut a text into what a reader takes for one character: a letter with the marks that sit on it."""
    found: list[str] = []
    for c in text:
        if found and unicodedata.category(c).startswith("M"):
            found[-1] += c
        else:
            found.append(c)
    return found


def wrap(text: str, style: Style, room: float, max_lines: int | None = None) -> list[str]:
    """Break a text into lines at its spaces, and inside a word (between syllables, in Korean) where it is too long.

    Args:
        text: any text; white space is folded.
        style: its size and weight.
        room: pixels that a line may take.
        max_lines: how many lines to keep; what is cut off is marked by "…".
    """
    if max_lines is not None:
        text = text[: (max_lines + 1) * (int(room) + 2)]  # a letter takes a pixel at least: more is never seen
    lines: list[str] = []
    line = ""
    for word in fonts.clean(text).split(" "):
        longer = f"{line} {word}" if line else word
        if width(longer, style) <= room:
            line = longer
            continue
        if line:
            lines.append(line)
        while width(word, style) > room:
            if max_lines is not None and len(lines) > max_lines:
                break
            head = _fitting(word, style, room)
            lines.append(head)
            word = word[len(head) :]
        line = word
        if max_lines is not None and len(lines) > max_lines:
            break
    if line:
        lines.append(line)
    if max_lines is not None and len(lines) > max_lines:
        lines = lines[:max_lines]
        last = clusters(lines[-1])
        while last and width("".join(last).rstrip() + "…", style) > room:
            last.pop()
        lines[-1] = "".join(last).rstrip() + "…"
    return lines


def _fitting(word: str, style: Style, room: float) -> str:
    """The longest beginning of a word that fits, one cluster at least."""
    parts = clusters(word[: int(room) + 2])  # a cluster takes a pixel at least
    low, high = 1, len(parts)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if width("".join(parts[:middle]), style) <= room else (low, middle - 1)
    return "".join(parts[:low])


def draw(canvas: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, style: Style) -> float:
    """Draw one line.

    Args:
        canvas: what to draw on.
        xy: the left upper corner of the line.
        text: the line; it is not wrapped.
        style: how it looks.

    Returns:
        Where the line ends, in pixels from the left.
    """
    pad = round(style.size * FINE)
    room = round(width(text, style) * FINE) + 2 * pad
    fine = Image.new("L", (-(-room // FINE) * FINE, style.line_height * FINE + 2 * pad // FINE * FINE), 0)
    pen = ImageDraw.Draw(fine)
    x, base = float(pad), pad + FINE * (style.line_height / 2 + style.size * 0.34)
    for run, face in runs(text, style.size):
        pen.text((x, base), run, 255, face, anchor="ls", stroke_width=style.stroke * FINE)
        x += face.getlength(run)
    corner = (round(xy[0] - pad / FINE), round(xy[1] - pad / FINE))
    canvas.bitmap(corner, fine.reduce(FINE), style.colour)
    return xy[0] + (x - pad) / FINE


def draw_lines(canvas: ImageDraw.ImageDraw, xy: tuple[float, float], lines: list[str], style: Style) -> float:
    """Draw lines below each other and give where the next would begin, in pixels from the top."""
    for line in lines:
        draw(canvas, xy, line, style)
        xy = (xy[0], xy[1] + style.line_height)
    return xy[1]
