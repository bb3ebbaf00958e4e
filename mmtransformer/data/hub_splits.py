"""Which files of a data set belong to a subset, and to which of its splits: by its card, or else by their names."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mmtransformer.data.files.endings import ARCHIVES, COMPRESSED, IMAGES, OTHERS
from mmtransformer.data.files.names import nfc
from mmtransformer.data.files.text import SPLITS, split_word
from mmtransformer.data.formats.parquet import ARROW, COLUMNAR
from mmtransformer.data.formats.readers import SUFFIXES

_PICTURES = (*IMAGES, *ARCHIVES, *COMPRESSED)

Chosen = dict[str, str | None]
"""Files, each with its split; None where nothing tells."""


def choose_files(
    name: str,
    files: Collection[str],
    configs: Sequence[Mapping[str, Any]],
    *,
    below: str = "",
    subset: str | None = None,
) -> tuple[Chosen, str]:
    """The files that are to be read.

    Args:
        name: Of the data set, for errors.
        files: All its files.
        configs: Subsets as its card lists them: "config_name", "data_files" or "data_dir", "default".
        below: A folder, a file or a pattern that is wanted alone.
        subset: The name of a subset: one of the card's, or a folder.

    Returns:
        The files, and what was chosen among several subsets, in words ("" = there was no choice).

    Raises:
        ValueError: If nothing is so called, or there are several subsets and none is the default.
    """
    named = {str(config.get("config_name", "default")): config for config in configs}
    said = ""
    if subset is not None and subset not in named:
        folder = next((at for at in (subset, f"data/{subset}") if any(f.startswith(f"{at}/") for f in files)), None)
        if folder is None or below:
            raise ValueError(f"{name} has no subset {subset!r}; it has: {_some(named) or 'none that its card names'}")
        subset, below = None, folder
    elif subset is None and not below and len(named) > 1:
        default = [key for key, config in named.items() if config.get("default")]
        subset = (default or [key for key in named if key == "default"] or [None])[0]
        if subset is None:
            raise ValueError(
                f"{name} has {len(named)} subsets ({_some(named)}), which are not read together: name one with "
                f"--subset (in a recipe data.read.subset), as in --subset {next(iter(named))}"
            )
        said = f"its subset {subset} is taken, of {_some(named)}"
    if below:
        files = [file for file in files if _fits(below, file)]
        if not files:
            raise ValueError(f"{name}: the data set has nothing called {below}")
    claims = {key: _claimed(config, files) for key, config in named.items() if subset in (None, key)}
    mine: Chosen = {}
    for found in claims.values():
        mine = found | mine
    if not mine:
        return splits_of_names(files), said
    if not all(mine.values()):  # the card names a folder alone
        mine = splits_of_names(list(mine))
    if any(file.lower().endswith(SUFFIXES) for file in mine):  # pictures that tables name are in no subset
        taken = {file for config in configs for file in _claimed(config, files)}
        mine |= {file: None for file in files if file not in taken and file.lower().endswith(_PICTURES)}
    return mine, said


def may_be_pairs(file: str) -> bool:
    """Whether a file may hold pictures or captions, by its name."""
    return file.lower().endswith(_PICTURES) or (file.lower().endswith(SUFFIXES) and not OTHERS.search(file))


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + ", ..." * (len(listed) > 8)


def _claimed(config: Mapping[str, Any], files: Iterable[str]) -> Chosen:
    """The files that a card gives a subset: of each split, or of a folder."""
    base, listed = str(config.get("data_dir") or "").strip("/"), config.get("data_files")
    if not listed:
        return {file: None for file in files if base and _fits(base, file)}
    found: Chosen = {}
    for split, path in _patterns(listed):
        for file in files:
            if file not in found and _fits(f"{base}/{path}", file):
                found[file] = split_word(split) or split
    return found


def _patterns(listed: Any, split: str = "train") -> Iterator[tuple[str, str]]:
    """The patterns under `data_files`, each with its split: a text, a list, or mappings of splits in any form."""
    if isinstance(listed, str):
        yield split, listed.removeprefix("./")
    elif isinstance(listed, Sequence):
        for item in listed:
            yield from _patterns(item, split) if isinstance(item, str | Mapping) else ()
    elif isinstance(listed, Mapping) and "path" in listed:
        named, paths = listed.get("split"), listed["path"]
        for path in paths if isinstance(paths, Sequence) and not isinstance(paths, str) else [paths]:
            yield from _patterns(path, str(named or split)) if isinstance(path, str) else ()
    elif isinstance(listed, Mapping):
        for named, paths in listed.items():
            for path in paths if isinstance(paths, Sequence) and not isinstance(paths, str) else [paths]:
                yield from _patterns(path, str(named)) if isinstance(path, str) else ()


def _fits(pattern: str, file: str) -> bool:
    """Whether a pattern stands for a file: `*` within a folder, `**` for any folders; a folder stands for all in it.

    In a time that no pattern makes long, as a card is not to be trusted.
    """
    wanted = pattern.strip("/").split("/")

    def with_none(places: set[int]) -> set[int]:  # `**` may stand for no folder
        for place in sorted(places):
            while place < len(wanted) and wanted[place] == "**":
                place += 1
                places.add(place)
        return places

    places = with_none({0})
    for part in file.split("/"):
        after = {place for place in places if place == len(wanted) or wanted[place] == "**"}
        after |= {place + 1 for place in places - after if fnmatchcase(part, wanted[place])}
        places = with_none(after)
    return len(wanted) in places


def splits_of_names(files: Collection[str]) -> Chosen:
    """Files, each with the split that names tell: none has one unless all tables have, or all archives, or folders.

    Where there are tables of one kind, those of Parquet before all others, no other tables are taken.
    """
    stems = {nfc(file).rpartition(".")[0] for file in files if file.lower().endswith(IMAGES)}
    tables = [file for file in files if _is_table(file, stems)]
    for ending in (".parquet", ARROW):
        tables = [file for file in tables if file.lower().endswith(ending)] or tables
    known, columnar = {*tables}, bool(tables) and tables[0].lower().endswith(COLUMNAR)
    rest = [file for file in files if file not in known and not (columnar and file.lower().endswith(SUFFIXES))]
    if not tables:
        packed = {file for file in files if file.lower().endswith(ARCHIVES)}
        if packed and all(map(_split_of, packed)):
            return {file: _split_of(file) if file in packed else None for file in files}
        by_folder = {file: _folder_split(file) for file in files}
        return by_folder if "train" in by_folder.values() else dict.fromkeys(files)
    told = {file: _split_of(file) for file in tables}
    if not all(told.values()):
        return dict.fromkeys([*tables, *rest])
    beside = {file.rpartition("/")[0] for file in tables}
    return told | {file: _beside(file, beside) for file in rest}


def _is_table(file: str, stems: Collection[str]) -> bool:
    """Whether a file may hold captions of several pictures: no text beside a picture, nor a notice."""
    if not file.lower().endswith(SUFFIXES) or OTHERS.search(file):
        return False
    stem = nfc(file).rpartition(".")[0]
    return not file.lower().endswith(".txt") and stem not in stems and stem.rpartition(".")[0] not in stems


def _split_of(file: str) -> str | None:
    """The split that a file's name says, or else the folder nearest to it that says one."""
    return split_word(file.rpartition("/")[2]) or next(
        (split for part in reversed(file.split("/")[:-1]) if (split := split_word(part))), None
    )


def _folder_split(file: str) -> str | None:
    return next((SPLITS[word] for part in file.split("/")[:-1] if (word := part.casefold()) in SPLITS), None)


def _beside(file: str, tables: Collection[str]) -> str | None:
    """The split of a picture or archive that lies beside a table, in a folder that a split gives its name."""
    parts = file.split("/")[:-1]
    above = ("/".join(parts[:end]) for end in range(len(parts), 0, -1))
    folder = next((folder for folder in above if folder in tables), None)
    return _folder_split(f"{folder}/") if folder is not None else None
