"""prepack_weights(): linear weights laid out once for oneDNN, for inference on a CPU.

Measured on a Zen 5 core with torch 2.15, 1576 tokens of width 192 to 768: 8.4 ms plain, 1.8 ms prepacked in float32
(there torch's own float32 product is MKL's, which runs such a CPU at half its rate); 0.94 and 0.90 ms in bfloat16.
"""

import os
import sys
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from mmtransformer.layers.attention import Attention
from mmtransformer.layers.blocks import MLP
from mmtransformer.layers.config import Activation
from mmtransformer.layers.kernels import HALVES, emulated
from mmtransformer.layers.linear import Linear, upcast_products
from mmtransformer.layers.restricted_head import RestrictedLMHead

Module = TypeVar("Module", bound=nn.Module)
Precision = Literal["fp32", "bf16", "int8"]
"""What a model computes with: its weights as they are, in bfloat16, or rounded to 8 bits."""

_INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")
_INT8_MOST = 1_000_000_000
_SHARE = 0.25  # Of the machine's memory, that prepacked copies of weights may take without being asked for.
_ANY = range(1, sys.maxsize)
_FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}  # What oneDNN calls them.


class PrepackedLinear(Linear):
    """A linear layer over another's weight and bias, which keeps a second, prepacked copy of the weight.

    The prepacked copy is made when it is first needed, and again after the weight has changed. It serves where no
    gradient is asked for, on the CPU, in the weight's own dtype; everywhere else this is a plain linear layer. Of
    numbers that are `emulated` the copy is in float32.

    Args:
        linear: the layer whose parameters are shared.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self._prepacked: _Kept = {}

    def forward(self, input: Tensor) -> Tensor:
        """(... in_features) -> (... out_features)."""
        prepacked = prepacked_weight(self._prepacked, input, self)
        if prepacked is not None:
            return self.product(input, prepacked, self.bias)
        return super().forward(input)

    @staticmethod
    def product(x: Tensor, prepacked: Any, bias: Tensor | None, act: tuple[str, str] = ("none", "")) -> Tensor:
        """A prepacked weight by tokens: (... in_features) -> (... out_features); `act` is one of `_FUSED`."""
        if x.dtype in HALVES and emulated(x):
            bias = None if bias is None else bias.float()
            return PrepackedLinear.product(x.float(), prepacked, bias, act).to(x.dtype)
        return torch.ops.mkldnn._linear_pointwise.default(x, prepacked, bias, act[0], [], act[1])

    @staticmethod
    def prepack(weight: Tensor) -> Any:
        """A weight (out_features in_features) as `product` takes it."""
        return torch.ops.mkldnn._reorder_linear_weight(weight.float() if emulated(weight) else weight, None)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepacked": {}}


_Kept = dict[int, tuple[list, list[weakref.ref], Any]]
"""By the number of layers: which weights were prepacked, as what they were, and what came of it."""


def prepacked_weight(kept: _Kept, x: Tensor, *layers: nn.Module) -> Any | None:
    """The weights of layers that all read the tokens x, prepacked as one; None where they cannot be, or cannot serve x.

    Weights that were loaded, moved or trained since are prepacked again. What nobody can tell is a change through
    `.data`, or of weights made in inference mode: prepack anew after it.

    Args:
        kept: what was prepacked before; what is prepacked now is put into it.
        x: tokens (... in_features).
        layers: linear layers of `in_features`, prepacked or not.
    """
    kind = type(layers[0])
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # no place for prepacked weights  # pyright: ignore[reportPrivateImportUsage]
        or torch.is_autocast_enabled("cpu")
        or not x.is_cpu
        or not x.numel()
        or not issubclass(kind, PrepackedLinear)
        or x.dtype not in kind.dtypes
        or (kind is PrepackedLinear and x.numel() // x.shape[-1] not in _rows())
    ):
        return None
    weights: list[Tensor] = []
    state: list[Any] = [kind]
    for layer in layers:
        if type(layer) is not kind or layer.weight.dtype != x.dtype or (layer.bias is None) != (layers[0].bias is None):
            return None
        weights.append(w := layer.weight)
        state.append((w.data_ptr(), w.dtype, None if w.is_inference() else w._version))
    found = kept.get(len(layers))
    if found is None or found[0] != state or any(ref() is not w for ref, w in zip(found[1], weights, strict=True)):
        with torch.no_grad():
            prepacked = kind.prepack(torch.cat(weights) if len(weights) > 1 else weights[0].detach())
        kept[len(layers)] = found = state, [weakref.ref(w) for w in weights], prepacked
    return found[2]


@cache
def _rows() -> range:
    """For how many rows of tokens a prepacked product is no slower than torch's own: any number, but without AVX-512.

    On Zen 3, 768 by 3072 and back, oneDNN's prepacked product took 0.65 of MKL's time for 4 rows, 0.9 for 64, 1.06 for
    256 and 1.48 for 577; decoding a row of BLIP-base 1.16. A GELU made with it took 8.9 ns a number, by itself 2.8.
    """
    kinds: dict[str, Any] = dict(getattr(torch.cpu, "get_capabilities", dict)())  # older ones of torch don't tell
    return range(2, 193) if kinds.get("avx2") and not kinds.get("avx512_f") else _ANY


class Int8Linear(PrepackedLinear):
    """A `PrepackedLinear` whose prepacked copy has 8 bits a weight, with a scale for each output.

    What comes in is rounded to 8 bits too, each row by a scale of its own, so that no row depends on those beside it.
    Serves float32 only.
    """

    dtypes = (torch.float32,)

    @staticmethod
    def prepack(weight: Tensor) -> Any:
        """As `PrepackedLinear.prepack`."""
        scale = (weight.abs().amax(1) / _int8_levels()).clamp(min=1e-12)
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        middle = weight.new_full(weight.shape[1:], 128.5)  # A row and not a number, with which torch is slower.
        return torch.ops.onednn.qlinear_prepack(rounded, None), scale, zero, middle

    @staticmethod
    def product(x: Tensor, prepacked: Any, bias: Tensor | None, act: tuple[str, str] = ("none", "")) -> Tensor:
        """As `PrepackedLinear.product`, without activations."""
        weight, scale, zero, middle = prepacked
        most = x.abs().amax(-1, keepdim=True).clamp_(min=1e-10)
        # Unsigned with its zero at 128: oneDNN's kernels for signed values are hundreds of times slower. The type cuts
        # off what is behind the point: the half that was added makes that rounding.
        rounded = torch.addcdiv(middle, x, most, value=127).to(torch.uint8)
        # It takes one scale for all rows: theirs, and the bias behind it, come after the product.
        out = torch.ops.onednn.qlinear_pointwise.default(
            rounded, 1 / 127, 128, weight, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out.mul_(most) if bias is None else torch.addcmul(bias, out, most)


@cache
def _int8_levels() -> int:
    """The largest weight in 8 bits that this CPU multiplies rightly: 127, or 64 where it cannot hold two such products.

    Without VNNI instructions two products are added up in 16 bits, and what is larger is cut off: 255 * 127 * 2 is.
    Zen 3 was up to half wrong. So one bit of weights goes, as oneDNN advises.
    """
    weight, most = torch.full((16, 64), 127, dtype=torch.int8), torch.full((2, 64), 255, dtype=torch.uint8)
    one, zero = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    prepacked = torch.ops.onednn.qlinear_prepack(weight, None)
    out = torch.ops.onednn.qlinear_pointwise.default(
        most, 1.0, 0, prepacked, one, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return 127 if bool((out == 255 * 127 * 64).all()) else 64


class PrepackedAttention(Attention):
    """An `Attention` over another's layers, which makes queries, keys and values with one product where it can.

    Args:
        attn: the attention whose layers are shared.
    """

    def __init__(self, attn: Attention) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(attn.__dict__)  # Its layers, and its hooks.
        self._prepacked: _Kept = {}

    def project_with(self, x: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
        """As `Attention.project_with`."""
        seen = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)  # by itself, by somebody
        prepacked = None if seen else prepacked_weight(self._prepacked, x, *layers)
        if prepacked is None and x.is_cpu and not torch.is_autocast_enabled("cpu"):
            return [layer(x) for layer in layers]
        if prepacked is None:
            return super().project_with(x, *layers)
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        first = cast(PrepackedLinear, layers[0])  # else there were nothing prepacked
        return first.product(x, prepacked, bias).split_with_sizes([len(layer.weight) for layer in layers], -1)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepacked": {}}


class PrepackedMLP(MLP):
    """An `MLP` over another's layers, which computes the activation with the first product where that is prepacked.

    Args:
        mlp: the MLP whose layers are shared.
    """

    def __init__(self, mlp: MLP) -> None:
        nn.Module.__init__(self)
        self.fc1, self.fc2, self.drop, self.act = mlp.fc1, mlp.fc2, mlp.drop, mlp.act
        self.activation: Activation = mlp.activation
        self.training = mlp.training

    def forward(self, x: Tensor) -> Tensor:
        """(... d) -> (... d)."""
        fc1, prepacked = self.fc1, None
        seen = fc1._forward_hooks or fc1._forward_pre_hooks
        if type(fc1) is PrepackedLinear and self.activation in _FUSED and not seen and _rows() is _ANY:
            prepacked = prepacked_weight(fc1._prepacked, x, fc1)
        if prepacked is None:
            return self.fc2(self.drop(self.act(self.fc1(x))))
        return self.fc2(self.drop(PrepackedLinear.product(x, prepacked, fc1.bias, _FUSED[self.activation])))


_KINDS = (nn.Linear, Linear, PrepackedLinear, Int8Linear)


def prepack_weights(model: Module, *, int8: bool = False) -> Module:
    """Makes a model's linear layers, MLPs and attentions prepacked ones (`PrepackedLinear`), in place.

    Parameters, their names and the state dict stay as they are; a prepacked model can still be trained, saved or moved.
    Linear weights take twice their memory from the first pass on. Results differ by rounding only (1e-5 in float32).

    Args:
        model: a model for inference on the CPU, with weights in float32 or bfloat16; others are left as they are.
        int8: round weights and what they meet to 8 bits (`Int8Linear`), for float32 models: faster where weights are
            read from memory again and again, as in decoding; results move by some percent of their spread.

    Returns:
        The model, for chaining.

    Raises:
        ValueError: if this build of torch has no oneDNN, or the model is itself one linear layer.
    """
    if not torch.backends.mkldnn.is_available():
        raise ValueError("prepack_weights needs a torch with oneDNN (torch.backends.mkldnn): this one has none")
    if type(model) in (nn.Linear, Linear):
        raise ValueError("prepack_weights is for the layers inside a model: for one layer, use PrepackedLinear(layer)")
    kind = Int8Linear if int8 else PrepackedLinear
    prepacked: dict[nn.Module, nn.Module] = {}  # What stands in several places stays one.
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is MLP:
                parent.add_module(name, prepacked.setdefault(child, PrepackedMLP(child)))
            elif type(child) in (Attention, PrepackedAttention):  # Again, in case a weight was changed unseen.
                assert isinstance(child, Attention)
                parent.add_module(name, prepacked.setdefault(child, PrepackedAttention(child)))
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() would leave out a second place.
            if isinstance(child, RestrictedLMHead):
                child.layer = kind
            if not isinstance(child, nn.Linear) or type(child) not in _KINDS:
                continue
            if child.weight.dtype in (torch.float32, torch.bfloat16):
                parent.add_module(name, prepacked.setdefault(child, kind(child)))
    return model


def for_inference(model: Module, precision: Precision = "fp32", *, prepack: bool = True) -> Module:
    """Makes a model fast where it stands, in place: on a CPU its linear weights are prepacked (`prepack_weights`).

    Prepacked copies are left out where they would take more than a quarter of the machine's memory: such a model
    computes as fast as it did.

    Args:
        model: the model, on its device.
        precision: "fp32" leaves the weights' dtype; "bf16" converts them, which only takes less memory on a CPU that is
            slow in it (`kernels.emulated`); "int8" rounds them, on a CPU only.
        prepack: whether to prepack weights that need not be; for a single image prepacking takes longer than it saves.

    Raises:
        ValueError: for an unknown precision, or int8 where it cannot be had.
    """
    if precision not in get_args(Precision):
        raise ValueError(f'precision must be one of {", ".join(get_args(Precision))}, not "{precision}"')
    if precision == "bf16":
        with torch.inference_mode(False):  # Parameters that were made in it could never be trained.
            model.to(torch.bfloat16)
    upcast_products(model)
    int8 = precision == "int8"
    on_cpu = all(x.device.type == "cpu" for x in model.parameters())
    if int8 and not on_cpu:
        raise ValueError("int8 weights are for CPUs: on a GPU use bf16")
    layers = {m.weight.data_ptr(): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    size = sum(x.numel() * (1 if int8 else 4 if emulated(x) else x.element_size()) for x in layers.values())
    if int8 or (prepack and on_cpu and torch.backends.mkldnn.is_available() and size <= _SHARE * _memory()):
        prepack_weights(model, int8=int8)
    return model


def int8_pays(decoder: nn.Module, device: torch.device) -> bool:
    """Whether 8-bit weights are the fastest with which a language model decodes on this device, and known to be safe.

    So it is on a CPU that multiplies in 8 bits, where weights of two bytes do not fit into the last cache and are read
    from memory for each token: GPT-2-small's shape took 0.46, 0.28 and 0.33 of transformers' time for 1, 8 and 32 rows
    on Zen 4 and 0.46, 0.30 and 0.41 on a Xeon (tests/benchmarks/README.md), a captioner's scores staying the same.
    Models of more than a billion parameters have not been scored so; outliers that 8 bits cut off are reported from 6.7
    billion on (arXiv:2208.07339, section 4).

    Args:
        decoder: the language model, as it was loaded.
        device: where it decodes.
    """
    if device.type != "cpu" or any(p.dtype != torch.float32 for p in decoder.parameters()):
        return False
    kinds: dict[str, Any] = dict(getattr(torch.cpu, "get_capabilities", dict)())  # older ones of torch don't tell
    if not torch.backends.mkldnn.is_available() or not any(kinds.get(name) for name in _INT8_INSTRUCTIONS):
        return False
    weights = {m.weight.data_ptr(): m.weight.numel() for m in decoder.modules() if isinstance(m, nn.Linear)}
    return _last_cache() < 2 * sum(weights.values()) <= 2 * _INT8_MOST


def _last_cache() -> int:
    """Bytes of the CPU's last cache; 32 MiB where it does not tell."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    words = path.read_text(encoding="ascii").strip() if path.exists() else ""
    return int(words[:-1]) * 1024 if words.endswith("K") and words[:-1].isdecimal() else 32 * 2**20


def _memory() -> float:
    """Bytes of memory of the machine; no end of them where it does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
