"""Key tables: which tensor of another project is which of the library's. One table serves both directions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One tensor of the source and the tensors of the target that it holds, one after the other along dimension 0.

    Attributes:
        source: its name in the other project.
        target: the library's names, in the order in which they are fused there.
        transposed: whether it is stored (in, out), as GPT-2's Conv1D does.
    """

    source: str
    target: tuple[str, ...]
    transposed: bool = False


def layer(source: str, *target: str, bias: bool = True, transposed: bool = False) -> list[Row]:
    """The rows of a linear layer or norm: its weight and, unless it has none, its bias."""
    rows = [Row(f"{source}.weight", tuple(f"{name}.weight" for name in target), transposed)]
    return rows + [Row(f"{source}.bias", tuple(f"{name}.bias" for name in target))] * bias


def convert(
    table: Iterable[Row], source: dict[str, Tensor], context: str, ignored: Iterable[str] = ()
) -> dict[str, Tensor]:
    """The other project's tensors, renamed and split into the library's.

    Args:
        table: the rows of this architecture.
        source: the tensors by the other project's names; all must be used.
        context: what they come from, for errors.
        ignored: names that may be left over (buffers, tied copies).

    Raises:
        ValueError: naming tensors that are missing there, or that the table does not know.
    """
    target: dict[str, Tensor] = {}
    left = dict(source)
    missing = []
    for row in table:
        tensor = left.pop(row.source, None)
        if tensor is None:
            missing.append(row.source)
            continue
        tensor = tensor.T if row.transposed else tensor
        target.update(zip(row.target, tensor.chunk(len(row.target)), strict=True))
    unknown = sorted(set(left) - set(ignored))
    if missing or unknown:
        faults = [f"missing: {', '.join(missing[:5])} ({len(missing)} in all)"] * bool(missing)
        faults += [f"unknown: {', '.join(unknown[:5])} ({len(unknown)} in all)"] * bool(unknown)
        raise ValueError(f"{context} does not have this architecture's tensors; {'; '.join(faults)}")
    return target


def convert_back(table: Iterable[Row], target: dict[str, Tensor]) -> dict[str, Tensor]:
    """The library's tensors, fused and renamed as the other project has them."""
    source = {}
    for row in table:
        tensor = torch.cat([target[name] for name in row.target])
        source[row.source] = (tensor.T if row.transposed else tensor).contiguous()
    return source


class UnsupportedModel(ValueError):
    """A language model that `TextDecoder` cannot be, though transformers may know it: `HubDecoder` can hold it."""


def need(config: dict[str, Any], names: Sequence[str], context: str) -> list[Any]:
    """The values of these keys of a hub config.

    Raises:
        ValueError: naming the keys that are missing.
    """
    if missing := [name for name in names if config.get(name) is None]:
        raise ValueError(f"{context}: the config lacks {', '.join(missing)}")
    return [config[name] for name in names]


def only(config: dict[str, Any], context: str, expected: dict[str, Any]) -> None:
    """Checks that keys of a hub config have the one value that `TextDecoder` has; a missing key has it.

    Raises:
        UnsupportedModel: naming the key, its value, and what was expected.
    """
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise UnsupportedModel(
                f"{context}: {name} is {config[name]!r}, and TextDecoder has only {value!r}"
            )


def prefixed(
    state: dict[str, Tensor], prefix: str, bare: Sequence[str] = ("lm_head.weight",)
) -> dict[str, Tensor]:
    """The tensors with a prefix before their names, where a model was saved without its head and lacks it."""
    if any(name.startswith(prefix) for name in state):
        return state
    return {name if name in bare else prefix + name: tensor for name, tensor in state.items()}


def tied_head(state: dict[str, Tensor], embedding: str, context: str) -> list[str]:
    """The head's copy of a tied embedding, to be ignored, where there is one.

    Raises:
        ValueError: if it is no copy.
    """
    copy, table = state.get("lm_head.weight"), state.get(embedding)
    if copy is None:
        return []
    if table is not None and (copy.shape != table.shape or not torch.equal(copy, table)):
        raise ValueError(
            f"{context}: the config ties lm_head.weight to {embedding}, but the two are different: one of them is wrong"
        )
    return ["lm_head.weight"]
