"""transformers' BERT -> `TextEncoder`, and back, with the heads that it has."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmtransformer.backbones.encoder import TextEncoder
from mmtransformer.layers.blocks import Activation
from mmtransformer.serialization.pretrained import (
    CONFIG,
    WEIGHTS,
    find_folder,
    load_strictly,
    read_json,
    read_safetensors,
)
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.weights.shared.keys import Row, convert, convert_back, layer

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}


def bert_table(
    depth: int, *, types: bool = True, pooler: bool = True, words: bool = False, sentences: bool = False
) -> list[Row]:
    """Which tensors of `BertForPreTraining` are which of `TextEncoder`; also what a Q-Former starts from.

    Args:
        depth: number of blocks.
        types: whether there are token types.
        pooler: whether there is a pooler.
        words: whether there is a head for masked words.
        sentences: whether there is a head for following sentences.
    """
    embeddings = "bert.embeddings"
    rows = [Row(f"{embeddings}.word_embeddings.weight", ("tok_embed.weight",))]
    rows += [Row(f"{embeddings}.position_embeddings.weight", ("pos_embed.weight",))]
    rows += [Row(f"{embeddings}.token_type_embeddings.weight", ("type_embed.weight",))] * types
    rows += layer(f"{embeddings}.LayerNorm", "norm")
    for i in range(depth):
        theirs, ours = f"bert.encoder.layer.{i}", f"blocks.{i}"
        for there, here in (("query", "q"), ("key", "k"), ("value", "v")):
            rows += layer(f"{theirs}.attention.self.{there}", f"{ours}.attn.{here}_proj")
        rows += layer(f"{theirs}.attention.output.dense", f"{ours}.attn.out_proj")
        rows += layer(f"{theirs}.attention.output.LayerNorm", f"{ours}.norm1")
        rows += layer(f"{theirs}.intermediate.dense", f"{ours}.mlp.fc1")
        rows += layer(f"{theirs}.output.dense", f"{ours}.mlp.fc2")
        rows += layer(f"{theirs}.output.LayerNorm", f"{ours}.norm2")
    rows += layer("bert.pooler.dense", "pool_proj") if pooler else []
    if words:
        rows += layer("cls.predictions.transform.dense", "words_proj.dense")
        rows += layer("cls.predictions.transform.LayerNorm", "words_proj.norm")
        rows += [Row("cls.predictions.bias", ("words_proj.bias",))]
    return rows + (layer("cls.seq_relationship", "sentence_proj") if sentences else [])


def _table_of(encoder: TextEncoder) -> list[Row]:
    return bert_table(
        encoder.depth,
        types=bool(encoder.num_types),
        pooler=encoder.pooler,
        words=encoder.word_head,
        sentences=encoder.sentence_head,
    )


def encoder_from_bert(config: dict[str, Any], state: dict[str, Tensor], context: str) -> TextEncoder:
    """A `TextEncoder` with BERT's weights and those of its heads that are there.

    Args:
        config: BERT's configuration, as in its `config.json`.
        state: tensors named as in `BertForPreTraining`, or as in `BertModel` (without "bert."); the first releases'
            "gamma" and "beta" of norms are understood.
        context: what they come from, for errors.

    Raises:
        ValueError: for a variant of BERT that differs in more than its size.
    """
    activation = config.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{context}: TextEncoder has no activation like {activation}")
    if (kind := config.get("position_embedding_type") or "absolute") != "absolute":
        raise ValueError(f'{context} has "{kind}" positions: TextEncoder has absolute ones only')
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise ValueError(
            f"{context} is a decoder or has cross-attention: TextEncoder sees both ways and has none"
        )
    if not any(name.startswith("bert.") for name in state):
        state = {f"bert.{name}": tensor for name, tensor in state.items()}
    state = {_new_name(name): tensor for name, tensor in state.items()}
    words = "cls.predictions.transform.dense.weight" in state
    if words and not config.get("tie_word_embeddings", True):
        raise ValueError(f"{context} has a word head of its own: TextEncoder's is tied to the embedding")
    encoder = TextEncoder(
        config["vocab_size"],
        config["hidden_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        max_len=config["max_position_embeddings"],
        num_types=config.get("type_vocab_size", 2),
        activation=_ACTIVATIONS[activation],
        norm_eps=config.get("layer_norm_eps", 1e-12),
        pooler="bert.pooler.dense.weight" in state,
        word_head=words,
        sentence_head="cls.seq_relationship.weight" in state,
        dropout=config.get("hidden_dropout_prob", 0.1),
    )
    expand_size = [
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
        "bert.embeddings.position_ids",
    ]
    load_strictly(encoder, convert(_table_of(encoder), state, context, ignored=expand_size), context)
    return encoder.eval()


def _new_name(name: str) -> str:
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def encoder_to_bert(encoder: TextEncoder) -> dict[str, Tensor]:
    """Tensors named as in `BertForPreTraining`, for the heads that there are."""
    theirs = convert_back(_table_of(encoder), dict(encoder.state_dict()))
    if encoder.word_head:
        theirs["cls.predictions.decoder.weight"] = theirs["bert.embeddings.word_embeddings.weight"]
        theirs["cls.predictions.decoder.bias"] = theirs["cls.predictions.bias"]
    return theirs


def from_bert(model: nn.Module) -> TextEncoder:
    """A `TextEncoder` with the weights of a transformers BERT; equal to 1e-5 in float32.

    Raises:
        ValueError: if it is no BERT, or one that differs in more than its size.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "bert":
        raise ValueError(f"{type(model).__name__} is not a BERT of transformers")
    return encoder_from_bert(config.to_dict(), model.state_dict(), f"transformers' {type(model).__name__}")


def load_encoder(source: str) -> TextEncoder:
    """A pretrained text encoder, from what is there: for recipes (`class_path: mmtransformer.weights.load_encoder`).

    Args:
        source: a folder (saved by this library, or `config.json` and `model.safetensors` with BERT's names), or the
            name of a hub repository.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    folder: Path = find_folder(source)
    config = read_json(folder / CONFIG)
    if "class" in config:
        return TextEncoder.from_pretrained(folder)
    if (family := config.get("model_type")) != "bert":
        raise ValueError(f'{folder / CONFIG}: the family "{family}" is not known here: bert is')
    state = read_safetensors(folder / WEIGHTS)
    with built_from(state, str(folder)):
        return encoder_from_bert(config, state, str(folder))
