"""Models in folders: `config.json` that says how to build one, `model.safetensors` that fills it. Never a pickle.

A model's constructor arguments are its configuration: each is kept as an attribute of the same name, so a config is
read off the model, and one that was built by hand is saved as well as one from a recipe.
"""

import importlib
import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

import torch
from torch import Tensor, nn

from mmtransformer.layers.lora import has_lora, refuse_lora
from mmtransformer.serialization.checksums import KEY, checksum, refuse_damaged
from mmtransformer.serialization.hub import CONFIGS, HubOptions, check_name, fetch
from mmtransformer.serialization.model_kinds import (
    arguments_of,
    import_path,
    imported_class,
    is_own,
    not_imported,
    other_kind,
)
from mmtransformer.serialization.runs import maker, refuse_file, refuse_run
from mmtransformer.serialization.untrusted import built_from, check_plain, fits, held, hints_of, hold, said, settings_of
from mmtransformer.serialization.weight_files import read_safetensors, write_weights
from mmtransformer.serialization.writing import made_folder

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PEFT = "adapter_config.json"
FORMAT_VERSION = 7  # Of folders: what config.json and model.safetensors hold, and how it is named.
_WRITER = "mmtransformer_version"  # Of the library that wrote a folder: read where it cannot be loaded.


def to_config(module: nn.Module, place: str = "the model") -> dict[str, Any]:
    """How to build this module again: {"class": name, "args": {...}}, nested where an argument is a module.

    Args:
        module: the module, one of the library's or of a class of your own.
        place: what it is of a larger one, for errors.

    Raises:
        ValueError: if it could not be built again: it is no `Pretrained`, or does not keep an argument as an attribute.
    """
    kind, args = type(module), {}
    path, public = import_path(kind), _public(kind.__name__) is kind
    what = f"{place} ({path}) cannot be saved"
    if not isinstance(module, Pretrained):
        raise ValueError(
            f"{what}: only what is a mmtransformer.serialization.pretrained.Pretrained can: derive a class of your own "
            f"from it too, as class Mine(Pretrained, nn.Module), and keep each constructor argument under its name "
            f"(self.dim = dim)"
        )
    if not public and not is_own(kind):
        raise ValueError(f"{what}: it is no public model of mmtransformer")
    if not public and imported_class(path, Pretrained) is None:
        raise ValueError(f"{what}: it is not found under this name again; let the class stand at the top of a module")
    for name in arguments_of(kind, what):
        if not hasattr(module, name):
            raise ValueError(f"{what}: its constructor takes {name}, and does not keep it: self.{name} = {name}")
        value = getattr(module, name)
        if isinstance(value, nn.Module):
            value = to_config(value, name if place == "the model" else f"{place}.{name}")
        elif isinstance(value, tuple):
            value = list(value)
        elif is_dataclass(value) and not isinstance(value, type):
            if (held := _settings_kind(hints_of(kind).get(name))) is not type(value):
                told = f"{name} is no plain {held.__name__}" if held else f"{name} ({name}: {type(value).__name__})"
                told = f"its {told}, and its own code would be lost" if held else f"annotate its {told}"
                raise ValueError(f"{what}: {told}: config.json holds its fields alone")
            value = asdict(value)
        args[name] = value
    try:
        json.dumps(args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: config.json holds numbers, texts, lists of them and models: {error}") from None
    return {"class": kind.__name__ if public else path, "args": args}


def _settings_kind(hint: Any) -> type | None:
    """The dataclass that an argument is annotated with, alone or beside None."""
    return next((kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)), None)


def _public(name: Any) -> Any:
    library = importlib.import_module("mmtransformer")
    return getattr(library, name, None) if isinstance(name, str) and name in library.__all__ else None


