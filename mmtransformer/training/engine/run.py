"""A training run that has ended: where its results belong, and what it took."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Run:
    """A training run that has ended, for `Task.finish`.

    Attributes:
        folder: Where its results belong.
        seconds: How long the training took.
        device: What it computed on.
        limit_batches: Most batches of a split that are to be evaluated; None = all.
        autocast: The number format to evaluate in; None computes in that of the weights.
    """

    folder: Path
    seconds: float
    device: torch.device
    limit_batches: int | None = None
    autocast: torch.dtype | None = None

    @property
    def title(self) -> str:
        """The folder's name, for the top of a picture."""
        return self.folder.resolve().name.replace("_", " ")


def device_name(device: torch.device) -> str:
    """What computes, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else device.type
