"""What a recipe may ask for: plain YAML of a reasonable size, and classes, not any function with any arguments.

A recipe is read like any file from outside. Whatever it names is compared with the type that is asked for; but where
that is a plain callable (a callback's hook, say), the parser would call any function with any arguments. Here it won't.
"""

import inspect
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from mmtransformer.cli.guards.own_modules import look_here

_MOST_BYTES, _MOST_VALUES, _MOST_DEPTH = 1 << 20, 100_000, 50
_HOOKS = ("mmtransformer", "lightning", "torch", "torchvision", "torchmetrics", "timm")
BUILDERS = (
    "mmtransformer.captioners.blip2.blip2_from_stage1",
    "mmtransformer.training.tasks.captioning.finetune",
    "mmtransformer.training.tasks.contrastive_learning.finetune_clip",
)
"""The functions of this library that a recipe may call in place of a class, beside `load_...` of `weights`."""


def check_recipe(path: str | Path) -> None:
    """Looks a recipe through before it is read: the parser's own recursion ends in a crash, its aliases never.

    Args:
        path: The file.

    Raises:
        ValueError: Naming the file, if it is not text, too long, nested too deeply, or grows with its aliases.
    """
    import yaml

    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError(f"{path}: not a regular file")
    size = Path(path).stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"{path}: {size:,} bytes are too many for a recipe ({_MOST_BYTES:,} at most)")
    values: list[int] = [0]  # in each collection that is open
    names: list[str | None] = [None]
    known: dict[str, int] = {}
    try:
        for event in yaml.parse(Path(path).read_text("utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
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
        hint = "; YAML is indented by spaces, not tabs" if "cannot start any token" in str(error) else ""
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}{hint}") from None


@contextmanager
def checked_files() -> Iterator[None]:
    """Where a parser reads: every file that it opens (`model: FILE`, at any depth) is looked through as a recipe is.

    jsonargparse has no hook before it opens a file, so its own class for paths is wrapped meanwhile.

    Raises:
        ValueError: In place of the parser's error, if it failed and a file was refused.
    """
    import yaml
    from jsonargparse._util import Path as ParserPath  # pyright: ignore[reportPrivateImportUsage]

    kind: Any = ParserPath
    name = "read_text" if hasattr(kind, "read_text") else "get_content"  # before jsonargparse 4.49
    read, refused = getattr(kind, name), []

    def checked(path: Any, *args: Any) -> str:
        try:
            check_recipe(path.absolute)
            look_here(Path(path.absolute).read_text("utf-8"))
        except ValueError as error:
            refused.append(error)
            raise yaml.YAMLError(str(error)) from error  # It may be no recipe: a table that is a plain argument, say.
        return read(path, *args)

    setattr(kind, name, checked)
    try:
        yield
    except Exception as error:
        raise (refused[-1] if refused else error) from None
    finally:
        setattr(kind, name, read)


@contextmanager
def paths_as_texts() -> Iterator[None]:
    """Where a parser works: a text that is given for `Class | str` stays one, whatever file it names.

    jsonargparse takes a file for a configuration of the class wherever a class may stand, and then the lines of a
    manifest (`data.source: captions.csv`) or a tokenizer's JSON for the argument. It checks its values anew whenever it
    builds or writes them, so that this must be around those, too. Where no text may stand (`data`, `model`, `trainer`,
    `data.transform`, ...), files are read as ever: see `checked_files`.
    """
    from jsonargparse._typehints import ActionTypeHint  # pyright: ignore[reportPrivateImportUsage]

    action: Any = ActionTypeHint
    make = action.__init__

    def made(self: Any, typehint: Any = None, enable_path: bool = False, **kwargs: Any) -> None:
        if get_origin(typehint) in (Union, UnionType) and str in get_args(typehint):
            enable_path = False
        make(self, typehint, enable_path, **kwargs)

    action.__init__ = made
    try:
        yield
    finally:
        action.__init__ = make


def check_names(config: Any) -> None:
    """Refuses what a parsed configuration would call though no type asks for it.

    A function is called for a class's instance only if it builds models (`BUILDERS`), or is of the user's own modules
    and annotated with what it returns; where something to call is asked for, none is called to make it. A class is
    none of Python's own; one that can be called must be a module of torch, or of a library of models.

    Args:
        config: What the parser made of recipes and command line.

    Raises:
        ValueError: Naming what is refused, or the key of a class whose path would be taken for a file's.
    """
    _refuse_bare_class(config)
    for name, found, hint in _named(config, None):
        if _is_refused(name, found, hint):
            shown = name or f"{found.__module__}.{getattr(found, '__qualname__', type(found).__qualname__)}"
            raise ValueError(
                f"{shown} is not run: recipes name classes of the kind that is asked for, and no other functions; put "
                f"what you need into a module of your own"
            )


def _refuse_bare_class(config: Any) -> None:
    """Refuses a class's path alone (`data.source: mine.Source`) where a text is taken for the path of a file."""
    for part in ("model", "data"):
        given = getattr(config, part, None)
        hints = _hints(_object(getattr(given, "class_path", "")))
        for name, value in vars(getattr(given, "init_args", None) or object).items():
            # By its capital: a script that is called as a table that is missing (train.csv) is not run.
            dotted = isinstance(value, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*\.[A-Z]\w*", value)
            if not dotted or str not in get_args(hints.get(name)) or Path(value).exists():
                continue
            if inspect.isclass(_object(value)):
                raise ValueError(
                    f"{part}.{name}: {value} is a class, and a word alone there is a path: "
                    f"--{part}.{name}.class_path={value}"
                )


def _is_refused(name: str | None, found: Any, hint: Any) -> bool:
    """Whether something must not be called: a class path with its arguments, or (name is None) a value."""
    from torch import nn

    top = (getattr(found, "__module__", None) or "").partition(".")[0]
    if inspect.isclass(found):
        known = top in _HOOKS or _is_own(found) or issubclass(found, nn.Module)
        return top in sys.stdlib_module_names or not (known or "__call__" not in dir(found))
    if name is None and top != "mmtransformer":
        return not (top in _HOOKS or _is_own(found if inspect.isroutine(found) else type(found)))
    if not _builds(f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"):
        own = top != "mmtransformer" and _is_own(found)
        if not own or not inspect.isclass(_returned(found)):
            return True
    return _asks_to_call(hint)


def _builds(name: str) -> bool:
    """Whether the library's function of that name reads a model, and writes nothing."""
    return name in BUILDERS or re.fullmatch(r"mmtransformer\.weights(\.[a-z]\w+)+\.load_\w+", name) is not None


def _named(value: Any, hint: Any) -> Iterator[tuple[str | None, Any, Any]]:
    """All that a configuration names: (class path, what it is, the type asked for); a value that is called has none."""
    if isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _named(item, hint)
        return
    items = value if isinstance(value, dict) else getattr(value, "__dict__", None)
    if isinstance(items, dict) and (isinstance(value, dict) or type(value).__name__ == "Namespace"):
        owner = None
        if isinstance(name := items.get("class_path"), str) and "." in name:
            owner = _object(name)
            yield name, owner, hint
        for key, item in items.items():
            if key == "init_args" and owner is not None:
                hints = _hints(owner)
                for argument, given in (item if isinstance(item, dict) else getattr(item, "__dict__", {})).items():
                    yield from _named(given, hints.get(argument))
            else:
                yield from _named(item, hint)
    elif callable(value) and not isinstance(value, os.PathLike):
        yield None, value, hint


def _hints(owner: Any) -> dict[str, Any]:
    """The types of what a class or function is called with."""
    try:
        return {name: p.annotation for name, p in inspect.signature(owner, eval_str=True).parameters.items()}
    except (TypeError, ValueError, NameError):
        return {}


def _asks_to_call(hint: Any) -> bool:
    """Whether a type is a callable, or may be one."""
    return (get_origin(hint) or hint) is Callable or any(map(_asks_to_call, get_args(hint)))


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
