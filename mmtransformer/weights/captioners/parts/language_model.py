"""What captioners of several parts share: names of several layouts sorted into parts, and a language model."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.base import Decoder
from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.weights.shared.configs import only_these
from mmtransformer.weights.text.llama import USUAL, decoder_to_llama, llama_config, llamas_of
from mmtransformer.weights.text.lm import decoder_from_state

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def sorted_out(state: Mapping[str, Tensor], layout: Mapping[str, str], context: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of each part, by their names in it.

    Args:
        state: all tensors.
        layout: patterns of whole names, and "part.name in it" for each; the first that fits counts.
        context: what they come from, for errors.

    Raises:
        ValueError: naming tensors that belong nowhere, or in one place twice.
    """
    parts: dict[str, dict[str, Tensor]] = {place.split(".")[0]: {} for place in layout.values()}
    strange: list[str] = []
    for name, tensor in state.items():
        found = next((m.expand(to) for pattern, to in layout.items() if (m := re.fullmatch(pattern, name))), "")
        part, _, inner = found.partition(".")
        if not found or inner in parts[part]:
            strange.append(name)
        else:
            parts[part][inner] = tensor
    if strange:
        raise ValueError(f"{context} has tensors that belong nowhere: {', '.join(strange[:5])} ({len(strange)} in all)")
    return parts


def language_model(config: Mapping[str, Any], state: dict[str, Tensor], context: str, *, tied: bool) -> Decoder:
    """The language model of a captioner, from its part of the config and its tensors.

    Args:
        config: its configuration; what is usual may be left out.
        state: its tensors, named as alone.
        context: what they come from, for errors.
        tied: whether the captioner's config ties the head to the embedding. A head of its own that the file has is
            kept nevertheless, as transformers keeps it.

    Raises:
        ValueError: if it is none of the families of `load_lm`, or does not fit.
    """
    head, table = state.get(_HEAD), state.get(_EMBEDDING)
    if tied and head is not None and table is not None:
        tied = torch.equal(head, table)
    config = {**USUAL.get(str(config.get("model_type")), {}), **config, "tie_word_embeddings": tied}
    return decoder_from_state(config, state, context)


def language_model_to(decoder: Decoder, context: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a language model, named as alone.

    Raises:
        ValueError: if it is not a `TextDecoder` of Llama's kind.
    """
    if not isinstance(decoder, TextDecoder):
        raise ValueError(f"{context} is written with a TextDecoder, not with a {type(decoder).__name__}")
    only_these(context, {"a decoder of Llama's kind": (bool(llamas_of(decoder)), True)})
    return llama_config(decoder, llamas_of(decoder)[0]), decoder_to_llama(decoder)
