"""The number format that a model's weights are kept in."""

from typing import Any, Literal, TypeVar

import torch
from torch import nn

from mmtransformer.layers.linear import Linear, upcast_products

Module = TypeVar("Module", bound=nn.Module)

DType = Literal["float32", "bfloat16", "nf4"]
"""float32, or for what does not learn: bfloat16 (half the memory, and autocast has nothing to cast at every step), or
nf4, four bits a weight of linear layers (QLoRA, arXiv:2305.14314), by bitsandbytes on a GPU; the rest is bfloat16."""

_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "nf4": torch.bfloat16}
_HEADS = ("head", "lm_head", "embed_out")
"""Layers that stay in bfloat16, as transformers leaves them: their rounding is seen in every token."""


def cast_frozen(model: Module, dtype: DType) -> Module:
    """The model with its parameters in that format, in place; buffers, such as rotary rates, stay as they are.

    A CPU that is slow in bfloat16 multiplies in float32 (`upcast_products`): only what is kept takes half the memory.

    Raises:
        ValueError: for another format; for nf4 without a GPU, or without bitsandbytes.
    """
    if dtype not in _FORMATS:
        raise ValueError(f'dtype must be "float32", "bfloat16" or "nf4", not "{dtype}"')
    if dtype == "nf4":
        _in_four_bits(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(_FORMATS[dtype])
    if dtype != "float32":
        upcast_products(model)
    return model


def _in_four_bits(model: nn.Module) -> None:
    """Puts bitsandbytes' layers in the place of linear ones; they round when they are moved to the GPU."""
    if not torch.cuda.is_available():
        raise ValueError('dtype "nf4": four-bit weights are for a GPU, and there is none here: take "bfloat16"')
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError('dtype "nf4" needs bitsandbytes: pip install bitsandbytes, or take "bfloat16"') from error
    kind: Any = bitsandbytes.nn.Linear4bit
    tables = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding)}
    for part in [*model.modules()]:
        for name, layer in part.named_children():
            if type(layer) in (nn.Linear, Linear) and name not in _HEADS and id(layer.weight) not in tables:
                biased = layer.bias is not None
                four = kind(
                    layer.in_features, layer.out_features, bias=biased, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                four.load_state_dict(layer.state_dict())
                setattr(part, name, four.requires_grad_(False).train(layer.training))
