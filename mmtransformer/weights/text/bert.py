"""transformers' BERT -> `TextEncoder`, and its decoders -> `TextDecoder`; and back, with the heads that there are."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.backbones.encoder import TextEncoder
from mmtransformer.layers.config import AttentionConfig, MLPConfig, NormConfig, PositionConfig
from mmtransformer.serialization.pretrained import CONFIG, find_folder, read_json
from mmtransformer.weights.shared.configs import (
    SIZES,
    SOURCE_ACTIVATIONS,
    activation_of,
    only_these,
    read_sizes,
    write_sizes,
)
from mmtransformer.weights.shared.folders import model_from_folder, write_folder
from mmtransformer.weights.shared.keys import export, fill, nested

_STACK = {
    "embeddings.[word,position,token_type]_embeddings": "[tok,pos,type]_embed",
    "encoder.layer.*.attention.self.[query,key,value]": "blocks.*.attn.[q,k,v]_proj",
    "encoder.layer.*.attention.output.dense": "blocks.*.attn.out_proj",
    "encoder.layer.*.attention.output.LayerNorm": "blocks.*.norm1",
    "encoder.layer.*.crossattention.self.[query,key,value]": "blocks.*.cross_attn.[q,k,v]_proj",
    "encoder.layer.*.crossattention.output.dense": "blocks.*.cross_attn.out_proj",
    "encoder.layer.*.crossattention.output.LayerNorm": "blocks.*.norm_cross",
    "encoder.layer.*.[intermediate,output].dense": "blocks.*.mlp.[fc1,fc2]",
    "encoder.layer.*.output.LayerNorm": "blocks.*.norm2",
}
_WORDS = {
    "cls.predictions.transform.[dense,LayerNorm]": "mlm_proj.[dense,norm]",
    "cls.predictions.bias": "mlm_proj.bias",
}
_KEYS = nested(_STACK, source="bert.") | {
    "bert.embeddings.LayerNorm": "norm",
    "bert.pooler.dense": "pool_proj",
    **_WORDS,
    "cls.seq_relationship": "nsp_proj",
}
_CROSS_ENCODER = _STACK | {"embeddings.LayerNorm": "norm"}
_DECODER = nested(_STACK, source="bert.") | {"bert.embeddings.LayerNorm": "embed_norm", **_WORDS}
_COPIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_CLASSES = {  # by (pooler, mlm_head, nsp_head)
    (True, True, True): "BertForPreTraining",
    (False, True, False): "BertForMaskedLM",
    (True, False, True): "BertForNextSentencePrediction",
    (True, False, False): "BertModel",
    (False, False, False): "BertModel",
}


def bert_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's tensors with "bert." in front."""
    prefix = "" if any(name.startswith("bert.") for name in state) else "bert."
    return {prefix + name: tensor for name, tensor in state.items()}


def encoder_from_bert(config: dict[str, Any], state: dict[str, Tensor], context: str) -> TextEncoder:
    """A `TextEncoder` with BERT's weights and those of its heads that are there.

    Args:
        config: BERT's configuration, as in its `config.json`.
        state: tensors named as in `BertForPreTraining`, or as in `BertModel` (without "bert.").
        context: what they come from, for errors.

    Raises:
        ValueError: for a variant of BERT that differs in more than its size.
    """
    activation = activation_of(config, "hidden_act", context)
    if (kind := config.get("position_embedding_type") or "absolute") != "absolute":
        raise ValueError(f'{context} has "{kind}" positions: TextEncoder has absolute ones only')
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise ValueError(
            f"{context} is a decoder or has cross-attention: only encoders that read a text alone are read"
        )
    state = bert_names(state)
    words = "cls.predictions.transform.dense.weight" in state
    if words and not config.get("tie_word_embeddings", True):
        raise ValueError(f"{context} has an MLM head of its own: TextEncoder's is tied to the embedding")
    encoder = TextEncoder(
        **read_sizes(config, SIZES, context),
        num_types=config.get("type_vocab_size", 2),
        activation=activation,
        norm_eps=config.get("layer_norm_eps", 1e-12),
        pooler="bert.pooler.dense.weight" in state,
        mlm_head=words,
        nsp_head="cls.seq_relationship.weight" in state,
        dropout=config.get("hidden_dropout_prob", 0.1),
    )
    fill(encoder, _KEYS, state, context, ignored=_COPIES)
    return encoder.eval()


def cross_encoder_from_bert(
    config: dict[str, Any], state: dict[str, Tensor], context: str, *, context_dim: int
) -> TextEncoder:
    """A `TextEncoder` that can read a context, without token types and heads: BLIP's.

    Args:
        config: its configuration.
        state: tensors named as in `BertModel`.
        context: what they come from, for errors.
        context_dim: width of the context's tokens.

    Raises:
        ValueError: for a variant that differs in more than its size, and tensors that do not fit.
    """
    encoder = TextEncoder(
        **read_sizes(config, SIZES, context),
        num_types=0,
        context_dim=context_dim,
        activation=activation_of(config, "hidden_act", context),
        norm_eps=config["layer_norm_eps"],
        pooler=False,
        dropout=config["hidden_dropout_prob"],
    )
    fill(encoder, _CROSS_ENCODER, state, context)
    return encoder.eval()


