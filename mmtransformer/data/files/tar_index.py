"""What lies where in a tar shard: its samples, with their captions and the place of their pictures' bytes.

A shard is read from end to end once, headers and captions only; the index is then kept as JSON lines, which hold no
code, under a name that its size and time are part of, so that a shard that has changed is read again. Nothing is ever
unpacked, and no member's name is used as a path.
"""

import contextlib
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mmtransformer.data.files.archives import MAX_BYTES, POINTER, is_pointer
from mmtransformer.data.files.cells import read_captions
from mmtransformer.data.files.endings import COMPRESSED, IMAGES
from mmtransformer.data.files.members import tar_members
from mmtransformer.data.files.names import join, refusal
from mmtransformer.data.files.text import CODES, lines
from mmtransformer.data.loading.source import Caption

TEXTS = ("txt", "caption", "cap", "text", "json")
_FORMAT = 3  # raise it when the meaning of the file changes
_MAX_TEXT = 1 << 22  # bytes of a caption; more is none
_MOST_INDEX = 1 << 30  # bytes
_BLOCK = 512


class ShardError(ValueError):
    """A shard that can't be used; the message names it, the byte and the remedy."""


class ShardSample(NamedTuple):
    """One sample of a shard: the members that share a name up to its first dot.

    Attributes:
        key: That name, with the folders before it.
        images: (ending, offset, size) of each member that ends like a picture.
        captions: Ending ("txt", "ko.txt", "json") -> the captions in it.
        errors: What is wrong with its texts: (cause, what).
        notes: What else is to be said of them: (note, what).
    """

    key: str
    images: list[tuple[str, int, int]]
    captions: dict[str, list[Caption]]
    errors: list[tuple[str, str]]
    notes: list[tuple[str, str]]


def read_index(shard: Path, cache_dir: Path | None = None) -> tuple[list[ShardSample], str]:
    """The samples of a shard, from its kept index or else from the shard itself, whose index is then kept.

    Args:
        shard: The tar file.
        cache_dir: Where indices are kept; beside the shard, as a hidden file, unless told.

    Returns:
        The samples in the order of the file, and why the index could not be kept ("" if it was).

    Raises:
        ShardError: If the shard is missing, compressed, damaged or cut short, or holds something that a shard of
            pictures and captions does not: links, devices, names that climb out, the same name twice.
    """
    try:
        info = shard.stat()
    except OSError as error:
        raise ShardError(f"{shard}: {error.strerror}") from None
    if not shard.is_file():
        raise ShardError(f"{shard}: not a regular file")
    if is_pointer(shard):
        raise ShardError(f"{shard}: {POINTER}")
    identity = {"format": _FORMAT, "size": info.st_size, "mtime_ns": info.st_mtime_ns}
    name = f".{shard.name}.index.jsonl"
    if cache_dir is not None:  # shards of different folders may have the same name
        name = f"{shard.stem}-{hashlib.sha256(str(shard.resolve()).encode()).hexdigest()[:12]}.index.jsonl"
    path = (cache_dir or shard.parent) / name
    if (kept := _load(path, identity)) is not None:
        return kept, ""
    samples = list(_scan(shard, info.st_size))
    return samples, _keep(path, identity, samples)


def _load(path: Path, identity: dict[str, int]) -> list[ShardSample] | None:
    """The samples of a kept index; None if there is none, it is of another shard, or it is damaged."""
    try:
        # An index is a file like any other: a pipe in its place would hang, a link to a device never end.
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_INDEX:
            return None
        head, *rows = path.read_text("utf-8").splitlines()
        head = json.loads(head)
        if head != identity | {"samples": len(rows)}:
            return None
        return [_sample(json.loads(row), identity["size"]) for row in rows]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _sample(row: Any, size: int) -> ShardSample:
    """A sample of a kept index. An index is a file like any other: what it says is checked.

    Raises:
        ValueError: If it says something that can't be.
    """
    key, images, captions, errors, notes = row
    for ending, offset, length in images:
        if not (isinstance(ending, str) and 0 <= offset <= offset + length <= size):
            raise ValueError("a place outside the shard")
    texts = {
        str(ending): [Caption(str(text), None if code is None else str(code)) for text, code, *_ in found]
        for ending, found in captions.items()
    }
    places = [(ending, int(offset), int(length)) for ending, offset, length in images]
    said = ([(str(cause), str(what)) for cause, what in some] for some in (errors, notes))
    return ShardSample(str(key), places, texts, *said)


def _keep(path: Path, identity: dict[str, int], samples: list[ShardSample]) -> str:
    rows = [json.dumps(identity | {"samples": len(samples)})]
    rows += [json.dumps(sample, ensure_ascii=True) for sample in samples]
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # never through a link that lies there
        with temporary.open("x", encoding="utf-8") as file:
            file.write("\n".join(rows) + "\n")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return f"{path}: {error.strerror}"
    return ""


