"""Key tables: which of our tensors is which of theirs. One table serves both directions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One tensor of theirs and the tensors of ours that it holds, one after the other along the first dimension.

    Attributes:
        theirs: its name there.
        ours: our names, in the order in which they are fused there.
        transposed: whether it is stored (in, out), as GPT-2's Conv1D does.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


def layer(theirs: str, *ours: str, bias: bool = True, transposed: bool = False) -> list[Row]:
    """The rows of a linear layer or norm: its weight and, unless it has none, its bias."""
    rows = [Row(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), transposed)]
    return rows + [Row(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours))] * bias


def to_ours(
    table: Iterable[Row], theirs: dict[str, Tensor], where: str, ignored: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Renames and splits their tensors.

    Args:
        table: the rows of this architecture.
        theirs: their tensors by name; all must be used.
        where: what they come from, for errors.
        ignored: names that may be left over (buffers, tied copies).

    Raises:
        ValueError: naming tensors that are missing there, or that the table does not know.
    """
    ours: dict[str, Tensor] = {}
    left = dict(theirs)
    missing = []
    for row in table:
        tensor = left.pop(row.theirs, None)
        if tensor is None:
            missing.append(row.theirs)
            continue
        tensor = tensor.T if row.transposed else tensor
        ours.update(zip(row.ours, tensor.chunk(len(row.ours)), strict=True))
    unknown = sorted(set(left) - set(ignored))
    if missing or unknown:
        faults = [f"missing: {', '.join(missing[:5])} ({len(missing)} in all)"] * bool(missing)
        faults += [f"unknown: {', '.join(unknown[:5])} ({len(unknown)} in all)"] * bool(unknown)
        raise ValueError(f"{where} does not have this architecture's tensors; {'; '.join(faults)}")
    return ours


def to_theirs(table: Iterable[Row], ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other direction: fuses and renames our tensors."""
    theirs = {}
    for row in table:
        tensor = torch.cat([ours[name] for name in row.ours])
        theirs[row.theirs] = (tensor.T if row.transposed else tensor).contiguous()
    return theirs


class UnsupportedModel(ValueError):
    """A language model that `TextDecoder` cannot be, though transformers may know it: `HubDecoder` can hold it."""


def need(config: dict[str, Any], names: Sequence[str], where: str) -> list[Any]:
    """The values of these keys of a hub config.

    Raises:
        ValueError: naming the keys that are missing.
    """
    if missing := [name for name in names if config.get(name) is None]:
        raise ValueError(f"{where}: the config lacks {', '.join(missing)}")
    return [config[name] for name in names]


def only(config: dict[str, Any], where: str, expected: dict[str, Any]) -> None:
    """Checks that keys of a hub config have the one value that `TextDecoder` has; a missing key has it.

    Raises:
        UnsupportedModel: naming the key, its value, and what was expected.
    """
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise UnsupportedModel(f"{where}: {name} is {config[name]!r}, and TextDecoder has only {value!r}")


def prefixed(
    state: dict[str, Tensor], prefix: str, bare: Sequence[str] = ("lm_head.weight",)
) -> dict[str, Tensor]:
    """The tensors with a prefix before their names, where a model was saved without its head and lacks it."""
    if any(name.startswith(prefix) for name in state):
        return state
    return {name if name in bare else prefix + name: tensor for name, tensor in state.items()}


def tied_head(state: dict[str, Tensor], embedding: str, where: str) -> list[str]:
    """The head's copy of a tied embedding, to be ignored, where there is one.

    Raises:
        ValueError: if it is no copy.
    """
    copy, table = state.get("lm_head.weight"), state.get(embedding)
    if copy is None:
        return []
    if table is not None and (copy.shape != table.shape or not torch.equal(copy, table)):
        raise ValueError(
            f"{where}: the config ties lm_head.weight to {embedding}, but the two are different: one of them is wrong"
        )
    return ["lm_head.weight"]
