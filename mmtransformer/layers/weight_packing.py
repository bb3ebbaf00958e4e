"""pack_weights(): linear weights laid out once for oneDNN, for inference on a CPU.

Measured on a Zen 5 core with torch 2.15, 1576 tokens of width 192 to 768: 8.4 ms plain, 1.8 ms packed in float32
(there torch's own float32 product is MKL's, which runs such a CPU at half its rate); 0.94 and 0.90 ms in bfloat16.
"""

import os
import weakref
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtransformer.layers.attention import Attention, split_heads
from mmtransformer.layers.blocks import MLP
from mmtransformer.layers.cache import KeyValue
from mmtransformer.layers.config import Activation

Module = TypeVar("Module", bound=nn.Module)
Precision = Literal["fp32", "bf16", "int8"]
"""What a model computes with: its weights as they are, in bfloat16, or rounded to 8 bits."""

_SHARE = 0.25  # Of the machine's memory, that packed copies of weights may take without being asked for.


_FUSED = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}  # What oneDNN calls them.


class PackedLinear(nn.Linear):
    """A linear layer over another's weight and bias, which keeps a second, packed copy of the weight.

    The packed copy is made when it is first needed, and again after the weight has changed. It serves where no
    gradient is asked for, on the CPU, in the weight's own dtype; everywhere else this is a plain linear layer.

    Args:
        linear: the layer whose parameters are shared.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self._packed: tuple[_State, Any] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(... in_features) -> (... out_features)."""
        if not self.serves(input):
            return F.linear(input, self.weight, self.bias)
        return self.product(input, self.packed(), self.bias)

    @staticmethod
    def product(x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
        """What a packed weight makes of tokens: (... in_features) -> (... out_features)."""
        return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")

    @staticmethod
    def pack(weight: Tensor) -> Any:
        """A weight (out_features in_features) as `product` takes it."""
        return torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def activated(self, x: Tensor, activation: Activation) -> Tensor | None:
        """The activation of the layer's result, computed with the product; None where that cannot be."""
        if type(self) is not PackedLinear or activation not in _FUSED or _hooked(self) or not self.serves(x):
            return None
        kind, form = _FUSED[activation]
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed(), self.bias, kind, [], form)

    def serves(self, x: Tensor) -> bool:
        """Whether the packed weight can be used for tokens (... in_features)."""
        return not (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or not x.is_cpu
            or x.dtype != self.weight.dtype
            or not x.numel()
        )

    def packed(self) -> Any:
        """The weight in oneDNN's layout, as it is now."""
        if self._packed is None or not self._packed[0].holds(self.weight):
            with torch.no_grad():
                self._packed = _State(self.weight), self.pack(self.weight.detach())
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}


