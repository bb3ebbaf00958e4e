"""transformers' RoBERTa and XLM-RoBERTa -> `TextEncoder`, and back: BERT, whose positions begin behind the padding's.

Its table of positions has a row for each id up to that of padding before the first token's, which no token reads.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.encoder import TextEncoder
from mmtransformer.weights.shared.configs import SIZES, SOURCE_ACTIVATIONS, write_sizes
from mmtransformer.weights.text.bert import encoder_from_bert, encoder_to_bert

ROBERTA_TYPES = ("roberta", "xlm-roberta")
"""`model_type` of both."""

_POSITIONS = "embeddings.position_embeddings.weight"
_USUAL: dict[str, Any] = {"pad_token_id": 1, "layer_norm_eps": 1e-12, "max_position_embeddings": 512}


def encoder_from_roberta(config: Mapping[str, Any], state: Mapping[str, Tensor], context: str) -> TextEncoder:
    """A `TextEncoder` with RoBERTa's weights, with its pooler if there is one; equal to 1e-5 in float32.

    Args:
        config: its configuration.
        state: tensors named as in `RobertaModel`, which are BERT's names.
        context: what they come from, for errors.

    Raises:
        ValueError: for a variant that differs in more than its size, and tensors that do not fit.
    """
    config = {**_USUAL, **{name: value for name, value in config.items() if value is not None}}
    first = config["pad_token_id"] + 1
    config["max_position_embeddings"] -= first
    state = {name: tensor for name, tensor in state.items() if not name.endswith("_ids")}
    if _POSITIONS in state:
        state[_POSITIONS] = state[_POSITIONS][first:]
    return encoder_from_bert(config, state, context)


def encoder_to_roberta(encoder: TextEncoder, pad_id: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sizes and the like of a config.json, and tensors named as in `RobertaModel`.

    Args:
        encoder: the encoder.
        pad_id: the id of padding; positions begin behind it.
    """
    tensors = {name.removeprefix("bert."): tensor for name, tensor in encoder_to_bert(encoder).items()}
    rows = tensors[_POSITIONS]
    tensors[_POSITIONS] = torch.cat((rows.new_zeros(pad_id + 1, rows.shape[1]), rows))
    config = {
        **write_sizes(encoder, SIZES),
        "max_position_embeddings": encoder.max_len + pad_id + 1,
        "type_vocab_size": encoder.num_types,
        "hidden_act": SOURCE_ACTIVATIONS[encoder.activation],
        "layer_norm_eps": encoder.norm_eps,
        "hidden_dropout_prob": encoder.dropout,
        "pad_token_id": pad_id,
    }
    return config, tensors
