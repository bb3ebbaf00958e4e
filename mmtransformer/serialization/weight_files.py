"""safetensors files: written whole or not at all, and read with a clear word on what is wrong with them."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmtransformer.serialization.checksums import refuse_nan
from mmtransformer.serialization.processes import ended_as_by_exit
from mmtransformer.serialization.untrusted import check_plain


@contextmanager
def weights_written_to(path: Path) -> Iterator[None]:
    """Where safetensors writes a file: what stops it is an OSError that names the file, as everywhere else."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code) if found else str(error), str(path)) from error


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Writes tensors, those that are one under the first of their names, and returns what was written.

    Those that share memory are each apart. A file that is there is replaced when the new one is whole: a model may
    still be reading it.
    """
    state: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, tensor in tensors.items():
        if not tensor.numel() or tensor.data_ptr() not in written:
            written.add(tensor.data_ptr())
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            state[name] = tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)
    part = path.with_name(f"{path.name}.part")
    try:
        with ended_as_by_exit(), weights_written_to(path):
            save_file(state, part, metadata={"format": "pt"})
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ValueError: naming the file, if it is missing or damaged, or holds weights that are NaN.
    """
    check_plain(path)
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except SafetensorError as error:
        torchs = path.suffix in (".pt", ".pth", ".bin", ".ckpt")
        hint = "torch.load(..., weights_only=True) and safetensors.torch.save_file make one of torch's own"
        hint = hint if torchs else "copy or download it again"
        raise ValueError(f"{path}: not a whole safetensors file: {error}; {hint}") from error
    refuse_nan(state, str(path))
    return state


def shapes_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, by name, without their numbers.

    Raises:
        ValueError: naming a file that is damaged.
    """
    shapes: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        check_plain(path)
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    shapes[name] = torch.empty(file.get_slice(name).get_shape(), device="meta")
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}; copy or download it again") from error
    return shapes
