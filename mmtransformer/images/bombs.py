"""Files made to exhaust: what decoding one would cost is counted first, at the speed of a search.

A few kilobytes can ask a decoder for minutes: scans of a JPEG, each over all pixels; a million pieces of nothing;
formats that are decoded in Python, a pixel a turn. The limits stand far above what cameras and programs write.
"""

import re
import struct

_MOST_JUNK = 1 << 16  # bytes of a JPEG's head that belong to nothing
_MOST_SEGMENTS = 10_000  # of a JPEG; a profile of 16 MB has 256
_MOST_EXIF = 64  # segments of a JPEG, which Pillow puts together one by one
_MOST_SCANS = 100  # of a JPEG; progressive ones have about 10
_FULL_SCANS = 12  # that a picture of `max_pixels` may have; a smaller one more
_MOST_CHUNKS = 100_000  # of a PNG: 800 MB in the smallest that encoders write
_MOST_BLOCKS = 100_000  # of a GIF before its first frame: 25 MB of comments
_MOST_HEAD = 1 << 16  # bytes of a PPM before its pixels
_MOST_SPELT = 1 << 22  # bytes that Pillow reads number by number: plain PPM, packed BMP
_MOST_TILES = 65_536  # of a TIFF

_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_PPM_HEAD = re.compile(rb"P[1-6](?:\s++|#[^\r\n]*+[\r\n])++(?:\d++(?:\s++|#[^\r\n]*+[\r\n])++){0,2}\d++")
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a segment
_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # of the frame


class Bomb(ValueError):
    """A file that would cost more than a picture does; the message says what it is, without the file's name."""


def check_jpeg(data: bytes, max_pixels: int) -> int:
    """Where the first scan of a JPEG begins, after its segments and scans were counted.

    Args:
        data: The file.
        max_pixels: The most that are decoded.

    Raises:
        Bomb: If there are too many of them, for the picture's size.
    """
    position, junk, segments, exif, pixels, first, scans = 2, 0, 0, 0, 0, 0, 0
    while found := _MARKER.search(data, position):
        marker = found[1][0]
        if not scans:
            junk += found.end() - position - 2
        if junk > _MOST_JUNK:
            raise Bomb(f"a JPEG with more than {_MOST_JUNK:,} bytes between its segments that belong to none")
        position = found.end()
        if marker == 0xD9:  # the end
            break
        if marker in _ALONE:
            continue
        segments += 1
        exif += data.startswith(b"Exif\0", position + 2)
        if segments > _MOST_SEGMENTS or exif > _MOST_EXIF:
            raise Bomb(f"a JPEG of more than {_MOST_SEGMENTS:,} segments, or {_MOST_EXIF} of Exif")
        size = int.from_bytes(data[position : position + 2])
        if marker in _SIZES:
            height, width = struct.unpack(">HH", data[position + 3 : position + 7].ljust(4, b"\0"))
            pixels = height * width
        if marker == 0xDA:
            scans += 1
            first = first or position - 2
            # Entropy-coded bytes hold no marker, so that this is a bound; what is behind the picture counts too.
            if scans == 1 and _few(1 + data.count(b"\xff\xda", position), pixels, max_pixels):
                break
            if not _few(scans, pixels, max_pixels):
                raise Bomb(
                    f"a JPEG of {pixels:,} pixels in {scans:,} scans or more; at most {_MOST_SCANS} are decoded, and "
                    f"{_FULL_SCANS} of {max_pixels:,} pixels"
                )
        position += max(size, 2)
    return first or len(data)


def _few(scans: int, pixels: int, max_pixels: int) -> bool:
    return scans == 1 or (scans <= _MOST_SCANS and scans * pixels <= _FULL_SCANS * max_pixels)


def png_chunks(data: bytes) -> list[tuple[bytes, int, int]]:
    """The chunks of a PNG up to its IEND: the kind, and where it begins and ends, checksum included.

    The last one's end is behind the file's where that is cut.

    Raises:
        Bomb: If there are too many.
    """
    found, position = [], 8
    while position + 8 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4])
        kind = data[position + 4 : position + 8]
        found.append((kind, position, end))
        if kind == b"IEND":
            break
        if len(found) > _MOST_CHUNKS:
            raise Bomb(f"a PNG of more than {_MOST_CHUNKS:,} chunks")
        position = end
    return found


def check_gif(data: bytes) -> None:
    """Raises `Bomb` if a GIF has too many comments and the like before its first frame."""
    position = 13 + (3 << ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 128 else 0)
    blocks = 0
    while data[position : position + 1] == b"\x21":
        position += 2
        blocks += 1
        while position < len(data) and (size := data[position]):
            position += 1 + size
            blocks += 1
            if blocks > _MOST_BLOCKS:
                break
        position += 1
        if blocks > _MOST_BLOCKS:
            raise Bomb(f"a GIF of more than {_MOST_BLOCKS:,} blocks before its first frame")


def check_ppm(data: bytes) -> None:
    """Raises `Bomb` if a PPM has a head without an end, or very many numbers that are spelt out."""
    head = _PPM_HEAD.match(data[: _MOST_HEAD + 64])
    if len(data) > _MOST_HEAD and (head is None or head.end() > _MOST_HEAD):
        raise Bomb(f"a PPM whose first {_MOST_HEAD:,} bytes hold no size")
    if data[1:2] in b"123" and len(data) > _MOST_SPELT:
        raise Bomb(f"a PPM of {len(data):,} bytes of numbers spelt out; at most {_MOST_SPELT:,} are read")


def check_bmp(data: bytes) -> None:
    """Raises `Bomb` if a packed BMP is long."""
    packed = int.from_bytes(data[30:34], "little") in (1, 2)  # runs of bytes or half bytes
    if packed and len(data) > _MOST_SPELT:
        raise Bomb(f"a BMP of {len(data):,} bytes in runs; at most {_MOST_SPELT:,} are read")


def check_tiles(tiles: int) -> None:
    """Raises `Bomb` if a picture is cut into too many strips or tiles."""
    if tiles > _MOST_TILES:
        raise Bomb(f"a TIFF of {tiles:,} strips or tiles; at most {_MOST_TILES:,} are read")


def check_tiff_jpeg(parts: list[bytes], pixels: int, max_pixels: int) -> None:
    """Raises `Bomb` if the JPEGs that a TIFF's strips are have too many scans: a TIFF may hide what a JPEG may not.

    Args:
        parts: The strips or tiles.
        pixels: Of each, at most.
        max_pixels: The most that are decoded.
    """
    for part in parts:
        if not _few(max(1, part.count(b"\xff\xda")), pixels, max_pixels):
            check_jpeg(part, max_pixels)
