"""What the families of language models share: a head that may be tied, and names that may lack their prefix."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.weights.shared.keys import export, fill

_HEAD = "lm_head.weight"


def fill_decoder(
    decoder: TextDecoder,
    keys: Mapping[str, str],
    state: Mapping[str, Tensor],
    context: str,
    *,
    transposed: tuple[str, ...] = (),
    buffers: tuple[str, ...] = (),
) -> TextDecoder:
    """The decoder with these tensors, in evaluation mode.

    Args:
        decoder: the decoder.
        keys: the key table; its first key is the embedding.
        state: named as the model with its head, or as the bare model, without the first part of the embedding's name.
        context: what they come from, for errors.
        transposed: see `keys.key_mappings`.
        buffers: ends of names that are not read.

    Raises:
        ValueError: for tensors that do not fit, and a head of its own where the config ties it to the embedding.
    """
    embedding = f"{next(iter(keys))}.weight"
    prefix = embedding.split(".")[0] + "."
    if not any(name.startswith(prefix) for name in state):
        state = {name if name == _HEAD else prefix + name: tensor for name, tensor in state.items()}
    ignored = [name for name in state if name.endswith(buffers)] if buffers else []
    copy = state.get(_HEAD) if decoder.tied else None
    if copy is not None:
        ignored.append(_HEAD)
        if embedding in state and not torch.equal(copy, state[embedding]):
            raise ValueError(
                f"{context}: the config ties {_HEAD} to {embedding}, but the two are different: one of them is wrong"
            )
    fill(decoder, keys, state, context, ignored=ignored, kept=_tied(decoder), transposed=transposed)
    decoder.eval()
    return decoder


def decoder_tensors(
    decoder: TextDecoder, keys: Mapping[str, str], context: str, *, transposed: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The decoder's tensors by the other project's names, a tied head last.

    Raises:
        ValueError: naming tensors that the family has no place for.
    """
    source = export(decoder, keys, context, kept=_tied(decoder), transposed=transposed)
    return source | ({_HEAD: source[f"{next(iter(keys))}.weight"]} if decoder.tied else {})


def _tied(decoder: TextDecoder) -> tuple[str, ...]:
    return (_HEAD,) if decoder.tied else ()