class Int8Linear(PackedLinear):
    """A `PackedLinear` whose packed copy has 8 bits a weight, with a scale for each output.

    What comes in is rounded to 8 bits too, each row by a scale of its own, so that no row depends on those beside it.
    Serves float32 only.
    """

    def serves(self, x: Tensor) -> bool:
        """As `PackedLinear.serves`."""
        return x.dtype == torch.float32 and super().serves(x)

    @staticmethod
    def pack(weight: Tensor) -> Any:
        """As `PackedLinear.pack`."""
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        middle = weight.new_full(weight.shape[1:], 128.5)  # A row and not a number, with which torch is slower.
        return torch.ops.onednn.qlinear_prepack(rounded, None), scale, zero, middle

    @staticmethod
    def product(x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
        """As `PackedLinear.product`."""
        weight, scale, zero, middle = packed
        most = x.abs().amax(-1, keepdim=True).clamp_(min=1e-10)
        # Unsigned with its zero at 128: oneDNN's kernels for signed values are hundreds of times slower. The type cuts
        # off what is behind the point: the half that was added makes that rounding.
        rounded = torch.addcdiv(middle, x, most, value=127).to(torch.uint8)
        # It takes one scale for all rows: theirs, and the bias behind it, come after the product.
        out = torch.ops.onednn.qlinear_pointwise.default(
            rounded, 1 / 127, 128, weight, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out.mul_(most) if bias is None else torch.addcmul(bias, out, most)


class PackedAttention(Attention):
    """An `Attention` over another's layers, which makes queries, keys and values with one product where it can.

    Args:
        attn: the attention whose layers are shared.
    """

    def __init__(self, attn: Attention) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(attn.__dict__)  # Its layers, and its hooks.
        self._packed: dict[int, tuple[type, _State, Any]] = {}

    def project_kv(self, context: Tensor) -> KeyValue:
        """As `Attention.project_kv`."""
        found = self._at_once(context, self.k_proj, self.v_proj)
        if found is None:
            return super().project_kv(context)
        k, v = found
        return KeyValue(split_heads(k, self.num_kv_heads, self.k_norm), split_heads(v, self.num_kv_heads))

    def project(self, x: Tensor, context: Tensor | KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """As `Attention.project`."""
        found = self._at_once(x, self.q_proj, self.k_proj, self.v_proj) if context is None else None
        if found is None:
            return super().project(x, context)
        q, k, v = found
        kv = KeyValue(split_heads(k, self.num_kv_heads, self.k_norm), split_heads(v, self.num_kv_heads))
        return split_heads(q, self.num_heads, self.q_norm), kv

    def _at_once(self, x: Tensor, *layers: nn.Linear) -> Sequence[Tensor] | None:
        """What each of these layers gives for tokens that all of them read; None where it cannot be one product."""
        first = layers[0]
        if not isinstance(first, PackedLinear) or not first.serves(x) or not _alike(layers):
            return None
        weights = [layer.weight for layer in layers]
        found = self._packed.get(len(layers))
        if found is None or found[0] is not type(first) or not found[1].holds(*weights):
            with torch.no_grad():
                found = type(first), _State(*weights), first.pack(torch.cat(weights))
            self._packed[len(layers)] = found
        bias = None if first.bias is None else torch.cat([layer.bias for layer in layers])
        return first.product(x, found[2], bias).split_with_sizes([len(w) for w in weights], -1)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}}


class PackedMLP(MLP):
    """An `MLP` over another's layers, which computes the activation with the first product where that is packed.

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
        first = self.fc1
        hidden = first.activated(x, self.activation) if isinstance(first, PackedLinear) else None
        return super().forward(x) if hidden is None else self.fc2(self.drop(hidden))


def pack_weights(model: Module, *, int8: bool = False) -> Module:
    """Puts a `PackedLinear` in the place of each linear layer of a model, in place, and packed MLPs and attentions.

    Parameters, their names and the state dict stay as they are; a packed model can still be trained, saved or moved.
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
        raise ValueError("pack_weights needs a build of torch with oneDNN (torch.backends.mkldnn): this one has none")
    if type(model) is nn.Linear:
        raise ValueError("pack_weights works on the layers inside a model: for one layer, use PackedLinear(layer)")
    kind = Int8Linear if int8 else PackedLinear
    packed: dict[nn.Module, nn.Module] = {}  # What stands in several places stays one.
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is MLP:
                parent.add_module(name, packed.setdefault(child, PackedMLP(child)))
            elif type(child) in (Attention, PackedAttention):  # Packed once more, in case a weight was changed unseen.
                assert isinstance(child, Attention)
                parent.add_module(name, packed.setdefault(child, PackedAttention(child)))
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() would leave out a second place.
            if not isinstance(child, nn.Linear) or type(child) not in (nn.Linear, PackedLinear, Int8Linear):
                continue
            if child.weight.dtype in (torch.float32, torch.bfloat16):
                parent.add_module(name, packed.setdefault(child, kind(child)))
    return model


def for_inference(model: Module, precision: Precision = "fp32") -> Module:
    """Makes a model fast where it stands, in place: on a CPU its linear weights are packed (`pack_weights`).

    Packed copies are left out where they would take more than a quarter of the machine's memory: such a model computes
    as fast as it did.

    Args:
        model: the model, on its device.
        precision: "fp32" leaves the weights' dtype; "bf16" converts them; "int8" rounds them, on a CPU only.

    Raises:
        ValueError: for an unknown precision, or int8 where it cannot be had.
    """
    if precision not in get_args(Precision):
        raise ValueError(f'precision must be one of {", ".join(get_args(Precision))}, not "{precision}"')
    if precision == "bf16":
        with torch.inference_mode(False):  # Parameters that were made in it could never be trained.
            model.to(torch.bfloat16)
    int8 = precision == "int8"
    on_cpu = all(x.device.type == "cpu" for x in model.parameters())
    if int8 and not on_cpu:
        raise ValueError("int8 weights are for CPUs: on a GPU use bf16")
    layers = {m.weight.data_ptr(): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    size = sum(x.numel() * (1 if int8 else x.element_size()) for x in layers.values())
    if int8 or (on_cpu and torch.backends.mkldnn.is_available() and size <= _SHARE * _memory()):
        pack_weights(model, int8=int8)
    return model


def _alike(layers: Sequence[nn.Linear]) -> bool:
    """Whether layers can be one product, of which nobody wants to see a part."""
    first = layers[0]
    return all(
        type(layer) is type(first) and (layer.bias is None) == (first.bias is None) and not _hooked(layer)
        for layer in layers
    )


def _hooked(layer: nn.Module) -> bool:
    """Whether somebody wants to see what this very layer reads or gives."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


class _State:
    """Which weights were packed, and as what they were: it tells those that were loaded, moved or trained since.

    What nobody can tell is a change through `.data`, or of weights made in inference mode: pack anew after it.
    """

    def __init__(self, *weights: Tensor) -> None:
        self.weights = [weakref.ref(weight) for weight in weights]
        self.was = self._of(weights)

    def holds(self, *weights: Tensor) -> bool:
        """Whether these are the weights, and still what they were."""
        same = all(ref() is weight for ref, weight in zip(self.weights, weights, strict=True))
        return same and self.was == self._of(weights)

    @staticmethod
    def _of(weights: Sequence[Tensor]) -> list[tuple]:
        return [(x.data_ptr(), x.dtype, None if x.is_inference() else x._version) for x in weights]


def _memory() -> float:
    """Bytes of memory of the machine; no end of them where it does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
