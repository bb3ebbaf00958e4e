import io
import os
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFile, TiffImagePlugin, features

from mmtransformer.images import Augment, ImageError, ImageTransform, load

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
AVIF = pytest.mark.skipif("avif" not in features.modules or not features.check("avif"), reason="no AVIF here")


def corners(height: int = 23, width: int = 31) -> Image.Image:
    """Four flat quarters, so that every turn and mirror image is another picture; the last one is not black."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, depth: int, colour: int, raw: bytes, *, extra: bytes = b"", interlaced: int = 0
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )


def oriented(turn: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = turn
    return encode(corners(), kind, exif=exif.tobytes(), **({"quality": 95} if kind == "JPEG" else {}))


def grey16(values: list[list[int]]) -> Image.Image:
    return Image.fromarray(np.array(values, dtype=np.uint16))


def seen(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours near the four corners, clockwise from the top left."""
    w, h = image.size
    return [image.getpixel(at) for at in ((2, 2), (w - 3, 2), (w - 3, h - 3), (2, h - 3))]  # type: ignore[misc]


def close(found: list[tuple[int, ...]], expected: list[tuple[int, ...]], by: int = 12) -> bool:
    return bool(np.abs(np.array(found, int) - np.array(expected, int)).max() <= by)


# ------------------------------------------------------------------------------------------ right pictures

