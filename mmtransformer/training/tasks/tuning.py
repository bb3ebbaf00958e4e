"""TuningConfig: which weights of a model learn when it is fine-tuned, part by part."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from mmtransformer.captioners.base import Captioner
from mmtransformer.captioners.llava import Llava
from mmtransformer.layers.config import known_fields
from mmtransformer.layers.lora import add_lora
from mmtransformer.layers.modes import is_frozen
from mmtransformer.serialization.printable import counted
from mmtransformer.training.engine.parameters import towers_of, trainable_parameters
from mmtransformer.weights.adapters import part_of
from mmtransformer.weights.shared.dtype import DType, cast_frozen

_ALIASES = {
    "q_proj": ("q", "query", "qkv", "query_key_value"),
    "k_proj": ("k", "key", "qkv", "query_key_value"),
    "v_proj": ("v", "value", "qkv", "query_key_value"),
    "out_proj": ("o", "o_proj", "proj"),
}
"""What a tower that transformers holds may call these layers."""

Part = Literal["vision", "connector", "decoder"]
Method = Literal["full", "last_blocks", "lora"]


@known_fields
@dataclass(frozen=True)
class TuningConfig:
    """Which weights learn.

    Args:
        parts: The parts that learn: "vision" encoder, language model ("decoder"), and "connector", which is all else:
            projectors, Q-Former, cross-attention. The connector learns whole wherever it is named; ["connector"] alone
            trains the connector between frozen towers.
        method: What of the two towers learns, where they are named: all of them ("full"), their "last_blocks" with the
            norm behind them, or low-rank products beside frozen weights ("lora"; needs peft).
        num_blocks: Of "last_blocks", how many.
        rank: Of "lora", the width of the products.
        alpha: Of "lora", their scale times the rank.
        dropout: Of "lora", the share of the products' input dropped in training.
        target_modules: Of "lora", ends of the names of the layers that get one: queries and values by default. In a
            tower that calls them otherwise (a T5's q and v, a fused qkv) it is those.
        frozen_dtype: What towers that do not learn at all are kept in: "bfloat16" takes half the memory, "nf4" an
            eighth, by bitsandbytes on a GPU. What is saved stands on the base's own numbers.
        save_merged: Whether the whole model is saved, with what was learned added in, where an adapter would do.

    Raises:
        ValueError: If a value is unknown, or would have no effect.
    """

    parts: Sequence[Part] = ("vision", "connector", "decoder")
    method: Method = "full"
    num_blocks: int = 2
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: Sequence[str] = ("q_proj", "v_proj")
    frozen_dtype: DType = "float32"
    save_merged: bool = False

    def __post_init__(self) -> None:
        choices = (("parts", self.parts, get_args(Part)), ("method", [self.method], get_args(Method)))
        for name, values, known in choices:
            if odd := [value for value in values if value not in known]:
                raise ValueError(f'tuning.{name}: unknown value "{odd[0]}"; choose one of {", ".join(known)}')
        if not self.parts or not self.target_modules:
            raise ValueError("tuning: name at least one of the parts, and of the target_modules")
        for name in ("num_blocks", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"tuning.{name} ({getattr(self, name)}) must be at least 1")
        towers, usual = set(self.parts) - {"connector"}, TuningConfig.__dataclass_fields__
        options = (("last_blocks", ["num_blocks"]), ("lora", ["rank", "alpha", "dropout", "target_modules"]))
        for method, names in options:
            for name in names if self.method != method or not towers else []:
                value = getattr(self, name)
                if (tuple(value) if name == "target_modules" else value) != usual[name].default:
                    raise ValueError(f"tuning.{name} has an effect only with method={method} of a tower: leave it out")
        if self.method != "full" and not towers:
            raise ValueError(f"tuning.method={self.method} is for vision encoder or decoder: name one in tuning.parts")

    @property
    def everything(self) -> bool:
        """Whether all of the model learns, so that all of it must be saved."""
        return self.method == "full" and len(set(self.parts)) == len(get_args(Part))

    def apply(self, captioner: Captioner) -> None:
        """Makes these parts of a captioner learn, in place, and freezes all else.

        Raises:
            ValueError: If the model has no such part, layer or so many blocks.
        """
        unread = unread_by(captioner)
        captioner.requires_grad_(False)
        named = dict(captioner.named_parameters())
        for part in dict.fromkeys(self.parts):
            mine = [name for name in named if part_of(captioner, name) == part]
            if not mine:
                known = dict.fromkeys(part_of(captioner, name) for name in named)
                raise ValueError(f"tuning.parts: a {type(captioner).__name__} has no {part}; it has {', '.join(known)}")
            if self.method == "last_blocks" and part != "connector":
                mine = last_blocks(captioner, mine, self.num_blocks, part)
            if self.method != "lora" or part == "connector":
                for name in mine:
                    named[name].requires_grad_(named[name] not in unread)
        if self.method == "lora":
            self._add_lora(captioner, {id(p) for p in named.values() if p.requires_grad})
        self._say_what_is_frozen(captioner)
        if self.frozen_dtype != "float32":
            towers = [tower for tower in (captioner.vision, _decoder(captioner)) if is_frozen(tower)]
            if not towers:
                raise ValueError("tuning.frozen_dtype is for towers of which nothing learns, and there is none")
            for tower in towers:
                cast_frozen(tower, self.frozen_dtype)

    def _say_what_is_frozen(self, captioner: Captioner) -> None:
        """Sets the captioner's own switches to what learns: no graph is kept of a frozen vision encoder."""
        captioner.freeze_vision = is_frozen(captioner.vision)
        if not captioner.freeze_vision:
            captioner.train_vision_norm = False  # It learns inside the encoder, with the rest.
        if captioner.train_vision_norm and "connector" in self.parts:
            captioner.freeze_vision = True
            captioner.vision.norm.requires_grad_(True)
        captioner.train_vision_norm = captioner.train_vision_norm and "connector" in self.parts
        if hasattr(captioner, "freeze_decoder"):
            inner = [p for name, p in captioner.named_parameters() if part_of(captioner, name) == "decoder"]
            vars(captioner)["freeze_decoder"] = not any(p.requires_grad for p in inner)

    def _add_lora(self, captioner: Captioner, learning: set[int]) -> None:
        """Products beside the layers of the towers that are named; what learned already goes on learning."""
        towers = {part: captioner.vision if part == "vision" else _decoder(captioner) for part in self.parts}
        towers.pop("connector", None)
        linear = {
            part: [name for name, layer in tower.named_modules() if isinstance(layer, nn.Linear)]
            for part, tower in towers.items()
        }
        found = {part: _matching(self.target_modules, names) for part, names in linear.items()}
        for target in self.target_modules:
            if not any(_matching([target], names) for names in linear.values()):
                known = sorted({name.rpartition(".")[2] for names in linear.values() for name in names})
                raise ValueError(
                    f'tuning.target_modules: no linear layer is called "{target}"; there are {", ".join(known)}'
                )
        for part, tower in towers.items():
            if not found[part]:
                known = sorted({name.rpartition(".")[2] for name in linear[part]})
                there = ", ".join(known) or f"no linear layer: leave {part} out of tuning.parts"
                raise ValueError(f"tuning.target_modules: none is in the {part}, which has {there}")
            add_lora(tower, found[part], rank=self.rank, alpha=self.alpha, dropout=self.dropout)
        for parameter in captioner.parameters():
            if id(parameter) in learning:
                parameter.requires_grad_(True)

    def describe(self, captioner: Captioner) -> str:
        """What learns, in a line."""
        count, total = trainable_parameters(captioner), sum(p.numel() for p in captioner.parameters())
        added = {
            "full": "",
            "last_blocks": f", of towers the last {counted(self.num_blocks, 'block')}",
            "lora": f", LoRA {self.rank} beside {', '.join(_products(captioner))}",
        }
        text = f"{', '.join(self.parts)} learn{added[self.method]}: {count:,} of {total:,} parameters"
        return text + ("" if self.frozen_dtype == "float32" else f"; frozen towers are kept in {self.frozen_dtype}")


def _matching(targets: Sequence[str], names: Sequence[str]) -> list[str]:
    """Which of the targets a tower has, by its layers' names; where it has none, what it calls them."""
    if mine := [target for target in targets if any(name.endswith(target) for name in names)]:
        return mine
    if wrapped := [inner for x in targets if any(n.endswith(inner := f"{x}.linear") for n in names)]:  # Gemma 4's
        return wrapped
    lasts = {name.rpartition(".")[2] for name in names}
    return list(dict.fromkeys(name for target in targets for name in _ALIASES.get(target, ()) if name in lasts))


def _products(captioner: Captioner) -> list[str]:
    """What the layers with a low-rank product are called."""
    return sorted({n.rpartition(".")[2] for n, layer in captioner.named_modules() if hasattr(layer, "lora_A")})


def _decoder(captioner: Captioner) -> nn.Module:
    found = getattr(captioner, "decoder", None)
    return found if isinstance(found, nn.Module) else nn.Module()


def unread_by(captioner: Captioner) -> set[nn.Parameter]:
    """What no caption depends on: the vision encoder's pooling and classes, its blocks behind the one that is read."""
    vision = captioner.vision
    parts = [getattr(vision, "attn_pool", None), getattr(vision, "head", None), getattr(vision, "pool_norm", None)]
    if isinstance(captioner, Llava) and captioner.vision_feature_layers is not None:
        last = max(layer % vision.depth for layer in captioner.vision_feature_layers)
        parts += [vision.norm, *vision.blocks[last + 1 :]]
    contrast = getattr(captioner, "contrastive_parameters", list)()  # of a CoCa
    return {p for part in parts if isinstance(part, nn.Module) for p in part.parameters()} | {*contrast}


def last_blocks(captioner: Captioner, names: Sequence[str], count: int, part: str) -> list[str]:
    """Of a tower's parameters, by their names, those of its last blocks and of the norm behind them.

    Of a vision encoder that is read before its last blocks, the last ones that are read.

    Raises:
        ValueError: If it has no list of blocks, or fewer.
    """
    found: list[str] = []
    unread = unread_by(captioner)
    for tower, blocks in towers_of(captioner):
        prefix = f"{tower}.".removeprefix(".")
        mine = [name for name in names if name.startswith(prefix)]
        if not mine:
            continue
        every: nn.ModuleList = captioner.get_submodule(prefix + blocks)  # pyright: ignore[reportAssignmentType]
        read = [i for i, block in enumerate(every) if not unread.issuperset(block.parameters())]
        if count > len(read):
            raise ValueError(f"tuning.num_blocks ({count}): the {part} has {len(read)}")
        starts = [f"{prefix}{blocks}.{i}." for i in read[-count:]]
        starts += [prefix + norm for norm in ("norm.", "last_norm.", "ln_f.", "final_layer_norm.", "post_layernorm.")]
        found += [name for name in mine if name.startswith(tuple(starts))]
    if not found:
        raise ValueError(f"tuning.method=last_blocks: the {part} of a {type(captioner).__name__} has no list of blocks")
    return found
