"""Captioners compared: the same towers, as many numbers to learn between them, the same steps and data."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import nn

from mmtransformer.backbones.base import Decoder
from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.backbones.vit import ViT
from mmtransformer.captioners.base import Captioner
from mmtransformer.captioners.blip2 import Blip2
from mmtransformer.captioners.flamingo import Flamingo, GatedBlockConfig
from mmtransformer.captioners.prefix import PrefixCaptioner
from mmtransformer.captioners.vision_encoder_decoder import VisionEncoderDecoder, add_cross_attention
from mmtransformer.connectors.qformer import QFormer
from mmtransformer.connectors.resampler import PerceiverResampler
from mmtransformer.connectors.transformer import TransformerConnector
from mmtransformer.layers.modes import is_frozen
from mmtransformer.metrics.scores import HEADLINE, TABLE
from mmtransformer.serialization.pretrained import from_config, to_config


class Frozen(TypedDict):
    """Which towers do not learn."""

    freeze_vision: bool
    freeze_decoder: bool


NUM_QUERIES = 32
"""What the Q-Former and the resampler turn a picture into."""


def cross(vision: ViT, decoder: Decoder, size: int, frozen: Frozen) -> Captioner:
    """Cross-attention in every block, to an encoder block's view of the patches; `size` is the width of its heads."""
    if not isinstance(decoder, TextDecoder):
        raise ValueError(f"cross-attention is added to a TextDecoder, not to a {type(decoder).__name__}")
    connector = TransformerConnector(vision.dim, 4 * size, 1, 4)
    return VisionEncoderDecoder(vision, add_cross_attention(decoder, 4 * size), connector=connector, **frozen)


def flamingo(vision: ViT, decoder: Decoder, size: int, frozen: Frozen) -> Captioner:
    """A resampler of one block, and gated attention before every block; `size` is the width of their MLPs."""
    heads, width = _heads(decoder.dim)
    resampler = PerceiverResampler(vision.dim, 1, heads, width, NUM_QUERIES, mlp_dim=size)
    return Flamingo(vision, decoder, connector=resampler, gated=GatedBlockConfig(heads, width, mlp_dim=size), **frozen)


def qformer(vision: ViT, decoder: Decoder, size: int, frozen: Frozen) -> Captioner:
    """A Q-Former of two blocks, queries in front of the text; `size` is the width of its MLPs."""
    heads, _ = _heads(decoder.dim)
    queries = QFormer(NUM_QUERIES, decoder.dim, 2, heads, vision.dim, cross_attention_frequency=1, mlp_dim=size)
    return Blip2(vision, queries, decoder, **frozen)