def from_config(config: dict[str, Any], where: str = CONFIG) -> nn.Module:
    """Builds the module that a config describes: of a public class, or of an own one that is imported already.

    Raises:
        ValueError: for a class or argument that there is not, one of your own that is not imported, or arguments that
            do not fit.
    """
    if not isinstance(config, dict) or set(config) != {"class", "args"} or not isinstance(config["args"], dict):
        kind = config.get("model_type") if isinstance(config, dict) else None
        other = f"; this one is of transformers ({kind}): docs/weights.md has what reads which" if kind else ""
        raise ValueError(f'{where}: a model is described by {{"class": ..., "args": {{...}}}}{other}')
    name = config["class"]
    found = _public(name) or imported_class(name, Pretrained)
    if not (isinstance(found, type) and issubclass(found, Pretrained)):
        raise not_imported(name, where)
    known = arguments_of(found, f"{where}: {name}")
    if unknown := sorted(set(config["args"]) - set(known)):
        raise ValueError(f"{where}: {name} has no argument {', '.join(unknown)}; it has {', '.join(known)}")
    hints, args = hints_of(found), dict(config["args"])
    for key, value in args.items():
        if isinstance(value, dict) and (kind := _settings_kind(hints.get(key))) is not None:
            args[key] = settings_of(kind, value, f"{where}: {key}")
        elif isinstance(value, dict) and "class" in value:
            args[key] = from_config(value, where)
    # Whole numbers of the library's constructors are sizes, all of them.
    minus = [key for key, value in args.items() if isinstance(value, int) and value < 0 and not is_own(found)]
    if odd := minus + [key for key, value in args.items() if not fits(value, hints.get(key, Any))]:
        raise ValueError(f"{where}: {name} cannot be built: {odd[0]} is {args[odd[0]]!r:.80}, not {hints.get(odd[0])}")
    try:
        return found(**args)  # pyright: ignore[reportReturnType]  # All public ones are modules.
    except Exception as error:  # numbers that make no sense bring out almost any
        raise ValueError(f"{where}: {name} cannot be built: {said(error)}") from error


def import_again(modules: Iterable[str]) -> None:
    """Imports in a process what the one that began it has (`imported_modules`): a model may have classes of them."""
    for name in modules:
        with suppress(ImportError):  # If it has, its loading names the one that is not there.
            importlib.import_module(name)


def find_folder(
    name_or_path: str | Path,
    options: HubOptions = HubOptions(),  # noqa: B008 (frozen)
    *,
    look: Callable[[Path], Any] | None = None,
    weights: bool = True,
) -> Path:
    """The folder itself, or a hub repository's files (weights, JSON, text), fetched once into the hub's cache.

    Args:
        name_or_path: the folder, or the repository's name.
        options: how the name is looked up.
        look: see `hub.fetch`; a folder is given to it as it is.
        weights: whether a repository's weights are wanted, or its texts alone.

    Raises:
        ValueError: if there is no such folder and no such repository, or the hub cannot be reached.
    """
    folder = Path(check_name(name_or_path))
    if folder.is_dir():
        if look is not None and any((folder / name).exists() for name in CONFIGS):
            look(folder)
        if not (folder / CONFIG).exists():
            refuse_run(folder)
        if not (folder / CONFIG).exists() and (folder / _PEFT).exists():
            base = read_json(folder / _PEFT).get("base_model_name_or_path")
            raise ValueError(
                f"{name_or_path}: an adapter of peft's without its base, {base!s:.200}: load both with peft, merge "
                f"(merge_and_unload), save what comes out, and name that folder"
            )
        return folder
    if folder.is_file() or folder.suffix == ".ckpt":
        refuse_file(folder)
    if folder.exists() or not _looks_like_id(str(name_or_path)):
        raise ValueError(f"{name_or_path}: no such folder{maker(folder)}")
    return fetch(str(name_or_path), options, look=look, weights=weights)


