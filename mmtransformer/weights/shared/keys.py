"""Key tables: which tensor of another project is which of the library's. One table serves both directions.

A table is a dictionary from the other project's layers to the library's, both up to ".weight" or ".bias":

    {"h.*.ln_[1,2]": "blocks.*.norm[1,2]", "h.*.attn.c_attn": "blocks.*.attn.[q,k,v]_proj"}

"*" is the number of a block; brackets on both sides are several layers, on the right alone those that are fused on the
left, one after the other along dimension 0. Layers that a model does not have are passed over.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmtransformer.layers.lora import refuse_lora
from mmtransformer.serialization.pretrained import load_strictly

_BUFFERS = re.compile(r"(.+\.)?(position_ids|masked_bias|rotary_emb\.inv_freq)")
"""What old files keep beside the tensors of any family: numbers that nobody learned."""
_OLD = {".gamma": ".weight", ".beta": ".bias"}
"""What the first BERTs call the two tensors of a LayerNorm."""


@dataclass(frozen=True)
class KeyMapping:
    """One tensor of the source and the tensors of the target that it holds, one after the other along dimension 0.

    Attributes:
        source: its name in the other project.
        target: the library's names, in the order in which they are fused there.
        transposed: whether it is stored (in, out), as GPT-2's Conv1D does.
    """

    source: str
    target: tuple[str, ...]
    transposed: bool = False


def _each(pattern: str) -> list[str]:
    """The patterns that one with brackets stands for."""
    found = re.search(r"\[(.+?)\]", pattern)
    return [pattern.replace(found[0], part) for part in found[1].split(",")] if found else [pattern]


def key_mappings(keys: Mapping[str, str], target: Iterable[str], *, transposed: Sequence[str] = ()) -> list[KeyMapping]:
    """What stands for the tensors that a model has.

    Args:
        keys: the table of the family.
        target: names of the model's tensors.
        transposed: ends of the source's layers whose weights are stored (in, out).
    """
    names, found = dict.fromkeys(target), []
    for key, value in keys.items():
        sources, targets = _each(key), _each(value)
        pairs = zip(sources, [[one] for one in targets], strict=True) if len(sources) > 1 else [(key, targets)]
        for source, fused in pairs:
            pattern = re.compile(re.escape(fused[0]).replace(r"\*", r"(\d+)") + r"(\.weight|\.bias|)")
            for match in filter(None, map(pattern.fullmatch, names)):
                number, kind = match[1] if "*" in fused[0] else "", match.groups()[-1]
                parts = tuple(part.replace("*", number) + kind for part in fused)
                turned = kind == ".weight" and source.endswith(tuple(transposed))
                if all(part in names for part in parts):
                    found.append(KeyMapping(source.replace("*", number) + kind, parts, turned))
    return found


def nested(keys: Mapping[str, str], *, source: str = "", target: str = "") -> dict[str, str]:
    """The table of a part of a larger model: with prefixes before the names."""
    return {source + key: target + value for key, value in keys.items()}


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def convert(
    table: Iterable[KeyMapping], source: Mapping[str, Tensor], context: str, ignored: Iterable[str] = ()
) -> dict[str, Tensor]:
    """The other project's tensors, renamed and split into the library's.

    Args:
        table: the mappings of this model, from `key_mappings`.
        source: the tensors by the other project's names; all must be used, but for buffers of old files. "gamma" and
            "beta" of old files' LayerNorms are their weight and bias.
        context: what they come from, for errors.
        ignored: names that may be left over (tied copies, a family's own buffers).

    Raises:
        ValueError: naming tensors that are missing there, or that the table does not know.
    """
    target: dict[str, Tensor] = {}
    left, missing = {_new_name(name): tensor for name, tensor in source.items()}, []
    for row in table:
        tensor = left.pop(row.source, None)
        if tensor is None:
            missing.append(row.source)
            continue
        tensor = tensor.T if row.transposed else tensor
        target.update(zip(row.target, tensor.chunk(len(row.target)), strict=True))
    unknown = sorted(name for name in set(left) - set(ignored) if not _BUFFERS.fullmatch(name))
    if missing or unknown:
        faults = [f"missing: {', '.join(missing[:5])} ({len(missing)} in all)"] * bool(missing)
        faults += [f"unknown: {', '.join(unknown[:5])} ({len(unknown)} in all)"] * bool(unknown)
        raise ValueError(f"{context} does not have this architecture's tensors; {'; '.join(faults)}")
    return target


def _new_name(name: str) -> str:
    kind = next((kind for kind in _OLD if name.endswith(f"LayerNorm{kind}")), None)
    return name if kind is None else name.removesuffix(kind) + _OLD[kind]


def fill(
    module: nn.Module,
    keys: Mapping[str, str],
    source: Mapping[str, Tensor],
    context: str,
    *,
    ignored: Iterable[str] = (),
    kept: tuple[str, ...] = (),
    extra: Mapping[str, Tensor] | None = None,
    transposed: Sequence[str] = (),
) -> None:
    """Fills a module with the other project's tensors, all of it and with nothing left over.

    Args:
        module: the module.
        keys: the table of the family.
        source: the tensors by the other project's names; all must be used.
        context: what they come from, for errors.
        ignored: see `convert`.
        kept: beginnings of names of the module's tensors that stay as they are.
        extra: tensors by the library's names that the table does not serve.
        transposed: see `key_mappings`.

    Raises:
        ValueError: as `convert`, and for tensors of another shape.
    """
    own, target = module.state_dict(), dict(extra or {})
    names = [name for name in own if not name.startswith(kept) and name not in target]
    target |= convert(key_mappings(keys, names, transposed=transposed), source, context, ignored)
    filled = {own[name].data_ptr() or name for name in target if name in own}
    stays = {name: t for name, t in own.items() if name.startswith(kept) and (t.data_ptr() or name) not in filled}
    load_strictly(module, target | stays, context)


def export(
    module: nn.Module,
    keys: Mapping[str, str],
    context: str,
    *,
    kept: tuple[str, ...] = (),
    transposed: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The module's tensors as the other project has them.

    Args:
        module: the module.
        keys: the table of the family.
        context: what the other project calls such a model, for errors.
        kept: beginnings of names of the module's tensors that are left out.
        transposed: see `key_mappings`.

    Raises:
        ValueError: naming tensors that the other project has no place for.
    """
    refuse_lora(module)
    own = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith(kept)}
    table = key_mappings(keys, own, transposed=transposed)
    known = {name for row in table for name in row.target}
    if extra := [name for name in own if name not in known]:
        raise ValueError(f"{context} has no place for {', '.join(extra[:5])} ({len(extra)} in all)")
    return convert_back(table, own)


def convert_back(table: Iterable[KeyMapping], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The library's tensors, fused and renamed as the other project has them."""
    source = {}
    for row in table:
        tensor = torch.cat([target[name] for name in row.target])
        source[row.source] = (tensor.T if row.transposed else tensor).contiguous()
    return source
