"""The rows of all processes that share a global batch, and means over it; one process needs no process group.

Letters: m rows of this process, M those of all processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """How many processes share the batch; 1 where no process group was initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """The rows of all processes. What flows back to a row is the sum of what all processes send to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out, ctx.start, ctx.rows = _all_gather(x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad[ctx.start : ctx.start + ctx.rows]


def _all_gather(x: Tensor) -> tuple[Tensor, int, int]:
    """The rows of all processes in the order of their ranks, which may have different numbers of them."""
    rows, rank = x.shape[0], dist.get_rank()
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(processes())]
    dist.all_gather(counts, torch.tensor([rows], device=x.device))
    numbers = [int(count) for count in counts]
    padded = x.new_zeros(max(numbers), *x.shape[1:])
    padded[:rows] = x
    parts = [torch.empty_like(padded) for _ in numbers]
    dist.all_gather(parts, padded)
    whole = torch.cat([part[:number] for part, number in zip(parts, numbers, strict=True)])
    return whole, sum(numbers[:rank]), rows


def gather(x: Tensor, *, grad: bool = True) -> Tensor:
    """The rows of all processes, in the order of their ranks; one process gets its own rows back.

    Args:
        x: (m ...), where m may differ between processes.
        grad: let gradients flow back to the processes that the rows came from. False saves that exchange: the others'
            rows are then constants, and the gradient is no longer that of the global batch.

    Returns:
        (M ...), M rows of all processes.
    """
    if processes() == 1:
        return x
    if grad and x.is_floating_point():
        return _Gather.apply(x)  # pyright: ignore[reportReturnType]
    whole, start, rows = _all_gather(x.detach())
    return torch.cat((whole[:start], x, whole[start + rows :]))


def global_mean(total: Tensor, count: Tensor | int) -> Tensor:
    """This process's share of a mean over all processes: the mean over processes of the results is that mean.

    Args:
        total: the sum over this process's terms, a scalar.
        count: how many terms they are.
    """
    count = torch.as_tensor(count, dtype=total.dtype, device=total.device).detach().clone()
    world = processes()
    if world > 1:
        dist.all_reduce(count)
    return total * (world / count.clamp(min=1))


def rows_before(rows: int, device: torch.device) -> int:
    """How many rows the processes before this one have.

    Args:
        rows: this process's own number.
        device: where to ask.
    """
    if processes() == 1:
        return 0
    return int(gather(torch.tensor([rows], device=device))[: dist.get_rank()].sum())
