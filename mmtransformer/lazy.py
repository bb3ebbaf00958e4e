"""Public names that are imported when they are first used, so that `mmt --help` need not wait for torch."""

import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

_IMPORT = re.compile(r"^    from (\S+) import (?:\(\s+)?(\w+) as \2\b", re.MULTILINE)


def lazy(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """A package's `__getattr__`, `__dir__` and `__all__`: its public names, and the modules in it.

    The names are those that its file imports for type checkers (`from module import name as name`): one list for both.

    Args:
        package: its dotted name.
        file: its `__init__.py`, whose text is read, as transformers does it.
    """
    home = {name: module for module, name in _IMPORT.findall(Path(file).read_text("utf-8"))}

    def modules() -> list[str]:
        found = (module.name for module in iter_modules(sys.modules[package].__path__))
        return [name for name in found if name[0] != "_"]

    def get(name: str) -> Any:
        if name in home:
            value = getattr(import_module(home[name]), name)
        elif name[0] != "_" and name in modules():
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}{hint(name)}")
        setattr(sys.modules[package], name, value)
        return value

    def hint(name: str) -> str:
        """Where a name is that a reader looks for here, or the nearest that is here."""
        if name[0] == "_":
            return ""
        for module in modules():
            if name in getattr(import_module(f"{package}.{module}"), "__all__", ()):
                return f"; it is {package}.{module}.{name}"
        for path in sorted(Path(sys.modules[package].__path__[0]).rglob("*.py")):
            if re.search(rf"^(class|def) {re.escape(name)}\b", path.read_text("utf-8"), re.MULTILINE):
                place = path.relative_to(sys.modules[package].__path__[0]).with_suffix("")
                return f"; it is {'.'.join([package, *place.parts])}.{name}"
        near = get_close_matches(name, [*home, *modules()], n=1, cutoff=0.7)
        return f"; did you mean {near[0]!r}?" if near else ""

    def listed() -> list[str]:
        shown = (name for name in vars(sys.modules[package]) if name.startswith("__"))
        return sorted({*shown, *home, *modules()})

    return get, listed, sorted(home)
