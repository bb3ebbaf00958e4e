"""Which parameters of a task learn: their number, the modes that follow from it, and those that no loss reaches."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def trainable_parameters(module: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def set_modes(module: nn.Module, training: bool = True) -> None:
    """Puts what learns into training mode and what is frozen into evaluation mode, whoever left it in which.

    A part learns if one of its parameters does; what has no parameters, such as dropout, goes with the part it is in.
    So a frozen tower has neither dropout nor stochastic depth, and a loaded one that learns has both.

    Args:
        module: The module.
        training: The mode of parts without parameters.
    """
    learns = [p.requires_grad for p in module.parameters()]
    module.training = any(learns) if learns else training
    for part in module.children():
        set_modes(part, module.training)


def say_what_cannot_learn(task: pl.LightningModule, loss: Tensor) -> None:
    """Warns of parameters that are to be learned and that a loss does not reach: they would stay what they are.

    Args:
        task: The task, in a training.
        loss: The loss of its first batch; all processes call this at once.

    Raises:
        ValueError: If processes would wait for their gradients, as they do with the strategy "ddp".
    """
    if isinstance(task.trainer.strategy, ModelParallelStrategy):
        return  # whose weights are gathered anew, and waited for by nobody
    names, wrapper = not_reached(task, loss), task.trainer.strategy.model
    waits = isinstance(wrapper, DistributedDataParallel) and not (
        wrapper.find_unused_parameters or wrapper.static_graph
    )
    if waits:
        found: list[list[str]] = [[]] * task.trainer.world_size
        torch.distributed.all_gather_object(found, names)
        names = list(dict.fromkeys(name for some in found for name in some))
    if not names:
        return
    text = f"{len(names)} parameters are to be learned, but the loss does not reach them: {in_words(names)}"
    remedy = "freeze that part, or leave it out of the model"
    if waits:
        raise ValueError(
            f"{text}, and processes would wait for their gradients; {remedy}, or take "
            f"--trainer.strategy ddp_find_unused_parameters_true"
        )
    warnings.warn(f"{text}; {remedy}", stacklevel=2)


def not_reached(module: nn.Module, loss: Tensor) -> list[str]:
    """The names of parameters that require a gradient and get none from a loss; no backward pass is run.

    Args:
        module: The module.
        loss: A loss of its output, with its graph.
    """
    graph = list(_graph(loss))
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in graph):
        return []  # Reentrant checkpointing hides what is inside.
    reached = {id(node.variable) for node in graph if hasattr(node, "variable")}
    named = module.named_parameters()
    return [name for name, parameter in named if parameter.requires_grad and id(parameter) not in reached]


def _graph(loss: Tensor) -> Iterator[Any]:
    todo: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo += [below for below, _ in node.next_functions]


def in_words(names: Iterable[str]) -> str:
    """Names of parameters by the module that they are of, at most four: "vit.pool.q_proj (2), head (1)"."""
    counts = Counter(name.rpartition(".")[0] for name in names)
    shown = [f"{owner or 'the task itself'} ({n})" for owner, n in list(counts.items())[:4]]
    return ", ".join(shown + ([f"and {len(counts) - 4} more modules"] if len(counts) > 4 else []))


_LISTS = ("blocks", "layers", "layer", "h", "block")
"""What lists of a tower's blocks are called, here and in transformers."""


def lr_scales(
    module: nn.Module, layer_decay: float = 1.0, parts: Mapping[str, float] | None = None
) -> dict[str, float]:
    """What the learning rate of each parameter that learns is multiplied by.

    Layers are counted in every tower by itself, as timm counts them (`param_groups_layer_decay`): what stands before
    the blocks, each block, the last norm with the last block, and what stands behind it (head, pooling) by itself. What
    is in no tower, such as a projector, learns at the full rate.

    Args:
        module: The module.
        layer_decay: The rate of a layer is that of the one above it times this (arXiv:2003.10555, section 3.2; 0.75
            fine-tunes a ViT, and LAVIS takes 0.95 for the vision encoder of a BLIP-2).
        parts: Parts by their names, "vision" or "decoder.blocks.3", and what their rates are multiplied by besides; of
            several that hold a parameter the longest name counts.

    Raises:
        ValueError: If nothing that learns is in a part.
    """
    scales = {name: 1.0 for name, p in module.named_parameters() if p.requires_grad}
    if layer_decay != 1.0:
        for tower, blocks in towers_of(module):
            prefix = f"{tower}." if tower else ""
            every = [name for name, _ in module.named_parameters() if name.startswith(prefix)]
            depth = len(module.get_submodule(prefix + blocks))  # pyright: ignore[reportArgumentType]
            layers = {name: _layer(name.removeprefix(prefix), blocks, depth) for name in every}
            top = max([depth, *(layer for name, layer in layers.items() if name in scales)])
            for name in scales.keys() & layers.keys():
                scales[name] *= layer_decay ** (top - layers[name])
    for name in scales:
        held = [part for part in parts or {} if f".{part}." in f".{name}."]
        if parts and held:
            scales[name] *= parts[max(held, key=len)]
    for part in parts or {}:
        if not any(f".{part}." in f".{name}." for name in scales):
            known = dict.fromkeys(name.removeprefix("captioner.").partition(".")[0] for name in scales)
            raise ValueError(f'nothing that learns is in a part called "{part}"; there are {", ".join(known)}')
    return scales


def towers_of(module: nn.Module) -> list[tuple[str, str]]:
    """The towers of a module: each one's name, and that of its list of blocks; those inside a block are left out."""
    found: list[tuple[str, str]] = []
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{tower}.{blocks}.".removeprefix(".")) for tower, blocks in found)
        for child, blocks in part.named_children():
            if not inside and child in _LISTS and isinstance(blocks, nn.ModuleList) and len(blocks):
                tower, alone = name, len(list(part.children())) == 1 and not list(part.parameters(recurse=False))
                if alone and tower:  # a list by itself, as transformers' encoders: its embeddings lie beside it
                    tower, _, last = tower.rpartition(".")
                    child = f"{last}.{child}"
                found.append((tower, child))
    return found


def _layer(name: str, blocks: str, depth: int) -> int:
    """The layer of a parameter in its tower: 0 = before the blocks, depth + 1 = behind them."""
    if inside := re.match(rf"{re.escape(blocks)}\.(\d+)\.", name):
        return int(inside[1]) + 1
    if re.match(r"\w*head|attn_pool|fc_norm|pool|proj", name):
        return depth + 1
    return depth if re.match(r"(last_|final_|post_)?(layer_?)?norm\.|ln_f", name) else 0
