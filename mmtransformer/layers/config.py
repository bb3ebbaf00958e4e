"""Constructor arguments that belong together: frozen, plain values, in YAML and JSON a mapping of the same names."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from types import MappingProxyType
from typing import Any, Literal, TypeVar

Norm = Literal["layer", "rms"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]

Kind = TypeVar("Kind", bound=type)


def check_sizes(least: int = 1, **sizes: int | None) -> None:
    """Refuses what is no size of a model: fractions, texts, and numbers below the least; None is none.

    Raises:
        ValueError: naming the first.
    """
    for name, size in sizes.items():
        if size is None:
            continue
        if not isinstance(size, Integral) or isinstance(size, bool):
            raise ValueError(f"{name} must be a whole number, not {size!r:.80}")
        if size < least:
            raise ValueError(f"{name} must be at least {least}, not {size}")


def check_configs(**given: tuple[object, type]) -> None:
    """Refuses what is no settings object where one belongs, such as `positions="rotary"`.

    Args:
        given: by the argument's name, its value and the class that it has to be of.

    Raises:
        TypeError: naming the first, and what its class holds.
    """
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            held = ", ".join(field.name for field in fields(kind) if field.init)
            raise TypeError(f"{name} must be of {kind.__name__}({held}), not {value!r:.80}")


def known_fields(kind: Kind, elsewhere: Mapping[str, str] = MappingProxyType({})) -> Kind:
    """A dataclass whose error for a keyword that it has not names the nearest that it has.

    Args:
        kind: the dataclass.
        elsewhere: names of other libraries -> what they are called here; "" = there is no such thing, whatever is near.
    """
    init: Any = kind.__init__
    known = [field.name for field in fields(kind) if field.init]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        for name in given:
            if name not in known:
                import difflib

                near = elsewhere.get(name, *difflib.get_close_matches(name, known, n=1, cutoff=0.6))
                hint = f'; did you mean "{near}"?' if near else f": it has {', '.join(known)}"
                raise TypeError(f'{kind.__name__} has no "{name}"{hint}')
        init(self, *args, **given)

    kind.__init__ = checked
    return kind


@known_fields
@dataclass(frozen=True)
class AttentionConfig:
    """How a decoder's tokens attend; GPT-2's way by default.

    Args:
        num_kv_heads: key/value heads (grouped-query attention, arXiv:2305.13245); None = as many as query heads.
        head_dim: width of one head; None = dim / num_heads.
        bias: whether queries, keys and values have biases (GPT-2, OPT, Qwen2; not Llama).
        out_bias: whether the output has one; None = as `bias` (Qwen2: false).
        qk_norm: norm of each head's queries and keys (Qwen3: "rms").
        window: a token looks at so many tokens up to itself (Mistral); None = at all.
        full_interval: the last of every so many blocks has no window (Gemma 2: 2); None = all have it.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2: 50); None = they stay.
        scale_dim: scores are divided by the root of this (Gemma 2 27B: 144); None = of a head's width.

    Raises:
        ValueError: for a window without a token, or blocks without one where there is none.
    """

    num_kv_heads: int | None = None
    head_dim: int | None = None
    bias: bool = True
    out_bias: bool | None = None
    qk_norm: Literal["rms", "layer"] | None = None
    window: int | None = None
    full_interval: int | None = None
    softcap: float | None = None
    scale_dim: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 token, not {self.window}")
        if self.full_interval is not None and (self.full_interval < 1 or self.window is None):
            raise ValueError(
                f"full_interval ({self.full_interval}) must be at least 1, with a window ({self.window}) elsewhere"
            )


@known_fields
@dataclass(frozen=True)
class MLPConfig:
    """A decoder's MLPs; GPT-2's by default.

    Args:
        activation: "swiglu" (Llama, arXiv:2002.05202), "geglu_tanh" (Gemma), or the activation between two
            layers; "gelu_tanh" is GPT-2's, "relu" OPT's.
        bias: whether the layers have biases; "swiglu" and "geglu_tanh" have none.
    """

    activation: Activation | Literal["swiglu", "geglu_tanh"] = "gelu_tanh"
    bias: bool = True


@known_fields
@dataclass(frozen=True)
class NormConfig:
    """A decoder's norms; GPT-2's by default.

    Args:
        kind: "layer" (GPT-2, OPT), "rms" (Llama) or "rms_offset", whose weights stand for 1 + themselves (Gemma).
        eps: added to variances.
        pre: norm before each branch, and a last one; false = after each sum, and no last one (2017, OPT-350m).
        embed: whether placed embeddings are normed before the first block (BERT, BLIP's text decoder).
        post: whether what a branch gives is normed too, before it is added (Gemma 2); with `pre` only.

    Raises:
        ValueError: for `post` without `pre`.
    """

    kind: Norm | Literal["rms_offset"] = "layer"
    eps: float = 1e-5
    pre: bool = True
    embed: bool = False
    post: bool = False

    def __post_init__(self) -> None:
        if self.post and not self.pre:
            raise ValueError("post is for decoders with a norm before each branch: pre must be true")


@known_fields
@dataclass(frozen=True)
class PositionConfig:
    """How a decoder's tokens know where they stand.

    Args:
        kind: "learned" (GPT-2, OPT), "rotary" (Llama) or "sinusoidal" (the 2017 Transformer).
        theta: base of the rotary wave lengths.
        scaling: how rotary positions reach longer contexts than trained on, see `positions.scaled_rates`.
        nope_interval: the last of every so many blocks does not turn queries and keys (SmolLM3: 4); None = all do.
        embed_scale: what embeddings are multiplied by before positions are added; sqrt(dim) in the 2017 Transformer.

    Raises:
        ValueError: for an unknown kind, or an interval that is none.
    """

    kind: Literal["learned", "rotary", "sinusoidal"] = "learned"
    theta: float = 10_000.0
    scaling: dict[str, Any] | None = None
    nope_interval: int | None = None
    embed_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("learned", "rotary", "sinusoidal"):
            raise ValueError(f'positions must be "learned", "rotary" or "sinusoidal", not "{self.kind}"')
        if self.nope_interval is not None and (self.nope_interval < 1 or self.kind != "rotary"):
            raise ValueError(
                f'nope_interval ({self.nope_interval}) must be at least 1, with positions "rotary", not "{self.kind}"'
            )
