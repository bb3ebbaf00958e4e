"""Modules of the user's own: imported where --import or a recipe names them, from the working folder as well.

Nothing is imported because a model's folder says so. The working folder is looked in last, so that no file in it stands
in for an installed package, and only once a module that is there, and nowhere else, was named.
"""

import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from mmtransformer.data.files.endings import ARCHIVES, COMPRESSED, TEXTS

_OPTION = "--import"
_FILES = (*TEXTS, *ARCHIVES, *COMPRESSED)
IMPORT_HELP = "import a module of yours first (mine, of mine.py in this folder): the model has classes of it"


def import_own(name: str) -> None:
    """Imports a module, one of the working folder too.

    Raises:
        ValueError: If there is none, or it cannot be imported.
    """
    look_here(name)
    try:
        import_module(name)
    except Exception as error:  # code of the user's brings out anything
        hint = ": give a module's name, mine, not its file's" if name.endswith(".py") or "/" in name else ""
        raise ValueError(f"{_OPTION} {name}: {type(error).__name__}: {error}{hint}") from error


def with_imports(words: Sequence[str]) -> list[str]:
    """A command line without its `--import`s, which are done."""
    left: list[str] = []
    rest = iter(words)
    for word in rest:
        option, equals, name = word.partition("=")
        if option != _OPTION:
            left.append(word)
            continue
        if not (name := name if equals else next(rest, "")):
            raise ValueError(f"{_OPTION} needs the name of a module")
        import_own(name)
    return left


def look_here(text: str) -> None:
    """Puts the working folder at the end of the path, if a text names a module that is there, and nowhere else.

    Args:
        text: A module's or class's import path, or what holds some, such as a recipe.
    """
    here = Path.cwd()
    for name, rest in dict.fromkeys(re.findall(r"(?<![\w./-])([^\W\d]\w*)((?:\.[^\W\d]\w*)+|\Z)", text)):
        if Path(name + rest).is_file() or rest.lower().endswith(_FILES):  # a table train.csv beside a script train.py
            continue
        is_here = (here / f"{name}.py").is_file() or (here / name / "__init__.py").is_file()
        if is_here and name not in sys.modules and find_spec(name) is None:
            sys.path.append(str(here))
            return
