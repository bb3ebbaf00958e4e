"""Switches of a recipe (less memory for more work, compiled blocks), and how many processes a CPU is shared by."""

import os
import sys
from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmtransformer.captioners.base import is_frozen

PROCESSES = "MMTRANSFORMER_PROCESSES"
"""The variable by which a process knows that it is one of several which share a CPU by themselves."""

SMALL = 20_000_000
"""Parameters up to which two processes are faster than two threads: 1.13 times with 4 million, measured on Zen 4."""


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of all towers: what stands in lists of modules, outermost first; none of them inside another."""
    inside: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and part not in inside:
            for block in part:
                if next(block.parameters(), None) is not None and block not in inside:
                    yield block
                    inside |= set(block.modules())


def checkpoint_activations(module: nn.Module) -> int:
    """Computes every block again in the backward pass, in place of keeping what is inside it.

    A step takes about a third longer. Dropout draws the same again, and the gradient is the same.

    Args:
        module: The model.

    Returns:
        The number of blocks.
    """
    found = list(blocks(module))
    for block in found:
        block.forward = partial(_recompute, block)  # with the block, so that a copy's or a pickle's is its own
    return len(found)


def _recompute(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = MethodType(type(block).forward, block)
    # A frozen block stays in evaluation mode, and yet keeps what the gradient of its input needs.
    if torch.is_grad_enabled() and (block.training or is_frozen(block)):
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


def compile_blocks(module: nn.Module, backend: str = "inductor") -> int:
    """Compiles every block in place, at its first use; blocks of one kind share the work.

    Args:
        module: The model.
        backend: The compiler, as `torch.compile` calls it.

    Returns:
        The number of blocks.
    """
    found = list(blocks(module))
    for block in found:
        block.compile(backend=backend)
    return len(found)


def share_cpu(module: nn.Module, batch_size: int) -> int:
    """How many processes of a machine without a GPU train a small model faster than one with all threads does.

    Products of small matrices gain little from a second thread, and what is between them nothing; two processes halve
    the batch and add their gradients. Measured with two cores, so there are two at most. The threads are shared out
    here, and the processes that are started later are told by the environment.

    Args:
        module: What is trained. Where a part is frozen, or not all of it small, one process does.
        batch_size: Pictures of one process, if it were alone.

    Returns:
        1 or 2.
    """
    if PROCESSES in os.environ:
        return int(os.environ[PROCESSES])
    threads, started = torch.get_num_threads(), "WORLD_SIZE" in os.environ
    small = sum(p.numel() for p in module.parameters()) <= SMALL
    learns = all(p.requires_grad for p in module.parameters())
    if started or sys.platform != "linux" or threads < 2 or batch_size % 2 or not (small and learns):
        return 1
    os.environ[PROCESSES] = "2"
    os.environ["OMP_NUM_THREADS"] = str(threads // 2)
    torch.set_num_threads(threads // 2)
    return 2
