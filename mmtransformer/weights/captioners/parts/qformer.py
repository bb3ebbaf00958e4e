"""The Q-Former's tensors by three key styles, transformers' (two of them) and LAVIS's; and its start from BERT."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmtransformer.connectors.qformer import QFormer
from mmtransformer.serialization.pretrained import find_folder
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.weights.shared.configs import SIZES, read_sizes
from mmtransformer.weights.shared.folders import read_config, read_tensors
from mmtransformer.weights.shared.keys import key_mappings
from mmtransformer.weights.text.bert import bert_names


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
INSTRUCTBLIP = KeyStyle("qformer.encoder.layer", "attention", "qformer.embeddings.layernorm", "qformer.embeddings")
LAVIS = KeyStyle("Qformer.bert.encoder.layer", "self", "Qformer.bert.embeddings.LayerNorm", "Qformer.bert.embeddings")
_BERT = KeyStyle("bert.encoder.layer", "self", "bert.embeddings.LayerNorm", "bert.embeddings")


def qformer_keys(style: KeyStyle) -> dict[str, str]:
    """The key table of a Q-Former in that style."""
    keys = {
        "query_tokens": "query_tokens",
        style.norm: "norm",
        f"{style.words}.[word,position]_embeddings": "[tok,pos]_embed",
    }
    for source, target, norm in (("attention", "attn", "norm1"), ("crossattention", "cross_attn", "norm_cross")):
        at = f"{style.layers}.*.{source}"
        keys[f"{at}.{style.attention}.[query,key,value]"] = f"blocks.*.{target}.[q,k,v]_proj"
        keys |= {f"{at}.output.dense": f"blocks.*.{target}.out_proj", f"{at}.output.LayerNorm": f"blocks.*.{norm}"}
    for source, target, norm in (("_query", "query_mlp", "query_norm"), ("", "mlp", "norm2")):
        keys[f"{style.layers}.*.[intermediate,output]{source}.dense"] = f"blocks.*.{target}.[fc1,fc2]"
        keys[f"{style.layers}.*.output{source}.LayerNorm"] = f"blocks.*.{norm}"
    return keys


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
    state = bert_names(bert.state_dict() if isinstance(bert, nn.Module) else bert)
    own, found = qformer.state_dict(), {}
    for row in key_mappings(qformer_keys(_BERT), own):
        if "query_tokens" in row.source or "crossattention" in row.source:
            continue
        source, name = row.source.replace("_query.", "."), row.target[0]
        if source not in state:
            raise ValueError(f"BERT has no tensor {source}, which a Q-Former of depth {qformer.depth} starts from")
        found[name] = _grown(state[source], own[name]) if "embeddings.weight" in source else state[source]
        if found[name].shape != own[name].shape:
            there, here = tuple(found[name].shape), tuple(own[name].shape)
            raise ValueError(f"BERT's {source} is {there}, but this Q-Former's {name} is {here}")
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
    return qformer


def load_qformer_from_bert(
    source: str | Path,
    *,
    num_queries: int = 32,
    visual_dim: int = 1408,
    cross_attention_frequency: int = 2,
    extra_ids: int = 1,
    dropout: float = 0.1,
) -> QFormer:
    """A Q-Former of BERT's size that starts from it (in recipes `mmtransformer.weights.load_qformer_from_bert`).

    Args:
        source: a folder with BERT's `config.json` and `model.safetensors`, or its name on the hub.
        num_queries: how many queries.
        visual_dim: width of the visual tokens.
        cross_attention_frequency: the first of every so many blocks reads the picture.
        extra_ids: ids of the text stream beyond BERT's vocabulary, such as `Blip2QFormer`'s `cls_token_id`.
        dropout: share of embeddings, attention weights and branch results dropped in training.

    Raises:
        ValueError: if it is no BERT, or lacks something.
    """
    folder = find_folder(source)
    config, state = read_config(folder, "bert"), read_tensors(folder)
    sizes = read_sizes(config, SIZES, str(folder))
    with built_from(state, str(folder)):
        sizes["vocab_size"] += extra_ids
        qformer = QFormer(
            num_queries,
            visual_dim=visual_dim,
            cross_attention_frequency=cross_attention_frequency,
            **sizes,
            dropout=dropout,
            norm_eps=config.get("layer_norm_eps", 1e-12),
        )
        return init_from_bert(qformer, state)


def _grown(table: Tensor, own: Tensor) -> Tensor:
    """BERT's rows, then our own where our table is longer (new ids); fewer rows where it is shorter."""
    if table.shape[1] != own.shape[1]:
        return table
    return torch.cat((table[: len(own)], own[len(table) :].to(table.dtype)))
