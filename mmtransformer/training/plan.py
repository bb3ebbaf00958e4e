"""What a run will need of memory and disk, from a few steps of smaller batches."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmtransformer.training.average import Average
from mmtransformer.training.checkpoints import tensor_bytes

STEPS = 3
"""Steps that are watched; the optimizer has its state after the first."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most there were, on a device that does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def see(self, tensor: Tensor) -> None:
        """Counts a tensor's storage, until it is let go."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return result


@dataclass
class Needs:
    """Bytes that a run needs, by what needs them.

    Attributes:
        parameters: The weights.
        frozen: Those of them that are not learned.
        gradients: Of the learned weights.
        optimizer: Its moments.
        average: The moving average of the weights.
        activations: What a step keeps for its backward pass, and all else that it needs at its peak.
        checkpoint: A checkpoint on the disk.
        cache: The feature cache on the disk.
    """

    parameters: int = 0
    frozen: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    activations: int = 0
    checkpoint: int = 0
    cache: int = 0

    @property
    def memory(self) -> int:
        """Of the device."""
        return self.parameters + self.gradients + self.optimizer + self.average + self.activations

    def table(self, samples: int, unit: str) -> str:
        """The numbers, a line each."""
        frozen = f"  ({_size(self.frozen)} of them frozen)" if self.frozen else ""
        lines = [
            f"  weights            {_size(self.parameters):>9}{frozen}",
            f"  gradients          {_size(self.gradients):>9}",
            f"  optimizer          {_size(self.optimizer):>9}",
            f"  moving average     {_size(self.average):>9}",
            f"  activations        {_size(self.activations):>9}  (batches of {samples} {unit})",
            f"  memory             {_size(self.memory):>9}",
            f"  a checkpoint       {_size(self.checkpoint):>9}  on the disk",
        ]
        if self.cache:
            lines.append(f"  feature cache      {_size(self.cache):>9}  on the disk")
        return "\n".join(lines)


def _size(number: int) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000  # pyright: ignore[reportAssignmentType]
    return f"{number:.2f} GB"


@dataclass
class Watch(pl.Callback):
    """Watches the memory of a run of `STEPS` steps.

    Attributes:
        needs: What it found, for the batches that it saw.
        samples: Samples of the largest batch.
    """

    needs: Needs = field(default_factory=Needs)
    samples: int = 0
    _live: LiveBytes | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins to count."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
            return
        self._live = LiveBytes()
        for tensor in (*pl_module.parameters(), *pl_module.buffers()):
            self._live.see(tensor)
        self._live.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes how large the batch was."""
        names: Callable[[Any], Sequence[str]] = pl_module.names  # pyright: ignore[reportAssignmentType]
        self.samples = max(self.samples, len(names(batch)))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the peak apart."""
        if self._live is not None:
            self._live.__exit__(None, None, None)
            peak = self._live.peak
        else:
            peak = torch.cuda.max_memory_allocated(pl_module.device)
        found = self.needs
        state = [optimizer.state for optimizer in trainer.optimizers]
        averages = (c.weights for c in getattr(trainer, "callbacks", ()) if isinstance(c, Average))
        found.parameters = tensor_bytes([*pl_module.parameters(), *pl_module.buffers()])
        found.frozen = tensor_bytes([p for p in pl_module.parameters() if not p.requires_grad])
        found.gradients = tensor_bytes([p for p in pl_module.parameters() if p.requires_grad])
        found.optimizer = tensor_bytes(state)
        found.average = tensor_bytes([list(weights.values()) for weights in averages])
        found.activations = max(peak - (found.memory - found.activations), 0)
        found.checkpoint = found.parameters - found.frozen + found.optimizer + found.average


def extended(small: Watch, large: Watch, samples: int) -> Needs:
    """The needs of larger batches: what does not depend on the batch stays, the rest grows in a line.

    Args:
        small: Of a small batch.
        large: Of a larger one.
        samples: Samples of the batch that is asked for.
    """
    if large.samples <= small.samples:
        return large.needs
    slope = (large.needs.activations - small.needs.activations) / (large.samples - small.samples)
    found = Needs(**vars(large.needs))
    found.activations = max(int(large.needs.activations + slope * (samples - large.samples)), 0)
    return found


def cache_bytes(module: nn.Module, data: Any) -> int:
    """Bytes of the feature cache of a run, 0 if its data keeps none."""
    captioner, kind = getattr(module, "captioner", None), getattr(data, "cache_dtype", None)
    if captioner is None or kind is None:
        return 0
    with torch.no_grad():
        height, width = data.transform.size
        one = captioner.encode(torch.zeros(1, 1, 3, height, width)).numel()
    width_of = {"float16": 2, "bfloat16": 2, "float32": 4}[kind]
    splits = {data.train_split: 2 if data.flip_features else 1} | dict.fromkeys(data.val_splits, 1)
    return sum(len(data.pairs(split)) * copies for split, copies in splits.items()) * one * width_of
