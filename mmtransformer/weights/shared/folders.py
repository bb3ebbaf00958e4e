"""Folders as hubs have them: `config.json`, and one file of safetensors or shards with an index. Never a pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtransformer.serialization.pretrained import (
    CONFIG,
    WEIGHTS,
    find_folder,
    open_weights,
    read_json,
    read_safetensors,
    write_weights,
)

_INDEX = "model.safetensors.index.json"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, of one file or of the shards that its index names.

    Raises:
        ValueError: naming files that are missing or damaged, and tensors that the index promises and no shard has.
    """
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if not (folder / _INDEX).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        there = f"; {', '.join(pickles[:3])} can run code when read, so convert it first" if pickles else ""
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {_INDEX}{there}")
    places = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f'{folder / _INDEX} has no "weight_map" from tensors to files')
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise ValueError(f"{folder / _INDEX} names {name}, which is not a file of this folder")
        tensors |= read_safetensors(folder / name)
    if missing := sorted(set(places) - set(tensors)):
        raise ValueError(f"{folder}: no shard has {', '.join(missing[:5])} ({len(missing)} in all)")
    return tensors


def read_state(source: str | Path) -> tuple[dict[str, Tensor], str]:
    """All tensors of a `.safetensors` file, a folder or a hub's repository, and what to call it in errors.

    Raises:
        ValueError: as `read_tensors`, or if there is no such thing.
    """
    path = Path(source)
    if path.suffix == ".safetensors":
        return read_safetensors(path), str(path)
    folder = find_folder(source)
    return read_tensors(folder), str(folder)


def write_folder(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes `config.json` and `model.safetensors`, a tensor that has several names under the first of them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / WEIGHTS, tensors)
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    open_weights(folder)
