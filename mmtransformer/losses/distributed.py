"""The rows of all processes that share a global batch, and means over it; one process needs no process group.

Shapes: m rows of this process, M those of all processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """How many processes share the batch; 1 where no process group was initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _AllGatherRows(torch.autograd.Function):
    """The rows of all processes. What flows back to a row is the sum of what all processes send to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out, ctx.start = _all_gather(x)
        ctx.rows = len(x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad[ctx.start : ctx.start + ctx.rows]


def _all_gather(x: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes in the order of their ranks, which may have different numbers; and where ours begin."""
    found = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(world_size())]
    dist.all_gather(found, torch.tensor([len(x)], device=x.device))
    counts = [int(count) for count in found]
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return whole, sum(counts[: dist.get_rank()])


def all_gather_rows(x: Tensor, *, grad: bool = True) -> Tensor:
    """The rows of all processes, in the order of their ranks; one process gets its own rows back.

    Args:
        x: (m ...), where m may differ between processes.
        grad: let gradients flow back to the processes that the rows came from. False saves that exchange: the others'
            rows are then constants, and the gradient is no longer that of the global batch.

    Returns:
        (M ...), M rows of all processes.
    """
    if world_size() == 1:
        return x
    if grad and x.is_floating_point():
        return _AllGatherRows.apply(x)  # pyright: ignore[reportReturnType]
    whole, start = _all_gather(x.detach())
    return torch.cat((whole[:start], x, whole[start + len(x) :]))


def global_mean(total: Tensor, count: Tensor | int) -> Tensor:
    """This process's share of a mean over all processes: the mean over processes of the results is that mean.

    Args:
        total: the sum over this process's terms, a scalar.
        count: how many terms they are.
    """
    count = torch.as_tensor(count, dtype=total.dtype, device=total.device).detach().clone()
    world = world_size()
    if world > 1:
        dist.all_reduce(count)
    return total * (world / count.clamp(min=1))


def row_offset(rows: int, device: torch.device) -> int:
    """How many rows the processes before this one have.

    Args:
        rows: this process's own number.
        device: where to ask.
    """
    if world_size() == 1:
        return 0
    return int(all_gather_rows(torch.tensor([rows], device=device))[: dist.get_rank()].sum())
