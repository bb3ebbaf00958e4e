"""The Q-Former's tensors by three spellings, transformers' (two of them) and LAVIS's; and its start from BERT."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmtransformer.connectors.qformer import QFormer
from mmtransformer.serialization.pretrained import CONFIG, WEIGHTS, find_folder, read_json, read_safetensors
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.weights.shared.keys import Row, layer


class KeyStyle(NamedTuple):
    """How a project names a Q-Former's tensors.

    Attributes:
        layers: where the blocks are.
        attention: what stands between "attention" and "query".
        norm: the norm of the embeddings.
        words: where words and positions are, for a Q-Former with a text stream.
    """

    layers: str
    attention: str
    norm: str
    words: str


BLIP2 = KeyStyle("qformer.encoder.layer", "attention", "qformer.layernorm", "embeddings")
INSTRUCTBLIP = KeyStyle(
    "qformer.encoder.layer", "attention", "qformer.embeddings.layernorm", "qformer.embeddings"
)
LAVIS = KeyStyle(
    "Qformer.bert.encoder.layer", "self", "Qformer.bert.embeddings.LayerNorm", "Qformer.bert.embeddings"
)


def qformer_table(qformer: QFormer, style: KeyStyle) -> list[Row]:
    """Which of their tensors is which of this Q-Former's."""
    rows = [Row("query_tokens", ("query_tokens",))] + layer(style.norm, "norm")
    text = qformer.vocab_size is not None
    if text:
        rows += [Row(f"{style.words}.word_embeddings.weight", ("tok_embed.weight",))]
        rows += [Row(f"{style.words}.position_embeddings.weight", ("pos_embed.weight",))]
    for i in range(qformer.depth):
        theirs, ours = f"{style.layers}.{i}", f"blocks.{i}"
        rows += _attention(f"{theirs}.attention", f"{ours}.attn", f"{ours}.norm1", style)
        if i in qformer.cross_layers:
            rows += _attention(f"{theirs}.crossattention", f"{ours}.cross_attn", f"{ours}.norm_cross", style)
        rows += _mlp(theirs, "_query", f"{ours}.query_mlp", f"{ours}.query_norm")
        rows += _mlp(theirs, "", f"{ours}.mlp", f"{ours}.norm2") if text else []
    return rows


def _attention(theirs: str, ours: str, norm: str, style: KeyStyle) -> list[Row]:
    rows: list[Row] = []
    for there, here in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        rows += layer(f"{theirs}.{style.attention}.{there}", f"{ours}.{here}")
    return (
        rows + layer(f"{theirs}.output.dense", f"{ours}.out_proj") + layer(f"{theirs}.output.LayerNorm", norm)
    )


def _mlp(theirs: str, which: str, ours: str, norm: str) -> list[Row]:
    rows = layer(f"{theirs}.intermediate{which}.dense", f"{ours}.fc1")
    rows += layer(f"{theirs}.output{which}.dense", f"{ours}.fc2")
    return rows + layer(f"{theirs}.output{which}.LayerNorm", norm)


def under(prefix: str, table: list[Row]) -> list[Row]:
    """The table with a prefix before our names."""
    return [
        Row(row.source, tuple(f"{prefix}.{name}" for name in row.target), row.transposed) for row in table
    ]


def init_from_bert(qformer: QFormer, bert: nn.Module | dict[str, Tensor]) -> QFormer:
    """Starts a Q-Former from BERT, as BLIP-2 does: the queries' MLPs begin as copies of the text's.

    Queries, cross-attention and ids beyond BERT's vocabulary stay as they are; BERT's token types, pooler and heads are
    not read.

    Args:
        qformer: it is changed in place; with or without a text stream.
        bert: a BERT of transformers, or its tensors by name, with or without "bert." in front.

    Returns:
        The Q-Former, for chaining.

    Raises:
        ValueError: naming what BERT lacks, or what is of another width.
    """
    state = bert.state_dict() if isinstance(bert, nn.Module) else bert
    state = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    # The first releases of BERT call a norm's weight and bias gamma and beta.
    state = {
        name.replace(".gamma", ".weight").replace(".beta", ".bias"): tensor for name, tensor in state.items()
    }
    style = KeyStyle("encoder.layer", "self", "embeddings.LayerNorm", "embeddings")
    fresh = ("query_tokens", "crossattention")
    table = [row for row in qformer_table(qformer, style) if not any(name in row.source for name in fresh)]
    own, found = qformer.state_dict(), {}
    for row in table:
        theirs, name = row.source.replace("_query.", "."), row.target[0]
        if theirs not in state:
            raise ValueError(
                f"BERT has no tensor {theirs}, which a Q-Former of depth {qformer.depth} starts from"
            )
        found[name] = _grown(state[theirs], own[name]) if "embeddings.weight" in theirs else state[theirs]
        if found[name].shape != own[name].shape:
            there, here = tuple(found[name].shape), tuple(own[name].shape)
            raise ValueError(f"BERT's {theirs} is {there}, but this Q-Former's {name} is {here}")
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
    return qformer


def qformer_from_bert(
    source: str,
    *,
    num_queries: int = 32,
    visual_dim: int = 1408,
    cross_every: int = 2,
    extra_ids: int = 1,
    dropout: float = 0.1,
) -> QFormer:
    """A Q-Former of BERT's size that starts from it (in recipes `class_path: mmtransformer.weights.qformer_from_bert`).

    Args:
        source: a folder with BERT's `config.json` and `model.safetensors`, or its name on the hub.
        num_queries: how many queries.
        visual_dim: width of the visual tokens.
        cross_every: the first of every so many blocks reads the picture.
        extra_ids: ids of the text stream beyond BERT's vocabulary, such as `ImageText`'s `class_id`.
        dropout: share of embeddings, attention weights and branch results dropped in training.

    Raises:
        ValueError: if it is no BERT, or lacks something.
    """
    folder = find_folder(source)
    config = read_json(folder / CONFIG)
    if config.get("model_type") != "bert":
        raise ValueError(f'{folder / CONFIG}: model_type is "{config.get("model_type")}", not "bert"')
    state = read_safetensors(folder / WEIGHTS)
    with built_from(state, str(folder)):
        qformer = QFormer(
            num_queries,
            config["hidden_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
            visual_dim,
            cross_every=cross_every,
            mlp_dim=config["intermediate_size"],
            vocab_size=config["vocab_size"] + extra_ids,
            max_len=config["max_position_embeddings"],
            dropout=dropout,
            eps=config.get("layer_norm_eps", 1e-12),
        )
        return init_from_bert(qformer, state)


def _grown(table: Tensor, own: Tensor) -> Tensor:
    """BERT's rows, then our own where our table is longer (new ids); fewer rows where it is shorter."""
    if table.shape[1] != own.shape[1]:
        return table
    return torch.cat((table[: len(own)], own[len(table) :].to(table.dtype)))
