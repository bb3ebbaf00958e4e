"""Files from outside: what they claim is looked at before memory is taken for it, and before they are followed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmtransformer.layers.linear import trunc_normal_

T = TypeVar("T")
_MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace,
           torch.logspace, torch.eye, torch.empty_strided}  # fmt: skip
_RANDOM = {nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, trunc_normal_}
_MOST_JSON = 1 << 28  # bytes; a tokenizer's largest has some tens of millions
_POINTER = b"version https://git-lfs.github.com/spec/"
_NEVER_EMPTY = (".json", ".safetensors", ".bin", ".pt")


def check_plain(path: Path) -> None:
    """Refuses what cannot be the file of a model: a pipe, a device, a link that leads elsewhere, a file without end,
    an empty one, or the pointer that Git LFS leaves where it has not fetched a file.

    Links may lead to the folder itself, or, as in the hub's cache, from snapshots/REVISION/ to blobs/.

    Raises:
        ValueError: naming the file.
    """
    if not path.is_file():
        missing = f"; {path.parent} is no model's folder" if path.name == "config.json" else ""
        raise ValueError(f"{path}: not a regular file" if path.exists() else f"{path}: no such file{missing}")
    if leads_out(path, path.parent):
        raise ValueError(f"{path}: a link that leads out of its folder, to {path.resolve()}; put the file there itself")
    if path.suffix in (".json", ".txt") and (size := path.stat().st_size) > _MOST_JSON:
        raise ValueError(f"{path}: {size:,} bytes are too many for it ({_MOST_JSON:,} at most)")
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
    if start == _POINTER:
        raise ValueError(
            f"{path}: a pointer of Git LFS in place of the file: run `git lfs pull` in {path.parent}, or download the "
            f"file again"
        )
    if not start and path.suffix in _NEVER_EMPTY:
        raise ValueError(f"{path}: an empty file; copy or download it again")


def hints_of(kind: type) -> dict[str, Any]:
    """The annotations of a constructor's arguments, as far as they can be told."""
    try:
        return get_type_hints(kind.__init__)
    except NameError:  # a name that only the type checker knows
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of an annotation's kind; what JSON cannot hold is left to the constructor."""
    hint = type(None) if hint is None else hint
    origin = get_origin(hint) or hint
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin in (int, float):
        return isinstance(value, (int, origin)) and not isinstance(value, bool)
    if origin in (bool, str, type(None)):
        return isinstance(value, origin)
    if is_dataclass(origin) and isinstance(origin, type):
        return isinstance(value, origin)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = get_args(hint)
        kinds = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
        return len(kinds) == len(value) and all(map(fits, value, kinds))
    if isinstance(origin, type) and (issubclass(origin, nn.Module) or origin is tuple):
        return isinstance(value, origin) or (origin is not tuple and isinstance(value, nn.Module))
    return True


def settings_of(kind: type[T], values: dict[str, Any], where: str) -> T:
    """A dataclass of plain settings, out of a file.

    Args:
        kind: the dataclass.
        values: what the file says.
        where: the file.

    Raises:
        ValueError: naming the file, for a key that there is not, and a value of another kind or without sense.
    """
    hints, known = get_type_hints(kind), [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    inner = [key for key, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)]
    inner = [key for key in inner if isinstance(values.get(key), dict)]
    values = values | {key: settings_of(hints[key], values[key], f"{where}: {key}") for key in inner}
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{where}: unknown keys {unknown}; known: {known}")
    if odd := [key for key, value in values.items() if not fits(value, hints[key])]:
        raise ValueError(f"{where}: {odd[0]} is {values[odd[0]]!r:.80}, not {hints[odd[0]]}")
    try:
        return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    except Exception as error:
        raise ValueError(f"{where}: {said(error)}") from error


