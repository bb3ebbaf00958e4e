"""Damage that a decoder does not notice, or takes for damage where there is none."""

import io
import math
import struct
import zlib

from PIL import ExifTags, Image, JpegImagePlugin, TiffImagePlugin

from mmtransformer.images.bombs import png_chunks

_TEXTS = (b"iCCP", b"zTXt", b"iTXt", b"tEXt")
_TAIL = bytes(64)
_BAND = 1 << 20  # pixels, or bytes, that are held at a time


def scale_down(image: Image.Image, at_least: tuple[float, float] | None, max_pixels: int) -> None:
    """Lets a JPEG that was not decoded yet be decoded smaller, by 2, 4 or 8; see `mmtransformer.images.load`."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return
    if at_least is not None:
        height, width = (max(1, math.ceil(side)) for side in at_least)
        try:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        except Exception:  # damaged tags turn nothing
            turned = False
        image.draft(None, (height, width) if turned else (width, height))
    if max_pixels < image.width * image.height <= 4 * max_pixels:
        image.draft(None, (image.width // 2, image.height // 2))


def check_jpeg(
    data: bytes, image: Image.Image, start: int, at_least: tuple[float, float] | None, max_pixels: int
) -> None:
    """Raises if the pixels end early: the decoder reads zeros as pixels, and fills up with grey at an end marker.

    Args:
        data: the file.
        image: what was decoded of it.
        start: where its first scan begins.
        at_least: how it was scaled down.
        max_pixels: the same.
    """
    if data.rfind(b"\xff\xd9", start) < 0:  # from behind, where it is
        raise OSError(f"no end marker in {len(data):,} bytes")
    last = image.getpixel((image.width - 1, image.height - 1))
    if any(abs(value - 128) > 16 for value in (last if isinstance(last, tuple) else (last,)) if value is not None):
        return  # not filled up
    end = data.find(b"\xff\xd9", start)
    while data[end - 1] == 0xFF:  # what was cut behind an FF byte
        end -= 1
    # Bytes before the end marker are ignored behind whole pixels, and are pixels if there is room for more.
    longer = data[:end] + bytes(range(1, 251)) * 4 + data[end:]
    with JpegImagePlugin.JpegImageFile(io.BytesIO(longer), "") as other:
        scale_down(other, at_least, max_pixels)
        step = max(1, _BAND // image.width)
        for top in range(0, image.height, step):
            box = (0, top, image.width, min(top + step, image.height))
            if other.crop(box).tobytes() != image.crop(box).tobytes():
                raise OSError("its pixels end early")


def check_png(data: bytes, image: Image.Image) -> None:
    """Raises if a checksum is wrong or rows are missing, neither of which decoding notices."""
    compressed, kind, end = [], b"", 0
    for kind, start, end in png_chunks(data):
        if end > len(data):
            break
        if zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise OSError(f"wrong checksum of {kind.decode('latin-1')!r} at byte {start:,}")
        if kind == b"IDAT":
            compressed.append(data[start + 8 : end - 4])
    if kind != b"IEND" or end > len(data):
        raise OSError(f"it ends before its IEND, after {len(data):,} bytes")
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    if not interlaced and any(image.crop((0, height - 1, width, height)).tobytes()):
        return  # missing rows are left 0, so only a dark end needs the closer look
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    sevenths = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    expected = 0
    for left, top, step_x, step_y in sevenths if interlaced else ((0, 0, 1, 1),):
        columns, lines = -((left - width) // step_x), -((top - height) // step_y)
        if columns > 0 and lines > 0:
            expected += lines * (1 + (columns * bits + 7) // 8)  # one byte a line names its filter
    found = _unpacked(compressed, expected)
    if found < expected:
        raise OSError(f"it holds {found:,} of {expected:,} bytes of pixels")


def _unpacked(parts: list[bytes], most: int) -> int:
    """How many bytes are packed in there, up to so many; a piece of them is held at a time."""
    found, machine = 0, zlib.decompressobj()
    for part in parts:
        while found < most and (part or machine.unconsumed_tail):
            found += len(machine.decompress(part, min(_BAND, most - found)))
            part = machine.unconsumed_tail
    return found


def without_texts(data: bytes) -> bytes:
    """Takes profiles and texts out of a PNG: nothing here reads them, and Pillow takes long ones for damage.

    Raises:
        Bomb: If it has too many chunks.
    """
    chunks = png_chunks(data)
    if not any(kind in _TEXTS for kind, _, _ in chunks):
        return data
    kept = [data[start:end] for kind, start, end in chunks if kind not in _TEXTS]
    return b"".join([data[:8], *kept])


def check_webp(data: bytes) -> None:
    """Raises if the coded pixels end in zeros, as those of a copy that was stopped do."""
    position = 12
    while position + 8 <= len(data):
        kind, size = (data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little"))
        end = position + 8 + size
        if kind in (b"VP8 ", b"VP8L") and size > 128 and data[end - len(_TAIL) : end] == _TAIL:
            raise OSError("its pixels end in zeros, as after a copy that was stopped")
        position = end + size % 2


def check_avif(data: bytes) -> None:
    """Raises if the file ends in zeros, where AVIF keeps its pixels."""
    if len(data) > 256 and data.endswith(_TAIL):
        raise OSError("it ends in zeros, as after a copy that was stopped")


def check_tiff(data: bytes, image: TiffImagePlugin.TiffImageFile, parts: list[tuple[int, int]]) -> None:
    """Raises if a deflated strip or tile is not whole; `parts`: where they lie, and their sizes."""
    if image.tag_v2.get(259) not in (8, 32946):
        return
    for start, size in parts:
        if size > 24 and not any(data[start + size - 16 : start + size]):
            raise OSError(f"the pixels at byte {start:,} end in zeros, as after a copy that was stopped")
