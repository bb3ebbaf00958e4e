"""A loss or gradient that is not finite stops the run, before it reaches the weights."""

from collections.abc import Sequence

from torch import nn


class NotFinite(ValueError):
    """A loss or a gradient became NaN or infinite; the message says where."""


def not_finite(
    module: nn.Module, *, loss: float, grad_norm: float, step: int, lr: float, names: Sequence[str]
) -> NotFinite:
    """The error to raise, with everything that helps to find the cause.

    Args:
        module: The model, its gradients in place.
        loss: The loss a token.
        grad_norm: The norm of all gradients.
        step: The optimizer step that was not taken.
        lr: Its learning rate.
        names: The samples of the step.
    """
    bad = (n for n, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
    first = next(bad, "none: their norm overflows")
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return NotFinite(
        f"step {step}: the loss is {loss:.6g} and the gradient's norm {grad_norm:.6g}, which is not finite; "
        f"the weights were left as they were. Learning rate {lr:.3g}; first bad gradient: {first}; "
        f"samples: {shown or 'unnamed'}. Lower model.optim.lr, lengthen model.optim.warmup_steps, or set "
        f"trainer.precision to 32-true"
    )