def leads_out(path: Path, root: Path) -> bool:
    """Whether a file below a folder is a link to elsewhere; in the hub's cache `blobs` is no elsewhere."""
    target = path.resolve()
    if target.is_relative_to(root.resolve()):
        return False
    places = [*path.absolute().parents, *path.parent.resolve().parents]
    caches = [place.parent / "blobs" for place in places if place.name == "snapshots"]
    return not any(target.is_relative_to(blobs.resolve()) for blobs in caches)


def said(error: Exception) -> str:
    """The first line of an error, with its kind where that is no part of the library's own words."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return line if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: {line}"


class _Bounded(TorchFunctionMode):
    """Within it, no more tensors and numbers are made than are allowed; asked for more, nothing is taken.

    `filled`: weights get no random numbers, which would take most of the time of a loading.
    """

    def __init__(self, tensors: int, numbers: int, *, filled: bool) -> None:
        super().__init__()
        self.filled = filled
        self.tensors, self.numbers = tensors, numbers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.filled and func in _RANDOM:
            return args[0] if args else kwargs["tensor"]
        if func in _MAKERS:
            plain = {key: value for key, value in kwargs.items() if key not in ("generator", "pin_memory")}
            self.tensors -= 1
            self.numbers -= func(*args, **plain | {"device": "meta"}).numel()
            if min(self.tensors, self.numbers) < 0:
                raise ValueError("the config asks for a far larger model than its weights are")
        return func(*args, **kwargs)


@dataclass
class _Held:
    """What was read, by the memory that it lies in, and which parameters have taken which places of it."""

    storages: set[int]
    taken: dict[int, Tensor] = field(default_factory=dict)


_READ: ContextVar[_Held | None] = ContextVar("read", default=None)


@contextmanager
def held(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Where nobody but the model that is filled will have these tensors, which were read from files: see `hold`."""
    before = _READ.set(_Held({tensor.untyped_storage().data_ptr() for tensor in tensors}))
    try:
        yield
    finally:
        _READ.reset(before)


def hold(place: Tensor, tensor: Tensor) -> None:
    """Fills a parameter or buffer; one that was read from a file (`held`) is not copied, but becomes it.

    The file is then memory that is read when it is first needed, and written to nowhere but in this process. So it may
    be replaced while the model lives, but not written over.

    Args:
        place: The parameter or buffer.
        tensor: What is to stand there, of the same shape.
    """
    read = _READ.get()
    alike = tensor.dtype == place.dtype and tensor.device == place.device and tensor.is_contiguous()
    if not tensor.numel() or tensor.data_ptr() == place.data_ptr():
        return
    if read is None or not alike or tensor.untyped_storage().data_ptr() not in read.storages:
        place.copy_(tensor)
    elif read.taken.setdefault(tensor.data_ptr(), place) is place:
        place.data = tensor
    else:  # Two parameters that are not tied stay two.
        place.copy_(tensor)


@contextmanager
def built_from(state: dict[str, Tensor], where: str, *, filled: bool = False) -> Iterator[None]:
    """Where a model is built to hold tensors that are there: nothing much larger is, and any error names the file.

    Sizes that a config only claims are found out before memory is taken for them.

    Args:
        state: the tensors.
        where: what they come from.
        filled: whether every weight of the model is filled from them (`load_strictly`), so that random numbers, most of
            the time of a loading, need not be drawn.

    Raises:
        ValueError: if the model would be far larger, or what is said of it makes no sense.
    """
    numbers = sum(tensor.numel() for tensor in state.values())
    try:
        with held(state.values()), _Bounded(4096 + 16 * len(state), (1 << 26) + 4 * numbers, filled=filled):
            yield
    except OSError:
        raise
    except Exception as error:  # numbers and shapes that make no sense bring out almost any
        ours = type(error) is ValueError or type(error).__module__.startswith("mmtransformer")
        if not ours:
            raise ValueError(f"{where}: model or config cannot be read: {said(error)}") from error
        if where in str(error):
            raise
        raise type(error)(f"{where}: {error}") from error
