"""torch's own files (.bin, .pt), of checkpoints that have no safetensors: tensors alone, and no code of theirs runs."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtransformer.serialization.checksums import refuse_nan
from mmtransformer.serialization.untrusted import check_plain, said

_INSIDE = ("model", "state_dict", "model_state_dict", "module")
_WHY = re.compile(r"WeightsUnpickler error: (.*?)(?:\. Please|$)", re.MULTILINE)  # without how to run it all the same
_MOST_PICKLE = 1 << 26  # bytes of names and shapes; tensors stand beside them


def read_pickle(path: Path) -> dict[str, Tensor]:
    """All tensors of a file that `torch.save` wrote, by `torch.load(weights_only=True)`, which runs no code.

    Sizes are checked first: the file is what it says, nothing is compressed, and no tensor is larger than its bytes.

    Raises:
        ValueError: naming the file, for what else is in it, another format or a damaged one.
    """
    check_plain(path)
    remedy = "convert it to safetensors, or take a revision that has them (--revision, such as refs/pr/1)"
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{path}: cut short, or not a file of torch 1.6 or later ({said(error)}): download it again, or {remedy}"
        ) from error
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > (
        path.stat().st_size
    ):
        raise ValueError(f"{path}: holds compressed parts, which torch never writes: {remedy}")
    if any(m.filename.endswith(".pkl") and m.file_size > _MOST_PICKLE for m in members):
        raise ValueError(f"{path}: what it says of its tensors takes more than {_MOST_PICKLE:,} bytes: {remedy}")
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler refuses with errors of many kinds
        found = _WHY.search(str(error))
        why = found[1] if found else said(error)
        raise ValueError(f"{path}: holds more than tensors, or is damaged ({why[:160]}): {remedy}") from error
    while isinstance(found, Mapping) and (inner := next((n for n in _INSIDE if isinstance(found.get(n), Mapping)), "")):
        found = found[inner]
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)} if _named(found) else {}
    if not tensors:
        raise ValueError(f"{path}: holds no tensors by name: {remedy}")
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{path}: {name} is no plain tensor: {remedy}")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} claims a shape of {tuple(tensor.shape)} beyond its bytes")
    refuse_nan(tensors, str(path))
    return tensors


def _named(found: Any) -> bool:
    return isinstance(found, Mapping) and all(isinstance(name, str) for name in found)
