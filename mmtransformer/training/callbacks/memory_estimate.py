"""What a run will need of memory and disk, from a few steps of smaller batches."""

import ctypes
import gc
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmtransformer.data.captions import CaptionData
from mmtransformer.data.loading.features import FeatureCacheConfig
from mmtransformer.data.loading.sampler import IndexSampler
from mmtransformer.training.engine.checkpoints import tensor_bytes
from mmtransformer.training.engine.ema import EMA
from mmtransformer.training.engine.precision import KERNEL_BYTES, limit_kernel_cache

STEPS = 5
"""Steps that are watched. The optimizer has its state after the first, and the third has the longest sample."""

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
"""What oneDNN has a kernel for, one a shape."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most there were, on a device that does not count.

    Attributes:
        live: Bytes of the tensors that are alive.
        peak: The most that were alive at once.
        products: The unlike products that were computed: their kinds, shapes and number formats.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.products: set[tuple[Any, ...]] = set()
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
        if func.overloadpacket.__name__ in PRODUCTS:
            self._product(func.overloadpacket.__name__, [x for x in args if isinstance(x, Tensor)])
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return result

    def _product(self, kind: str, parts: list[Tensor]) -> None:
        exact = torch.get_float32_matmul_precision() == "highest"
        if parts[-1].dtype in ({torch.bfloat16} if exact else {torch.bfloat16, torch.float32}):
            self.products.add((kind, *((part.shape, part.stride(), part.dtype) for part in parts)))


@dataclass
class Needs:
    """Bytes that a run needs for its training, by what needs them.

    On a GPU they are those of tensors, as `torch.cuda.max_memory_allocated` counts. On a CPU they are those of the
    process that no file backs (RssAnon + RssShmem of /proc/self/status), as long as malloc gives back what is freed;
    by itself it keeps some of it.

    Attributes:
        parameters: The weights.
        frozen: Those of them that are not learned.
        gradients: Of the learned weights.
        optimizer: Its moments.
        average: The moving average of the weights.
        activations: What a step keeps for its backward pass, and all else that it needs at its peak.
        kernels: Of matrix products, which a CPU keeps, one a shape.
        program: Of Python, its libraries and the list of the data, on a CPU.
        checkpoint: A checkpoint on the disk.
        cache: The feature cache on the disk.
    """

    parameters: int = 0
    frozen: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    activations: int = 0
    kernels: int = 0
    program: int = 0
    checkpoint: int = 0
    cache: int = 0

    @property
    def memory(self) -> int:
        """Of the device."""
        return self.tensors + self.kernels + self.program

    @property
    def tensors(self) -> int:
        """Of all tensors."""
        return self.parameters + self.gradients + self.optimizer + self.average + self.activations

    def table(self, samples: int, unit: str) -> str:
        """The numbers, a line each."""
        frozen = f"  ({_size(self.frozen)} of them frozen)" if self.frozen else ""
        rows = [
            ("weights", self.parameters, frozen),
            ("gradients", self.gradients, ""),
            ("optimizer", self.optimizer, ""),
            ("moving average", self.average, ""),
            ("activations", self.activations, f"  (batches of {samples} {unit})"),
            ("kernels", self.kernels, "  (of products, one a shape)"),
            ("program", self.program, "  (Python and its libraries)"),
            ("memory", self.memory, ""),
            ("a checkpoint", self.checkpoint, "  on the disk"),
            ("feature cache", self.cache, "  on the disk"),
        ]
        rows = [row for row in rows if row[1] or row[0] not in ("kernels", "program", "feature cache")]
        return "\n".join(f"  {name:<19}{_size(size):>9}{text}" for name, size, text in rows)


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
    _first: int = 0

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
        """Notes how large the batch was, and how many products a run begins with."""
        if self._live is not None and batch_idx < 2:
            self._first = len(self._live.products)
        names: Callable[[Any], Sequence[str]] = pl_module.names  # pyright: ignore[reportAssignmentType]
        self.samples = max(self.samples, len(names(batch)))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the peak apart."""
        found = self.needs
        if self._live is not None:
            self._live.__exit__(None, None, None)
            peak, seen = self._live.peak, len(self._live.products)
            limit = limit_kernel_cache() if _keeps_kernels(pl_module.device) else 0
            # Where steps bring products that are new, a run comes to as many as are kept.
            found.kernels = KERNEL_BYTES * (limit if seen > self._first else min(seen, limit))
            if pl_module.device.type == "cpu":
                found.program = max(private_bytes() - self._live.live - KERNEL_BYTES * min(seen, limit), 0)
        else:
            peak = torch.cuda.max_memory_allocated(pl_module.device)
        state = [optimizer.state for optimizer in trainer.optimizers]
        averages = (c.weights for c in getattr(trainer, "callbacks", ()) if isinstance(c, EMA))
        found.parameters = tensor_bytes([*pl_module.parameters(), *pl_module.buffers()])
        found.frozen = tensor_bytes([p for p in pl_module.parameters() if not p.requires_grad])
        found.gradients = tensor_bytes([p for p in pl_module.parameters() if p.requires_grad])
        found.optimizer = tensor_bytes(state)
        found.average = tensor_bytes([list(weights.values()) for weights in averages])
        found.activations = max(peak - (found.tensors - found.activations), 0)
        found.checkpoint = found.parameters - found.frozen + found.optimizer + found.average


def _keeps_kernels(device: torch.device) -> bool:
    """Whether products on it are oneDNN's, in bfloat16."""
    mine = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return mine and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def private_bytes() -> int:
    """Bytes of this process that no file backs, after malloc has given back what is free; 0 where that is not told."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
    lines = (line.split() for line in status.read_text(encoding="ascii").splitlines())
    return 1024 * sum(int(words[1]) for words in lines if words[0] in ("RssAnon:", "RssShmem:"))


def longest_soon(sampler: IndexSampler) -> None:
    """Lets the batch that holds a run's longest sample come third: its padding decides what the run needs."""
    order, lengths, step = sampler.order, sampler.lengths, sampler.step
    if lengths is None:
        return

    def sooner(epoch: int) -> np.ndarray:
        rows = order(epoch)
        full = len(rows) // step * step  # The last batch is not one of them where it is smaller.
        if full:
            begin = int(lengths(epoch)[rows[:full]].argmax()) // step * step
            rest = np.delete(rows, slice(begin, begin + step))
            rows = np.insert(rest, min(2 * step, full - step), rows[begin : begin + step])
        return rows

    sampler.order = sooner


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
    found.program = small.needs.program  # That of the second run holds what the first left behind.
    found.activations = max(int(large.needs.activations + slope * (samples - large.samples)), 0)
    return found


def cache_bytes(module: nn.Module, data: CaptionData, config: FeatureCacheConfig) -> int:
    """Bytes of the feature cache of a run, 0 if its model has no captioner."""
    captioner = getattr(module, "captioner", None)
    if captioner is None:
        return 0
    with torch.no_grad():
        height, width = data.transform.size
        one = captioner.forward_features(torch.zeros(1, 1, 3, height, width)).numel()
    width_of = {"float16": 2, "bfloat16": 2, "float32": 4}[config.dtype]
    splits = {data.train_split: 2 if config.flip else 1} | dict.fromkeys(data.val_splits, 1)
    return sum(len(data.pairs(split)) * copies for split, copies in splits.items()) * one * width_of
