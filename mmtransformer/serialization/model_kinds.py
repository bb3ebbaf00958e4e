"""Classes of models: what a saved one is for, said where another was wanted, and those that are a user's own.

An own class is saved under its import path, and found by it where its module has been imported already: nothing is
imported because a file says so, as files are not trusted.
"""

import inspect
import re
import sys
from pathlib import Path
from typing import TypeVar

from torch import nn

T = TypeVar("T")

_USES = {
    "CLIP": "it compares pictures and texts: `mmt search`, or ImageTextEmbedder (its classify takes classes by their "
    "names, its save_transformers exports)",
    "TextToImageModel": "it draws: `mmt draw`, or ImageGenerator",
    "Transformer": "it translates: `mmt translate`, or Translator",
    "ViT": "a vision encoder; one that vit_classify has trained classifies: `mmt classify`, or ImageClassifier",
    "Captioner": "it captions: `mmt caption`, or ImageCaptioner",
}
_WANTED = {
    "CLIP": "a CLIP, a dual encoder, which has a tower for pictures and one for texts",
    "TextToImageModel": "a TextToImageModel, a model that draws",
}


def with_article(name: str) -> str:
    """`a CLIP`, `a VisionEncoderDecoder`."""
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def other_kind(folder: str | Path, found: type, wanted: str) -> ValueError:
    """The error that a folder holds another model than is wanted, with what takes the one that it holds.

    Args:
        folder: the folder.
        found: the class of its model.
        wanted: the name of the class that was asked for.
    """
    use = next((f"; {_USES[kind.__name__]}" for kind in found.__mro__ if kind.__name__ in _USES), "")
    return ValueError(
        f"{folder} holds {with_article(found.__name__)}, not {_WANTED.get(wanted) or with_article(wanted)}{use}"
    )


def import_path(kind: type) -> str:
    """`mine.MyConnector`."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_own(kind: type) -> bool:
    """Whether a class is none of this library's."""
    return kind.__module__.partition(".")[0] != "mmtransformer"


def imported_class(path: object, base: type[T]) -> type[T] | None:
    """The own class of an import path, if its module has been imported and it is of the kind `base`."""
    module, _, name = str(path).rpartition(".")
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    return found if isinstance(found, type) and issubclass(found, base) and is_own(found) else None


def own_modules(model: nn.Module) -> list[str]:
    """The modules that must be imported before this model can be loaded: those of own classes that are saved."""
    kinds = {type(part) for part in model.modules() if hasattr(part, "save_pretrained")}
    return sorted({kind.__module__ for kind in kinds if is_own(kind)})


def imported_modules(base: type) -> list[str]:
    """The modules of all own classes of the kind `base` that this process has imported: what another needs as well."""
    below = base.__subclasses__()
    own = {kind.__module__ for kind in below if is_own(kind)} - {"__main__"}
    return sorted(own.union(*map(imported_modules, below)))


def not_imported(name: object, where: str) -> ValueError:
    """The error that a file names a class that is not there.

    Args:
        name: the class.
        where: the file.
    """
    module = str(name).rpartition(".")[0]
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", str(name)) or module.partition(".")[0] == "mmtransformer":
        return ValueError(f'{where}: mmtransformer has no model class "{name}"')
    if module == "__main__":
        return ValueError(
            f"{where}: {name} is a class of a script's or notebook's own: define it first, of the same name; in a file "
            f'mine.py it can be imported, and is "mine.{str(name).rpartition(".")[2]}" in {where}'
        )
    if module in sys.modules:
        return ValueError(f"{where}: {name} is a class of your own, and {module}, as it is imported, has no such model")
    return ValueError(
        f"{where}: {name} is a class of your own: import {module} first (in Python `import {module}`; on the command "
        f"line --import {module})"
    )


def arguments_of(kind: type, what: str = "") -> list[str]:
    """The names of a constructor's arguments.

    Args:
        kind: the class.
        what: begins the error.

    Raises:
        ValueError: if some have no names (*args, **kwargs).
    """
    if kind.__init__ is nn.Module.__init__:
        return []
    found = list(inspect.signature(kind.__init__).parameters.values())[1:]
    if unnamed := [
        f"{argument}" for argument in found if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
    ]:
        raise ValueError(
            f"{what}: its constructor takes {', '.join(unnamed)}: name each argument, and keep it under its name "
            f"(self.dim = dim)"
        )
    return [each.name for each in found]
