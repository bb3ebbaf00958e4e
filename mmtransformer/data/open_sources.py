"""From a path to pairs, whatever lies there: files with captions, tar shards, or interleaved documents."""

import dataclasses
import glob
import logging
import re
import tarfile
from collections.abc import Collection, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from mmtransformer.data.documents.document_records import holds_documents
from mmtransformer.data.documents.documents import DocumentsAsPairs
from mmtransformer.data.documents.interleaved import InterleavedFiles
from mmtransformer.data.files.archives import Selection
from mmtransformer.data.files.endings import ARCHIVES, COMPRESSED, IMAGES
from mmtransformer.data.files.names import is_hidden
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.files.shards import TarShards, find_shards
from mmtransformer.data.files.tar_index import TEXTS
from mmtransformer.data.formats.readers import SUFFIXES
from mmtransformer.data.hub_pairs import HubPairs, open_dataset
from mmtransformer.data.loading.errors import Report
from mmtransformer.data.pair_files.index import find_kept
from mmtransformer.data.pairs import PairFiles
from mmtransformer.serialization.hub import HubOptions
from mmtransformer.serialization.hub_dataset import HubDataset, card_configs
from mmtransformer.serialization.untrusted import leads_out

_log = logging.getLogger(__name__)
_HUB = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>refs/(?:convert|pr)/[\w.-]+|[\w.%-]+))?"
    r"(/(?P<below>[^/.].*?)?/?)?",
    re.ASCII,
)
_PAGE = re.compile(r"https?://[^/]+/datasets/([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*).*", re.ASCII)
_FILES = (*SUFFIXES, *ARCHIVES, *COMPRESSED)  # what ends so is a file that is missing here
_PEEK = 64  # members that tell what a tar is


class InterleavedPairs(DocumentsAsPairs):
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
    root: str | Path,
    read: ReadOptions = ReadOptions(),
    *,
    max_bad_fraction: float = 0.01,
    splits: Collection[str] | None = None,
    hub: HubOptions = HubOptions(),  # noqa: B008 (frozen)
    known_languages: Sequence[str] = (),
) -> PairFiles | TarShards | InterleavedPairs | HubPairs:
    """Opens what a path names: `TarShards`, the pictures of `InterleavedFiles` with texts after them, or `PairFiles`.

    A data set whose files a card or names share out to splits is `HubPairs` of these.

    Args:
        root: A folder, an archive, a manifest, or a pattern of tar shards. Or a data set on the hub: "org/name", or
            "hf://datasets/org/name@revision/folder", where a file or a pattern may stand for the folder too; its files
            are fetched into the hub's cache, those of `splits` alone where names or its card tell the splits.
        read: How it is read. A format or columns that are named make it `PairFiles`.
        max_bad_fraction: Share of the rows that may be unusable.
        splits: What is going to be asked for; others of a hub's data set are fetched when they are. None = all.
        hub: How a name is looked up.
        known_languages: Those of the model that the pairs are read for. Where nothing at all names a language (see
            `PairFiles`), its captions are in English if it knows that, else in the first: it learns and writes them
            behind a language's tag.

    Raises:
        ValueError: If nothing is there that could be pairs, or an option would have no effect on what is there; or the
            hub has not got it, or does not give it.
    """
    found = _open_pairs(root, read, max_bad_fraction, splits, hub)
    if found.languages or not known_languages or read.default_language is not None:
        return found
    code = "en" if "en" in known_languages else known_languages[0]
    _log.warning("%s: nothing names a language: read as %s, which the model knows (--default-language)", root, code)
    return _open_pairs(root, dataclasses.replace(read, default_language=code), max_bad_fraction, splits, hub)