UPRIGHT = [RED, GREEN, WHITE, BLUE]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("PPM", {}),
        pytest.param("AVIF", {"quality": 95}, marks=AVIF),
    ],
)
def test_every_format_is_told_by_its_content(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    data = encode(corners(), kind, **options)
    path = tmp_path / "사진 № 1.pdf"  # the name lies
    path.write_bytes(data)
    for source in (path, str(path), data, io.BytesIO(data)):
        image = load(source)
        assert type(image) is Image.Image
        assert (image.mode, image.size, image.info) == ("RGB", (31, 23), {})
        assert close(seen(image), UPRIGHT)
    assert close(seen(load(data + b"trailing junk" * 9)), UPRIGHT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (1, [RED, GREEN, WHITE, BLUE]),
        (2, [GREEN, RED, BLUE, WHITE]),
        (3, [WHITE, BLUE, RED, GREEN]),
        (4, [BLUE, WHITE, GREEN, RED]),
        (5, [RED, BLUE, WHITE, GREEN]),
        (6, [BLUE, RED, GREEN, WHITE]),
        (7, [WHITE, GREEN, RED, BLUE]),
        (8, [GREEN, WHITE, BLUE, RED]),
        (9, [RED, GREEN, WHITE, BLUE]),  # no such turn
    ],
)
def test_orientation_tags_are_applied(kind: str, turn: int, expected: list[tuple[int, ...]]) -> None:
    image = load(oriented(turn, kind))
    assert image.size == ((23, 31) if 5 <= turn <= 8 else (31, 23))
    assert close(seen(image), expected, by=60 if kind == "WEBP" else 12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's word about it
def test_damaged_tags_do_not_lose_the_image() -> None:
    data = encode(corners(), "JPEG", quality=95, exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    assert close(seen(load(data)), UPRIGHT)


def half_transparent(mode: str) -> Image.Image:
    """Left half opaque black, right half transparent with a hidden red."""
    image = Image.new("RGBA", (6, 4), (*RED, 0))
    image.paste((*BLACK, 255), (0, 0, 3, 4))
    if mode == "P":
        image = Image.new("P", (6, 4), 1)
        image.putpalette([*BLACK, *RED])
        image.paste(0, (0, 0, 3, 4))
        return image
    return image.convert(mode)


@pytest.mark.parametrize(
    "data",
    [
        encode(half_transparent("RGBA"), "PNG"),
        encode(half_transparent("LA"), "PNG"),
        encode(half_transparent("P"), "PNG", transparency=1),
        encode(half_transparent("P"), "PNG", transparency=b"\xff\x00"),
        encode(half_transparent("P"), "GIF", transparency=1),
        encode(half_transparent("RGBA").convert("RGB"), "PNG", transparency=RED),
        encode(half_transparent("LA").convert("L"), "PNG", transparency=76),
        encode(half_transparent("RGBA"), "WEBP", lossless=True, exact=True),
        encode(half_transparent("RGBA"), "TIFF"),
        encode(grey16([[0, 0, 0, 999, 999, 999]] * 4), "PNG", transparency=999),
        png(6, 4, 1, 0, (b"\0\x1c") * 4, extra=chunk(b"tRNS", b"\0\1")),
    ],
    ids=[
        "rgba",
        "la",
        "palette",
        "palette-bytes",
        "gif",
        "rgb-key",
        "grey-key",
        "webp",
        "tiff",
        "grey16-key",
        "bit-key",
    ],
)
def test_transparent_pixels_lie_on_white(data: bytes) -> None:
    image = load(data)
    assert image.getpixel((1, 1)) == BLACK
    assert image.getpixel((4, 2)) == WHITE


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    data = encode(Image.new("RGBA", (5, 3), (200, 100, 0, 128)), "PNG")
    assert load(data).getpixel((0, 0)) == (227, 177, 127)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_scaled_not_clipped(kind: str) -> None:
    image = load(encode(grey16([[0, 257, 32896, 65278, 65535]]), kind))
    assert [image.getpixel((x, 0)) for x in range(5)] == [(v,) * 3 for v in (0, 1, 128, 254, 255)]


def test_dark_grey_of_16_bits_stays_dark() -> None:
    for kind in ("PNG", "TIFF", "PPM"):
        assert load(encode(grey16([[0, 200, 250]]), kind)).getextrema() == ((0, 1),) * 3


def test_colour_of_16_bits_is_scaled() -> None:
    raw = b"\0" + struct.pack(">6H", 65535, 32896, 0, 257, 0, 65535)
    image = load(png(2, 1, 16, 2, raw))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(255, 128, 0), (1, 0, 255)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),  # 0..1
        ([0.0, 51.0, 255.0], [0, 51, 255]),  # 0..255
        ([0.0, 257.0, 65535.0], [0, 1, 255]),  # 0..65535
        ([-3.0, -1.0, 1.0], [0, 128, 255]),  # no convention: darkest to brightest
        ([1e9, 1e9, 1e9], [0, 0, 0]),
    ],
)
def test_grey_of_floats_is_scaled(values: list[float], expected: list[int]) -> None:
    image = load(encode(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(v,) * 3 for v in expected]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "L", "1"])
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_other_colour_spaces(mode: str, kind: str) -> None:
    image = Image.new("RGB", (17, 13), (250, 250, 250))
    image.paste((10, 10, 10), (0, 0, 8, 13))
    found = load(encode(image.convert(mode), kind))  # a CMYK JPEG is inverted, as Adobe's are
    assert close([found.getpixel((1, 5)), found.getpixel((15, 5))], [(5, 5, 5), (252, 252, 252)], by=14)  # type: ignore[list-item]


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (11, 7), colour) for colour in (RED, GREEN, BLUE)]
    for kind, options in {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}, "TIFF": {}}.items():
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert load(data).getpixel((5, 3)) == RED, kind


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 20000)])
@pytest.mark.parametrize("resize", ["squash", "crop", "letterbox"])
def test_extreme_shapes(size: tuple[int, int], resize: Any) -> None:
    image = load(encode(Image.new("RGB", size, RED), "PNG"))
    assert image.size == size
    before = time.process_time()
    pixels = ImageTransform((113, 127), resize)(image)
    assert time.process_time() - before < 0.5  # resizing all of it before the crop would take long
    assert pixels.shape == (3, 113, 127)
    assert pixels[:, 56, 63].tolist() == [1, -1, -1]


def test_a_pillow_image_is_copied_not_changed() -> None:
    given = half_transparent("RGBA")
    assert load(given).getpixel((4, 2)) == WHITE
    assert given.mode == "RGBA"
    given = corners()
    given.info["note"] = "mine"
    result = load(given)
    assert result is not given
    assert given.info == {"note": "mine"}
    assert (result.mode, result.info) == ("RGB", {})
    with pytest.raises(ImageError, match=r"<picture>: 31 x 23 = 713 pixels are more than 712"):
        load(given, max_pixels=712)


def test_files_inside_a_zip() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.png", encode(corners(), "PNG"))
        archive.writestr("b.png", b"")
    with zipfile.ZipFile(file) as archive:
        with archive.open("a.png") as member:
            assert load(member).size == (31, 23)  # pyright: ignore
        with archive.open("b.png") as member, pytest.raises(ImageError, match=r"b\.png: empty, 0 bytes"):
            load(member)  # pyright: ignore


