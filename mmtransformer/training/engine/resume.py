"""Going on where a run stopped: what stands in its checkpoint beside Lightning's own, and how it is put back.

A run is a function of its recipe, its seed and the number of steps: the order of the pictures is f(seed, epoch), their
augmentation f(seed, epoch, index) (see data/sampler.py), and what is drawn in a step, such as dropout, f(seed, step,
process). So the checkpoint holds weights, optimizer, averages and counters, and no state of any generator.

Frozen weights are left out; a hash of each says what is expected in their place.
"""

import hashlib
import json
import random
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmtransformer.data.loading.hashing import hash64
from mmtransformer.serialization.pretrained import Pretrained, to_config
from mmtransformer.serialization.printable import counted
from mmtransformer.training.engine.checkpoints import CheckpointError

_COMPILED = "_orig_mod."


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds all generators for one batch, so that what it draws depends on nothing that came before it.

    Args:
        seed: The run's seed.
        step: The batch's number in the run.
        rank: The process.
    """
    word = int(hash64(seed, step, rank, 5)) >> 1
    torch.manual_seed(word)
    random.seed(word)
    np.random.seed(word & 0xFFFFFFFF)  # noqa: NPY002 (for code that draws from the global generator)


# ------------------------------------------------------------------------------------------------------ weights


def strip_frozen(module: nn.Module, checkpoint: dict[str, Any], hashes: dict[str, str]) -> None:
    """Leaves frozen weights and the compiler's prefix out of a checkpoint, and adds what is needed to compare.

    Args:
        module: The run's module.
        checkpoint: What Lightning collected; it is changed.
        hashes: The module's `frozen_hashes`.
    """
    state = {unwrapped(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name not in hashes}
    checkpoint["frozen"] = hashes
    checkpoint["model"] = configs(module)


def restore_frozen(module: nn.Module, checkpoint: dict[str, Any], hashes: dict[str, str]) -> None:
    """Fills a checkpoint's weights up with the module's frozen ones, if they are what the run had.

    Args:
        module: The module that goes on.
        checkpoint: What was read; it is changed.
        hashes: The module's `frozen_hashes`.

    Raises:
        CheckpointError: In one line, what is another model's: a size, a vocabulary, frozen weights.
    """
    own = {unwrapped(name): (name, tensor) for name, tensor in module.state_dict().items()}
    saved = {unwrapped(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    expected: dict[str, str] = checkpoint.get("frozen", {})
    if mismatches := _mismatches({name: tensor for name, (_, tensor) in own.items()}, saved, expected, hashes):
        changed = _differences(checkpoint.get("model", {}), configs(module))
        mismatches = ([f"{place} was {old} and is now {new}" for place, old, new in changed] or []) + mismatches
        shown = "; ".join(mismatches[:3]) + (f"; and {len(mismatches) - 3} more" if len(mismatches) > 3 else "")
        raise CheckpointError(
            f"cannot resume with another model: {shown}. Use the recipe of the run (config.yaml in its folder), or "
            f"start a new run, without --resume"
        )
    checkpoint["state_dict"] = {name: saved.get(key, tensor) for key, (name, tensor) in own.items()}


def _mismatches(
    own: dict[str, Tensor], saved: dict[str, Tensor], expected: dict[str, str], hashes: dict[str, str]
) -> list[str]:
    """What does not fit, the most telling first."""
    shapes = [
        f"{name} was {tuple(saved[name].shape)} and is now {tuple(own[name].shape)}"
        for name in own
        if name in saved and saved[name].shape != own[name].shape
    ]
    other = [name for name in expected if name in hashes and hashes[name] != expected[name]]
    mismatches = shapes + (
        [f"the frozen weights of {_tower(other)} are not those of the run (first: {other[0]})"] if other else []
    )
    for words, names in (
        ("were frozen and are now trained", [n for n in expected if n in own and n not in hashes]),
        ("were trained and are now frozen", [n for n in hashes if n in saved]),
        ("are not in the run", [n for n in own if n not in saved and n not in expected]),
        ("are no longer in the model", [n for n in (*saved, *expected) if n not in own]),
    ):
        if names:
            mismatches.append(f"{counted(len(names), 'weight')} of {_tower(names)} {words} (first: {names[0]})")
    return mismatches


def _tower(names: list[str]) -> str:
    """What names have in common: captioner.vision, say."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(words[0] for words in takewhile(lambda words: len(set(words)) == 1, parts)) or "the model"


def unwrapped(name: str) -> str:
    """A weight's name without what `torch.compile` puts before it."""
    return name.replace(_COMPILED, "")


def frozen_hashes(module: nn.Module) -> dict[str, str]:
    """The name of every frozen weight -> 16 hexadecimal digits of its type, shape and bytes."""
    found = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        if not weight.requires_grad:
            tensor = weight.detach().cpu().contiguous()
            digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            found[unwrapped(name)] = digest.hexdigest()[:16]
    return found


def configs(module: nn.Module) -> dict[str, Any]:
    """How the library's models in a module are built, by their place: what an error can name."""
    found = {}
    for name, part in module.named_children():
        if isinstance(part, Pretrained):
            try:
                found[name] = json.loads(json.dumps(to_config(part), default=str))
            except (ValueError, AttributeError):
                continue  # not one that can be saved; its shapes are compared nevertheless
    return found


def _differences(old: Any, new: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        inner = {key: place if key == "args" else f"{place}.{key}" if place else key for key in old | new}
        return [each for key, path in inner.items() for each in _differences(old.get(key), new.get(key), path)]
    return [] if old == new else [(place, old, new)]


def refuse_another_optimizer(checkpoint: Mapping[str, Any], optim: Mapping[str, Any]) -> None:
    """Compares the settings of the optimizer with those of the run.

    Args:
        checkpoint: The run's.
        optim: The fields of this run's `OptimConfig`.

    Raises:
        CheckpointError: Naming those that differ, or if the checkpoint holds no optimizer's state.
    """
    if not checkpoint.get("optimizer_states"):
        raise CheckpointError(
            "cannot resume: the checkpoint holds nothing of the optimizer. Take another one, or start a new run from "
            "the weights"
        )
    then = checkpoint.get("optim", {})
    changed = [f"optim.{k} was {v} and is now {optim.get(k)}" for k, v in then.items() if v != optim.get(k)]
    if changed:
        raise CheckpointError(
            f"cannot resume with another optimizer: {', '.join(changed)}; a run that goes on keeps what it began with"
        )
