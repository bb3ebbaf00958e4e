"""A hub's repository by its name: looked at first, then fetched once into the hub's cache."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtransformer.serialization.hub_requests import LOOK, few_tries
from mmtransformer.serialization.printable import counted, say

_LARGE = 100_000_000  # bytes; what a download takes is said from there on
_TEXTS = (".json", ".txt", ".md", ".jinja", ".model")
_PICKLES = (".bin", ".pt")
CONFIGS = ("config.json", "open_clip_config.json")
"""Files that say what a folder holds."""


@dataclass(frozen=True)
class HubOptions:
    """How a name is looked up, as `huggingface_hub` knows it; HF_HUB_OFFLINE, HF_HOME and its like count as well.

    Attributes:
        revision: a branch, tag or commit; the main branch unless told.
        token: of an account, for private and gated repositories; that of `hf auth login` unless told.
        cache_dir: the folder of the cache.
        local_files_only: whether to take what the cache has and ask nobody.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False


def check_name(name_or_path: str | Path) -> str | Path:
    """The name of a model, where it is one.

    Raises:
        ValueError: if it is empty, which would be the current folder, or no name at all.
    """
    if not isinstance(name_or_path, (str, os.PathLike)) or not str(name_or_path):
        raise ValueError(f"{name_or_path!r:.80} names no model: give its folder, or its name on the hub")
    return name_or_path


def fetch(
    name: str, options: HubOptions = HubOptions(), *, look: Callable[[Path], Any] | None = None, weights: bool = True
) -> Path:
    """The folder of a repository's files: safetensors, JSON and text of its top, and of tokenizers below it.

    Args:
        name: of the repository.
        options: how it is looked up.
        look: called with a folder that has its config alone, before anything large is fetched; may refuse it.
        weights: whether weights are wanted, or the texts alone.

    Raises:
        ValueError: if it is not there, private or gated, or the hub is out of reach and the cache has not got it.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    place: Any = {"revision": options.revision, "cache_dir": options.cache_dir, "token": options.token}
    info = code = None
    if not options.local_files_only:
        try:
            info = HfApi(token=options.token).model_info(
                name, revision=options.revision, files_metadata=True, timeout=LOOK
            )
        except Exception as error:
            refuse(name, error, "model")
            code = _status(error)
    if info is None:
        try:
            return Path(snapshot_download(name, local_files_only=True, **place))
        except Exception as error:
            raise out_of_reach(name, code=code) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = [file for file in files_of(list(sizes)) if weights or file.endswith(_TEXTS)]
    try:
        if look is not None and (config := next((file for file in CONFIGS if file in sizes), None)):
            with few_tries():
                found = hf_hub_download(name, config, **place)
            look(Path(found).parent)
        announce(name, info, {file: sizes[file] for file in wanted}, options)
        with few_tries():
            return Path(snapshot_download(name, allow_patterns=wanted, **place))
    except ValueError as error:
        if type(error).__module__.startswith(("huggingface_hub", "httpx")):
            refuse(name, error, "model", last=True)
        raise
    except Exception as error:
        refuse(name, error, "model", last=True)
        raise


def out_of_reach(name: str, kind: str = "", *, code: int | None = None) -> ValueError:
    """Of a repository that neither the hub nor its cache gives.

    Args:
        name: of the repository.
        kind: options that a download by hand needs.
        code: what the hub answered, such as 503; None = nothing.
    """
    hub = "the hub is out of reach" if code is None else f"the hub answers with {code}"
    return ValueError(
        f"{name}: no such folder here, {hub}, and its cache has not got it: where there is a "
        f"network, `hf download {name} {kind}--local-dir FOLDER`, and give FOLDER in place of the name"
    )


def files_of(names: Sequence[str]) -> list[str]:
    """Which of a repository's files make a model: of several kinds of weights one, safetensors first."""
    below = [name for name in names if "/" not in name or name.startswith("qformer_tokenizer/")]
    texts = [name for name in below if name.endswith(_TEXTS)]
    top = [name for name in below if "/" not in name and ".fp16." not in name]
    safe = [name for name in top if name.endswith(".safetensors")]
    weights = [name for name in safe if name.startswith("model")] or safe
    if not weights:
        old = [name for name in top if name.endswith(_PICKLES)]
        weights = [name for name in old if name.startswith("pytorch_model")] or old
    return [*texts, *weights]


def announce(name: str, info: Any, sizes: dict[str, int], options: HubOptions, kind: str = "model") -> None:
    """Says how much is going to be fetched, under which licence, and what it takes in memory."""
    from huggingface_hub import constants, try_to_load_from_cache

    new = {
        file: size
        for file, size in sizes.items()
        if not isinstance(try_to_load_from_cache(name, file, options.cache_dir, info.sha, kind), str)
    }
    if sum(new.values()) < _LARGE:
        return
    card = getattr(info, "card_data", None)
    place = Path(options.cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
    if sum(new.values()) > free:
        raise ValueError(
            f"{name}: {sum(new.values()) / 1e9:.1f} GB to fetch, and {place} has {free / 1e9:.1f} GB left: name "
            f"another place with HF_HOME, or a part of it"
        )
    licence = (card.get("license") if card is not None else None) or "none named"
    count = getattr(getattr(info, "safetensors", None), "total", None)
    memory = f"; {4 * count / 1e9:.1f} GB of memory in float32" if count else ""
    size = f"{sum(new.values()) / 1e9:.1f} GB to fetch in {counted(len(new), 'file')}"
    say(f"{name}: {size}; licence: {licence}{memory}", file=sys.stderr)


def refuse(name: str, error: Exception, kind: str, *, last: bool = False) -> None:
    """Says in a line what a hub's answer means; one that is out of reach may be done without, unless it is the last."""
    from huggingface_hub import errors

    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, errors.GatedRepoError):
        why = "gated: accept its conditions on its page, then `hf auth login`, or give a token"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = (
            f"no such folder here, and no such {kind} on the hub, or a private one (401): mind the spelling, or log in"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        why = "the hub has no such revision of it"
    elif isinstance(error, errors.HFValidationError):
        why = f"neither a folder here nor a name on the hub: {said}"
    elif isinstance(error, errors.HfHubHTTPError) and (code := _status(error)) in (401, 403):
        why = f"the hub does not give it to you ({code}): ask for access on its page, then `hf auth login`"
    elif last:
        why = f"it could not be fetched whole: {said}; the next try goes on where this one ended"
    else:
        return
    raise ValueError(f"{name}: {why}") from error


def _status(error: Any) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
