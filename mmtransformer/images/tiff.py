"""TIFF, of which Pillow reads the first page and takes some numbers for others: which page, and what is refused."""

import struct
from typing import NamedTuple

from PIL import Image, TiffImagePlugin

_MOST_PAGES = 1000  # that are looked at
_WIDTH, _HEIGHT, _REDUCED, _OLD_REDUCED = 256, 257, 254, 255
_SIZES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # of a field's kind: bytes, 16, 32 and 64 bits


class Page(NamedTuple):
    """One picture of a TIFF.

    Attributes:
        pixels: how many.
        whole: whether it is neither a smaller version nor a mask of another.
        parts: its strips or tiles.
    """

    pixels: int
    whole: bool
    parts: int


def pages(data: bytes) -> list[Page]:
    """The pages of a TIFF's first chain, as far as it can be read: at most a thousand."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    # An offset, a count of fields, a field, and where its value stands in there.
    offset, count, size, value = ("Q", "Q", 20, 12) if big else ("I", "H", 12, 8)
    found: list[Page] = []
    seen: set[int] = set()
    try:
        (at,) = struct.unpack_from(order + offset, data, 8 if big else 4)
        while at and at not in seen and len(found) < _MOST_PAGES:
            seen.add(at)
            (fields,) = struct.unpack_from(order + count, data, at)
            at += struct.calcsize(count)
            known: dict[int, int] = {}
            parts = 0
            for place in range(at, at + size * min(fields, 65535), size):
                tag, kind = struct.unpack_from(f"{order}HH", data, place)
                if tag in (_WIDTH, _HEIGHT, _REDUCED, _OLD_REDUCED) and kind in _SIZES:
                    (known[tag],) = struct.unpack_from(order + _SIZES[kind], data, place + value)
                elif tag in (273, 324):
                    (parts,) = struct.unpack_from(order + offset, data, place + 4)
            whole = not known.get(_REDUCED, 0) & 5 and known.get(_OLD_REDUCED) != 2
            found.append(Page(known.get(_WIDTH, 0) * known.get(_HEIGHT, 0), whole, parts))
            (at,) = struct.unpack_from(order + offset, data, at + size * fields)
    except struct.error:  # cut or damaged: Pillow says so
        pass
    return found


def largest(found: list[Page]) -> int:
    """Which page is the picture: the largest of the whole ones, the first of several; a thumbnail may stand before it.

    Raises:
        ValueError: If none is whole.
    """
    whole = [i for i, page in enumerate(found) if page.whole]
    if found and not whole:
        raise ValueError(
            "a TIFF with a small preview only, as a camera's raw photographs have (NEF, DNG, ...); develop it first"
        )
    return max(whole, key=lambda i: found[i].pixels, default=0)


def check_tags(image: TiffImagePlugin.TiffImageFile) -> None:
    """Refuses what Pillow takes and reads wrongly.

    Raises:
        ValueError: Saying what it is.
    """
    bits = image.tag_v2.get(258, (1,))
    if bits[0] == 8 and image.tag_v2.get(339, (1,))[0] == 2:
        raise ValueError("a TIFF of signed bytes; save it with unsigned ones")
    if len(bits) > 1 and max(bits) > 8 and image.tag_v2.get(284) == 2:
        raise ValueError(
            f"a TIFF of {max(bits)} bits with each colour apart; save it with 8 bits or with colours together"
        )


def parts(image: TiffImagePlugin.TiffImageFile, data: bytes) -> list[tuple[int, int]]:
    """Where the strips or tiles of a page lie, and their sizes, in bytes."""
    starts, sizes = (image.tag_v2.get(a) or image.tag_v2.get(b) or () for a, b in ((273, 324), (279, 325)))
    return list(zip(starts, sizes, strict=False))


def white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF's grey of more than 8 bits is written the other way round, which Pillow leaves as it is."""
    return (
        isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(262) == 0 and image.mode not in ("1", "L")
    )


def is_unsigned(image: Image.Image) -> bool:
    """Whether 32-bit whole numbers are unsigned, which Pillow reads as signed."""
    return (
        isinstance(image, TiffImagePlugin.TiffImageFile)
        and image.mode == "I"
        and image.tag_v2.get(339, (1,))[0] == 1
        and image.tag_v2.get(258, (1,))[0] == 32
    )


def top_of(image: Image.Image) -> int:
    """The brightest number that grey of more than 8 bits can be; 0 if 32 bits leave that open."""
    bits, kind = 16, 1
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits, kind = image.tag_v2.get(258, (1,))[0], image.tag_v2.get(339, (1,))[0]
    if image.mode.startswith("I;16"):
        return 2**bits - 1
    if image.mode == "I" and bits == 16 and kind == 2:
        return 32767
    return 65535 if image.format == "PPM" else 0  # of 16 bits, which Pillow gives as one of 32
