"""What this machine is fast at: bfloat16 where it has it, else float32 with fast matmuls; freed memory used again."""

import ctypes
import os
import sys
from typing import Literal, NamedTuple

import torch

from mmtransformer.layers.kernels import bfloat16_hardware

KERNELS = 128
"""Kernels of matrix products that a CPU keeps in a run."""

KERNEL_BYTES = 632_000
"""Of a kernel of oneDNN 3.13 for matrices of any size: it is described twice, in 0.3 MB, in each of two caches."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""What glibc's mallopt calls them."""

_MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
"""What the environment calls them, and what decides with them."""

Precision = Literal["bf16-mixed", "32-true"]


class PrecisionChoice(NamedTuple):
    """The precision for ``Trainer(precision=...)`` and the reason, in words."""

    precision: Precision
    reason: str


def pick_precision(accelerator: str = "auto") -> PrecisionChoice:
    """The fastest safe precision of this machine.

    Args:
        accelerator: Where the run goes, as Lightning spells it; "auto" takes the GPU if there is one.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if bfloat16_hardware("cuda").fast:
            return PrecisionChoice("bf16-mixed", f"{name} computes in bfloat16")
        return PrecisionChoice("32-true", f"{name} has no bfloat16; float32 with TF32 where it exists")
    if accelerator == "mps" or (accelerator == "auto" and torch.backends.mps.is_available()):
        return PrecisionChoice("32-true", "Apple GPU: float32")
    found = bfloat16_hardware("cpu")
    return PrecisionChoice("bf16-mixed" if found.fast else "32-true", f"the CPU has {found.words}")


def asked_for(precision: str | int, accelerator: str = "auto") -> str:
    """The reason of a precision that a user, or the recipe of a run on another machine, asks for; and if it is slow."""
    said, gpu = f"{precision} was asked for", torch.cuda.is_available() or torch.backends.mps.is_available()
    if "16" not in str(precision) or (gpu and accelerator != "cpu") or (found := bfloat16_hardware("cpu")).fast:
        return said
    return f"{said}; but the CPU has {found.words}: --trainer.precision=32-true is faster"


def set_up_process() -> None:
    """How a process of the command line computes, said before a model's first product.

    Float32 matmuls use TF32 (GPU) or bfloat16 (CPU) inside, which is twice as fast on a CPU with avx512_bf16; few of a
    CPU's kernels are kept (`limit_kernel_cache`), and its freed memory (`keep_freed_memory`).
    """
    torch.set_float32_matmul_precision("medium")
    limit_kernel_cache()
    if not torch.cuda.is_available():
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Lets tensors of up to a GiB take memory that others have freed, of which 2 GiB are kept: glibc's malloc alone.

    By itself malloc gives tensors above 32 MB back to the system, and a fault is paid for each of their pages when the
    next step asks for them anew. A step of a GPT-2-small-shaped captioner with cached features, whose table of 50,257
    words has a gradient of 154 MB, took 0.83 s on a core of a Zen 5, and 0.62 s with this, at the same peak of memory
    (4.28 GB, also after 40 steps). Nothing promises that peak: small tensors that stay between large ones can part what
    was freed, and a loop over one tensor of 200 MB came to hold seven times as much before it took no more.
    What the environment says of these sizes (`_MALLOC`, `GLIBC_TUNABLES`) stays. For a process whose first allocations
    are to come by these rules too, set MALLOC_MMAP_THRESHOLD_=1073741824 and MALLOC_TRIM_THRESHOLD_=2147483647.

    Returns:
        Whether it is so now.
    """
    said = any(name in os.environ for name in _MALLOC) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if said or set_option is None:
        return False
    return bool(set_option(_MMAP_THRESHOLD, 2**30)) and bool(set_option(_TRIM_THRESHOLD, 2**31 - 1))


def limit_kernel_cache() -> int:
    """Lets a CPU keep the kernels of the last `KERNELS` shapes of products, where oneDNN by itself keeps 1024.

    Batches of many lengths have many shapes, whose kernels would take 0.65 GB. The recipes measured are no slower for
    it; models of which text is all cost 3 to 5 % more. It must come before the first product of a process, and the
    environment is the one place that oneDNN asks; a number that stands there already stays.

    Returns:
        How many are kept.
    """
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        if not os.environ.get(name, "").isdecimal():
            os.environ[name] = str(KERNELS)
    return max(int(os.environ[name]) for name in names)
