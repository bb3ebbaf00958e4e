"""What zips and tars hold, listed without unpacking anything, and any bytes of theirs."""

import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mmtransformer.data.files.endings import MOST_RATIO, SMALL_BYTES


class Entry(NamedTuple):
    """Where one file lies.

    Attributes:
        path: From the root, with "/": "images/a.jpg", or "part-0.zip/images/a.jpg" inside an archive.
        inner: The path inside its archive, or `path` in composed Unicode for a file in a folder.
        archive: Index of the archive in `Files.archives`, or -1 for a file of its own.
        offset: First byte in the archive (of the local header, for a zip).
        size: Bytes, unpacked.
        compressed_size: Bytes as stored.
        method: 0 stored, 8 deflated.
        crc: CRC-32 of the bytes, or -1 where none is kept (tar, folder).
    """

    path: str
    inner: str
    archive: int = -1
    offset: int = 0
    size: int = 0
    compressed_size: int = 0
    method: int = 0
    crc: int = -1


def list_zip(path: Path) -> Iterator[tuple[str, Entry | str]]:
    """The names in a zip, each with its place, or why it can't be read."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename
            if not name or name.endswith("/"):
                continue
            if not info.flag_bits & 0x800 and not name.isascii():
                name = _repair_encoding(name)
            if info.flag_bits & 1:
                yield name, "encrypted"
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                yield (name, f"packed with zip method {info.compress_type}; only stored and deflated can be read")
            elif stat.S_ISLNK(info.external_attr >> 16):
                yield name, "a link inside an archive"
            elif info.file_size > max(SMALL_BYTES, MOST_RATIO * info.compress_size):
                yield (name, f"{info.file_size:,} bytes out of {info.compress_size:,}: a bomb, or nothing but one byte")
            else:
                size, stored = info.file_size, info.compress_size
                yield name, Entry("", "", -1, info.header_offset, size, stored, info.compress_type, info.CRC)


def _repair_encoding(name: str) -> str:
    """A name that a zip holds without saying its encoding: zipfile reads cp437; it is UTF-8, or Korean Windows."""
    try:
        raw = name.encode("cp437")
    except UnicodeEncodeError:
        return name
    for encoding in ("utf-8", "cp949"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return name


def tar_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """What a tar holds but folders, as it stands there.

    Raises:
        tarfile.ReadError: If a header leads backwards, so that reading would never end.
    """
    last = -1
    for info in archive:
        if info.offset <= last or info.size < 0:
            raise tarfile.ReadError(f"a header at byte {info.offset} leads backwards")
        last = info.offset
        if not info.isdir():
            yield info


def list_tar(path: Path) -> Iterator[tuple[str, Entry | str]]:
    """The same of a tar."""
    with tarfile.open(path, "r:") as archive:
        for info in tar_members(archive):
            if not info.isreg() or info.issparse():
                yield (info.name, "a link inside an archive" if info.issym() or info.islnk() else "not a regular file")
            else:
                yield info.name, Entry("", "", offset=info.offset_data, size=info.size, compressed_size=info.size)


def pread(handle: int, size: int, offset: int) -> bytes:
    """Bytes from a place on, fewer at the end of the file."""
    chunks: list[bytes] = []
    while size > 0 and (chunk := os.pread(handle, min(size, 1 << 26), offset)):
        chunks.append(chunk)
        size, offset = size - len(chunk), offset + len(chunk)
    return b"".join(chunks)
