"""What stops a run rather than being trained through: numbers that are not finite, memory that runs out."""

import contextlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtransformer.serialization.printable import counted

MOST_IN_A_ROW = 10
"""Steps that may be skipped one after the other before a run that skips them stops all the same."""
RECORD = "not_finite.jsonl"
"""The file of the run's folder with a line for every such step and process: all samples of the part that was bad."""


class NonFiniteError(ValueError):
    """A loss or a gradient became NaN or infinite; the message says where."""


class OutOfMemory(ValueError):
    """The device's memory does not do; the message says what would."""


def not_finite(
    *,
    loss: float,
    grad_norm: float,
    step: int,
    lr: float,
    names: Sequence[str],
    process: int = 0,
    bad_here: bool = True,
    culprit: str | None = None,
    gradient: str | None = None,
    record: Path | None = None,
    precision: str = "",
) -> NonFiniteError:
    """The error to raise, with everything that helps to find the cause.

    Args:
        loss: The loss a token.
        grad_norm: The norm of all gradients.
        step: The optimizer step that was not taken.
        lr: Its learning rate.
        names: The samples of the step, or of the part of it whose loss is not finite.
        process: The number of this process.
        bad_here: Whether the loss of one of its own samples is not finite; the cause may be another process's.
        culprit: What `first_bad_module` found.
        gradient: The name of the first gradient that is not finite.
        record: A file that gets a line with all of this; the message names eight samples.
        precision: That of the run: what it is set to already is not advised.
    """
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    if record is not None:
        row = {"step": step, "process": process, "bad_here": bad_here, "loss": str(loss), "lr": lr}
        row |= {"grad_norm": str(grad_norm), "module": culprit}
        with contextlib.suppress(OSError):  # never hide the error
            _note(record, json.dumps(row | {"gradient": gradient, "samples": list(names)}, ensure_ascii=False))
        shown += f" (all in {record})" if len(names) > 8 else ""
    if not bad_here and not math.isfinite(loss):
        shown = "those of another process, whose message names them"
    where = f"first bad module: {culprit}; " if culprit else ""
    where += f"first bad gradient: {gradient}" if gradient else "every gradient is finite by itself"
    wide = "" if precision in ("32-true", "64-true") else "set trainer.precision to 32-true, "
    return NonFiniteError(
        f"step {step}: the loss is {loss:.6g} and the gradient's norm {grad_norm:.6g}, which is not finite; the "
        f"weights were left as they were. Learning rate {lr:.3g}; {where}; samples: {shown or 'unnamed'}. Lower "
        f"model.optim.lr, lengthen model.optim.warmup_steps, {wide}or leave such steps out "
        f"with model.optim.nonfinite=skip"
    )


def _note(record: Path, line: str) -> None:
    """Adds a line; a run that goes on before the step of a line may write the same once more, and does not."""
    with record.open("a+", encoding="utf-8") as file:
        file.seek(0)
        if f"{line}\n" not in file:
            file.write(f"{line}\n")


def first_bad_module(
    module: nn.Module, compute: Callable[[], object], bad: Collection[str] | None = None
) -> str | None:
    """Where numbers stop being finite on the way forward.

    Nothing that is done beside `compute` waits for another process, so of processes that compute together each may look
    at its own batch. (One whose memory ends here, without a backward pass, ends as a run would whose memory ends: with
    an error in all.)

    Args:
        module: The model.
        compute: Runs it once more on the bad batch.
        bad: Its weights that are not finite, where this process does not hold all of them.

    Returns:
        The path of the module whose output is the first that is not finite though its inputs are; or what was wrong
        with the inputs already; None if the way forward is clean.
    """
    found: list[str] = []
    if bad is None:
        weights = module.named_parameters(remove_duplicate=False)
        bad = {n for n, p in weights if not p.isfinite().all()}

    def look(name: str, part: nn.Module) -> Callable[..., None]:
        def hook(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not found and not _finite(output):
                own = [n for n, _ in part.named_parameters() if f"{name}.{n}" in bad]
                inputs = "" if _finite((args, kwargs)) else ", whose input is not finite already"
                weights = f", whose weight {own[0]} is not finite" if own else ""
                kind = type(part).__name__.removeprefix("FSDP")  # of weights that are shared out
                found.append(f"{name} ({kind}){weights or inputs}")

        return hook

    handles = [
        part.register_forward_hook(look(name, part), with_kwargs=True) for name, part in module.named_modules() if name
    ]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled code would be made anew
            compute()
    except Exception as error:  # a look for a cause must not hide the error
        found.append(f"unknown ({type(error).__name__})")
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(_finite(v) for v in value.values())
    return all(_finite(v) for v in value) if isinstance(value, (tuple, list)) else True


@contextlib.contextmanager
def memory_advice(device: torch.device, step: Callable[[], int], names: Callable[[], int]) -> Iterator[None]:
    """Turns "out of memory" into a message that says what to change.

    Args:
        device: Where it computes.
        step: The optimizer step.
        names: The number of samples in the batch.

    Raises:
        OutOfMemory: In place of the device's own error.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if type(error) is RuntimeError and "can't allocate memory" not in text and "out of memory" not in text:
            raise
        size, have = names(), ""
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            have = f" ({(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB in use)"
        less = f"data.batch_size={max(size // 2, 1)} --trainer.accumulate_grad_batches=2"
        raise OutOfMemory(
            f"step {step()}: out of memory on {device}{have} with batches of {counted(size, 'sample')}. "
            f"These help, and leave the gradient what it is: --{less} (times what it is now), "
            f"--activation_checkpointing=true, "
            f"--trainer.precision=bf16-mixed; `mmt plan` says what takes the memory. ({text.splitlines()[0][:160]})"
        ) from error
