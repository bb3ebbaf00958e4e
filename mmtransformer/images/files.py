"""Image file to RGB.

`load` takes files from anywhere and either gives the picture as a person would see it or raises an `ImageError` that
names the file, the fault and the remedy; it never gives a wrong picture and never hangs. What it knows and most loaders
do not: orientation tags are applied, alpha is laid on white, 16-bit grey is scaled and not clipped (the rule stands at
`_grey_to_rgb`), checksums are verified, copies that stopped are found, sizes are looked at before anything is decoded,
pipes and devices are refused. Colour profiles are not applied, as no training set of the field applies them. Pillow's
global settings are neither changed nor needed, so threads may load side by side.
"""

import io
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageChops,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from mmtransformer.images import bombs, damage, tiff

Source = str | Path | bytes | BinaryIO | Image.Image
_MAX_PIXELS = 64_000_000

_OPENERS: dict[str, Callable[..., ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,  # also for the first picture of an MPO, which starts as a JPEG
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
}
if features.check("webp"):
    _OPENERS["WEBP"] = WebPImagePlugin.WebPImageFile
if "avif" in features.modules and features.check("avif"):
    from PIL import AvifImagePlugin

    _OPENERS["AVIF"] = AvifImagePlugin.AvifImageFile

_BAND = 1 << 20  # pixels that are worked on at a time
if features.check("jpg_2000"):
    _OPENERS["JPEG 2000"] = Jpeg2KImagePlugin.Jpeg2KImageFile
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A picture that cannot be used; the message names the file, the fault and the remedy."""


def load(
    source: Source,
    *,
    name: str | None = None,
    max_pixels: int = _MAX_PIXELS,
    at_least: tuple[float, float] | None = None,
) -> Image.Image:
    """Reads one picture as RGB: JPEG, PNG, GIF, WebP, BMP, TIFF, PPM, AVIF, JPEG 2000, and HEIC with pillow-heif.

    The format is told by the content, not by the name; AVIF and JPEG 2000 need a Pillow that has them. Of an animation
    it is the first frame, of a TIFF the largest page (the first of several), as thumbnails may stand before it.

    Args:
        source: A path, the bytes of a file, an open binary file, or a Pillow picture of any mode.
        name: What errors call the picture; the path if not given.
        max_pixels: The most that are decoded, 64 megapixels unless told, which take up to 1.2 GB of memory meanwhile
            (at most 18 bytes each, beside the file's own); larger pictures are refused before they are decoded. A JPEG
            may have four times as many: it is decoded at half its sides, still far above what models see. A JPEG 2000
            may have half as many. A few kilobytes of a "decompression bomb" can hold billions.
        at_least: Height and width, px, of the upright picture that suffice. A JPEG is then decoded at a half, a
            quarter or an eighth of its size, where that is no smaller, in a fraction of the time: JPEG keeps blocks of
            8 x 8 as frequencies, and the high ones are left out. None decodes all; other formats always do.

    Raises:
        ImageError: If the picture cannot be read whole and right.
    """
    if isinstance(source, Image.Image):
        called = _printable(name or str(getattr(source, "filename", "")) or "<picture>")
        return _decoded(called, lambda: _finished(source, called, max_pixels))
    data, name = _read(source, name, max_bytes=16 * max_pixels + 2**26)
    kind = kind_of(data[:64])
    opener = _heic_opener() if kind == "HEIC" else _OPENERS.get(kind)
    if opener is None:
        raise ImageError(f"{name}: {_what_it_is(data, kind)}; give one of {', '.join(_OPENERS)}")

    def decode() -> Image.Image:
        start = bombs.check_jpeg(data, max_pixels) if kind == "JPEG" else 0
        if kind == "TIFF":
            bombs.check_tiles(max((page.parts for page in tiff.pages(data)), default=0))
        if check := {"GIF": bombs.check_gif, "PPM": bombs.check_ppm, "BMP": bombs.check_bmp}.get(kind):
            check(data)
        coded = damage.without_texts(data) if kind == "PNG" else data
        image = opener(io.BytesIO(coded), "")  # reads the header only
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_tiff(image, data, name, max_pixels)
        # A JPEG may be decoded at half its sides; a JPEG 2000 is in numbers of 32 bits.
        _check_size(image, name, int({"JPEG": 4, "JPEG 2000": 0.5}.get(kind, 1) * max_pixels))
        damage.scale_down(image, at_least, max_pixels)
        result = _finished(image, name, max_pixels, own=True)
        if kind == "PNG":
            damage.check_png(data, image)
        if kind == "JPEG":
            damage.check_jpeg(data, image, start, at_least, max_pixels)
        if kind == "WEBP":
            damage.check_webp(data)
        if kind == "AVIF":
            damage.check_avif(data)
        return result

    return _decoded(name, decode, kind)


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a picture's file, for `load`; they are not looked at.

    Raises:
        ImageError: If it is no file that can be read, or empty, or far too large for a picture.
    """
    return _read(path, None, max_bytes=16 * _MAX_PIXELS + 2**26)[0]


def _heic_opener() -> Callable[..., ImageFile.ImageFile] | None:
    """pillow-heif's reader, which turns pictures upright itself; None where it is not installed."""
    try:
        from pillow_heif.as_plugin import HeifImageFile  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return HeifImageFile


def _decoded(name: str, decode: Callable[[], Image.Image], kind: str = "picture") -> Image.Image:
    """Runs a decoder and turns whatever it raises into an ImageError."""
    try:
        return decode()
    except ImageError:
        raise
    except bombs.Bomb as error:
        raise ImageError(f"{name}: {error}; save it anew") from error
    except MemoryError as error:
        raise ImageError(f"{name}: not enough memory to decode this {kind}; make it smaller") from error
    except Exception as error:  # damaged files bring out OSError, SyntaxError, struct.error, zlib.error, ...
        reason = str(error) or type(error).__name__
        reason = "it ends too early" if " a buffer of " in reason else reason  # in the words of Python's struct
        raise ImageError(f"{name}: damaged {kind} ({reason}); get the file again or save it anew") from error


def _read(source: str | Path | bytes | BinaryIO, name: str | None, max_bytes: int) -> tuple[bytes, str]:
    """Returns the whole content of a source, and its name."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = _printable(name or "<bytes>")
        data = bytes(source)
    elif isinstance(source, (str, os.PathLike)):
        name = _printable(name or os.fspath(source))
        data = _read_file(source, name, max_bytes)
    elif hasattr(source, "read"):
        name = _printable(name or str(getattr(source, "name", "<stream>")))
        try:
            data = source.read(max_bytes + 1)
        except Exception as error:  # a damaged zip member raises BadZipFile, zlib.error, EOFError, ...
            raise ImageError(f"{name}: not readable ({error}); get the file again") from error
        if not isinstance(data, bytes):
            raise ImageError(f'{name}: opened as text; open it with mode "rb"')
    else:
        called = name or " ".join(repr(source).split())[:60]
        way = "; PIL.Image.fromarray makes a picture of (height, width, 3) RGB bytes" * hasattr(source, "__array__")
        if hasattr(source, "permute"):  # a tensor of torch
            way = "; torchvision's to_pil_image makes a picture of (3, height, width)"
        raise ImageError(f"{called}: a {type(source).__name__} is not a path, bytes or binary file{way}")
    if len(data) > max_bytes:
        raise ImageError(f"{name}: more than {max_bytes:,} bytes, too large for a picture; make it smaller")
    if not data:
        raise ImageError(f"{name}: empty, 0 bytes; get the file again")
    return data, name


def _printable(name: str) -> str:
    """Keeps line ends and stray bytes of file names out of messages."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _read_file(path: str | os.PathLike[str], name: str, max_bytes: int) -> bytes:
    """Reads a regular file, and refuses everything else at once: a pipe would make us wait for ever."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        if str(path).startswith(("http:", "https:", "ftp:", "s3:", "gs:", "file:", "data:")):
            raise ImageError(f"{name:.99}: an address, not a file; download it first, or give path or bytes") from error
        if isinstance(error, IsADirectoryError):
            raise ImageError(f"{name}: a folder, not a picture; give the path of a file") from error
        way = "check the path and its permissions" if len(name) < 1000 else "of base64 give base64.b64decode(text)"
        raise ImageError(f"{name:.999}: cannot be read ({getattr(error, 'strerror', 0) or error}); {way}") from error
    raise ImageError(f"{name}: a pipe or a device, not a picture; give the path of a file")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has neither the flag nor such pipes


def kind_of(head: bytes) -> str:
    """Tells the format by the first bytes; "" if unknown."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PPM"
    if head[4:8] == b"ftyp":
        if head[8:12] in (b"avif", b"avis") or b"avif" in head[16:64]:
            return "AVIF"
        return "HEIC" if head[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc") else ""
    if head.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return "JPEG 2000"
    if head.startswith(b"BM"):
        return "BMP"
    return ""


def _what_it_is(data: bytes, kind: str) -> str:
    """Describes a file that is not a picture of an allowed format."""
    if kind == "HEIC":
        return 'a HEIC picture, as iPhones take them, which needs pillow-heif (the extra "heic"; docs/install.md)'
    if kind:
        return f"a {kind} picture, which this installation cannot read"
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    signs = {
        b"%pdf": "a PDF document",
        b"%!ps": "a PostScript file",
        b"\xc5\xd0\xd3\xc6": "a PostScript file",
        b"<!doctype": "a web page (the download failed?)",
        b"<html": "a web page (the download failed?)",
        b"<svg": "an SVG drawing",
        b"<?xml": "an XML or SVG file",
        b"version https://git-lfs": "a Git LFS pointer (run `git lfs pull`)",
        b"pk\x03\x04": "a zip archive",
        b"\x1f\x8b": "a gzip file",
        b"8bps": "a Photoshop file",
        b"\xff\x0a": "a JPEG XL picture",
        b"\0\0\0\x0cjxl": "a JPEG XL picture",
    }
    for sign, what in signs.items():
        if head.startswith(sign):
            return what
    if not any(data[:512]):
        return "only zero bytes (a failed copy?)"
    return f"not a picture (it starts with {data[:8]!r})"


def _finished(image: Image.Image, name: str, max_pixels: int, *, own: bool = False) -> Image.Image:
    """Decodes a picture that is not too large, turns it upright and makes it a plain RGB picture.

    Args:
        image: The picture, of which a file's header is read.
        name: What errors call it.
        max_pixels: The most that it may have.
        own: Whether nobody else has the picture, so that its pixels need not be copied.
    """
    _check_size(image, name, max_pixels)
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged tags say nothing about the pixels, nor about how to turn them
        turn = None
    frame = image.dispose_extent if isinstance(image, GifImagePlugin.GifImageFile) else None
    upright = image if turn is None else image.transpose(turn)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        result = _grey_to_rgb(upright, name, tiff.white_is_zero(image), tiff.is_unsigned(image), tiff.top_of(image))
    elif image.mode == "CMYK" and isinstance(image, JpegImagePlugin.JpegImageFile) and "adobe" not in image.info:
        result = _to_rgb(ImageChops.invert(upright), name)  # Adobe's are inverted, and Pillow takes all for theirs
    else:
        result = _to_rgb(upright, name)
    if frame not in (None, (0, 0, *image.size)):  # nothing was drawn around the frame
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(result.crop(frame), frame)
        result = canvas
    if result is image:
        result = image._new(image.im) if own else image.copy()  # pyright: ignore[reportPrivateUsage]
    result.info.clear()  # profiles and tags that would travel with every picture
    return result


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    """Refuses a picture that is too large, or empty."""
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} = {width * height:,} pixels are more than {max_pixels:,}; "
            f"make it smaller (in Python, mmtransformer.images.load(file, max_pixels=N) reads one that you trust)"
        )
    if width * height == 0:
        raise ImageError(f"{name}: {width} x {height} pixels, an empty picture; leave it out")


def _check_tiff(image: TiffImagePlugin.TiffImageFile, data: bytes, name: str, max_pixels: int) -> None:
    """Goes to the page that is the picture, and refuses what would cost too much or come out wrong."""
    found = tiff.pages(data)
    try:
        if page := tiff.largest(found):
            image.seek(page)
        tiff.check_tags(image)
    except ValueError as error:
        raise ImageError(f"{name}: {error}") from error
    parts = tiff.parts(image, data)
    if image.tag_v2.get(259) in (6, 7):
        coded = [data[start : start + size] for start, size in parts]
        bombs.check_tiff_jpeg(coded, image.width * image.height, max_pixels)
    damage.check_tiff(data, image, parts)


def _bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Parts of a picture of about a megapixel: their boxes, left, top, right, bottom."""
    step = max(1, _BAND // image.width)
    for top in range(0, image.height, step):
        yield 0, top, image.width, min(top + step, image.height)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("1", "L", "CMYK", "YCbCr", "HSV", "RGBX") and "transparency" not in image.info:
        return image.convert("RGB")
    if image.mode == "LAB":
        raise ImageError(f"{name}: its colours are CIE Lab; save it as RGB")
    # P, PA, LA, La, RGBa, RGBA, and 1, L, RGB with one colour that is transparent
    if image.mode == "P" and "transparency" not in image.info:
        return image.convert("RGB")
    result = Image.new("RGB", image.size)
    for box in _bands(image):
        part = image.crop(box).convert("RGBA")
        paper = Image.new("RGBA", part.size, "white")
        result.paste(Image.alpha_composite(paper, part).convert("RGB"), box)
    return result


def _grey_to_rgb(image: Image.Image, name: str, white_is_zero: bool, unsigned: bool, top: int) -> Image.Image:
    """Scales grey of more than 8 bits to 8, by one rule (docs/own-data.md); Pillow's own conversion clips it to white.

    16 bits mean 0 to 65535, also where only 12 of them are used, and 0 to 32767 where they are signed; a TIFF of 12
    bits means 0 to 4095. 32-bit numbers mean the smallest of 0 to 1 (floats), 0 to 255 and 0 to 65535 that holds them;
    floats that are not whole numbers mean 0 to 1. What fits none of these (negative or larger values) goes from its
    darkest to its brightest value.
    """

    def numbers(box: tuple[int, int, int, int]) -> np.ndarray:
        values = np.asarray(image.crop(box))
        if unsigned:
            values = values.view(np.uint32)
        return values.astype(np.float32 if values.itemsize < 4 or image.mode == "F" else np.float64)

    low, high, bad, whole = np.inf, -np.inf, 0, True
    for box in _bands(image):
        values = numbers(box)
        bad += int((~np.isfinite(values)).sum())
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        whole = whole and bool((values == np.rint(values)).all())
    if bad:
        raise ImageError(f"{name}: {bad:,} pixels are not finite numbers; repair it and save it as 8-bit")
    if not top and image.mode == "F" and not whole:
        top = 1 if high <= 1 else 0
    elif not top:  # 32 bits say nothing of the range
        top = next((top for top in (1, 255, 65535) if high <= top and (top > 1 or image.mode == "F")), 0)
    transparent = image.info.get("transparency")
    result = Image.new("RGB", image.size)
    for box in _bands(image):
        values = numbers(box)
        grey = values * (255 / top) if top and low >= 0 else (values - low) * (255 / max(high - low, 1e-30))
        image_8 = np.rint(255 - grey if white_is_zero else grey).clip(0, 255).astype(np.uint8)
        if isinstance(transparent, int):
            image_8[values == transparent] = 255
        result.paste(Image.fromarray(image_8).convert("RGB"), box)
    return result