def prefix(vision: ViT, decoder: Decoder, size: int, frozen: Frozen) -> Captioner:
    """An MLP, patches in front of the text, merged until they leave half the room to it; `size` is its width."""
    gh, gw = vision.grid_size
    fits = (s for s in range(1, gh + 1) if not (gh % s or gw % s) and 2 * gh * gw // s**2 <= decoder.max_len)
    pixel_shuffle = next(fits, gh)
    return PrefixCaptioner(vision, decoder, hidden_dim=size, pixel_shuffle=pixel_shuffle, **frozen)


def _heads(dim: int) -> tuple[int, int]:
    """As many heads as have a width of at least 32, and their width."""
    heads = next(h for h in range(max(dim // 32, 1), 0, -1) if dim % h == 0)
    return heads, dim // heads


Build = Callable[..., Captioner]
CAPTIONERS: dict[str, Build] = {"cross": cross, "flamingo": flamingo, "qformer": qformer, "prefix": prefix}


def connector_parameters(captioner: Captioner) -> int:
    """How many numbers are learned outside the vision tower and what the language model brought along."""
    own = {id(p) for p in captioner.vision.parameters()}
    decoder: Any = getattr(captioner, "decoder", None)
    if not isinstance(captioner, VisionEncoderDecoder) and isinstance(decoder, nn.Module):
        own |= {id(p) for p in decoder.parameters()}
    elif isinstance(captioner, VisionEncoderDecoder):
        names = captioner.decoder.named_parameters()
        own |= {id(p) for name, p in names if ".cross_attn." not in name and ".norm_cross." not in name}
    return sum(p.numel() for p in captioner.parameters() if p.requires_grad and id(p) not in own)


def with_towers_of(captioner: Captioner, name: str, parameters: int) -> Captioner:
    """Another captioner of the same towers, frozen where they were: see `sized`.

    Raises:
        ValueError: if it has no language model that reads text alone, and as `sized`.
    """
    decoder = getattr(captioner, "decoder", None)
    if not isinstance(decoder, Decoder):
        raise ValueError("ablate needs a recipe of mmtransformer.training.Captioning with a language model")
    if getattr(decoder, "context_dim", None) is not None:
        raise ValueError(
            "the recipe's language model has a connector within it, cross-attention: ablate needs one that reads text "
            "alone, as that of flamingo_scenes does"
        )
    frozen = Frozen(freeze_vision=is_frozen(captioner.vision), freeze_decoder=is_frozen(decoder))
    return sized(name, captioner.vision, decoder, parameters, frozen)


def sized(name: str, vision: ViT, decoder: Decoder, parameters: int, frozen: Frozen) -> Captioner:
    """A captioner with as nearly so many parameters between its towers as its width allows.

    Args:
        name: one of `CAPTIONERS`.
        vision: the vision tower.
        decoder: the language model.
        parameters: how many numbers are to be learned between the two.
        frozen: which towers do not learn.

    Raises:
        ValueError: for a captioner that there is not, or one that cannot be so small.
    """
    check_captioners([name])
    build = CAPTIONERS[name]
    with torch.device("meta"):
        towers = [from_config(to_config(part)) for part in (vision, decoder)]  # pyright: ignore[reportArgumentType]

        def count(size: int) -> int:
            return connector_parameters(build(*towers, size, frozen))

        low, high = 1, 2
        if (least := count(low)) > parameters:
            raise ValueError(
                f'the captioner "{name}" has at least {least:,} parameters between its towers, more than {parameters:,}'
            )
        while count(high) < parameters:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle) <= parameters else (low, middle)
        nearest = min((low, high), key=lambda size: abs(count(size) - parameters))
    return build(vision, decoder, nearest, frozen)


def check_captioners(captioners: Sequence[str]) -> None:
    """Refuses names that are none of `CAPTIONERS`.

    Raises:
        ValueError: naming them, and the captioners that there are.
    """
    if unknown := [name for name in captioners if name not in CAPTIONERS]:
        raise ValueError(f"no captioner {', '.join(unknown)}; there are {', '.join(CAPTIONERS)}")


def headline(names: Iterable[str]) -> list[str]:
    """Those of `scores_of` that are drawn."""
    return [name for name in names if name.startswith(("facts", *(TABLE[n].label for n in HEADLINE)))]


def scores_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a run's metrics.json that are compared."""
    found: dict[str, float] = {}
    for split, by in metrics.get("facts", {}).items():
        found |= {f"facts % {split} {language}": 100 * x for language, x in by.items()}
    if not found:
        for split, by in metrics.get("captions", {}).items():
            for language, scores in by.items():
                label = f"{split}" if language == "any" else f"{split} {language}"
                values = scores["values"]
                found |= {f"{TABLE[n].label} {label}": TABLE[n].times * values[n] for n in HEADLINE if n in values}
    for split, losses in metrics.get("image_ablation", {}).items():
        found |= {f"{split} {name.replace('_', ' ')}": x for name, x in losses.items()}
    training = metrics["training"]
    found |= {"connector parameters": metrics["connector_parameters"], "steps": training["steps"]}
    return found | {"seconds": training["seconds"]}
