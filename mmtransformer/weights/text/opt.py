"""OPT (arXiv:2205.01068) as transformers names it -> `TextDecoder`, and back.

OPT's table of positions has two rows more than it has positions: position p stands in row p + 2. Ours has no such rows.
"""

from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.serialization.pretrained import load_strictly
from mmtransformer.weights.shared.keys import (
    Row,
    UnsupportedModel,
    convert,
    convert_back,
    layer,
    need,
    only,
    prefixed,
    tied_head,
)
from mmtransformer.weights.text.gpt2 import ACTIVATIONS, is_gpt2

_POSITIONS, _OFFSET = "model.decoder.embed_positions.weight", 2


def _table(depth: int, *, tied: bool) -> list[Row]:
    rows = [
        Row("model.decoder.embed_tokens.weight", ("tok_embed.weight",)),
        Row(_POSITIONS, ("pos_embed.weight",)),
    ]
    for i in range(depth):
        theirs, ours = f"model.decoder.layers.{i}", f"blocks.{i}"
        rows += layer(f"{theirs}.self_attn_layer_norm", f"{ours}.norm1")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            rows += layer(f"{theirs}.self_attn.{name}", f"{ours}.attn.{name}")
        rows += layer(f"{theirs}.final_layer_norm", f"{ours}.norm2")
        rows += layer(f"{theirs}.fc1", f"{ours}.mlp.fc1") + layer(f"{theirs}.fc2", f"{ours}.mlp.fc2")
    rows += layer("model.decoder.final_layer_norm", "last_norm")
    return rows if tied else rows + [Row("lm_head.weight", ("lm_head.weight",))]


def decoder_from_opt(config: dict[str, Any], state: dict[str, Tensor], context: str) -> TextDecoder:
    """A `TextDecoder` with OPT's weights.

    Args:
        config: OPT's configuration, as its config.json has it.
        state: tensors named as in `OPTForCausalLM`, or as in `OPTModel` (without "model.").
        context: what they come from, for errors.

    Raises:
        ValueError: for OPT-350m (norms after the sums, narrower embeddings) and other variants, or tensors that do not
            fit.
    """
    name = config.get("activation_function", "relu")
    if name not in ACTIVATIONS:
        raise UnsupportedModel(f"{context}: TextDecoder has no activation like {name}")
    vocab_size, dim, depth, heads, mlp_dim, max_len = need(
        config,
        (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "ffn_dim",
            "max_position_embeddings",
        ),
        context,
    )
    if (config.get("word_embed_proj_dim") or dim) != dim:
        raise UnsupportedModel(
            f"{context}: embeddings are {config['word_embed_proj_dim']} wide and tokens {dim} (as in OPT-350m), and "
            "TextDecoder has one width"
        )
    expected = {
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "quantization_config": None,
    }
    only(config, context, expected)
    tied = config.get("tie_word_embeddings", True)
    decoder = TextDecoder(
        vocab_size, dim, depth, heads, max_len=max_len, mlp_dim=mlp_dim, mlp=ACTIVATIONS[name], tied=tied
    )
    state = prefixed(state, "model.")
    if _POSITIONS in state:
        state = state | {_POSITIONS: state[_POSITIONS][_OFFSET:]}
    expand_size = tied_head(state, "model.decoder.embed_tokens.weight", context) if tied else []
    ours = convert(_table(depth, tied=tied), state, context, ignored=expand_size)
    load_strictly(decoder, ours, context)
    return decoder.eval()


def decoder_to_opt(decoder: TextDecoder) -> dict[str, Tensor]:
    """Tensors named as in `OPTForCausalLM`; the two rows before the positions, which no token reads, are 0.

    Raises:
        ValueError: if the decoder is not of OPT's kind.
    """
    if not is_opt(decoder):
        kind = (decoder.norm, decoder.norm_eps, decoder.positions, decoder.bias, decoder.qk_norm)
        raise ValueError(
            f"only a decoder of OPT's kind can be written as OPT; this one has {kind}, mlp {decoder.mlp}, cross_dim "
            f"{decoder.cross_dim}, num_kv_heads {decoder.num_kv_heads}, head_dim {decoder.head_dim}"
        )
    theirs = convert_back(_table(decoder.depth, tied=decoder.tied), dict(decoder.state_dict()))
    positions = theirs[_POSITIONS]
    theirs[_POSITIONS] = torch.cat((positions.new_zeros(_OFFSET, decoder.dim), positions))
    return {"lm_head.weight": theirs["model.decoder.embed_tokens.weight"]} | theirs


def is_opt(decoder: TextDecoder) -> bool:
    """Whether a decoder can be written as OPT."""
    return is_gpt2(decoder) and decoder.cross_dim is None and decoder.norm_eps == 1e-5


def opt_config(decoder: TextDecoder) -> dict[str, Any]:
    """The config.json of a decoder that `is_opt`."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.dim,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": decoder.num_heads,
        "ffn_dim": decoder.mlp_dim,
        "max_position_embeddings": decoder.max_len,
        "activation_function": names[decoder.mlp],
        "word_embed_proj_dim": decoder.dim,
        "tie_word_embeddings": decoder.tied,
    }
