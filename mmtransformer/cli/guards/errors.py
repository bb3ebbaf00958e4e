"""One clear line for what a user can put right, with "did you mean" for misspelt keys."""

import codecs
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from mmtransformer.generation.config import NOT_HERE
from mmtransformer.serialization.runs import refuse_no_checkpoint

OTHER_NAMES = {
    "learning_rate": "lr", "batch": "batch_size", "per_device_train_batch_size": "batch_size", "wd": "weight_decay",
    "epochs": "max_epochs", "num_train_epochs": "max_epochs", "steps": "max_steps", "output_dir": "default_root_dir",
    "gradient_accumulation_steps": "accumulate_grad_batches", "max_grad_norm": "gradient_clip_val",
    "resume_from_checkpoint": "ckpt_path", "seed": "seed_everything", "max_length": "max_len max_new_tokens",
    "image": "transform", "cross_layer_interval": "cross_attn_every_n_layers",
    "--num-steps": "--num-inference-steps", "lora_target_modules": "target_modules", "--json": "--out",
    "ema": "ema_decay", "language": "default_language", "cross_dim": "context_dim", "visual_dim": "context_dim",
    "num_examples": "num_shots", "--language": "--default-language", "--images": "--image-folder",
    "--index": "--images", "mlp": "activation", "max_len": "row_len",
    "--max-length": "--max-new-tokens --max-len", "--lang": "--language --default-language",
    "--connectors": "--captioners", "--question": "--prompt", "--steps": "--num-inference-steps",
    "--cfg": "--guidance-scale", "--cfg-scale": "--guidance-scale", "--scheduler": "--solver", "--sampler": "--solver",
    "--init-image": "--image",
}  # fmt: skip
"""What settings are called elsewhere -> here; of several names the first that there is."""


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean "fit"?`, or nothing if nothing is close."""
    known = list(known)
    front, _, last = word.rpartition(".")
    for other in OTHER_NAMES.get(last, "").split():
        mine = [key for key in known if key.rpartition(".")[2] == other]
        if mine:
            beside = f"{front}.{other}"
            return f'; did you mean "{beside if beside in mine else mine[0]}"?'
    if last.lstrip("-").replace("-", "_") in NOT_HERE:
        return ""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


_OTHERS = {
    r"^(-?\d+) is not in bounds, numpy accepts from 0 to (\d+)": "seed_everything ({}) must be from 0 to {}",
    r"current_epoch=(\d+), but you have set Trainer\(max_epochs=(\d+)\)": "trainer.max_epochs ({1}) is less than the "
    "{0} that the run has done: give at least as many, or begin another with --trainer.default_root_dir DIR",
    r"Trainer\(devices=.*value is not a valid input|`devices` selected with `CPUAccelerator`": "trainer.devices must "
    "be at least 1 (on a CPU the number of processes; -1 are all GPUs): leave it out to use what there is",
    r"`val_check_interval` \((\d+)\) must be less than or equal to .* batches \((\d+)\)": "trainer.val_check_interval "
    "({}) is more than the {} batches of an epoch: give at most so many, or count them over epochs with "
    "--trainer.check_val_every_n_epoch=null",
    r"`val_check_interval` should be an integer .*every_n_epoch=None": "trainer.val_check_interval is a share of an "
    "epoch, while trainer.check_val_every_n_epoch: null counts batches over epochs: give a whole number of batches, or "
    "--trainer.check_val_every_n_epoch=1 too",
    r"No supported gpu backend found|Accelerator` can not run on your system": "trainer.accelerator: torch finds no "
    "such device here; leave it out to use what there is",
}
"""What other libraries say without a way out, and what is said in its place."""


def one_line(error: BaseException) -> str | None:
    """The line to print for an error that a user can put right; None for one that is a fault of the program."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, UnicodeEncodeError) and _is_of_output(error.encoding):
        way = "unset PYTHONIOENCODING" if "PYTHONIOENCODING" in os.environ else "set PYTHONUTF8=1"
        lost = error.object[error.start : error.end]
        return f'the output goes out as {sys.stdout.encoding}, which has no "{lost:.40}": {way} in the environment'
    text = str(error)
    for pattern, way in _OTHERS.items():
        if found := re.search(pattern, text):
            return way.format(*found.groups())
    named = {kind.__name__ for kind in type(error).__mro__}
    if not named & {"ValueError", "MisconfigurationException", "ArgumentError"}:
        return None
    if "DataLoader worker process" in text:  # torch puts the worker's traceback into the message
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return text.strip() or type(error).__name__


def _is_of_output(encoding: str) -> bool:
    """Whether a codec that lacks letters is that of the standard output; Windows' are "charmap" in errors."""
    codec = codecs.lookup(encoding).name
    return codec != "utf-8" and codec in ("charmap", codecs.lookup(sys.stdout.encoding).name)