# ---------------------------------------------------------------------------------------- refused pictures


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("PPM", {}),
        pytest.param("AVIF", {}, marks=AVIF),
    ],
)
def test_cut_files_are_refused(kind: str, options: dict[str, Any]) -> None:
    data = encode(smooth(41, 53), kind, **options)
    for kept in (len(data) - 20, len(data) // 2, 64, 16):
        with pytest.raises(ImageError, match=rf"x\.bin: damaged {kind} \(.+\); get the file again"):
            load(data[:kept], name="x.bin")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"optimize": True}, {"progressive": True}], ids=str)
def test_a_jpeg_whose_pixels_end_early_is_refused(mode: str, options: dict[str, Any]) -> None:
    """Zeros (of a copy that stopped) would be read as pixels, and before an end marker decoders fill up with grey."""
    for height, width in ((96, 128), (97, 129), (89, 117)):
        whole = encode(smooth(height, width).convert(mode), "JPEG", quality=90, **options)
        assert load(whole + b"\0" * 999).size == (width, height)
        for kept in (len(whole) * 9 // 10, len(whole) * 3 // 4, len(whole) // 2):
            with pytest.raises(ImageError, match="damaged JPEG"):
                load(whole[:kept] + b"\0" * 9999)
            if "progressive" not in options:  # which loses detail only, all over the picture
                with pytest.raises(ImageError, match="its pixels end early"):
                    load(whole[:kept] + b"\xff\xd9")


def test_a_grey_jpeg_is_whole() -> None:
    for mode in ("RGB", "L"):
        image = load(encode(Image.new(mode, (37, 41), (128,) * len(mode)), "JPEG"))
        assert image.getextrema() == ((128, 128),) * 3


def test_a_wrong_checksum_is_refused() -> None:
    good = png(3, 2, 8, 0, b"\0\1\2\3\0\4\5\6")
    assert load(good).getpixel((2, 1)) == (6, 6, 6)
    at = good.index(b"IDAT") + 4 + len(zlib.compress(b"\0\1\2\3\0\4\5\6"))
    with pytest.raises(ImageError, match=r"damaged PNG \(wrong checksum of 'IDAT' at byte 33\)"):
        load(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with pytest.raises(ImageError, match=r"ends before its IEND"):
        load(good[:-12])


SEVEN_PASSES = [(2, 2), (2, 2), (1, 4), (3, 3), (3, 7), (6, 6), (5, 13)]  # lines and columns of 11 x 13 interlaced


@pytest.mark.parametrize("fill", [b"\0", b"\xff"])  # if all is black, only counting can tell
@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(("depth", "colour", "line"), [(8, 2, 39), (1, 0, 2), (8, 6, 52), (16, 4, 52), (8, 0, 13)])
def test_a_png_without_its_last_row_is_refused(
    fill: bytes, interlaced: int, depth: int, colour: int, line: int
) -> None:
    bits = depth * {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    lines = [columns for n, columns in (SEVEN_PASSES if interlaced else [(11, 13)]) for _ in range(n)]
    raw = b"".join(b"\0" + fill * ((columns * bits + 7) // 8) for columns in lines)
    assert load(png(13, 11, depth, colour, raw, interlaced=interlaced)).size == (13, 11)
    missing = png(13, 11, depth, colour, raw[: -line - 1], interlaced=interlaced)
    with pytest.raises(ImageError, match=rf"holds {len(raw) - line - 1} of {len(raw)} bytes of pixels"):
        load(missing)


BOMBS = {
    "PNG": png(50021, 50023, 8, 2, b"\0" * 99),
    "BMP": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 50021, 50023, 1, 24, 0, 0, 0, 0, 0, 0),
    "GIF": b"GIF89a"
    + struct.pack("<HHBBB", 50021, 50023, 0, 0, 0)
    + b","
    + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
    + b"\2\2\x4c\1\0;",
    "PPM": b"P6 50021 50023 255\n" + b"\0" * 99,
    "JPEG": encode(corners(), "JPEG").replace(struct.pack(">HH", 23, 31), struct.pack(">HH", 50023, 50021), 1),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_before_they_are_decoded(kind: str) -> None:
    before = time.process_time()
    with pytest.raises(
        ImageError, match=r"50021 x 50023 = 2,502,200,483 pixels are more than (64|256),000,000; .*max_pixels"
    ):
        load(BOMBS[kind])
    assert time.process_time() - before < 1


def test_max_pixels_is_the_largest_that_is_read() -> None:
    data = encode(corners(), "PNG")
    assert load(data, max_pixels=713).size == (31, 23)
    with pytest.raises(ImageError, match="31 x 23 = 713 pixels are more than 712"):
        load(data, max_pixels=712)


def test_pillows_own_limit_neither_warns_nor_counts() -> None:
    image = Image.new("1", (9487, 9500))  # 90.1 million pixels, where Pillow warns
    assert load(encode(image, "PNG"), max_pixels=10**8).size == (9487, 9500)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "empty, 0 bytes; get the file again"),
        (b"\0" * 4096, "only zero bytes"),
        (b"%PDF-1.7 ...", "a PDF document; give one of JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript file"),
        (b"\xc5\xd0\xd3\xc6 eps", "a PostScript file"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
        (b"<html><body>", "a web page"),
        (b"<svg xmlns='x'/>", "an SVG drawing"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "an XML or SVG file"),
        (b"version https://git-lfs.example/spec/v1\noid", "a Git LFS pointer"),
        (b"PK\x03\x04....", "a zip archive"),
        (b"\x1f\x8b\x08....", "a gzip file"),
        (b"8BPS\0\1", "a Photoshop file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
        ("빨간 별이 두 개 있다".encode(), "not a picture (it starts with"),
        (b"GIF88a....", "not a picture"),
        (b"P7 not a netpbm we know", "not a picture"),
        (b"\x89PNG", "not a picture"),
        (b"BM", "damaged BMP"),
        (b"\xff\xd8\xff", "damaged JPEG"),
        (b"\x89PNG\r\n\x1a\n", "damaged PNG"),
        (b"RIFF\x04\0\0\0WEBP", "damaged WEBP"),
        (b"II*\0\x08\0\0\0\0\0", "damaged TIFF"),
        (b"P6 0 5 255\n", "damaged PPM"),
        (b"P6 5 5 0\n" + b"\0" * 75, "damaged PPM"),
        (png(0, 5, 8, 2, b""), "damaged PNG"),
        (png(5, 5, 3, 2, b""), "damaged PNG"),
        (png(5, 5, 8, 2, b"")[:40] + b"\xff" * 30, "damaged PNG"),
        (encode(Image.new("LAB", (3, 2)), "TIFF"), "its colours are CIE Lab; save it as RGB"),
    ],
)
def test_what_is_no_image_is_refused_by_name(data: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ImageError) as caught:
            load(source, name="a.jpg")
        assert str(caught.value).startswith("a.jpg: ")
        assert what in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers_are_refused(bad: float) -> None:
    values = np.full((5, 7), 0.25, dtype=np.float32)
    values[2, 3] = values[4, 6] = bad
    with pytest.raises(ImageError, match="2 pixels are not finite numbers"):
        load(encode(Image.fromarray(values), "TIFF"))


def test_folders_pipes_devices_and_absent_files_are_refused_at_once(tmp_path: Path) -> None:
    pipe, loop, locked = tmp_path / "pipe.jpg", tmp_path / "loop.jpg", tmp_path / "없다.jpg"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    cases = {
        tmp_path: "a folder, not a picture; give the path of a file",
        pipe: "a pipe or a device",
        Path("/dev/zero"): "a pipe or a device",
        loop: "cannot be read",
        locked: r"없다.jpg: cannot be read (No such file or directory); check the path",
        Path("a\0b.jpg"): r"a\x00b.jpg: cannot be read",
        Path("x" * 999): "cannot be read",
    }
    faults: dict[Path, str] = {}

    def attempt() -> None:
        for path in cases:
            try:
                load(path)
            except ImageError as error:
                faults[path] = str(error)

    thread = threading.Thread(target=attempt, daemon=True)  # a hang must fail the test, not stop it
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "load waits for ever"
    for path, fault in cases.items():
        assert fault in faults[path]


def test_addresses_and_wrong_types_are_refused() -> None:
    with pytest.raises(ImageError, match=r"^/9j/4AAQA{991}: .*; of base64 give base64\.b64decode\(text\)$"):
        load("/9j/4AAQ" + 7000 * "A")
    with pytest.raises(ImageError, match=r"https://example.com/a.jpg: an address, not a file; download it first"):
        load("https://example.com/a.jpg")
    for path in ("file:///photos/a.jpg", "data:image/png;base64," + "A" * 5000):
        with pytest.raises(ImageError, match=r"an address, not a file; .* give path or bytes") as caught:
            load(path)
        assert len(str(caught.value)) < 200
    with pytest.raises(ImageError, match='opened as text; open it with mode "rb"'):
        load(io.StringIO("text"))  # type: ignore[arg-type]
    with pytest.raises(
        ImageError, match=r"^array.*: a ndarray is not a path.*Image.fromarray makes a picture of .height, width, 3."
    ):
        load(np.zeros((40, 40, 3), np.uint8))  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"damaged GIF \(it ends too early\); get the file again"):
        load(b"GIF89a")
    with pytest.raises(ImageError, match="a int is not a path, bytes or binary file"):
        load(3)  # type: ignore[arg-type]


def test_messages_stay_on_one_line_that_can_be_printed(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"line\nend \xff.jpg")
    path.write_bytes(b"no picture")
    with pytest.raises(ImageError) as caught:
        load(path)
    assert r"line\nend \udcff.jpg: not a picture" in str(caught.value)
    str(caught.value).encode("utf-8")


def test_every_damaged_byte_gives_a_image_or_an_image_error() -> None:
    """No other exception comes out, whatever is wrong with the file."""
    rng = np.random.default_rng(7)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
        data = encode(smooth(19, 23), kind)
        for _ in range(40):
            damaged = bytearray(data)
            for at in rng.integers(0, min(len(data), 400), 3):
                damaged[at] = rng.integers(0, 256)
            try:
                assert load(bytes(damaged), max_pixels=10**6).mode == "RGB"
            except ImageError as error:
                assert str(error).startswith("<bytes>: ")  # noqa: PT017


def test_threads_load_side_by_side_and_settings_of_pillow_stay() -> None:
    settings = lambda: (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, TiffImagePlugin.READ_LIBTIFF)  # noqa: E731
    before = settings()
    files = [encode(smooth(61, 67, seed), kind) for seed in range(3) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF")]
    alone = [np.asarray(load(data)) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: np.asarray(load(data)), files * 8))
    for i, image in enumerate(together):
        assert np.array_equal(image, alone[i % len(files)])
    assert settings() == before


# --------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize(("height", "width"), [(201, 333), (333, 201), (97, 89), (300, 300), (480, 640)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_equals_torchvision(height: int, width: int, interpolation: Any) -> None:
    from torchvision.transforms import InterpolationMode, v2

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = v2.Compose(
        [
            v2.Resize(248, interpolation=InterpolationMode(interpolation)),
            v2.CenterCrop(224),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )
    ours = ImageTransform(224, "crop", mean, std, interpolation, 224 / 248, "timm")
    image = smooth(height, width)
    pixels = ours(image)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    torch.testing.assert_close(pixels, theirs(image), atol=2e-6, rtol=0)


@pytest.mark.parametrize("mode", ["crop", "squash"])
def test_equals_timms_transform(mode: Any) -> None:
    from timm.data import create_transform  # pyright: ignore

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    crop_pct, crop_mode = (0.9, "center") if mode == "crop" else (1.0, "squash")
    theirs: Callable[..., Any] = create_transform(  # pyright: ignore
        (3, 224, 224), interpolation="bicubic", mean=mean, std=std, crop_pct=crop_pct, crop_mode=crop_mode
    )
    ours = ImageTransform(224, mode, mean, std, crop_fraction=224 / 248 if mode == "crop" else 1.0, backend="timm")
    for height, width in ((211, 307), (307, 211), (224, 224)):
        image = smooth(height, width)
        torch.testing.assert_close(ours(image), theirs(image), atol=2e-6, rtol=0)


def test_crop_of_long_images_equals_resizing_all_of_it() -> None:
    """Past 16 times the area only the part that is seen is resized, to the same result."""
    image = smooth(20, 997)
    whole = image.resize((int(31 * 997 / 20), 31), Image.Resampling.BICUBIC)
    left = round((whole.width - 29) / 2)
    expected = np.asarray(whole.crop((left, 1, left + 29, 30)), int)
    found = ImageTransform(29, "crop", (0, 0, 0), (1, 1, 1), crop_fraction=29 / 31)(image)
    assert whole.width * whole.height > 16 * 29 * 29
    assert np.abs(found.mul(255).round().permute(1, 2, 0).int().numpy() - expected).max() <= 2


def test_crop_of_a_size_that_is_not_square() -> None:
    pixels = ImageTransform((10, 20), "crop")(corners(40, 40))
    assert pixels.shape == (3, 10, 20)
    assert pixels[:, 0, 0].tolist() == [1, -1, -1]  # the middle half of the height, the whole width
    assert pixels[:, -1, -1].tolist() == [1, 1, 1]


def test_letterbox_keeps_the_shape_and_fills_with_the_mean() -> None:
    image = Image.new("RGB", (60, 30), WHITE)
    pixels = ImageTransform((20, 20), "letterbox", mean=(0.25,) * 3, std=(0.5,) * 3)(image)  # pyright: ignore
    assert pixels[:, :5].unique().tolist() == [0.0]
    assert pixels[:, 15:].unique().tolist() == [0.0]
    assert pixels[:, 5:15].unique().tolist() == [1.5]


def test_a_image_of_another_mode_is_flattened_as_by_load() -> None:
    pixels = ImageTransform(4)(half_transparent("RGBA").resize((4, 4), Image.Resampling.NEAREST))
    assert pixels[:, 0, -1].tolist() == [1, 1, 1]


def test_the_image_that_has_the_size_is_not_resampled_or_changed() -> None:
    image = smooth(29, 37)
    before = np.array(image)
    pixels = ImageTransform((29, 37), mean=(0, 0, 0), std=(1, 1, 1))(image)
    assert torch.equal(pixels.mul(255).round().byte(), torch.from_numpy(before).permute(2, 0, 1))
    assert np.array_equal(np.asarray(image), before)


def test_transform_survives_json() -> None:
    import json

    transform = ImageTransform((192, 224), "crop", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.875)
    values = json.loads(json.dumps(transform.to_dict()))
    assert ImageTransform.from_dict(values) == transform
    assert hash(ImageTransform.from_dict(values)) == hash(transform)
    with pytest.raises(
        ValueError, match=r"unknown keys of an image transform: \['image_sise'\]; known: \['image_size'"
    ):
        ImageTransform.from_dict({"image_sise": 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": (224, -1)}, r"image_size is \(224, -1\)"),
        ({"image_size": (1, 2, 3)}, r"image_size is \(1, 2, 3\)"),
        ({"resize": "stretch"}, "resize is 'stretch', must be \"squash\""),
        ({"interpolation": "nearest"}, "interpolation is 'nearest'"),
        ({"std": (0.5, 0.5, 0)}, r"std is \(0.5, 0.5, 0\)"),
        ({"mean": (0.5, 0.5)}, r"mean is \(0.5, 0.5\)"),
        ({"mean": (1e40, 0.5, 0.5)}, r"mean is \(1e\+40, 0.5, 0.5\)"),
        ({"std": ("x", 0.5, 0.5)}, r"std is \('x', 0.5, 0.5\)"),
        ({"image_size": 8.5}, "image_size is 8.5"),
        ({"resize": "crop", "crop_fraction": 1.5}, "crop_fraction is 1.5"),
        ({"resize": "letterbox", "crop_fraction": 0.9}, 'crop_fraction is 0.9, but resize is "letterbox"'),
        ({"backend": "opencv"}, "backend is 'opencv'"),
    ],
)
def test_wrong_arguments_of_the_transform(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTransform(**arguments)


# ------------------------------------------------------------------------------------------- augmentation


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_augmentation_depends_on_the_generator_alone() -> None:
    augment, image = Augment((0.3, 0.9), flip=True, jitter=0.4), smooth(53, 71)
    torch.manual_seed(1)
    first = np.array(augment(image, generator(5)))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = np.array(augment(image, generator(5)))
    assert np.array_equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({np.array(augment(image, generator(seed))).tobytes() for seed in range(9)}) == 9


def test_augmentation_draws_the_same_numbers_whatever_its_settings() -> None:
    after = set()
    for augment in (Augment(), Augment((1, 1)), Augment(flip=True), Augment(jitter=0.5)):
        draws = generator(3)
        augment(smooth(31, 37), draws)
        after.add(torch.rand(1, generator=draws).item())
    assert len(after) == 1


def test_crops_keep_the_area_and_shape_asked_for() -> None:
    image = smooth(400, 600)
    shares, ratios, spots = [], [], set()
    for seed in range(200):
        crop = Augment((0.25, 0.64), ratio=(0.8, 1.25))(image, generator(seed))
        shares.append(crop.width * crop.height / 240_000)
        ratios.append(crop.width / crop.height / 1.5)
        spots.add(crop.tobytes()[:99])
    assert 0.245 < min(shares) < 0.28
    assert 0.61 < max(shares) < 0.645
    assert 0.79 < min(ratios) < 0.83
    assert 1.2 < max(ratios) < 1.26
    assert len(spots) > 190


def test_a_crop_is_an_exact_part_and_flips_half_of_the_images() -> None:
    ramp = np.zeros((40, 60, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(60), np.arange(40)[:, None]
    flipped = 0
    for seed in range(60):
        crop = np.array(Augment((0.5, 0.5), flip=True)(Image.fromarray(ramp), generator(seed))).astype(int)
        flipped += (step := crop[0, 1, 0] - crop[0, 0, 0]) == -1
        assert (np.diff(crop[..., 0], axis=1) == step).all()
        assert (np.diff(crop[..., 1], axis=0) == 1).all()
    assert 18 <= flipped <= 42


def test_no_augmentation_gives_the_same_image() -> None:
    image = smooth(31, 37)
    assert np.array_equal(Augment((1, 1))(image, generator(0)), image)  # pyright: ignore


def test_jitter_changes_colours_within_its_range() -> None:
    image = Image.new("RGB", (7, 5), (100, 100, 100))
    values = [Augment((1, 1), jitter=0.3)(image, generator(seed)).getpixel((0, 0))[0] for seed in range(100)]  # type: ignore[index]
    assert 70 <= min(values) < 76
    assert 124 < max(values) <= 130


def test_jitter_changes_brightness_then_contrast_then_saturation() -> None:
    image = smooth(23, 29)
    draws = torch.rand(8, generator=generator(11), dtype=torch.float64)[5:].tolist()
    expected = image
    for tool, draw in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), draws):
        expected = tool(expected).enhance(0.5 + draw)
    assert np.array_equal(Augment((1, 1), jitter=0.5)(image, generator(11)), expected)  # pyright: ignore


def test_large_crops_are_not_narrower_than_their_area_allows() -> None:
    image = smooth(400, 600)
    for seed in range(20):
        crop = Augment((0.9, 0.9))(image, generator(seed))
        assert abs(crop.width * crop.height / 240_000 - 0.9) < 0.005


@pytest.mark.parametrize("shape", [(1, 1), (1, 20000), (20000, 1), (2, 3)])
def test_augmentation_of_extreme_shapes(shape: tuple[int, int]) -> None:
    for seed in range(5):
        image = Augment((0.01, 1), flip=True, jitter=1.0)(Image.new("RGB", shape, RED), generator(seed))
        assert image.width >= 1
        assert image.height >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (0, 1)}, r"scale is \(0, 1\)"),
        ({"scale": (0.9, 0.8)}, r"scale is \(0.9, 0.8\)"),
        ({"scale": (0.9, 1.1)}, r"scale is \(0.9, 1.1\)"),
        ({"jitter": 1.5}, "jitter is 1.5, must be from 0 to 1"),
        ({"ratio": (2, 1)}, r"ratio is \(2, 1\)"),
    ],
)
def test_wrong_arguments_of_the_augmentation(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**arguments)


# What Pillow reads wrongly, or takes for damage.


def tiff(values: np.ndarray, photometric: int, *, planar: int = 1, kind: int = 1) -> bytes:
    """An uncompressed TIFF of (height width) or (height width colours); kind 1 unsigned, 2 signed, 3 float."""
    height, width, colours = (*values.shape, 1)[:3]
    planes = [values.tobytes()] if planar == 1 else [values[..., i].tobytes() for i in range(colours)]
    body, starts = b"", []
    for plane in planes:
        starts.append(8 + len(body))
        body += plane
    tags, extra = [], b""
    fields = {256: [width], 257: [height], 258: [8 * values.itemsize] * colours, 259: [1], 262: [photometric]}
    fields |= {273: starts, 277: [colours], 278: [height], 279: [len(plane) for plane in planes], 284: [planar]}
    for tag, numbers in (fields | {339: [kind] * colours}).items():
        data = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            data, extra = struct.pack("<I", 8 + len(body) + len(extra)), extra + data
        tags.append(struct.pack("<HHI", tag, 4, len(numbers)) + data)
    directory = struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(body) + len(extra)) + body + extra + directory


