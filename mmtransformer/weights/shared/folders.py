"""Folders as hubs have them: `config.json` with safetensors, in one file or shards, or with torch's own files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from mmtransformer.serialization.pretrained import CONFIG, WEIGHTS, find_folder, open_weights, read_json
from mmtransformer.serialization.printable import counted
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.serialization.weight_files import read_safetensors, write_weights
from mmtransformer.serialization.writing import made_folder
from mmtransformer.weights.shared.pickles import read_pickle

T = TypeVar("T")
_INDEX = "model.safetensors.index.json"
_OLD, _OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder: of model.safetensors, of the shards that its index names, or of one safetensors file.

    Where there is no such file, torch's own are read (`pickles.read_pickle`): pytorch_model.bin, its shards, or the one
    .bin or .pt that there is. No code of theirs runs.

    Raises:
        ValueError: naming files that are missing or damaged, and tensors that the index promises and no shard has.
    """
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if (folder / _INDEX).is_file():
        return _shards(folder, folder / _INDEX, read_safetensors)
    if (folder / _OLD).is_file():
        return read_pickle(folder / _OLD)
    if (folder / _OLD_INDEX).is_file():
        return _shards(folder, folder / _OLD_INDEX, read_pickle)
    single = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin"), *folder.glob("*.pt")]
    if len(single) == 1:
        return (read_safetensors if single[0].suffix == ".safetensors" else read_pickle)(single[0])
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter without the model that it was trained on: load that, which its "
            f"adapter_config.json names, and merge the adapter into it"
        )
    there = f": {', '.join(sorted(path.name for path in single)[:3])} are not told apart" if single else ""
    raise ValueError(f"{folder} has neither {WEIGHTS} nor {_INDEX}{there}; was it downloaded whole?")


def read_config(folder: Path, *kinds: str) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ValueError: if its `model_type` is none of these.
    """
    config = read_json(folder / CONFIG)
    if (kind := config.get("model_type")) not in kinds:
        wanted = " or ".join(f'"{name}"' for name in kinds)
        raise ValueError(f'{folder / CONFIG}: model_type is "{kind}", not {wanted}')
    return config


def check_safetensors(folder: Path) -> None:
    """Refuses a folder without safetensors, or without some that its index names, for a model that reads only those.

    Raises:
        ValueError: saying what is missing.
    """
    if (folder / _INDEX).is_file():
        _places(folder, folder / _INDEX)
    elif not any(folder.glob("*.safetensors")):
        old = any((folder / name).exists() for name in (_OLD, _OLD_INDEX))
        why = f"; of {_OLD} this family is not read: convert it to safetensors" if old else "; was it downloaded whole?"
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {_INDEX}{why}")


def _shards(folder: Path, index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    places, tensors = _places(folder, index), dict[str, Tensor]()
    for name in sorted(set(places.values())):
        tensors |= read(folder / name)
    if missing := sorted(set(places) - set(tensors)):
        raise ValueError(f"{folder}: no shard has {', '.join(missing[:5])} ({len(missing)} in all)")
    return tensors


def _places(folder: Path, index: Path) -> dict[str, str]:
    """Which file has which tensor; all the files are there."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f'{index} has no "weight_map" from tensors to files')
    files = sorted(set(places.values()))
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name}, which is not a file of this folder")
    if lost := [name for name in files if not (folder / name).exists()]:
        raise ValueError(
            f"{folder} lacks {len(lost)} of {counted(len(files), 'file')} that {index.name} names, {lost[0]} the "
            f"first: it was not downloaded whole"
        )
    return places


def model_from_folder(
    source: str | Path, read: Callable[[dict[str, Any], dict[str, Tensor], str], T], *kinds: str
) -> T:
    """A model from a folder as hubs have it, or the name of a hub's repository.

    Args:
        source: the folder or the name.
        read: config.json, all tensors, and what they come from (for errors) -> the model, each of its weights filled.
        kinds: what config.json may say under `model_type`.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    folder = find_folder(source)
    config, state = read_config(folder, *kinds), read_tensors(folder)
    with built_from(state, str(folder), filled=True):
        return read(config, state, str(folder))


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


def write_folder(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, weights: str = WEIGHTS
) -> None:
    """Writes `config.json` and the weights, a tensor that has several names under the first of them."""
    folder = made_folder(folder)
    write_weights(folder / weights, tensors)
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    open_weights(folder, weights)