def _open_pairs(
    root: str | Path, read: ReadOptions, max_bad_fraction: float, splits: Collection[str] | None, hub: HubOptions
) -> PairFiles | TarShards | InterleavedPairs | HubPairs:
    open_files = partial(_open_files, max_bad_fraction=max_bad_fraction)
    if (name := hub_name(root)) is not None:
        revision = name["revision"] and unquote(name["revision"])
        if revision and hub.revision not in (None, revision):
            raise ValueError(f"{root} names a revision, and hub.revision is another one ({hub.revision})")
        dataset = HubDataset.on_hub(name["name"], dataclasses.replace(hub, revision=revision or hub.revision))
        return open_dataset(dataset, read, open_files, below=name["below"] or "", splits=splits)
    folder = Path(root).expanduser()
    if card_configs(folder):
        return open_dataset(HubDataset.of_folder(folder), read, open_files, splits=splits)
    if read.subset is not None:
        raise ValueError(
            f"subset ({read.subset}) would have no effect on {root}, which is no data set with a card that names some"
        )
    return open_files(root, read)


def _open_files(
    root: str | Path, read: ReadOptions, *, max_bad_fraction: float
) -> PairFiles | TarShards | InterleavedPairs:
    if read.format == "auto" and not any(read.wanted[:4]):
        if read.image_folder is None and are_shards(root):
            _refuse(read, "tar shards", "encoding", "languages")
            shards = root if isinstance(root, Selection) else str(root)
            options = {
                "default_language": read.default_language,
                "normalize": read.plain,
                "val_fraction": read.val_fraction,
            }
            return TarShards(shards, **options, max_bad_fraction=max_bad_fraction)
        if (found := find_kept(root, read)) is not None and not found.documents:  # before anything is listed
            return PairFiles(root, read, max_bad_fraction=max_bad_fraction, found=found)
        if are_documents(root):
            _refuse(read, "interleaved documents", "encoding", "languages", "normalize")
            options = {
                "image_folder": read.image_folder,
                "default_language": read.default_language,
                "val_fraction": read.val_fraction,
            }
            return InterleavedPairs(InterleavedFiles(root, **options, max_bad_fraction=max_bad_fraction))
    return PairFiles(root, read, max_bad_fraction=max_bad_fraction)


def hub_name(root: str | Path) -> re.Match[str] | None:
    """What a root says of a data set on the hub ("name", "revision", "below"); None if it can only be a place here.

    Raises:
        ValueError: If it can only be a name on the hub, and names no data set.
    """
    plain = str(root)
    if plain.startswith("hf://"):
        if (name := _HUB.fullmatch(plain.removeprefix("hf://datasets/"))) is None:
            raise ValueError(f"{root} names no data set on the hub: hf://datasets/ORG/NAME[@REVISION][/FOLDER]")
        return name
    if plain.startswith(("https://", "http://")):
        page = _PAGE.fullmatch(plain)
        how = f"name the data set as hf://datasets/{page[1]}" if page else "fetch the files first"
        raise ValueError(f"{root} is an address, and nothing is downloaded from there: {how}")
    if plain.count("/") != 1 or Path(plain.partition("/")[0]).exists() or plain.endswith(_FILES):
        return None
    return _HUB.fullmatch(plain)


def _refuse(read: ReadOptions, what: str, *names: str) -> None:
    for name in names:
        if (value := getattr(read, name)) is not None:
            raise ValueError(f"{name} ({value}) would have no effect on {what}; leave it out")


def are_documents(root: str | Path) -> bool:
    """Whether a path is, or holds, JSON lines of interleaved documents."""
    path = Path(root).expanduser()
    if not path.is_dir():
        return holds_documents(path)
    some = [path / file for file in root.splits] if isinstance(root, Selection) else path.iterdir()
    return any(holds_documents(item) and not is_hidden(item.name) and not leads_out(item, path) for item in some)


def are_shards(root: str | Path) -> bool:
    """Whether a path is a pattern, or tars alone, whose members are pictures with their captions beside them."""
    path = Path(root).expanduser()
    if not path.exists():
        return "{" in str(root) or glob.has_magic(str(root))
    if isinstance(root, Selection):
        files = [Path(root, file) for file in sorted(root.splits)]
    elif path.is_dir():
        files = [item for item in path.iterdir() if item.is_file() and not item.name.startswith(".")]
    else:
        files = [path]
    if not files or any(item.suffix.lower() != ".tar" for item in files):
        return False
    try:
        if not (first := files[0] if isinstance(root, Selection) else find_shards(str(path))[0]).is_file():
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