def greys(data: bytes) -> list[int]:
    return np.asarray(load(data))[..., 0].ravel().tolist()


@pytest.mark.parametrize(
    ("values", "kind", "photometric", "expected"),
    [
        (np.array([[0, 4095, 65535]], np.uint16), 1, 1, [0, 16, 255]),  # 12 bits of 16 stay dark
        (np.array([[0, 32896, 65535]], np.uint16), 1, 0, [255, 127, 0]),  # 0 is white
        (np.array([[0, 2**31, 2**32 - 1]], np.uint32), 1, 1, [0, 128, 255]),
        (np.array([[0, 100, 255]], np.uint32), 1, 1, [0, 100, 255]),
        (np.array([[0, 100, 255]], np.int32), 2, 1, [0, 100, 255]),
        (np.array([[-100, 0, 100]], np.int16), 2, 1, [0, 128, 255]),
        (np.array([[0, 0.502, 1.004]], np.float32), 3, 1, [0, 128, 255]),
        (np.array([[0, 1.3, 2.6]], np.float32), 3, 1, [0, 128, 255]),
        (np.array([[0, 12749.9, 25500]], np.float32), 3, 1, [0, 127, 255]),
        (np.array([[0, 100, 255]], np.float32), 3, 1, [0, 100, 255]),
        (np.array([[0, 0.5, 1]], np.float32), 3, 0, [255, 127, 0]),
    ],
)
def test_grey_of_any_numbers_by_one_rule(values: np.ndarray, kind: int, photometric: int, expected: list[int]) -> None:
    assert greys(tiff(values, photometric, kind=kind)) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(("colours", "photometric"), [(3, 2), (4, 5)])
