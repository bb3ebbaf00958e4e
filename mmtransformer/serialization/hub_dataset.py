"""A data set as hubs lay it out: its files, the subsets that its card names, and fetching some of them."""

import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any, Self

from mmtransformer.serialization.hub import HubOptions, announce, out_of_reach, refuse
from mmtransformer.serialization.hub_requests import LOOK, few_tries
from mmtransformer.serialization.printable import counted, say

CARD = "README.md"
_FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)  # a card's YAML
_MOST_OF_A_CARD = 1 << 20  # bytes that are looked at
_SHARD = re.compile(r"(?P<before>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<after>[^/]*)")


class HubDataset:
    """What a data set holds; nothing of it is fetched before `fetch`, and nothing in it is ever run.

    Args:
        name: Of the repository.
        files: All that is data, and how many bytes it has.
        configs: Its subsets, each a mapping with "config_name" and "data_files", as its card lists them.
        folder: Where it lies, if it is here already.
        options: How it is looked up on the hub.
        info: What the hub says of it.

    Attributes:
        programs: Whether it has a program that makes it; that is left alone.
        partial: Whether some of its files may be missing here.
    """

    def __init__(
        self,
        name: str,
        files: Mapping[str, int],
        configs: Any,
        *,
        folder: Path | None = None,
        options: HubOptions = HubOptions(),  # noqa: B008 (frozen)
        info: Any = None,
    ):
        self.name, self.folder = name, folder
        self.files = {path: size for path, size in files.items() if _is_data(path)}
        self._all, self.partial = tuple(files), False
        self.programs = any(path.endswith(".py") and "/" not in path for path in files)
        listed = configs if isinstance(configs, Sequence) else ()
        self.configs: list[Mapping[str, Any]] = [config for config in listed if isinstance(config, Mapping)]
        self._options, self._info = options, info

    @classmethod
    def on_hub(cls, name: str, options: HubOptions = HubOptions()) -> Self:  # noqa: B008 (frozen)
        """Looks a data set up: on the hub, or where that is out of reach in its cache, which is said.

        Raises:
            ValueError: If it is not there, private or gated, or the hub is out of reach and the cache has not got it.
        """
        from huggingface_hub import HfApi, snapshot_download

        info = None
        if not options.local_files_only:
            try:
                api = HfApi(token=options.token)
                info = api.dataset_info(name, revision=options.revision, files_metadata=True, timeout=LOOK)
            except Exception as error:
                refuse(name, error, "data set")
        if info is None:
            place: Any = {"revision": options.revision, "cache_dir": options.cache_dir}
            try:
                folder = Path(snapshot_download(name, repo_type="dataset", local_files_only=True, **place))
            except Exception as error:
                raise out_of_reach(name, "--repo-type dataset ") from error
            found = cls.of_folder(folder, name)
            found.partial = True
            count = counted(len(found.files), "file")
            say(f"{name}: the hub was not asked; its cache has {count} of it", file=sys.stderr)
            return found
        card: Any = getattr(info, "card_data", None)
        files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        return cls(name, files, card.get("configs") if card is not None else None, options=options, info=info)

    @classmethod
    def of_folder(cls, folder: Path, name: str = "") -> Self:
        """A data set that lies in a folder.

        Args:
            folder: The folder.
            name: What it is called; the folder's name unless told.
        """
        paths = (path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
        return cls(name or folder.name, files, card_configs(folder), folder=folder)

    def fetch(self, files: Collection[str]) -> Path:
        """Brings some of the files, and the card, into the hub's cache; what is large is said before.

        Returns:
            The data set's folder, in which there may be other files too.

        Raises:
            ValueError: If they do not fit on the disk, or the hub does not give them.
        """
        if self.folder is not None:
            return self.folder
        from huggingface_hub import snapshot_download

        options, wanted = self._options, {*files, *({CARD} & self.files.keys())}
        announce(self.name, self._info, {file: self.files[file] for file in wanted}, options, "dataset")
        place: Any = {"revision": options.revision, "cache_dir": options.cache_dir, "token": options.token}
        patterns = patterns_of(wanted, self._all)
        try:
            with few_tries():
                return Path(snapshot_download(self.name, repo_type="dataset", allow_patterns=patterns, **place))
        except Exception as error:
            refuse(self.name, error, "data set", last=True)
            raise

    def refuse_parts(self, files: Collection[str]) -> None:
        """Refuses files of which only some of the shards are here, as their names tell ("-00003-of-00010").

        Raises:
            ValueError: If shards are missing.
        """
        found = Counter((m["before"], m["count"], m["after"]) for file in files if (m := _SHARD.fullmatch(file)))
        for (before, count, after), here in found.items():
            if here < int(count):
                raise ValueError(
                    f"{self.name}: {here} of the {int(count)} files {before}-*-of-{count}{after} are here: fetch the "
                    f"others where there is a network, or name those that you want"
                )


def card_configs(folder: Path) -> Any:
    """What the card of a data set (README.md) lists under `configs`; None if it has none, or can't be read."""
    import yaml

    try:
        with (folder / CARD).open("rb") as file:
            text = file.read(_MOST_OF_A_CARD).decode("utf-8-sig", "replace")
        front = _FRONT.match(text)
        data = yaml.safe_load(front[1]) if front else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return data.get("configs") if isinstance(data, dict) else None


def patterns_of(wanted: Collection[str], files: Collection[str]) -> list[str]:
    """Patterns, of which `*` stands for slashes too, that fit the wanted files and no others: few, as each is tried.

    Args:
        wanted: Some of the files.
        files: All files.
    """
    others = {above for file in files if file not in wanted for above in _folders(file)}
    found: dict[str, None] = {}
    for file in wanted:
        whole = next((above for above in _folders(file) if above not in others), None)
        found[escape(file) if whole is None else f"{escape(whole)}/*"] = None
    return sorted(found)


def _folders(file: str) -> list[str]:
    """The folders above a file, the highest first."""
    parts = file.split("/")[:-1]
    return ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _is_data(file: str) -> bool:
    return not file.endswith((".py", ".pyc", ".ipynb")) and not any(part[:1] == "." for part in file.split("/"))
