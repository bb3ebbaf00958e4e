"""Configs of other projects: what must be there, and what must not be otherwise."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn

from mmtransformer.layers.config import Activation

ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
"""transformers' names of activations, and the library's."""

SOURCE_ACTIVATIONS = {target: source for source, target in reversed(ACTIVATIONS.items())}


SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "max_position_embeddings": "max_len",
}
"""The sizes of a text model: the names that most of transformers' configs have for them, and the library's."""


class UnsupportedModel(ValueError):
    """A language model that `TextDecoder` cannot be, though transformers may know it: `HFDecoder` can hold it."""


def activation_of(config: Mapping[str, Any], key: str, context: str, default: str = "gelu") -> Activation:
    """The activation that a config names.

    Raises:
        UnsupportedModel: if the library has none like it.
    """
    name = config.get(key, default)
    if name not in ACTIVATIONS:
        raise UnsupportedModel(
            f"{context}: there is no activation like {name} here: known are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def read_sizes(config: Mapping[str, Any], names: Mapping[str, str], context: str) -> dict[str, Any]:
    """What a config says, as arguments of one of the library's models.

    Args:
        config: the other project's config.
        names: its keys, and the library's names, such as `SIZES`.
        context: what it comes from, for errors.

    Raises:
        ValueError: naming the keys that are missing.
    """
    if missing := [name for name in names if config.get(name) is None]:
        raise ValueError(f"{context}: the config lacks {', '.join(missing)}")
    return {target: config[source] for source, target in names.items()}


def write_sizes(model: nn.Module, names: Mapping[str, str]) -> dict[str, Any]:
    """The same entries of a config, from a model that has these attributes."""
    return {source: getattr(model, target) for source, target in names.items()}


def only(config: Mapping[str, Any], context: str, expected: Mapping[str, Any], kind: str = "TextDecoder") -> None:
    """Checks that keys of a config have the one value that a class of ours has; a missing key has it.

    Raises:
        UnsupportedModel: naming the key, its value, and what was expected.
    """
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise UnsupportedModel(f"{context}: {name} is {config[name]!r}, and {kind} has only {value!r}")


def _differences(name: str, found: Any, wanted: Any) -> Iterator[str]:
    """What differs, as NAME=VALUE; of settings of one kind those alone that do."""
    if is_dataclass(found) and type(found) is type(wanted):
        for field in fields(found):
            inner = f"{name}.{field.name}"
            yield from _differences(inner, getattr(found, field.name), getattr(wanted, field.name))
    elif found != wanted:
        yield f"{name}={found!r}"


def only_these(context: str, facts: Mapping[str, tuple[Any, Any]]) -> None:
    """Checks a model that is to be written as another project's: each of its traits is the one that the other has.

    Args:
        context: the other project's model.
        facts: by name, what the model has and what the other would have.

    Raises:
        ValueError: naming the traits that differ.
    """
    if differs := [text for name, values in facts.items() for text in _differences(name, *values)]:
        raise ValueError(f"{context} has nothing like {', '.join(differs)}")
