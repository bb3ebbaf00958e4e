"""Batch: tensors that travel together."""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass  # not frozen: Lightning casts its tensors in place for true float64 and bfloat16
class Batch:
    """What a loader yields: a dataclass of tensors, with names or whatever else belongs to them.

    A subclass, a dataclass too, names the fields.
    """

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The batch with its tensors on another device."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return replace(self, **{k: x.to(device, non_blocking=non_blocking) for k, x in values if isinstance(x, Tensor)})

    def pin_memory(self) -> Self:
        """The batch with its tensors in page-locked memory, for copies beside the computation."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return replace(self, **{k: x.pin_memory() for k, x in values if isinstance(x, Tensor)})
