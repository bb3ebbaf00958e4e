"""Sums and counts that become means when all parts are known: of an optimizer step's batches, of a validation's."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmtransformer.losses.next_token import Loss


def all_reduce_sum(numbers: Tensor, processes: int) -> Tensor:
    """The sum over all processes; they call this at once."""
    if processes > 1:
        torch.distributed.all_reduce(numbers)
    return numbers


class StepAccumulator:
    """What one process has seen of a global batch: its micro-batches since the last optimizer step.

    Attributes:
        names: The names of all samples.
        bad: Whether the loss of one of them is not finite.
        suspect: The batch to look at if something is wrong: the first bad one, else the last.
        suspects: The names of its samples; of all, if none is bad.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.bad = False
        self.suspect: Any = None
        self.suspects: Sequence[str] = self.names
        self._losses: list[Tensor] = []

    def add(self, batch: Any, names: Sequence[str], loss: Loss) -> int:
        """Adds a micro-batch.

        Returns:
            Its count.
        """
        both = torch.stack([loss.sum.detach().double(), loss.count.double()])
        total, count = both.tolist()
        if not self.bad:
            self.suspect = batch
            if not math.isfinite(total):
                self.bad, self.suspects = True, list(names)
        self._losses.append(both)
        self.names += names
        return int(count)

    def total(self) -> Tensor:
        """The sum of all losses and their count, (2) float64."""
        return torch.stack(self._losses).sum(0)


class Means:
    """Sums and counts by split and name."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, str], Tensor] = {}

    def add(self, split: str, name: str, loss: Loss) -> None:
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
