"""A GPU that is none: tensors that say they are on one and refuse others that are not, with their numbers in memory.

    with SecondDevice() as gpu:
        model = model.to(gpu.device)
        loss = model(batch.to(gpu.device)).loss     # WrongDevice where a tensor was made on the CPU
        assert not gpu.waits                        # what Python waited for

Code that asks for the device's name takes the GPU's path; the kernels are the CPU's. So it finds tensors made in the
wrong place, waits for the device, and what no CUDA graph can hold, but no fault of CUDA itself.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ASKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select", "bincount")
"""Operations with a result whose value or shape Python has to wait for."""
MAY_MIX = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_")
"""Operations that take tensors of the CPU beside those of a GPU."""


class WrongDevice(RuntimeError):
    """What a GPU would refuse."""


class OnGPU(Tensor):
    """A tensor that says it is on a GPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGPU":
        # To C++ it is on "meta", the one device that is neither the CPU nor needs a driver.
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        self = Tensor._make_wrapper_subclass(cls, inner.size(), **shape, device="meta")  # type: ignore[attr-defined]
        self.inner = inner
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    def tolist(self) -> Any:
        return self.cpu().tolist()

    # From here on: C++ would put the numbers on "meta", which has none.

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **({"dtype": self.dtype, "device": GPU} | options))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._placed(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(self._placed(key), value)

    def _placed(self, key: Any) -> Any:
        if isinstance(key, tuple):
            return tuple(self._placed(part) for part in key)
        return self.new_tensor(key, dtype=torch.long) if isinstance(key, list) else key

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise WrongDevice(f"{func}: the second device is not there any more")


def tied(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`nn.Module._apply`, which makes new parameters here, but still one where there was one."""

    def apply_tied(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), []).append((module, name))
        apply(self, *args, **kwargs)
        for (first, name), *others in places.values():
            for module, other in others:
                module._parameters[other] = first._parameters[name]
        return self

    return apply_tied


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Modules take new parameters in place of new numbers; and CUDA needs no driver to be named."""
    overwrites, lifts = (
        torch.__future__.get_overwrite_module_params_on_conversion(),
        torch._C._only_lift_cpu_tensors(),
    )
    apply = nn.Module._apply
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    torch._C._ensureCUDADeviceGuardSet()
    nn.Module._apply = tied(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]
        torch._C._set_only_lift_cpu_tensors(lifts)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


class SecondDevice(TorchDispatchMode):
    """While it is entered, a `cuda:0` can be computed on.

    Attributes:
        device: Its name.
        waits: What Python waited for, and how often.
    """

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # or torch would look for a driver

    def __init__(self) -> None:
        super().__init__()
        self.device = GPU
        self.waits: Counter[str] = Counter()
        self._tape: list[tuple[Any, Any, Any, Any]] | None = None
        self._inside = 0

    def __enter__(self) -> Self:
        if not self._inside:
            self._settings = contextlib.ExitStack()
            self._settings.enter_context(_settings())
        self._inside += 1  # what is taken apart comes by once more
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._inside -= 1
        if not self._inside:
            self._settings.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose():  # in inference mode nobody has
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in leaves if isinstance(x, OnGPU)]
        wanted = kwargs.get("device")
        there = bool(ours) if wanted is None else torch.device(wanted).type != "cpu"
        self._check(func, name, leaves, ours, there)
        if wanted is not None:
            kwargs = {**kwargs, "device": CPU}
        inner_args, inner_kwargs = tree_map_only(OnGPU, lambda x: x.inner, (args, kwargs))
        known = {id(x.inner): x for x in ours}

        def placed(x: Tensor) -> Tensor:
            return known[id(x)] if id(x) in known else OnGPU(x)

        with contextlib.ExitStack() as stack:
            if torch.is_inference_mode_enabled():  # whose tensors have no version, and what wraps them needs one
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            result = func(*inner_args, **inner_kwargs)
            if self._tape is not None:
                self._tape.append((func, inner_args, inner_kwargs, result))
            return tree_map_only(Tensor, placed, result) if there else result

    def _check(self, func: Any, name: str, leaves: list[Tensor], ours: list[OnGPU], there: bool) -> None:
        strangers = [tuple(x.shape) for x in leaves if not isinstance(x, OnGPU) and x.numel()]
        if ours and any(strangers) and name not in MAY_MIX:
            raise WrongDevice(f"{func}: tensors on the CPU, {strangers}, beside {len(ours)} on the GPU")
        asks = name in ASKS or (name == "_to_copy" and not there)
        asks |= name in MAY_MIX and "index" in name and any(x.dtype == torch.bool for x in leaves[1:])
        if ours and asks:
            self.waits[name] += 1
        if self._tape is not None and ours and asks:
            raise WrongDevice(f"{func}: a graph cannot wait")
        if self._tape is not None and there and strangers and name in ("copy_", "_to_copy"):
            raise WrongDevice(f"{func}: a graph cannot copy {strangers} from the CPU")

    @contextlib.contextmanager
    def graph(self, graph: "Graph") -> Iterator[None]:
        """Stands for `torch.cuda.graph`."""
        self._tape = graph.tape
        try:
            yield
        finally:
            self._tape = None


class Graph:
    """Stands for a `torch.cuda.CUDAGraph`: does the same operations again, on the same memory."""

    def __init__(self) -> None:
        self.tape: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.tape:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    """Stands for a `torch.cuda.Stream`."""

    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)
