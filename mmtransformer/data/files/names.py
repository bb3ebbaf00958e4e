"""Names that manifests and archives give: compared in one spelling, and never handed to the file system."""

import unicodedata
from pathlib import Path

_BASE64 = ("/9j/", "ivborw0kggo", "r0lgod", "uklgr")  # how JPEG, PNG, GIF and WebP begin there, in lower case


def nfc(name: str) -> str:
    """The composed Unicode form: macOS hands out Korean file names decomposed, manifests rarely hold them so."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def refusal(name: str) -> str | None:
    """Why a name that a manifest or archive gives can't be a path below the root, or None if it can."""
    head = name.strip().lower()
    scheme = head.partition("://")[0]
    if "\0" in name:
        return "a path with a NUL byte"
    if head.startswith("data:") or (len(head) > 200 and head.startswith(_BASE64)):
        return "a picture itself, in base64: write it into a file, and the file's name here"
    if "://" in head and scheme.replace("+", "").isalnum():
        return "a URL, and nothing is downloaded: fetch the pictures first (img2dataset does)"
    if head.startswith(("/", "\\", "~")) or (len(head) > 1 and head[1] == ":" and head[0].isalpha()):
        return "an absolute path: write it relative to the manifest"
    return None


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: hidden, of a Mac's archiver, or Excel's of an open workbook."""
    return name.startswith((".", "~$")) or name == "__MACOSX"


def is_hidden_by_dot(path: str) -> bool:
    """Whether a file, or a folder above it, is hidden by a dot; what a Mac writes beside files (._a.jpg) is not."""
    *folders, name = path.split("/")
    hidden = any(part.startswith(".") for part in (*folders, name))
    return hidden and not name.startswith("._") and "__MACOSX" not in folders


def join(base: str, name: str) -> str | None:
    """`name` seen from the folder `base`, both below the root; None if it climbs out of the root."""
    parts = [part for part in base.split("/") if part]
    for part in nfc(name).replace("\\", "/").split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def join_into(root: Path, folder: Path, name: str) -> str | None:
    """`name` seen from a folder anywhere, as a path below the root; None if it leads elsewhere."""
    full, top = join(nfc(folder.as_posix()), name), join("", root.as_posix())
    return full.removeprefix(f"{top}/") if full and full.startswith(f"{top}/") else None