def test_deep_colours_apart_are_refused(colours: int, photometric: int) -> None:
    values = np.arange(2 * 3 * colours, dtype=np.uint16).reshape(2, 3, colours) * 2000
    with pytest.raises(ImageError, match="a TIFF of 16 bits with each colour apart"):
        load(tiff(values, photometric, planar=2))
    bytes_apart = tiff((values >> 8).astype(np.uint8), photometric, planar=2)
    bytes_together = tiff((values >> 8).astype(np.uint8), photometric)
    assert load(bytes_apart).tobytes() == load(bytes_together).tobytes()


def test_signed_bytes_are_refused() -> None:
    with pytest.raises(ImageError, match="signed bytes"):
        load(tiff(np.array([[-5, 5]], np.int8), 1, kind=2))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_cut_behind_an_ff_byte_is_refused(mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (97, 89, 3), dtype=np.uint8)
    whole = encode(Image.fromarray(noise).convert(mode), "JPEG", quality=90)
    start = whole.index(b"\xff\xda")
    cuts = [i + 1 for i in range(start + 20, len(whole) - 200) if whole[i] == 0xFF]
    assert len(cuts) > 20
    taken = 0
    for cut in cuts:
        try:
            load(whole[:cut] + b"\xff\xd9")
            taken += 1
        except ImageError:
            pass
    assert taken == 0, f"{taken} of {len(cuts)}"
    load(whole)


