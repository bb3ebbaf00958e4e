"""LoRA: small trainable matrices beside frozen ones (arXiv:2106.09685), through `peft` (the extra `lora`)."""

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn
from torch.autograd.graph import increment_version

Module = TypeVar("Module", bound=nn.Module)


def add_lora(
    model: Module,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
) -> Module:
    """Freezes a model and puts a trainable low-rank product beside some of its linear layers, in place.

    At first the products are zero and the model says what it said before. Give the result to a captioner that does not
    freeze it itself (freeze_decoder: false). What is trained is saved after `merge_lora`, as an ordinary model.

    Args:
        model: A language model or a vision encoder.
        target_modules: Ends of the names of the layers; queries and values, as in the paper (section 7.1), unless told.
        rank: Width of the products.
        alpha: The products are scaled by alpha / rank.
        dropout: Share of the products' input dropped in training.

    Returns:
        The same model.

    Raises:
        ValueError: If peft is not installed, no layer has such a name, one has products already, or shares its weight
            with another.
    """
    if isinstance(target_modules, str):
        raise ValueError(f'target_modules is a list of names: ["{target_modules}"], not "{target_modules}"')
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("add_lora needs peft: pip install peft") from error
    linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    ends = tuple(f".{name}" for name in target_modules)
    if done := [n for n, m in model.named_modules() if hasattr(m, "lora_A") and f".{n}".endswith(ends)]:
        raise ValueError(f"{done[0]} has LoRA already: merge_lora(model) first, or name other target_modules")
    for target in target_modules:
        if not any(name.endswith(target) for name, m in model.named_modules() if isinstance(m, nn.Linear)):
            raise ValueError(f'no linear layer is called "{target}"; there are {", ".join(linear)}')
    shared = [p.data_ptr() for m in model.modules() for p in m.parameters(recurse=False)]
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not name.endswith(tuple(target_modules)):
            continue
        if shared.count(module.weight.data_ptr()) > 1 and not module.weight.is_meta:
            raise ValueError(
                f"{name} shares its weight with another layer (a head tied to the embedding?), which would receive the "
                "product too: choose other target_modules, or a model that is not tied"
            )
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(target_modules))  # pyright: ignore[reportArgumentType]  # A float is fine.
    if not has_lora(model):  # What peft remembers of merged ones it would warn of.
        vars(model).pop("peft_config", None)
    inject_adapter_in_model(config, model)
    return model


def merge_lora(model: Module) -> Module:
    """Adds every low-rank product to the matrix beside it and takes it away, in place; others are left as they are.

    Returns:
        The same model, of ordinary layers again.
    """
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        layer.merge()
        increment_version(layer.get_base_layer().weight)  # peft changes it unseen, through .data
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model


def has_lora(model: nn.Module) -> bool:
    """Whether a model has low-rank products that are not merged."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def refuse_lora(model: nn.Module) -> None:
    """Refuses to write a model with low-rank products, whose tensors no reader of the model has a place for.

    Raises:
        ValueError: naming one of them, and `merge_lora`.
    """
    if products := [name for name in model.state_dict(keep_vars=True) if ".lora_A." in name]:
        raise ValueError(
            f"{type(model).__name__} is not saved with LoRA's products beside its weights ({products[0]}, the first of "
            f"{len(products)}): mmtransformer.layers.lora.merge_lora(model) adds them in; then save it"
        )
