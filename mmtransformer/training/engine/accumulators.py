"""Sums and counts that become means when all parts are known: of an optimizer step's batches, of a validation's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mmtransformer.batch import SumAndCount


def all_reduce_sum(numbers: Tensor, processes: int) -> Tensor:
    """The sum over all processes; they call this at once."""
    if processes > 1:
        torch.distributed.all_reduce(numbers)
    return numbers


class StepAccumulator:
    """What one process has seen of a global batch: its micro-batches since the last optimizer step.

    Nothing here waits for the device: sums stay there, and are read all at once when the step ends (`read`).

    Attributes:
        watched: Single numbers that are logged with the step, by name.
    """

    def __init__(self) -> None:
        self.watched: dict[str, Tensor] = {}
        self._batches: list[tuple[Any, Sequence[str]]] = []
        self._sums: list[Tensor] = []

    def add(self, batch: Any, names: Sequence[str], loss: SumAndCount, tokens: Tensor) -> None:
        """Adds a micro-batch.

        Args:
            batch: What to look at again if its loss is not finite.
            names: Its samples.
            loss: Its sum and count.
            tokens: How many of its tokens are learned; none in a padding sample, which keeps processes in step.
        """
        self._batches.append((batch, names))
        # A padding sample, to keep processes in step, has no token that is learned.
        sums = [loss.sum.detach(), loss.count, tokens, (tokens > 0) * len(names)]
        self._sums.append(torch.stack([number.double() for number in sums]))

    def read(self, norm: Tensor, processes: int) -> "StepSums":
        """The step's sums; one wait for the device.

        Args:
            norm: The gradient's norm.
            processes: How many there are; all call this at once.
        """
        mine = torch.stack(self._sums)
        total = all_reduce_sum(mine.sum(0), processes)
        parts = [total, norm.detach(), mine.flatten(), *self.watched.values()]
        loss, count, tokens, samples, size, *rest = torch.cat([part.reshape(-1).double() for part in parts]).tolist()
        losses = rest[: mine.numel() : mine.shape[1]]
        watched = dict(zip(self.watched, rest[mine.numel() :], strict=True))
        named = [names for _, names in self._batches]
        first = next((i for i, value in enumerate(losses) if not math.isfinite(value)), None)
        batch, names = self._batches[-1 if first is None else first]
        suspects = [name for names in named for name in names] if first is None else list(names)
        bad = first is not None
        return StepSums(loss, int(count), size, int(samples), int(tokens), watched, bad, batch, suspects)


@dataclass(frozen=True)
class StepSums:
    """An optimizer step's sums, as plain numbers.

    Attributes:
        loss: The sum of the losses of all processes.
        count: What it is to be divided by, of all processes.
        norm: The gradient's norm.
        samples: Of all processes.
        tokens: Of all processes, that are learned.
        watched: Single numbers of this process that are logged with the step.
        bad: Whether the loss of one of its own micro-batches is not finite.
        suspect: The batch to look at if something is wrong: the first bad one, else the last.
        suspects: The names of its samples; of all, if none is bad.
    """

    loss: float
    count: int
    norm: float
    samples: int
    tokens: int
    watched: dict[str, float]
    bad: bool
    suspect: Any
    suspects: list[str]

    def exact(self, grads: Sequence[Tensor]) -> "StepSums":
        """The sums with the norm of gradients whose squares overflowed; the device is waited for only then."""
        return replace(self, norm=norm_of_large(grads)) if math.isinf(self.norm) else self


class Means:
    """Sums and counts by split and name."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, str], Tensor] = {}

    def add(self, split: str, name: str, loss: SumAndCount) -> None:
        """Adds a batch's sum and count."""
        both = torch.stack([loss.sum.detach().double(), loss.count.double()])
        self._totals[split, name] = self._totals.get((split, name), torch.zeros_like(both)) + both

    def take(self, processes: int) -> dict[str, Tensor]:
        """The means over all processes, as SPLIT/NAME, and a loss called "loss" also as a perplexity; empties itself.

        Args:
            processes: How many there are; a process may have had nothing to add, so the names come along.
        """
        found: list[dict[tuple[str, str], list[float]]] = [{k: v.tolist() for k, v in self._totals.items()}]
        self._totals = {}
        if processes > 1:
            mine, found = found[0], [{}] * processes
            torch.distributed.all_gather_object(found, mine)
        logs: dict[str, Tensor] = {}
        for split, name in sorted({key for totals in found for key in totals}):
            pairs = [totals[split, name] for totals in found if (split, name) in totals]
            value, count = (sum(numbers) for numbers in zip(*pairs, strict=True))
            logs[f"{split}/{name}"] = mean = torch.tensor(value / count if count else math.nan)
            if name == "loss":
                logs[f"{split}/perplexity"] = mean.exp()
        return logs


def norm_of_large(grads: Sequence[Tensor]) -> float:
    """The norm of all gradients together where the squares of finite ones are more than float32 holds.

    So large are those of a model that begins behind zeros, such as BLIP-2's queries before their training: every norm
    of a zero vector (eps 1e-12) multiplies a gradient by a million.
    """
    if not grads or any(isinstance(grad, DTensor) for grad in grads):
        return math.inf
    largest = max(float(grad.abs().max()) for grad in grads)
    if not math.isfinite(largest):
        return largest
    return float(torch.nn.utils.get_total_norm([grad / largest for grad in grads])) * largest
