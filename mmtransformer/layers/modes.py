"""Training and evaluation mode, module by module: who looks at a model leaves it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
