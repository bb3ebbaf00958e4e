"""From a path to pairs, whatever lies there: files with captions, tar shards, or interleaved documents."""

import glob
import re
import tarfile
from itertools import islice
from pathlib import Path

from mmtransformer.data.documents.document_records import document_files, holds_documents
from mmtransformer.data.documents.documents import DocumentPairs
from mmtransformer.data.documents.interleaved import InterleavedFiles
from mmtransformer.data.files.archives import ARCHIVES, COMPRESSED, IMAGES, Files
from mmtransformer.data.files.manifests import SUFFIXES
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.files.shards import Shards, find_shards
from mmtransformer.data.files.tar_index import TEXTS
from mmtransformer.data.loading.errors import Report
from mmtransformer.data.pairs import PairFiles
from mmtransformer.serialization.hub import HubOptions, fetch_dataset

_HUB = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-]+))?(/(?P<below>[^/.][^?*{}]*))?", re.ASCII
)
_FILES = (*SUFFIXES, *ARCHIVES, *COMPRESSED)  # what ends so is a file that is missing here
_PEEK = 64  # members that tell what a tar is


class InterleavedPairs(DocumentPairs):
    """Interleaved files as pairs, with what was found in them and what was wrong."""

    source: InterleavedFiles

    @property
    def report(self) -> Report:
        """What is wrong with the documents."""
        return self.source.report

    def describe(self) -> str:
        """What was found."""
        return self.source.describe()


def open_pairs(
    root: str | Path, read: ReadOptions = ReadOptions(), *, max_bad: float = 0.01
) -> PairFiles | Shards | InterleavedPairs:
    """Opens what a path names: `Shards`, the pictures of `InterleavedFiles` with the texts after them, or `PairFiles`.

    Args:
        root: A folder, an archive, a manifest, or a pattern of tar shards; or a data set on the hub (`from_hub`).
        read: How it is read. A format or columns that are named make it `PairFiles`.
        max_bad: Share of the rows that may be unusable.

    Raises:
        ValueError: If nothing is there that could be pairs, or an option would have no effect on what is there.
    """
    root = from_hub(root)
    if read.format == "auto" and not any(read.wanted[:4]):
        if read.images is None and are_shards(root):
            _refuse(read, "tar shards")
            return Shards(str(root), language=read.language, val_fraction=read.val_fraction, max_bad=max_bad)
        if are_documents(root):
            _refuse(read, "interleaved documents")
            options = {"images": read.images, "language": read.language, "val_fraction": read.val_fraction}
            return InterleavedPairs(InterleavedFiles(root, **options, max_bad=max_bad))
    return PairFiles(root, read, max_bad=max_bad)


def from_hub(root: str | Path) -> str | Path:
    """Fetches a data set that is named as on the hub: "org/name", or "hf://datasets/org/name@revision/folder".

    Returns:
        Its folder in the hub's cache; any other root as it is.

    Raises:
        ValueError: If the hub has not got it, or does not give it.
    """
    plain, name = str(root), None
    if plain.startswith("hf://"):
        if (name := _HUB.fullmatch(plain.removeprefix("hf://datasets/"))) is None:
            raise ValueError(f"{root} names no data set on the hub: hf://datasets/ORG/NAME[@REVISION][/FOLDER]")
    elif plain.count("/") == 1 and not Path(plain.partition("/")[0]).exists() and not plain.endswith(_FILES):
        name = _HUB.fullmatch(plain)
    if name is None:
        return root
    return fetch_dataset(name["name"], HubOptions(revision=name["revision"]), below=name["below"] or "")


def _refuse(read: ReadOptions, what: str) -> None:
    for name in ("encoding", "normalize"):
        if (value := getattr(read, name)) is not None:
            raise ValueError(f"{name} ({value}) would have no effect on {what}; leave it out")


def are_documents(root: str | Path) -> bool:
    """Whether a path is, or holds, JSON lines of interleaved documents."""
    path = Path(root).expanduser()
    some = path.glob("*") if path.is_dir() else [path]
    if not any(item.suffix.lower() in (".jsonl", ".ndjson") and item.is_file() for item in some):
        return False
    files = Files(root)
    found = document_files(files)
    return bool(found) and all(holds_documents(files, entry) for entry in found)


def are_shards(root: str | Path) -> bool:
    """Whether a path is a pattern, or tars alone, whose members are pictures with their captions beside them."""
    path = Path(root).expanduser()
    if not path.exists():
        return "{" in str(root) or glob.has_magic(str(root))
    if path.is_dir():
        files = [item for item in path.iterdir() if item.is_file() and not item.name.startswith(".")]
        if not files or any(item.suffix.lower() != ".tar" for item in files):
            return False
    elif path.suffix.lower() != ".tar":
        return False
    try:
        if not (first := find_shards(str(path))[0]).is_file():
            return True
        with tarfile.open(first, "r:") as archive:
            names = [info.name.lower() for info in islice(archive, _PEEK)]
    except (tarfile.TarError, OSError, ValueError, EOFError):
        return True  # shards, but damaged ones: they say how
    images = {_key(name) for name in names if name.endswith(IMAGES)}
    return any(_key(name) in images for name in names if name.rpartition(".")[2] in TEXTS)


def _key(name: str) -> str:
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"