def _scan(shard: Path, size: int) -> Iterator[ShardSample]:
    """Reads a shard's headers and texts."""
    samples: dict[str, ShardSample] = {}
    seen: dict[tuple[str, str], int] = {}
    with _errors_named(shard), shard.open("rb") as file:
        if shard.name.lower().endswith(COMPRESSED) or file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5"):
            raise ShardError(
                f"{shard}: compressed as a whole, so no member can be read in place; unpack it once "
                f"(gunzip {shard.name}): pictures are compressed already, it hardly grows"
            )
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in tar_members(archive):
                path = _path(shard, info)
                folder, _, name = path.rpartition("/")
                stem, dot, ending = name.partition(".")
                if not stem or "__MACOSX" in path.split("/"):  # hidden files, and what macOS adds
                    continue
                key, ending = f"{folder}/{stem}" if folder else stem, ending.lower()
                if (key, ending) in seen:
                    raise ShardError(
                        f"{shard}: {path} at byte {info.offset} was there before, at byte {seen[key, ending]}: a key "
                        f"must name one sample only"
                    )
                seen[key, ending] = info.offset
                if (end := info.offset_data + info.size) > size:
                    raise ShardError(f"{shard}: cut short: {path} ends at byte {end:,}, the file has {size:,}")
                sample = samples.setdefault(key, ShardSample(key, [], {}, [], []))
                if dot and f".{ending.rpartition('.')[2]}" in IMAGES:
                    sample.images.append((ending, info.offset_data, info.size))
                elif ending.rpartition(".")[2] in TEXTS:
                    data = b""
                    if info.size <= _MAX_TEXT and (found := archive.extractfile(info)) is not None:
                        data = found.read()
                    sample.captions[ending] = list(_texts(data, ending, path, sample.errors, sample.notes))
            _check_end(shard, file, archive.offset)
    yield from samples.values()


def _path(shard: Path, info: tarfile.TarInfo) -> str:
    """A member's name in its plain form.

    Raises:
        ShardError: If it is no plain file, or its name would lead out of the shard.
    """
    name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    where = f"{shard}: {name[:120]!r} at byte {info.offset}"
    if not info.isreg() or info.issparse():
        what = "a link" if info.issym() or info.islnk() else "no regular file"
        raise ShardError(f"{where} is {what}; a shard holds pictures and captions only, so this one is not trusted")
    if (reason := refusal(name)) is not None:
        raise ShardError(f"{where} is {reason}; this shard is not trusted")
    path = join("", name)
    if not path or ".." in name.split("/"):
        raise ShardError(f"{where} is a path that climbs out of its shard; this shard is not trusted")
    if info.size > MAX_BYTES:
        raise ShardError(f"{where} claims {info.size:,} bytes, over the limit of {MAX_BYTES:,} for one file")
    return path


def _texts(
    data: bytes, ending: str, path: str, errors: list[tuple[str, str]], notes: list[tuple[str, str]]
) -> Iterator[Caption]:
    """The captions in a member: one a line, or in a JSON object under "caption" or the like."""
    if ending.rpartition(".")[2] == "json":
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            errors.append(("not JSON", f"{path}: {error}"))
            return
        if isinstance(value, dict):
            value = next((value[key] for key in ("captions", "caption", "text", "title") if key in value), None)
        if value is not None:
            yield from read_captions(value, None, path, errors, notes)
        return
    language = ending.rpartition(".")[0]
    for line in lines(data):
        if line.text is None:
            errors.append(("not UTF-8", f"{path}:{line.number}: {line.hint}"))
        elif line.text.strip():
            yield from read_captions(line.text, language if language in CODES else None, path, errors, notes)


@contextlib.contextmanager
def _errors_named(shard: Path) -> Iterator[None]:
    try:
        yield
    except ShardError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise ShardError(f"{shard}: a damaged tar ({error}); make it again, or leave it out") from None


def _check_end(shard: Path, file: Any, end: int) -> None:
    """A whole tar ends with blocks of zeros; `tarfile` takes any damage behind the first header for the end."""
    file.seek(end)
    mark = file.read(_BLOCK)
    if len(mark) < _BLOCK:
        raise ShardError(f"{shard}: cut short: it ends at byte {end + len(mark):,} without an end mark")
    if mark.strip(b"\0"):
        raise ShardError(f"{shard}: damaged: what stands at byte {end:,} is neither a header nor the end of the tar")
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise ShardError(
                f"{shard}: there is more behind its end mark at byte {end:,}: tars cannot be joined with cat; make one "
                f"of them, or name both"
            )
