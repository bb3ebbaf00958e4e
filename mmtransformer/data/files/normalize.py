"""What users' data leaves open, decided in one way for all formats: the language of a text, the split of a picture."""

import re
from collections import Counter
from collections.abc import Collection, Sequence

from mmtransformer.data.files.read_options import Plain
from mmtransformer.data.files.text import SPLITS, hash_share, is_korean
from mmtransformer.data.loading.source import Caption
from mmtransformer.text.detokenize import detokenize
from mmtransformer.text.markup import strip_markup

BY_HASH = "by hash of the name"
"""How members are shared out to splits where the data name none, in words."""

_ORDER = {"train": 0, "val": 1, "test": 2}


def plain_captions(captions: Sequence[Caption], how: Collection[Plain]) -> list[Caption]:
    """Captions as people write them, as `ReadOptions.normalize` says; those of which nothing is left are left out."""
    found = list(captions)
    if "html" in how:
        found = [caption._replace(text=strip_markup(caption.text)) for caption in found]
    if "detokenize" in how:
        found = [caption._replace(text=detokenize(caption.text)) for caption in found]
    return [caption for caption in found if caption.text.strip()]


def split_order(name: str) -> tuple[int, str]:
    """What splits are sorted by: train, val, test, then any others."""
    return _ORDER.get(name, 3), name


def normalize_languages(groups: Sequence[list[Caption]], default_language: str | None) -> tuple[tuple[str, ...], str]:
    """Names the language of captions that name none: Korean by its script, the others as `PairFiles` says.

    Args:
        groups: The captions of each picture; changed in place.
        default_language: The language of captions that neither the data nor their script tells.

    Returns:
        All languages there are, and what was found, in words.
    """
    named = {c.language for group in groups for c in group} - {None}
    open_ = [c.text for group in groups for c in group if c.language is None]
    korean, total = sum(map(is_korean, open_)), len(open_)
    rest = default_language
    if default_language is None and (named or 100 * korean >= total > 0):
        rest = "en"
    by_script = korean > 0 and rest is not None
    if default_language is None and not named and 100 * (total - korean) < total:
        rest, by_script = "ko", False  # Korean, with a "KTX" here and there
    if open_ and rest is not None:
        for group in groups:
            for i, caption in enumerate(group):
                if caption.language is None:
                    group[i] = caption._replace(language="ko" if by_script and is_korean(caption.text) else rest)
    counts = Counter(c.language for group in groups for c in group)
    languages = tuple(sorted(code for code in counts if code))
    if not languages:
        return (), "no language named"
    said = "languages " + ", ".join(f"{code} {counts[code]}" for code in languages)
    assumed = default_language is None and rest == "en" and korean < total
    return languages, said + (" (en where nothing says otherwise)" if assumed else "")


def find_split(name: str, there: Collection[str], where: str) -> str:
    """A split by its name, or by another one of its names: validation and dev for val.

    Args:
        name: What is asked for.
        there: The names of the splits there are.
        where: The data, for the error.

    Raises:
        ValueError: If there is none; the message lists those there are.
    """
    for found in (name, SPLITS.get(name.casefold())):
        if found is not None and found in there:
            return found
    way = "; `mmt fit` validates on the training pictures with --data.splits.val=[train]"
    way *= SPLITS.get(name.casefold()) == "val" and [*there] == ["train"]  # one picture alone
    raise ValueError(f"{where} has no split {name!r}; it has: {', '.join(there) or 'none'}{way}")


def folder_splits(paths: Sequence[str]) -> list[str | None]:
    """The split that a folder of each path names, where one of the folders is that of training; else none."""
    folders = dict.fromkeys(path.rpartition("/")[0] for path in paths)
    for say in (_split_of, _aihub_split):
        told = {folder: next(filter(None, map(say, folder.split("/"))), None) for folder in folders}
        if "train" in told.values():
            return [told[path.rpartition("/")[0]] for path in paths]
    return [None] * len(paths)


def _split_of(folder: str) -> str | None:
    """The split that a folder, or an archive, is called like: train, train2014, 1.Training, val.zip."""
    word = re.sub(r"\.(zip|tar)$|\s", "", folder.casefold())
    return SPLITS.get(re.sub(r"^[\d\W_]+|[\d\W_]+$", "", word))


def _aihub_split(folder: str) -> str | None:
    """The split of AI Hub's TS1.zip and VS_2.zip: T for training, V for validation."""
    found = re.fullmatch(r"([TV])S(\d.*|_.*)?\.(zip|tar)|([TV])S(\d+|_.*)", folder)
    return {"T": "train", "V": "val"}.get(found[1] or found[4]) if found else None


def normalize_splits(
    names: Sequence[str], splits: Sequence[str | None], val_fraction: float, what: str = "pictures"
) -> tuple[dict[str, list[int]], str]:
    """Shares members out to splits: as the data says, and where it has no val, by a hash of the name (so members of one
    name stay together).

    Args:
        names: The members' names.
        splits: What the data says of each.
        val_fraction: Share that goes to val; 0 for no val.
        what: What the members are called.

    Returns:
        The members of each split (train, val, test, then any others), and what was done, in words.
    """
    found, said = list(splits), ""
    if val_fraction and "val" not in found:
        pool = [i for i, split in enumerate(found) if split in (None, "train")]
        draws = {names[i]: hash_share(names[i]) for i in pool}
        held_out = {name for name, value in draws.items() if value < val_fraction}
        if len(draws) > 1:  # neither train nor val is empty, however few there are
            held_out = held_out or {min(draws, key=lambda name: draws[name])}
            held_out -= {max(draws, key=lambda name: draws[name])}
        for i in pool:
            found[i] = "val" if names[i] in held_out else "train"
        said = f"val {BY_HASH}, {val_fraction:.0%} of the {what}" if pool else ""
    members: dict[str, list[int]] = {}
    for i, split in enumerate(found):
        members.setdefault(split or "train", []).append(i)
    return dict(sorted(members.items(), key=lambda item: split_order(item[0]))), said
