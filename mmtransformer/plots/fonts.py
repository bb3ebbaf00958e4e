"""Fonts for text in any language, on a machine that may have none.

Two fonts are always there: MMT Hangul, which lies beside this file (all Hangul, Latin, kana, symbols), and DejaVu
Sans, which comes with matplotlib (accents, Greek, Cyrillic, Arabic, Hebrew, more symbols). For what is left the
machine's own fonts are searched. A character that no font has is spelt out (`U+72AC`, `:dog face:`), so that a
reader sees what was there and never an empty box.
"""

import itertools
import os
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import ImageFont

EMBEDDED = Path(__file__).parent / "assets" / "mmt-hangul.ttf"


def font(size: float, text: str = "") -> ImageFont.FreeTypeFont:
    """Give one font that has every character of a text, or the embedded one where no font has them all.

    Text that needs several fonts is the business of `text.draw`, which changes the font between words.

    Args:
        size: pixels of an em.
        text: what will be written.
    """
    needed = characters(text)
    path = next((p for p in faces(needed) if needed <= coverage(p)), EMBEDDED)
    return load(path, size)


def characters(text: str) -> frozenset[int]:
    """Code points of a text that need a glyph: without spaces and what is never seen."""
    return frozenset(ord(c) for c in clean(text) if c != " ")


def clean(text: str) -> str:
    """Compose a text (so that split Korean syllables join), fold white space, drop what has no shape.

    Direction overrides, joiners and control characters go: a caption is a stranger's text and must not turn its
    neighbours around.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf") and not _selector(c))


def missing(text: str) -> list[str]:
    """Characters of a text that no font on this machine has, in their order."""
    found: dict[str, None] = {}
    for c in clean(text):
        if c != " " and face_of(c) is None:
            found[c] = None
    return list(found)


def spell(characters: str) -> str:
    """Spell out characters that cannot be drawn: picture signs by name, others by number ("[U+72AC 732B]")."""
    parts: list[str] = []
    for c in characters:
        name = unicodedata.name(c, "")
        if name and unicodedata.category(c) == "So":
            parts.append(f":{name.lower()}:")
        elif parts and parts[-1].endswith("]"):
            parts[-1] = f"{parts[-1][:-1]} {ord(c):04X}]"
        else:
            parts.append(f"[U+{ord(c):04X}]")
    return " ".join(parts)


def spelt(text: str) -> str:
    """Give a text whose every character some font has: what is missing is spelt out."""
    known = itertools.groupby(text, key=lambda c: c == " " or face_of(c) is not None)
    return "".join("".join(run) if has else spell("".join(run)) for has, run in known)


@cache
def face_of(character: str) -> Path | None:
    """The first font that has this character."""
    point = ord(character)
    return next((path for path in faces(frozenset([point])) if point in coverage(path)), None)


def faces(needed: frozenset[int]) -> Iterator[Path]:
    """The fonts in the order of asking; the machine's own are looked for only if the two that are always there
    lack something.
    """
    yield EMBEDDED
    yield dejavu()
    if needed <= coverage(EMBEDDED) | coverage(dejavu()):
        return
    yield from system_fonts()


@cache
def coverage(path: Path) -> frozenset[int]:
    """Code points that a font file has; none for a file that cannot be read or has no outlines."""
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(str(path))
        return frozenset(face.get_charmap()) if face.num_fixed_sizes == 0 else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@cache
def system_fonts() -> tuple[Path, ...]:
    """Font files of this machine: plain sans faces first, then by name."""
    home = Path.home()
    folders = [
        Path("/usr/share/fonts"),
        Path("/usr/local/share/fonts"),
        home / ".local/share/fonts",
        home / ".fonts",
        Path("/System/Library/Fonts"),
        Path("/Library/Fonts"),
        home / "Library/Fonts",
        Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts",
    ]
    found = {p for folder in folders if folder.is_dir() for p in folder.rglob("*")}
    if lister := shutil.which("fc-list"):
        try:
            told = subprocess.run([lister, "--format=%{file}\n"], capture_output=True, timeout=20, check=False)
            found |= {Path(line) for line in os.fsdecode(told.stdout).splitlines()}
        except (OSError, subprocess.TimeoutExpired):
            pass  # the well-known folders were searched already
    return tuple(sorted((p for p in found if p.suffix.lower() in (".ttf", ".otf", ".ttc")), key=_plainness))


@cache
def load(path: Path, size: float) -> ImageFont.FreeTypeFont:
    """Open a font file at a size in pixels of an em."""
    return ImageFont.truetype(str(path), size)


@cache
def dejavu() -> Path:
    """The font that comes with matplotlib."""
    import matplotlib

    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def _plainness(path: Path) -> tuple[bool, bool, str]:
    name = path.name.lower()
    styled = ("bold", "italic", "oblique", "light", "thin", "black", "mono", "condensed", "serif")
    return any(word in name.replace("sansserif", "") for word in styled), "sans" not in name, str(path)


def _selector(character: str) -> bool:
    return 0xFE00 <= ord(character) <= 0xFE0F or 0xE0100 <= ord(character) <= 0xE01EF


def subset(text: str) -> bytes:
    """Cut from the embedded font what a text needs, as a WOFF file to put into a page.

    Args:
        text: all that the page may show; characters that the font lacks are left out.
    """
    import io

    from fontTools.subset import Options, Subsetter
    from fontTools.ttLib import TTFont

    options = Options()
    options.name_IDs = [0, 1, 2, 6, 13, 14]  # the licence travels with the cut
    options.notdef_outline = True
    file = io.BytesIO()
    with TTFont(EMBEDDED, recalcTimestamp=False) as face:
        cutter = Subsetter(options)
        cutter.populate(unicodes=characters(text) & coverage(EMBEDDED))
        cutter.subset(face)
        face.flavor = "woff"
        face.save(file)
    return file.getvalue()
