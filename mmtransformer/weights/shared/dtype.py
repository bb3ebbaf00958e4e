"""The number format that a model's weights are kept in."""

from typing import Literal, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)

DType = Literal["float32", "bfloat16"]
"""float32, or bfloat16 for what does not learn: half the memory, and autocast has nothing to cast at every step."""


def cast_frozen(model: Module, dtype: DType) -> Module:
    """The model with its parameters in that format, in place; buffers, such as rotary rates, stay as they are.

    Raises:
        ValueError: for another format.
    """
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in formats:
        raise ValueError(f'dtype must be "float32" or "bfloat16", not "{dtype}"')
    for parameter in model.parameters():
        parameter.data = parameter.data.to(formats[dtype])
    return model
