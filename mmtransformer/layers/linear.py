"""Linear layers, whose product is made in the way that is fastest on this CPU, and their first weights.

Nothing here changes what a linear layer is: every way gives the same numbers, but for rounding. Measured on a Zen 5
core with torch 2.15, 2308 tokens of width 768 to 3072 in float32, in GFLOP/s, forward and for the gradients of tokens
and of weights: 107, 114, 113 by torch's own product, which is MKL's, and 238, 203, 193 by oneDNN's.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_unary

from mmtransformer.layers.kernels import (
    HALVES,
    autocast_input,
    emulated,
    fast_by_onednn,
    onednn_linear,
    transformed,
    watched,
)

_LEAST = 1 << 23  # multiplications, for which a call more and the kernel of a new shape (0.4 ms) pay


class Linear(nn.Linear):
    """`torch.nn.Linear`, whose product is made in the way that is fastest on this CPU (see `linear`)."""

    def forward(self, input: Tensor) -> Tensor:
        """(... in_features) -> (... out_features)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, the same but for rounding: (... in_features) -> (... out_features).

    Numbers of 16 bits that are `emulated` are multiplied in float32. The weight is cast anew for each product, and for
    its gradient, so that it takes 16 bits all the time: 0.8 of 6 ms for 32 rows of 768 by 3072 on Zen 3, where the
    product in bfloat16 takes 17. Large products in float32 are oneDNN's where those are faster than torch's own.
    """
    if weight.dtype in HALVES and emulated(weight):
        return _upcast(x, weight, bias)
    if weight.dtype == torch.float32 and _by_onednn(x, weight, bias):
        return _OneDNNProduct.apply(x, weight, bias) if torch.is_grad_enabled() else onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN makes this product: of plain numbers in float32, that nobody but autograd looks at."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and type(weight) in (Tensor, nn.Parameter)
        and not watched()
        and x.numel() * len(weight) >= _LEAST
        and x.numel() >= 4 * x.shape[-1]  # Fewer rows wait for the weight, whoever multiplies.
        and weight.is_cpu
        and x.dtype == torch.float32
        and weight.is_contiguous()
        and (bias is None or bias.dtype == torch.float32)
        and x.shape[-1] == weight.shape[1]  # else torch says what is wrong
        and not torch.is_autocast_enabled("cpu")
        and fast_by_onednn()
    )


class _OneDNNProduct(torch.autograd.Function):
    """`linear` by oneDNN, and its gradients too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # What no gradient needs is not kept: of a frozen weight the tokens, of tokens that have none the weight.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        product = F.linear if torch.is_grad_enabled() else onednn_linear  # torch's, of a gradient that has one itself
        return (
            None if weight is None else product(grad, weight.T),
            None if x is None else product(rows.T, x.flatten(0, -2).contiguous().T),
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _upcast(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        x = autocast_input(x)
    with torch.autocast("cpu", enabled=False):
        if torch.is_grad_enabled() and not transformed():
            return _UpcastProduct.apply(x, weight, bias)
        if x.numel() == x.shape[-1]:  # torch has kernels for a single row, which read half the bytes.
            return F.linear(x, weight, bias)
        return F.linear(x.float(), weight.float(), bias if bias is None else bias.float()).to(x.dtype)


class _UpcastProduct(torch.autograd.Function):
    """Keeps for the gradient the 16-bit weight, not its copy in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        return F.linear(x.float(), weight.float(), bias if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, weight), (kind, bias) = ctx.saved_tensors, ctx.dtypes
        grad, needed = grad.float(), ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            (grad @ weight.float()).to(kind) if needed[0] else None,
            None if x is None else (rows.T @ x.float().flatten(0, -2)).to(weight.dtype),
            rows.sum(0).to(bias) if needed[2] else None,
        )


class _UpcastConv:
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve: Callable[..., Tensor] = super()._conv_forward  # pyright: ignore[reportAttributeAccessIssue]
        if not emulated(weight):
            return convolve(input, weight, bias)
        with torch.autocast("cpu", enabled=False):
            out = convolve(input.float(), weight.float(), bias if bias is None else bias.float())
        return out.to(weight.dtype)


class UpcastConv2d(_UpcastConv, nn.Conv2d):
    """A convolution in float32 where its 16-bit numbers are `emulated`."""


class UpcastConv3d(_UpcastConv, nn.Conv3d):
    """A convolution in float32 where its 16-bit numbers are `emulated`."""


_UPCAST: dict[type, type] = {nn.Linear: Linear, nn.Conv2d: UpcastConv2d, nn.Conv3d: UpcastConv3d}


def upcast_products(model: nn.Module) -> None:
    """Makes those layers of a model that are kept in 16 bits multiply in float32 where 16 bits are `emulated`.

    They become `Linear` and the like in place, layers of torch's own classes alone; elsewhere, as on a GPU, they
    compute what they did.
    """
    for layer in model.modules():
        if type(layer) in _UPCAST and cast(Any, layer).weight.dtype.itemsize == 2:
            layer.__class__ = _UPCAST[type(layer)]


def trunc_normal_(tensor: Tensor, std: float) -> Tensor:
    """`nn.init.trunc_normal_`, cut at +-2 (not at 2 std); a mode can leave it out, as it can the other ones of torch.

    Args:
        tensor: filled in place.
        std: standard deviation.
    """
    if has_torch_function_unary(tensor):
        return handle_torch_function(trunc_normal_, (tensor,), tensor, std)
    return nn.init.trunc_normal_(tensor, std=std)
