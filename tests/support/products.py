"""In which number formats matrices are multiplied: on a CPU without kernels for 16 bits they must not be in those."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmtransformer.layers import kernels

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "linear", "matmul", "convolution", "convolution_backward",
            "_linear_pointwise"}  # fmt: skip


def slow_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "fast_in_bfloat16", lambda: False)


class Products(TorchDispatchMode):
    """Collects the formats of all products made within it; those of a single row, which need no kernels, aside."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            self.dtypes |= {x.dtype for x in args if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))
