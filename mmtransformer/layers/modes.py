"""Training and evaluation mode, and what is frozen, module by module: who looks at a model leaves it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while the context is open; then each module's own flag is again what it was.

    `model.eval()` and `model.train(was)` would restore one flag for all: parts that a user has put into evaluation
    mode, or that are frozen, would be in training afterwards.

    Args:
        model: any module.
    """
    in_training = [module for module in model.modules() if module.training]
    try:
        for module in in_training:
            module.training = False
        yield
    finally:
        for module in in_training:
            module.training = True


def freeze(module: Module) -> Module:
    """Takes a part out of training: no gradients, evaluation mode (which `Captioner.train` then keeps)."""
    return module.requires_grad_(False).eval()


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, and none of them learns."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)