@pytest.mark.parametrize("kind", ["iCCP", "zTXt"])
@pytest.mark.parametrize("behind", [False, True])
def test_a_png_with_a_long_profile_or_text_is_whole(kind: str, behind: bool) -> None:
    image = Image.new("RGB", (5, 4), (1, 2, 3))
    data = encode(image, "PNG")
    body = b"name\0\0" + zlib.compress(bytes(range(256)) * 40_000)
    named = kind.encode() + body
    chunk = struct.pack(">I", len(body)) + named + struct.pack(">I", zlib.crc32(named))
    place = data.index(b"IEND") - 4 if behind else 33
    assert load(data[:place] + chunk + data[place:]).tobytes() == image.tobytes()
    with pytest.raises(ImageError, match="wrong checksum"):
        load(data[:place] + chunk[:-1] + bytes([chunk[-1] ^ 1]) + data[place:])


@pytest.mark.parametrize(
    ("kind", "options"),
    [("WEBP", {}), ("WEBP", {"lossless": True}), ("AVIF", {}), ("TIFF", {"compression": "tiff_adobe_deflate"})],
)
def test_a_copy_that_stopped_is_refused(kind: str, options: dict[str, Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 170, 3), dtype=np.uint8)
    whole = encode(Image.fromarray(noise), kind, **options)
    load(whole)
    for part in (0.4, 0.7, 0.95):
        cut = int(len(whole) * part)
        start = 8 if kind == "TIFF" and whole[4:8] == b"\x08\0\0\0" else 0
        assert start == 0
        stopped = whole[:cut] + bytes(len(whole) - cut)
        with pytest.raises(ImageError):
            load(stopped)
    flat = encode(Image.new("RGB", (400, 300), "white"), kind, **options)
    assert load(flat).size == (400, 300)


def test_nothing_was_drawn_around_a_small_first_frame_of_a_gif() -> None:
    data = bytearray(encode(Image.new("RGB", (4, 3), (200, 10, 10)), "GIF"))
    data[6:10] = struct.pack("<HH", 9, 7)
    found = load(bytes(data))
    assert (found.size, found.getpixel((8, 6)), found.getpixel((3, 2))) == ((9, 7), (255, 255, 255), (200, 10, 10))
