"""A language model of a folder, with token tables from elsewhere: longer ones, that others trained with new tokens."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtransformer.backbones.base import Decoder
from mmtransformer.backbones.hf.decoder import HFDecoder
from mmtransformer.serialization.pretrained import CONFIG, read_json
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.weights.shared.configs import only
from mmtransformer.weights.shared.folders import read_tensors
from mmtransformer.weights.text.lm import READERS, decoder_from_state

EMBEDDINGS = ("wte.weight", "embed_in.weight", "embed_tokens.weight", "tok_embed.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
_MOSAIC = "mosaic_gpt"
"""What MPT-1B was called before MPT: it norms queries and keys, which transformers' MPT does not."""
_MOSAIC_KEYS = {".ln_": ".norm_", ".mlp.mlp_up.": ".ffn.up_proj.", ".mlp.mlp_down.": ".ffn.down_proj."}


class NormedQueriesKeys(nn.Module):
    """One product for queries, keys and values, the first two normed over all heads together, as MosaicGPT has them.

    Args:
        weight: of the product, (3d d).
        norms: weights of the queries' and of the keys' norm, (d) each.
    """

    def __init__(self, weight: Tensor, norms: Sequence[Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.norms = nn.ParameterList(norms)

    def forward(self, x: Tensor) -> Tensor:
        """(b q d) -> (b q 3d)."""
        parts = nn.functional.linear(x, self.weight).chunk(3, dim=-1)
        normed = [nn.functional.layer_norm(p, p.shape[-1:], w) for p, w in zip(parts, self.norms, strict=False)]
        return torch.cat((*normed, parts[2]), dim=-1)


def table_of(state: Mapping[str, Tensor], ends: tuple[str, ...]) -> str | None:
    """The name of a state's embedding (`EMBEDDINGS`) or head (`HEADS`); None = it has none."""
    return next((name for name in state if name.endswith(ends)), None)


def decoder_with_tables(folder: Path, embedding: Tensor, head: Tensor | None = None) -> Decoder:
    """A folder's language model with these tables in place of its own; all that `load_lm` takes, and MPT-1B.

    Args:
        folder: config.json, and tensors of any layout.
        embedding: the rows of all tokens (n e).
        head: those of the head; None = the model's own, which is the embedding where the two are tied. Tokens that its
            own has not get rows of zeros, and a warning.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    config, state, context = read_json(folder / CONFIG), read_tensors(folder), str(folder)
    state = {name: tensor for name, tensor in state.items() if not name.endswith(_BUFFERS)}
    norms: dict[str, Tensor] = {}
    if config.get("model_type") == _MOSAIC:
        config, state, norms = _as_mpt(config, state, context)
    if (own := table_of(state, EMBEDDINGS)) is None:
        raise ValueError(f"{context} has no embedding of tokens: it is no language model")
    if state[own].shape[1] != embedding.shape[1]:
        raise ValueError(
            f"{context}: tokens are {state[own].shape[1]} wide, and {embedding.shape[1]} where they come from: it is "
            f"another language model"
        )
    top = table_of(state, HEADS)
    tied = config.get("tie_word_embeddings", top is None)
    if top is not None and tied:
        del state[top]
    elif top is not None:
        state[top] = _longer(state[top], len(embedding), context) if head is None else head
    state |= {own: embedding}
    config = config | {"vocab_size": len(embedding), "tie_word_embeddings": bool(tied)}
    if config.get("model_type") in READERS:
        return decoder_from_state(config, state, context)
    return _from_hf(config, state, norms, context)


def _longer(table: Tensor, rows: int, context: str) -> Tensor:
    """A head's rows for so many tokens."""
    if rows > len(table):
        warnings.warn(
            f"{context}: its head has {len(table)} rows, and {rows} tokens are embedded: those of the rest are zeros",
            stacklevel=3,
        )
    return torch.cat((table[:rows], table.new_zeros(max(rows - len(table), 0), table.shape[1])))


def _as_mpt(
    config: dict[str, Any], state: dict[str, Tensor], context: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """MosaicGPT in MPT's words: its config, its tensors, and the norms of its queries and keys by their old names."""
    usual = {"learned_pos_emb": False, "no_bias": True, "attn_clip_qkv": None, "prefix_lm": False, "alibi": True,
             "logit_scale": None, "embedding_fraction": 1.0, "attn_uses_sequence_id": False}  # fmt: skip
    only(config, context, usual, "the MPT that is known here")
    for old, new in _MOSAIC_KEYS.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    norms = {name: tensor for name, tensor in state.items() if name.endswith((".q_ln.weight", ".k_ln.weight"))}
    sizes = {key: config[key] for key in ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size")}
    bias = {"alibi": True, "alibi_bias_max": config.get("alibi_bias_max", 8)}
    bias["softmax_scale"] = config.get("softmax_scale")
    more = {"expansion_ratio": config.get("mlp_ratio", 4), "attn_config": bias}
    return {"model_type": "mpt", **sizes, **more}, {k: v for k, v in state.items() if k not in norms}, norms


def _from_hf(config: dict[str, Any], state: dict[str, Tensor], norms: dict[str, Tensor], context: str) -> HFDecoder:
    """Transformers' model of a config with these tensors, all of which must be used."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{context}: its language model needs transformers: pip install transformers") from error
    settings = {name: value for name, value in config.items() if name not in ("model_type", "auto_map")}
    try:
        with built_from(state, context):
            built = transformers.AutoConfig.for_model(str(config.get("model_type")), **settings)
            kind: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(built)]
            model, report = kind.from_pretrained(
                None, config=built, state_dict=state, output_loading_info=True, dtype=torch.float32
            )
    except Exception as error:  # almost any comes out of a config that makes no sense
        raise ValueError(f"{context}: transformers cannot load it: {str(error).splitlines()[0]}") from error
    if faults := {name: sorted(map(str, found)) for name, found in report.items() if found}:
        told = "; ".join(f"{name}: {', '.join(found[:5])} ({len(found)} in all)" for name, found in faults.items())
        raise ValueError(f"{context} does not fit transformers' {type(model).__name__}; {told}")
    for i, block in enumerate(model.transformer.blocks if norms else ()):
        pair = [norms.pop(f"transformer.blocks.{i}.attn.{part}_ln.weight", None) for part in "qk"]
        if None in pair:
            raise ValueError(f"{context} has no tensor transformer.blocks.{i}.attn.q_ln.weight, or k_ln's")
        block.attn.Wqkv = NormedQueriesKeys(block.attn.Wqkv.weight.detach(), [x for x in pair if x is not None])
    return HFDecoder.from_model(model.eval())
