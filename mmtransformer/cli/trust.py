"""What a recipe may ask for: plain YAML of a reasonable size, and classes, not any function with any arguments.

A recipe is read like any file from outside. Whatever it names is compared with the type that is asked for; but where
that is a plain callable (a callback's hook, say), the parser would call any function with any arguments. Here it won't.
"""

import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

_MOST_BYTES, _MOST_VALUES, _MOST_DEPTH = 1 << 20, 100_000, 50
_HOOKS = ("mmtransformer", "lightning", "torch", "torchvision", "torchmetrics", "timm")


def check_recipe(path: str | Path) -> None:
    """Looks a recipe through before it is read: the parser's own recursion ends in a crash, its aliases never.

    Args:
        path: The file.

    Raises:
        ValueError: Naming the file, if it is not text, too long, nested too deeply, or grows with its aliases.
    """
    import yaml

    size = Path(path).stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"{path}: {size:,} bytes are too many for a recipe ({_MOST_BYTES:,} at most)")
    values: list[int] = [0]  # in each collection that is open
    names: list[str | None] = [None]
    known: dict[str, int] = {}
    try:
        for event in yaml.parse(Path(path).read_text("utf-8"), Loader=yaml.SafeLoader):
            if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                values.append(1)
                names.append(event.anchor)
                if len(values) > _MOST_DEPTH:
                    raise ValueError(f"{path}: nested more than {_MOST_DEPTH} deep, which no recipe is")
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                count, name = values.pop(), names.pop()
                values[-1] += count
                known |= {name: count} if name else {}
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor not in known and event.anchor in names:
                    raise ValueError(f"{path}: *{event.anchor} stands for itself, without an end")
                values[-1] += known.get(event.anchor, 1)
            elif isinstance(event, yaml.ScalarEvent):
                values[-1] += 1
                known |= {event.anchor: 1} if event.anchor else {}
            if sum(values) > _MOST_VALUES:
                raise ValueError(f"{path}: its aliases stand for more than {_MOST_VALUES:,} values")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start:,})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def check_names(config: Any) -> None:
    """Refuses what a parsed configuration would call though no type asks for it.

    A function is called for a class's instance only if it is one of this library, or of the user's own modules, and its
    annotation says what it returns; a class that can be called must be a module of torch, or of a library of models.

    Args:
        config: What the parser made of recipes and command line.

    Raises:
        ValueError: Naming what is refused.
    """
    from torch import nn

    for name, found in _named(config):
        top = (getattr(found, "__module__", None) or "").partition(".")[0]
        mine = top == "mmtransformer" or _is_own(found)
        if inspect.isclass(found):
            callable_ = "__call__" in dir(found) and not issubclass(found, nn.Module)
            bad = callable_ and not (mine or top in _HOOKS)
        elif name is not None:
            bad = not mine or not inspect.isclass(_returned(found))
        else:
            bad = not (mine or top in _HOOKS)
        if bad:
            shown = name or f"{top}.{getattr(found, '__qualname__', found)}"
            raise ValueError(
                f"{shown} is not run: recipes name classes of the kind that is asked for, and no other functions; put "
                f"what you need into a module of your own"
            )


def _named(value: Any) -> Iterator[tuple[str | None, Any]]:
    """Everything that a configuration names: (class path, what it is), or (None, a function that is a value)."""
    if isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _named(item)
        return
    items = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    if inspect.isroutine(value) or inspect.isclass(value):
        yield None, value
    elif isinstance(items, dict) and (isinstance(value, dict) or type(value).__name__ == "Namespace"):
        if isinstance(name := items.get("class_path"), str) and "." in name:
            yield name, _object(name)
        for item in items.values():
            yield from _named(item)


def _object(path: str) -> Any:
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found
    return None


def _returned(function: Any) -> Any:
    """The class that a function says it returns."""
    try:
        return inspect.signature(function, eval_str=True).return_annotation or None
    except (TypeError, ValueError, NameError):
        return None


def _is_own(found: Any) -> bool:
    """Whether something is of a module of the user's: neither Python's nor installed."""
    name = getattr(found, "__module__", None) or ""
    file = getattr(sys.modules.get(name), "__file__", None)
    installed = {"site-packages", "dist-packages"}
    own = name.partition(".")[0] not in sys.stdlib_module_names
    return file is not None and own and not installed & set(Path(file).parts)
