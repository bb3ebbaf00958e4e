"""Pictures that are made to exhaust, or that hold more than one: refused by name at once, or read in stated memory."""

import io
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, features

from mmtransformer.images import ImageError, load


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def scans(side: int, count: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    data = encode(Image.new("RGB", (side, side), (200, 30, 40)), "JPEG", progressive=True)
    begins = data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda"))
    return data[:-2] + data[begins:-2] * count + b"\xff\xd9"


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(before: bytes = b"", behind: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + b"\x90" * 16) * 16))
    return b"\x89PNG\r\n\x1a\n" + head + before + pixels + behind + chunk(b"IEND")


def gif(between: bytes) -> bytes:
    data = encode(Image.new("P", (16, 16), 3), "GIF")
    start = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 128 else 0)
    return data[:start] + between + data[start:]


def bmp(codes: bytes) -> bytes:
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256))
    header = struct.pack("<IiiHHIIiiII", 40, 4000, 4000, 1, 8, 1, len(codes), 0, 0, 256, 0)
    return (
        b"BM" + struct.pack("<IHHI", 54 + len(palette) + len(codes), 0, 0, 54 + len(palette)) + header + palette + codes
    )


def page(width: int, height: int, value: int, at: int, *, last: bool, **tags: int) -> bytes:
    """One page of a grey TIFF that begins at a byte of the file: its pixels and its directory."""
    pixels = bytes([value]) * (width * height)
    fields = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: at, 277: 1, 278: height, 279: len(pixels)}
    fields |= {int(tag[1:]): number for tag, number in tags.items()}
    listed = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in sorted(fields.items()))
    after = at + len(pixels) + 2 + len(listed) + 4
    return pixels + struct.pack("<H", len(fields)) + listed + struct.pack("<I", 0 if last else after + 0)


def tiff(*pages: tuple[int, int, int, dict[str, int]]) -> bytes:
    """A TIFF of pages (width, height, grey, more tags)."""
    data, links = bytearray(b"II*\0" + bytes(4)), [4]
    for width, height, value, tags in pages:
        body = page(width, height, value, len(data), last=True, **tags)
        struct.pack_into("<I", data, links[-1], len(data) + width * height)
        data += body
        links.append(len(data) - 4)
    return bytes(data)


J = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "scans": (lambda: scans(4000, 1000), r"a JPEG of 16,000,000 pixels in 49 scans or more; at most 100 are decoded"),
    "scans of little": (lambda: scans(64, 200), "in 101 scans or more"),
    "junk": (lambda: J[:2] + b"\xff" * 3_000_000 + J[2:], "more than 65,536 bytes between its segments"),
    "junk behind a segment": (lambda: J[:20] + bytes(300_000) + J[20:], "more than 65,536 bytes between its segments"),
    "segments": (lambda: J[:2] + b"\xff\xfe\0\2" * 50_000 + J[2:], "a JPEG of more than 10,000 segments"),
    "segments between scans": (
        lambda: scans(2000, 50).replace(b"\xff\xc4", b"\xff\xfe\0\2" * 9_000 + b"\xff\xc4"), "a JPEG of .* segments"),
    "Exif": (lambda: J[:2] + (b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)) * 99 + J[2:], "or 64 of Exif"),
    "chunks": (lambda: png(chunk(b"abCd") * 200_000), "a PNG of more than 100,000 chunks"),
    "chunks behind the pixels": (lambda: png(behind=chunk(b"tEXt", b"a\0b") * 200_000), "a PNG of more than 100,000"),
    "comments": (lambda: gif(b"\x21\xfe" + b"\x01a" * 200_000 + b"\0"), "a GIF of more than 100,000 blocks"),
    "extensions": (lambda: gif(b"\x21\xfe\0" * 200_000), "a GIF of more than 100,000 blocks"),
    "a head without an end": (lambda: b"P6 #" + b"a" * 3_000_000 + b"\n4 4 255 " + b"a" * 48, "65,536 bytes hold no"),
    "numbers spelt out": (lambda: b"P3 2000 2000 255\n" + b"9 " * 12_000_000, "numbers spelt out"),
    "runs": (lambda: bmp(b"\x01\x05" * 16_000_000), "a BMP of 32,001,078 bytes in runs"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_by_name_at_once(kind: str) -> None:
    make, said = BOMBS[kind]
    data = make()
    before = time.process_time()
    with pytest.raises(ImageError, match=rf"^x\.bin: .*{said}.*; save it anew"):
        load(data, name="x.bin")
    assert time.process_time() - before < 0.5


def test_tiffs_in_a_million_tiles_and_of_jpegs_with_many_scans_are_refused() -> None:
    many = tiff((160, 160, 7, {}))
    at = many.rindex(struct.pack("<HH", 273, 4))
    with pytest.raises(ImageError, match="a TIFF of 1,000,000 strips or tiles; at most 65,536"):
        load(many[: at + 4] + struct.pack("<I", 1_000_000) + many[at + 8 :])
    coded = scans(1000, 300)
    data = bytearray(tiff((1000, 1000, 7, {"t259": 7})))
    for tag, number in ((273, len(data)), (279, len(coded))):
        struct.pack_into("<I", data, data.rindex(struct.pack("<HHI", tag, 4, 1)) + 8, number)
    with pytest.raises(ImageError, match="a JPEG of 1,000,000 pixels in 101 scans or more"):
        load(bytes(data) + coded)


def test_what_programs_write_is_no_bomb() -> None:
    large = Image.effect_noise((1500, 1100), 60).convert("RGB")
    for options in ({}, {"progressive": True}, {"progressive": True, "subsampling": 0}, {"restart_marker_blocks": 1}):
        assert load(encode(large, "JPEG", icc_profile=bytes(3_000_000), **options)).size == large.size
    assert load(encode(large, "GIF", comment=bytes(range(1, 256)) * 4000)).size == large.size
    assert load(b"P2\n# a comment\n3 2 # another\n255\n1 2 3\n4 5 6\n").getpixel((2, 1)) == (6, 6, 6)
    hidden = J[:-2] + b"\xff\xd9" + b"\xff\xda" * 500  # behind a picture there may be anything
    assert load(hidden).size == (64, 64)


def test_a_jpeg_above_the_limit_is_read_at_half_its_sides_and_others_are_refused() -> None:
    image = Image.new("RGB", (400, 300), (200, 30, 40))
    found = load(encode(image, "JPEG", quality=95), max_pixels=40_000)
    assert found.size == (200, 150)
    assert np.abs(np.asarray(found, int) - (200, 30, 40)).max() < 4
    for kind in ("PNG", "TIFF", "GIF", "BMP"):
        with pytest.raises(ImageError, match="400 x 300 = 120,000 pixels are more than 40,000"):
            load(encode(image, kind), max_pixels=40_000)
    with pytest.raises(ImageError, match="400 x 300 = 120,000 pixels are more than 119,996"):
        load(encode(image, "JPEG"), max_pixels=29_999)
    grey = encode(Image.new("L", (400, 300), 128), "JPEG")  # whose end is looked at once more
    assert load(grey, max_pixels=40_000).getpixel((199, 149)) == (128, 128, 128)
    noise = encode(Image.effect_noise((400, 300), 60), "JPEG")
    with pytest.raises(ImageError, match="its pixels end early"):
        load(noise[: len(noise) // 2] + b"\xff\xd9", max_pixels=40_000)


PEAK = """
import resource, sys
from mmtransformer.images import load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [("PNG", "RGBA", {}), ("PNG", "P", {}), ("JPEG", "L", {"quality": 9}), ("WEBP", "RGBA", {"lossless": True}),
     ("TIFF", "F", {"compression": "tiff_adobe_deflate"}), ("JPEG", "RGB", {"progressive": True, "subsampling": 0})],
)  # fmt: skip
def test_64_megapixels_take_the_memory_that_is_stated(tmp_path, kind: str, mode: str, options: dict) -> None:
    (tmp_path / "x").write_bytes(encode(Image.new(mode, (8000, 8000), 128 if mode != "F" else 0.5), kind, **options))
    run = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "x"], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 18 * 64e6


# ------------------------------------------------------------------------------------------------ which picture


def test_the_largest_page_of_a_tiff_is_taken_and_of_equal_ones_the_first() -> None:
    small, large = (4, 3, 10), (40, 30, 200)
    reduced = {"t254": 1}
    for pages, grey in (
        ([(*small, reduced), (*large, {})], 200),
        ([(*small, {}), (*large, {})], 200),  # some scanners' thumbnails do not say that they are
        ([(*large, reduced), (*small, {})], 10),
        ([(40, 30, 50, {}), (*large, {})], 50),
        ([(*small, {"t255": 2}), (5, 2, 70, {})], 70),
        ([(*small, {}), (40, 30, 0, {"t254": 4})], 10),  # a mask of the other
    ):
        assert load(tiff(*pages)).getpixel((0, 0)) == (grey,) * 3


def test_a_raw_photograph_with_a_preview_alone_is_refused_by_name() -> None:
    data = tiff((16, 12, 9, {"t254": 1}))
    with pytest.raises(ImageError, match=r"a\.nef: a TIFF with a small preview only, .* \(NEF, DNG, \.\.\.\)"):
        load(data, name="a.nef")


def test_a_chain_of_pages_that_leads_back_ends() -> None:
    data = bytearray(tiff((4, 3, 10, {}), (40, 30, 200, {})))
    struct.pack_into("<I", data, len(data) - 4, struct.unpack_from("<I", data, 4)[0])
    assert load(bytes(data)).size == (40, 30)


def test_only_adobes_cmyk_jpegs_are_inverted() -> None:
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 255))  # which Pillow writes as Adobe does: 0, 255, 255, 0
    adobe = encode(image, "JPEG", quality=95)
    at = adobe.index(b"Adobe") - 4
    plain = adobe[:at] + adobe[at + 2 + int.from_bytes(adobe[at + 2 : at + 4]) :]
    assert np.abs(np.asarray(load(adobe), int)).max() < 4
    assert np.abs(np.asarray(load(plain), int) - (255, 0, 0)).max() < 4  # the numbers as they stand: red


J2K = pytest.mark.skipif(not features.check("jpg_2000"), reason="no JPEG 2000 here")


@J2K
@pytest.mark.parametrize("options", [{}, {"irreversible": True}, {"no_jp2": True}, {"tile_size": (32, 32)}], ids=str)
def test_jpeg_2000_is_read_and_cut_files_are_refused(options: dict) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((101, 83), Image.Resampling.BICUBIC)
    data = encode(image, "JPEG2000", **options)
    limit = 12 if options.get("irreversible") else 0
    assert np.abs(np.asarray(load(data), int) - np.asarray(image, int)).max() <= limit
    for kept in (len(data) - 3, len(data) // 2, len(data) // 3):
        for tail in (b"", bytes(len(data) - kept), b"\xff\xd9"):
            with pytest.raises(ImageError, match="damaged JPEG 2000"):
                load(data[:kept] + tail)


@J2K
def test_jpeg_2000_of_16_bits_is_scaled_and_alpha_laid_on_white() -> None:
    deep = np.array([[0, 4095, 65535]], np.uint16)
    assert np.asarray(load(encode(Image.fromarray(deep), "JPEG2000")))[0, :, 0].tolist() == [0, 16, 255]
    assert load(encode(Image.new("RGBA", (9, 9), (1, 2, 3, 0)), "JPEG2000")).getpixel((4, 4)) == (255, 255, 255)


def test_a_tiff_of_12_bits_uses_them_all_and_signed_16_bits_go_to_32767() -> None:
    packed = int("".join(f"{value:012b}" for value in (0, 2048, 4095, 16)), 2).to_bytes(6)
    data = bytearray(tiff((6, 1, 0, {"t258": 12})))
    struct.pack_into("<I", data, data.rindex(struct.pack("<HHI", 256, 4, 1)) + 8, 4)
    data[8:14] = packed
    assert [load(bytes(data)).getpixel((x, 0))[0] for x in range(4)] == [0, 128, 255, 1]  # type: ignore[index]
    data = bytearray(tiff((6, 1, 0, {"t258": 16, "t339": 2})))
    struct.pack_into("<I", data, data.rindex(struct.pack("<HHI", 256, 4, 1)) + 8, 3)
    data[8:14] = struct.pack("<3h", 0, 16384, 32767)
    assert [load(bytes(data)).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]  # type: ignore[index]
