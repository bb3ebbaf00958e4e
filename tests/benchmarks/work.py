"""What a call takes at least on this machine: its matrix products at the best rate there is, its reading of weights.

Counted are the matrix products that are made, by number format, prepacked and 8-bit ones too, and the bytes of the
larger factor of each. A compiled function hides its products.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mmtransformer.layers.kernels import bfloat16_hardware
from mmtransformer.layers.weight_prepacking import prepack_weights

_SIDE = 1536
_PREPACKED = {torch.ops.mkldnn._linear_pointwise.default: 1, torch.ops.onednn.qlinear_pointwise.default: 3}
_PLAIN = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16", torch.float64: "fp32"}


class Work(NamedTuple):
    """Of one call.

    Attributes:
        flops: floating point operations of matrix products, by number format; "medium" is float32 that computes in
            bfloat16 inside.
        reads: bytes of weights (and other larger factors), each time they are multiplied with.
        weights: bytes of the different ones among them.
    """

    flops: dict[str, float]
    reads: float
    weights: float


class Rates(NamedTuple):
    """Of this machine, at this number of threads.

    Attributes:
        gemm: operations a CPU second of a large matrix product, by number format: the best of all kinds at hand.
        read: bytes a second from memory.
        cache: bytes of the last cache; weights that fit into it are not read from memory.
    """

    gemm: dict[str, float]
    read: float
    cache: float

    def limit(self, work: Work) -> tuple[float, str]:
        """Seconds that a call takes at least, and what bounds it."""
        products = sum(flops / self.gemm[kind] for kind, flops in work.flops.items())
        reading = work.reads / self.read if work.weights > self.cache else 0.0
        return max((products, "GEMM"), (reading, "reading"))


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops: dict[str, float] = {}
        self.reads, self.weights = 0.0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _PREPACKED and func.overloadpacket not in flop_registry:
            with self:  # In inference mode, where linear() comes whole.
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        out = func(*args, **(kwargs or {}))
        if (at := _PREPACKED.get(func)) is not None:
            x, weight = args[0], args[at if at == 1 else 3]
            kind = _PLAIN[x.dtype] if at == 1 else "int8"
            self._add(kind, 2.0 * x.numel() * out.shape[-1], weight)
        elif (formula := flop_registry.get(func.overloadpacket)) is not None:
            factors = [x for x in args if isinstance(x, Tensor)]
            kind = _PLAIN.get(factors[-1].dtype, "fp32")
            if kind == "fp32" and factors[0].is_cpu and torch.get_float32_matmul_precision() == "medium":
                kind = "medium"
            self._add(kind, formula(*args, **(kwargs or {}), out_val=out), max(factors, key=lambda x: x.numel()))
        return out

    def _add(self, kind: str, flops: float, factor: Tensor) -> None:
        size = factor.numel() * factor.element_size()
        self.flops[kind] = self.flops.get(kind, 0.0) + flops
        self.reads += size
        # A prepacked weight has no address of its own; its object lives as long as the model.
        self.weights[id(factor) if factor.is_mkldnn else factor.data_ptr()] = size


def work_of(run: Callable[[], object]) -> Work:
    """Counts what one call does."""
    with _Counter() as counter:
        run()
    return Work(counter.flops, counter.reads, sum(counter.weights.values()))


def rates(device: str = "cpu") -> Rates:
    """Measures this machine; a few seconds."""
    a, b = torch.randn(2, _SIDE, _SIDE, device=device)
    half = a.bfloat16(), b.bfloat16()
    found = {"fp32": _rate(lambda: torch.mm(a, b)), "bf16": 0.0}
    if bfloat16_hardware(device).fast:  # Elsewhere it takes minutes; prepacked it is made in float32.
        found["bf16"] = _rate(lambda: torch.mm(*half))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    found["medium"] = max(found["fp32"], _rate(lambda: torch.mm(a, b)))
    torch.set_float32_matmul_precision(before)
    found["int8"] = found["medium"]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        with torch.inference_mode():
            for kind, x in (("fp32", a), ("bf16", half[0]), ("int8", a)):
                layer = prepack_weights(nn.Sequential(nn.Linear(_SIDE, _SIDE, dtype=x.dtype)), int8=kind == "int8")
                found[kind] = max(found[kind], _rate(lambda layer=layer, x=x: layer(x)))
        found["medium"] = max(found["medium"], found["fp32"])
    large, thin = torch.randn(8192, 8192, device=device), torch.randn(8192, device=device)
    read = max(large.nbytes / _best(lambda: torch.mv(large, thin)), large.nbytes / _best(large.sum))
    return Rates(found, read, _cache())


def _rate(run: Callable[[], object]) -> float:
    return 2 * _SIDE**3 / _best(run)


def _best(run: Callable[[], object], calls: int = 8) -> float:
    run()
    found = []
    for _ in range(calls):
        begin = time.process_time()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.process_time() - begin)
    return min(found)


def _cache() -> float:
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return float(path.read_text().strip().rstrip("K")) * 1024 if path.exists() else 32.0 * 2**20
