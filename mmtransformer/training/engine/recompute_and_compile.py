"""Two switches of a recipe: less memory for more work, and compiled blocks. Names of weights stay what they are."""

from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmtransformer.layers.modes import is_frozen


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
