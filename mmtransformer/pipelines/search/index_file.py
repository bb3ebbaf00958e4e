"""The file of an image index: one safetensors file, written whole or not at all, and never more than looked up.

    embeddings  (n d) float16   a unit vector a picture; of ten nearest 99.98 % are those of float32
    hashes      (n 16) uint8    BLAKE2b of each picture's file: same bytes, same picture
    stamps      (n 2) int64     size and time of each file, by which a change is seen without reading it
    names       uint8           UTF-8 JSON: paths below the root, in the order of the embeddings
    bad         uint8           UTF-8 JSON: path -> [size, time, what is wrong with it]

The header's metadata say the format's version, the model (a hash of its weights, settings and image transform), where
the pictures lie, and a check sum of all tensors.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmtransformer.serialization.checksums import checksum
from mmtransformer.serialization.untrusted import check_plain
from mmtransformer.serialization.weight_files import weights_written_to

SUFFIX = ".safetensors"
ANEW = "delete it, and it is made anew from its pictures (mmt search --images FOLDER --index-file FILE)"
"""What helps a file that cannot be read: it no longer says where its pictures lie."""
_KIND, _VERSION = "mmtransformer image index", "1"
_HASH = 16  # bytes
_TYPES = {"embeddings": torch.float16, "hashes": torch.uint8, "stamps": torch.int64, "names": torch.uint8,
          "bad": torch.uint8}  # fmt: skip
Stamp = tuple[int, int]


@dataclass
class IndexFile:
    """What an index holds.

    Args:
        model: The hash of the model that made it.
        root: The folder or archive below which the names lie.
        places: What was indexed: files, folders, patterns, archives.
        names: (n) paths below the root.
        embeddings: (n d) float16, unit vectors.
        hashes: (n 16) uint8, of the files' bytes.
        stamps: (n 2) int64, size and time; -1 where there is no telling.
        bad: Pictures that could not be used, with their stamps and what is wrong.
        readers: Which formats could be read: a picture that was bad is tried again where there are others.
        model_name: What the model was called.
    """

    model: str
    root: str
    places: Sequence[str]
    names: list[str] = field(default_factory=list)
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float16))
    hashes: Tensor = field(default_factory=lambda: torch.empty(0, _HASH, dtype=torch.uint8))
    stamps: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int64))
    bad: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    readers: str = ""
    model_name: str = ""

    def write(self, path: str | Path) -> Path:
        """Writes the file beside its final name, and gives it that name when it is whole.

        Raises:
            ValueError: If the path is a folder's.
            OSError: If it cannot be written; names it.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file in it, such as {path / f'photos{SUFFIX}'}")
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "embeddings": self.embeddings.contiguous(),
            "hashes": self.hashes.contiguous(),
            "stamps": self.stamps.contiguous(),
            "names": _to_bytes(self.names),
            "bad": _to_bytes(self.bad),
        }
        metadata = {
            "kind": _KIND,
            "format_version": _VERSION,
            "model": self.model,
            "model_name": self.model_name,
            "root": json.dumps(self.root),  # what is no UTF-8 survives as \udcXX
            "places": json.dumps(list(self.places)),
            "readers": self.readers,
            "checksum": checksum(tensors),
        }
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".part")
        os.close(handle)
        try:
            with weights_written_to(path):
                save_file(tensors, temporary, metadata=metadata)
            with open(temporary, "rb+") as file:  # noqa: PTH123 (a plain handle)
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        return path

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Reads a file; its embeddings are mapped, not copied. One that is written meanwhile is read again.

        Raises:
            ValueError: If there is none, or it is damaged, cut short, of another kind or version; one line with the
                remedy.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"{path} is a folder, and an index is one file: name the file, or a folder of pictures")
        if path.is_file() and not path.stat().st_size:
            raise ValueError(f"{path}: cut short, or no safetensors file (it is empty); {ANEW}")
        check_plain(path)
        while True:
            before = _identity(path)
            try:
                return cls._read(path)
            except ValueError:  # safetensors opens it twice: the head may be of one file and the tensors of the next
                if _identity(path) == before:
                    raise

    @classmethod
    def _read(cls, path: Path) -> Self:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("kind") != _KIND:
                    raise ValueError(f"{path}: no image index of mmtransformer; name a file that mmt search wrote")
                if (version := metadata.get("format_version")) != _VERSION:
                    raise ValueError(
                        f"{path}: an index of format version {version!r:.20}, and this mmtransformer reads {_VERSION}; "
                        f"{ANEW}"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cut short, or no safetensors file ({error}); {ANEW}") from error
        try:
            if checksum(tensors) != metadata["checksum"]:
                raise ValueError("its check sum is another")
            return cls._of(tensors, metadata)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            said = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}: damaged ({said}); {ANEW}") from error

    @classmethod
    def _of(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Self:
        """What tensors and metadata say, each of its kind, and all of one length."""
        for name, dtype in _TYPES.items():
            if tensors[name].dtype != dtype:
                raise ValueError(f"{name} are of type {tensors[name].dtype}")
        names, bad = _from_bytes(tensors["names"]), _from_bytes(tensors["bad"])
        places, root = json.loads(metadata["places"]), json.loads(metadata["root"])
        embeddings, hashes, stamps = tensors["embeddings"], tensors["hashes"], tensors["stamps"]
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("names are no list of texts")
        n = len(names)
        if embeddings.ndim != 2 or embeddings.shape[0] != n or hashes.shape != (n, _HASH) or stamps.shape != (n, 2):
            shapes = ", ".join(f"{tuple(x.shape)}" for x in (embeddings, hashes, stamps))
            raise ValueError(f"{n} names and tensors of {shapes}")
        if len(set(names)) < n or any(_climbs(name) for name in names):
            raise ValueError("names stand twice, or lead out of the root")
        if not (isinstance(bad, dict) and all(map(_is_fault, bad.values()))):
            raise ValueError("bad is no table of faults")
        if not (isinstance(root, str) and isinstance(places, list) and all(isinstance(p, str) for p in places)):
            raise ValueError("places are no list of texts")
        return cls(
            metadata["model"],
            root,
            places,
            names,
            embeddings,
            hashes,
            stamps,
            {name: (size, time, said) for name, (size, time, said) in bad.items()},
            metadata["readers"],
            metadata["model_name"],
        )


def _climbs(name: str) -> bool:
    return name.startswith(("/", "\\")) or (".." in name and ".." in name.replace("\\", "/").split("/"))


def _is_fault(value: Any) -> bool:
    return isinstance(value, list) and [type(x) for x in value] == [int, int, str]


def _to_bytes(value: Any) -> Tensor:
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _identity(path: Path) -> tuple[int, ...] | None:
    """What is another as soon as a file is written anew; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _from_bytes(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes().decode("utf-8", "surrogatepass"))
