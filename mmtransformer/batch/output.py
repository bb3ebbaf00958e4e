"""What a model's `forward` gives in training."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class SumAndCount:
    """A sum over tokens and their number, both scalars; divide where all parts of a global batch are known."""

    sum: Tensor
    count: Tensor


@dataclass(frozen=True)
class ModelOutput:
    """What a captioner's `forward` gives.

    Attributes:
        sums: the loss as a sum and a count, for training over micro-batches and processes, which divides at the end.
        logits: (n q vocab), of every token, where they were asked for; else None: training needs those of the
            predicted tokens only, and makes no others.
        terms: what the loss is made of, by name (detached scalars), where it is made of several.
    """

    sums: SumAndCount
    logits: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """The mean over what is predicted, a scalar, 0 where nothing is: what to call `backward` on."""
        return self.sums.sum / self.sums.count.clamp(min=1)