def _looks_like_id(name: str) -> bool:
    """Whether a hub could have it: its names are of ASCII letters, digits and -_. alone; runs/x is of a folder here."""
    parts = name.split("/")
    return (
        len(parts) in (1, 2)
        and all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", part, re.ASCII) for part in parts)
        and not (len(parts) == 2 and Path(parts[0]).is_dir())
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: naming the file, if it is missing or not a JSON object.
    """
    check_plain(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of 5,000 digits
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def open_weights(folder: Path, weights: str = WEIGHTS) -> None:
    """Lets those read the weights who may read the config beside them: safetensors writes for its user alone."""
    (folder / weights).chmod((folder / CONFIG).stat().st_mode & 0o777)


def rehash(folder: str | Path) -> str:
    """Takes the weights of a folder as they are now for what was saved, after another tool has rewritten them.

    Args:
        folder: A folder that `save_pretrained` wrote.

    Returns:
        The new sum.

    Raises:
        ValueError: If it holds no such model, or its weights are damaged in a way that needs no sum.
    """
    path = Path(folder) / CONFIG
    config = read_json(path)
    if "format_version" not in config:
        raise ValueError(f"{path}: not a folder of mmtransformer, and without a check sum")
    config[KEY] = checksum(read_safetensors(Path(folder) / WEIGHTS))
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return config[KEY]


def load_strictly(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Fills a module, all of it and with nothing left over; tied tensors need to be there once.

    Raises:
        ValueError: naming tensors that are missing, left over, of another shape, or tied here but different there.
    """
    own = module.state_dict(keep_vars=True)
    storage = {name: tensor.data_ptr() or name for name, tensor in own.items()}  # on the meta device all are at 0
    filled = {storage[name] for name in state if name in storage}
    missing = [name for name in own if name not in state and storage[name] not in filled]
    extra = [name for name in state if name not in own]
    wrong = [
        f"{name} is {tuple(state[name].shape)}, the model wants {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    first = {storage[name]: name for name in reversed(state) if name in own}
    tied = [(first[storage[name]], name) for name in state if name in own and first[storage[name]] != name]
    torn = [f"{a} and {b}" for a, b in tied if state[a].shape == state[b].shape and not torch.equal(state[a], state[b])]
    real = Tensor.is_floating_point  # whole numbers for weights have been quantised, and need a scale
    kinds = {"missing": missing, "not in the model": extra, "shapes": wrong, "tied in the model, but different": torn}
    kinds["number formats"] = [f"{n} is {x.dtype}" for n, x in state.items() if n in own and real(x) != real(own[n])]
    if faults := [f"{kind}: {_few(names)}" for kind, names in kinds.items() if names]:
        raise ValueError(f"{where} does not fit {type(module).__name__}; " + "; ".join(faults))
    with torch.no_grad():
        for name, tensor in state.items():
            hold(own[name], tensor)


def rebuilt(config: dict[str, Any]) -> nn.Module | None:
    """The module that a config describes, without memory (on the meta device); None where it cannot be built there.

    Raises:
        ValueError: if a class of a user's own is in it, and it can be built nowhere.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return from_config(config)
        except ValueError:  # a model of transformers that computes with its weights when it is built
            if not _names_own(config):
                return None
        return from_config(config)


def _names_own(config: Any) -> bool:
    """Whether a config names a class by its import path."""
    if not isinstance(config, dict) or set(config) != {"class", "args"}:
        return False
    return "." in config["class"] or any(map(_names_own, config["args"].values()))


def refuse_unreadable(module: nn.Module, config: dict[str, Any]) -> None:
    """Refuses a module whose tensors, or whose ties, are not those of its arguments.

    Raises:
        ValueError: naming them.
    """
    refuse_lora(module)
    own = module.state_dict(keep_vars=True)
    name = type(module).__name__
    again = rebuilt(config)
    fresh = own if again is None else again.state_dict(keep_vars=True)
    other = [key for key in own if key not in fresh or own[key].shape != fresh[key].shape]
    other += [key for key in fresh if key not in own]
    if other:
        raise ValueError(f"{name} is not saved, as it could not be loaded: its arguments say nothing of {_few(other)}")
    if strange := _ties(own) ^ _ties(fresh):
        raise ValueError(
            f"{name} is not saved, since it could not be loaded: its arguments do not say of "
            f"{_few(sorted(strange.pop()))} whether they are one tensor; give each its own, or tie as the arguments do"
        )


def refuse_unsaved(module: nn.Module) -> None:
    """Refuses, before it is trained, a model that could not be saved; low-rank products are merged in until then.

    Raises:
        ValueError: as `to_config` and `refuse_unreadable`.
    """
    config = to_config(module)
    if not has_lora(module):
        refuse_unreadable(module, config)


def _ties(state: dict[str, Tensor]) -> set[frozenset[str]]:
    """Which names stand for one tensor, or for one place in memory (`a.data = b.data`)."""
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(tensor.data_ptr() or id(tensor), []).append(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def _few(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class Pretrained:
    """Saving to and loading from folders, for the library's models (beside `nn.Module`).

    Attributes:
        presets: constructor arguments of known models, by name.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A model of a known shape, with random weights: `ViT.preset("tiny", image_size=64)`.

        Args:
            name: one of `presets`.
            changes: constructor arguments that differ from it.

        Raises:
            ValueError: if there is no such preset.
        """
        if name not in cls.presets:
            raise ValueError(f'{cls.__name__} has no preset "{name}": it has {", ".join(cls.presets) or "none"}')
        return cls(**(cls.presets[name] | changes))

    def save_pretrained(self, folder: str | Path, *, metadata: dict[str, Any] | None = None) -> None:
        """Writes `config.json` and `model.safetensors`; tied tensors once.

        Args:
            folder: where; made if it is not there.
            metadata: anything else that JSON can hold, for other uses (hashes, data settings): `from_pretrained` leaves
                it alone.

        Raises:
            ValueError: if `from_pretrained` could not read it, before anything is written: see `refuse_unsaved`.
        """
        assert isinstance(self, nn.Module)
        config = to_config(self)
        refuse_unreadable(self, config)
        version = importlib.import_module("mmtransformer").__version__
        whole = {"format_version": FORMAT_VERSION, _WRITER: version, **config, "metadata": metadata or {}}
        json.dumps(whole)  # refused before anything is written
        folder = made_folder(folder)
        whole[KEY] = checksum({name: t.cpu() for name, t in write_weights(folder / WEIGHTS, self.state_dict()).items()})
        text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
        open_weights(folder)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> Self:
        """Loads a model that was saved here, from a folder or from the hub, in evaluation mode.

        Raises:
            ValueError: if a file is missing or damaged, or weights and config do not fit in every name and shape.
        """
        folder = find_folder(name_or_path)
        config, own = read_json(folder / CONFIG), importlib.import_module("mmtransformer").__version__
        writer = config.get(_WRITER, own)
        by = "" if writer == own else f"; mmtransformer {writer!s:.20} wrote it, and this is {own}"
        if "class" in config and (version := config.get("format_version")) != FORMAT_VERSION:
            raise ValueError(
                f"{folder / CONFIG}: format_version is {version!r:.20}, and this mmtransformer reads {FORMAT_VERSION}: "
                f"train it again, or load it with the version that saved it{by}"
            )
        state = read_safetensors(folder / WEIGHTS)
        described = {k: v for k, v in config.items() if k not in ("format_version", _WRITER, "metadata", KEY)}
        try:
            with built_from(state, str(folder / CONFIG), filled=True):
                model = from_config(described, str(folder / CONFIG))
        except ValueError as error:
            error.args = (f"{error}{by}",)
            raise
        if not isinstance(model, cls):
            raise other_kind(folder, type(model), cls.__name__)
        with held(state.values()):
            load_strictly(model, state, str(folder / WEIGHTS))
        refuse_damaged(state, config, folder, folder / WEIGHTS)
        return model.eval()