def explain(message: str, keys: Iterable[str]) -> str:
    """What jsonargparse says of a bad configuration, in one line.

    Args:
        message: Its message, of many lines.
        keys: The keys that there are, for suggestions.
    """
    keys = list(keys)
    classes = re.findall(r"Problem with given class_path '([^']+)'", message)
    owned = {argument for owner in classes for argument in arguments_of(owner)}
    trail = re.findall(r'Parser key "([^"]+)"', message)
    trail = [name for name in trail if "." not in name or name in keys or name.partition(".")[0] in owned]
    if found := re.search(r"[Uu]nrecognized arguments: (.*)", message):
        word = found[1].split()[0].partition("=")[0]
        if not word.startswith("-"):
            return f'unexpected word "{word}"; keys are given as --key=value'
        if not classes:
            begin = "; keys begin with model., data. or trainer.: see mmt fit --model.help"
            return f"no such key: {word}{suggest(word.lstrip('-'), keys) or begin}"
        return _below(".".join(trail), word.lstrip("-").replace("init_args.", ""), classes[-1])
    if found := re.search(r"Option '([^']+)' is not accepted", message):
        if not classes:
            return f"no such key: {found[1]}{suggest(found[1], keys)}"
        word, owner = found[1], classes[-1]
        front = "".join(f"{name}." for name in trail)
        inside = [f"{front}{name}" for name in _nested(owner)]
        known = arguments_of(owner)
        if word.partition(".")[0] not in known:  # of connector.init_args.dim the connector
            word = word.partition(".")[0]
        near = suggest(word, known) or _suggest_last(word, inside) or (f"; it has {', '.join(known)}" if known else "")
        return f"no such key: {front}{word} ({owner} has none){near}"
    if found := re.search(r"Group '([\w.]+)' does not accept option '([^']+)'", message):
        word = f"{found[1]}.{found[2]}"
        if not classes:
            return f"no such key: {word}{suggest(word, keys)}"
        return _below(".".join(trail), word, classes[-1])
    if found := re.search(r"the following arguments are required: (.*)", message):
        missing = [f"--{'.'.join([*trail, word.strip()])}" for word in found[1].split(",")]
        return f"{classes[-1] if classes else 'the configuration'} needs {', '.join(missing)}"
    if found := re.search(r"Key \"?'?([\w.]+)'?\"? is not expected", message):
        return f"no such key: {found[1]}{suggest(found[1], keys)}"
    groups = r"[Nn]ested key '([\w.]+)'|Group '[\w.]+' does not accept (?:nested )?key '([\w.]+)'"
    if found := re.search(groups, message):
        word = found[1] or found[2]
        known = [key for key in keys if key.endswith(word.rpartition(".")[2])] or keys
        return f"no such key: {word}{suggest(word, known)}"
    if found := re.search(r"Expected a dot import path string: (.*)", message):
        first = re.search(r"([\w.]+\.help)\b", message)
        key, word = first[1] if first else ".".join(trail), found[1].strip()
        if key.endswith(".help"):
            way = f"; of a part: --config RECIPE --{key.removesuffix('help')}PATH.TO.PART.help {word}"
        else:
            way = f", and no settings: --{key}.KEY gives one of them, --print_config shows all"
        return f'{key}: "{word}" is no class that can stand there{way}'
    if found := re.search(r"Import path (\S+) does not implement protocol (\w+)", message):
        hint = _parameters(_named(classes[-1])).get(trail[-1]) if classes and trail else None
        kinds = () if hint is None else (hint.annotation, *get_args(hint.annotation))
        protocol = next((kind for kind in kinds if getattr(kind, "__name__", "") == found[2]), None)
        if protocol is not None and (lacks := _unlike(_named(found[1]), protocol)):
            return f"{'.'.join(trail)}: {found[1]} is no {found[2]}, whose methods are annotated: {'; '.join(lacks)}"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    dull = ("Does not validate against any", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")
    lines = [line for line in lines if not line.startswith(dull)]
    lines = [line for line in lines if not line.startswith(("Parser key", "Problem with given class_path"))]
    lines = [line for line in lines if not line.startswith("Expected a path but")] or lines  # a class was meant
    if absent := re.search(r"No module named '([\w.]+)'", message):
        lines.append(f"no {absent[1].partition('.')[0]}.py in this folder, on PYTHONPATH, or installed")
    reason = "; ".join(lines) or message.strip().splitlines()[-1]
    return f"{'.'.join(trail)}: {reason}" if trail else reason


def _below(front: str, word: str, class_path: str) -> str:
    """What to say of a key that an argument of a class has not: `read.encodng` of what is given for `data`."""
    import inspect

    owners: list[Any] = [_named(class_path)]
    *path, last = word.split(".")
    for name in path:
        hints = [_parameters(owner)[name].annotation for owner in owners if name in _parameters(owner)]
        owners = [kind for hint in hints for kind in (hint, *get_args(hint)) if inspect.isclass(kind)]
    key = ".".join([front, *path, last]) if front else word
    known = [f"{key.removesuffix(last)}{name}" for owner in owners for name in _parameters(owner)]
    # the same name below another argument: data.loader.max_bad_fraction
    beside = [f"{front}.{name}" for name in _nested(class_path) if name.rpartition(".")[2] == last]
    return f"no such key: {key}{suggest(beside[0] if beside else key, beside or known)}"


def _nested(class_path: str) -> list[str]:
    """The keys one level below a class's own arguments: loader.num_workers."""
    return [
        f"{name}.{inner}"
        for name, parameter in _parameters(_named(class_path)).items()
        for kind in (parameter.annotation, *get_args(parameter.annotation))
        if dataclasses.is_dataclass(kind)
        for inner in _parameters(kind)
    ]


def _unlike(found: Any, protocol: Any) -> list[str]:
    """The methods of a protocol that a class has not, or with other annotations, as they are to be written."""
    lacks = []
    for name in (name for name in dir(protocol) if not name.startswith("_") and callable(getattr(protocol, name))):
        wanted, mine = _signature(getattr(protocol, name)), _signature(getattr(found, name, None))
        if wanted is None or (mine is not None and _annotations(wanted) == _annotations(mine, wanted)):
            continue
        if (bound := getattr(wanted.return_annotation, "__bound__", None)) is not None:
            wanted = wanted.replace(return_annotation=bound)
        lacks.append(re.sub(r"\bmmtransformer\.[\w.]+\.", "", f"def {name}{wanted}"))
    return lacks


def _annotations(signature: Any, like: Any = None) -> list[Any]:
    """What parameters and result are annotated with; a result that is asked for as a type variable may be any."""
    result = (like or signature).return_annotation
    free = hasattr(result, "__bound__")
    return [(p.name, p.annotation) for p in signature.parameters.values()] + [free or signature.return_annotation]


def _suggest_last(word: str, keys: list[str]) -> str:
    """`suggest`, by the keys' last parts: data.loader.num_workers for num_worker."""
    lasts = {key.rpartition(".")[2]: key for key in reversed(keys)}
    close = difflib.get_close_matches(word.rpartition(".")[2], lasts, n=1, cutoff=0.6)
    return f'; did you mean "{lasts[close[0]]}"?' if close else ""


def cause_of(error: ValueError) -> ValueError:
    """What a constructor said, out of what jsonargparse makes of it when a class cannot be built."""
    cause: BaseException | None = error
    while cause is not None and str(cause).startswith(("Does not validate", "Problem with given", "Parser key")):
        cause = cause.__cause__
    if isinstance(cause, ValueError):
        return cause
    return error if cause is None else ValueError(f"{type(cause).__name__}: {cause}")


def arguments_of(class_path: str) -> list[str]:
    """The constructor's arguments of what a class path names; none if it names nothing."""
    return list(_parameters(_named(class_path)))


def _named(class_path: str) -> Any:
    import importlib

    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _parameters(owner: Any) -> Mapping[str, Any]:
    """What something is called with; nothing, if that cannot be told."""
    found = _signature(owner)
    return {} if found is None else found.parameters


def _signature(owner: Any) -> Any:
    """How something is called; None, if that cannot be told."""
    import inspect

    try:
        return inspect.signature(owner, eval_str=True)
    except (ValueError, TypeError, NameError):
        return None


def check_checkpoint(path: str | Path) -> Path:
    """The path, if it is a file that may be a checkpoint.

    Raises:
        ValueError: If not, with the checkpoint of the run that is named, or a file of a similar name, if there is one.
    """
    path = Path(path)
    refuse_no_checkpoint(path)
    if path.is_file():
        return path
    near = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
    raise ValueError(f"{path}: no such checkpoint{suggest(path.name, near)}")