def cross_encoder_to_bert(encoder: TextEncoder, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sizes and the like of a config.json, and tensors named as in `BertModel`.

    Args:
        encoder: the encoder.
        name: what the other project calls it, for errors.

    Raises:
        ValueError: if it has token types or heads.
    """
    only_these(name, {"num_types": (encoder.num_types, 0)})
    config = {
        **write_sizes(encoder, SIZES),
        "hidden_act": SOURCE_ACTIVATIONS[encoder.activation],
        "layer_norm_eps": encoder.norm_eps,
        "hidden_dropout_prob": encoder.dropout,
        "attention_probs_dropout_prob": encoder.dropout,
    }
    return config, export(encoder, _CROSS_ENCODER, name)


def encoder_to_bert(encoder: TextEncoder) -> dict[str, Tensor]:
    """Tensors named as in `BertForPreTraining`, for the heads that there are."""
    source = export(encoder, _KEYS, "BERT")
    return source | ({copy: source[name] for copy, name in _COPIES.items()} if encoder.mlm_head else {})


def decoder_from_bert(
    config: dict[str, Any], state: dict[str, Tensor], context: str, *, context_dim: int | None
) -> TextDecoder:
    """A `TextDecoder` with the weights of a BERT that looks back only (BLIP's, or a `BertLMHeadModel`).

    Args:
        config: its configuration.
        state: tensors named as in `BertLMHeadModel`; all tokens are of type 0, which is added to their positions.
        context: what they come from, for errors.
        context_dim: width of the tokens that cross-attention reads; None = it has none.

    Raises:
        ValueError: for a variant that differs in more than its size, and tensors that do not fit.
    """
    decoder = TextDecoder(
        **read_sizes(config, SIZES, context),
        context_dim=context_dim,
        mlp=MLPConfig(activation_of(config, "hidden_act", context)),
        norm=NormConfig(eps=config.get("layer_norm_eps", 1e-12), pre=False, embed=True),
        mlm_head=True,
        dropout=config.get("hidden_dropout_prob", 0.1),
    )
    state = bert_names(state)
    for copy, name in _COPIES.items():
        if copy in state and name in state and not torch.equal(state[copy], state[name]):
            raise ValueError(f"{context}: {copy} and {name} are tied, but the two are different: one of them is wrong")
    positions = "bert.embeddings.position_embeddings.weight"
    types = state.pop("bert.embeddings.token_type_embeddings.weight", None)
    if types is not None and positions in state:
        state[positions] = state[positions].float() + types[0].float()  # of half precision no digit is lost
    fill(decoder, _DECODER, state, context, ignored=_COPIES, kept=("lm_head.",))
    return decoder.eval()


def decoder_to_bert(decoder: TextDecoder, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sizes and the like of a config.json, and tensors named as in `BertLMHeadModel`, without token types.

    Args:
        decoder: the decoder.
        name: what the other project calls it, for errors.

    Raises:
        ValueError: if it is not a BERT.
    """
    facts = {
        "cross_attn_every_n_layers": (decoder.cross_attn_every_n_layers, 1),
        "attention": (decoder.attention, AttentionConfig()),
        "mlp": (decoder.mlp, MLPConfig(decoder.mlp.activation)),
        "norm": (decoder.norm, NormConfig(eps=decoder.norm.eps, pre=False, embed=True)),
        "positions": (decoder.positions, PositionConfig()),
        "tied": (decoder.tied, True),
        "mlm_head": (decoder.mlm_head, True),
    }
    only_these(name, facts)
    tensors = export(decoder, _DECODER, name, kept=("lm_head.",))
    config = {
        **write_sizes(decoder, SIZES),
        "hidden_act": SOURCE_ACTIVATIONS[decoder.mlp.activation],  # pyright: ignore[reportArgumentType]  # Not swiglu.
        "layer_norm_eps": decoder.norm.eps,
        "hidden_dropout_prob": decoder.dropout,
        "attention_probs_dropout_prob": decoder.dropout,
    }
    return config, tensors | {copy: tensors[own] for copy, own in _COPIES.items()}


def load_bert(source: str | Path) -> TextEncoder:
    """A pretrained text encoder, from what is there: for recipes (`class_path: mmtransformer.weights.load_bert`).

    Args:
        source: a folder (saved by this library, or `config.json` and `model.safetensors` with BERT's names), or the
            name of a hub repository.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    folder = find_folder(source)
    if "class" in read_json(folder / CONFIG):
        return TextEncoder.from_pretrained(folder)
    return model_from_folder(folder, encoder_from_bert, "bert")


def save_bert(encoder: TextEncoder, folder: str | Path) -> None:
    """Writes a BERT that transformers reads: `config.json` and `model.safetensors`.

    Raises:
        ValueError: if transformers has no BERT with these heads, before anything is written.
    """
    heads = (encoder.pooler, encoder.mlm_head, encoder.nsp_head)
    if heads not in _CLASSES or not encoder.num_types:
        raise ValueError(
            f"transformers has no BERT with pooler {heads[0]}, mlm_head {heads[1]}, nsp_head {heads[2]} and "
            f"{encoder.num_types} token types"
        )
    tensors = encoder_to_bert(encoder)
    if _CLASSES[heads] == "BertModel":
        tensors = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    config = {
        "model_type": "bert",
        "architectures": [_CLASSES[heads]],
        **write_sizes(encoder, SIZES),
        "type_vocab_size": encoder.num_types,
        "hidden_act": SOURCE_ACTIVATIONS[encoder.activation],
        "layer_norm_eps": encoder.norm_eps,
        "hidden_dropout_prob": encoder.dropout,
        "attention_probs_dropout_prob": encoder.dropout,
    }
    write_folder(folder, config, tensors)
