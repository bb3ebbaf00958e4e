"""A hub of data sets that stands in for the real one: a folder of files, of which some are fetched into a cache."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from mmtransformer.serialization.hub_dataset import card_configs

SHA = "a" * 40


class DatasetHub:
    """One data set, whose files lie in a folder; what is asked of it is remembered.

    Args:
        repo: Its files.
        cache: Where fetched ones go, laid out as the hub's cache is.
    """

    def __init__(self, repo: Path, cache: Path, refusal: Exception | None = None):
        self.repo, self.cache, self.refusal = repo, cache, refusal
        self.fetched: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.sizes: dict[str, int] = {}

    def put(self, monkeypatch: pytest.MonkeyPatch) -> "DatasetHub":
        """Puts it in the place of the real one."""
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda api, name, **o: self._info(name, **o))
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._download)
        return self

    def _files(self) -> list[str]:
        paths = (Path(folder, file) for folder, _, files in os.walk(self.repo) for file in files)
        return sorted(path.relative_to(self.repo).as_posix() for path in paths)

    def _info(self, name: str, **options: Any) -> Any:
        self.asked.append({"name": name, **options})
        if self.refusal is not None:
            raise self.refusal
        sizes = {name: (self.repo / name).stat().st_size for name in self._files()} | self.sizes
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
        card = {"license": "mit", "configs": card_configs(self.repo)}
        return SimpleNamespace(siblings=files, sha=SHA, card_data=card)

    def _download(self, name: str, *, repo_type: str, **options: Any) -> str:
        assert repo_type == "dataset"
        top = self.cache / f"datasets--{name.replace('/', '--')}"
        snapshot = top / "snapshots" / SHA
        if options.get("local_files_only"):
            if not snapshot.exists():
                raise errors.LocalEntryNotFoundError("no")
            return str(snapshot)
        self.asked.append(options)
        (top / "blobs").mkdir(parents=True, exist_ok=True)
        for file in filter_repo_objects(self._files(), allow_patterns=options["allow_patterns"]):
            link, blob = snapshot / file, top / "blobs" / f"{abs(hash(file)):x}"
            if not link.exists():
                self.fetched.append(file)
                blob.write_bytes((self.repo / file).read_bytes())
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(Path(os.path.relpath(blob, link.parent)))
        return str(snapshot)
