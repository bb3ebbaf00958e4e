"""OPT (arXiv:2205.01068) as transformers names it -> `TextDecoder`, and back.

OPT's table of positions has two rows more than it has positions: position p stands in row p + 2. Ours has no such rows.
"""

from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.layers.config import MLPConfig
from mmtransformer.weights.shared.configs import (
    SIZES,
    SOURCE_ACTIVATIONS,
    UnsupportedModel,
    activation_of,
    only,
    read_sizes,
    write_sizes,
)
from mmtransformer.weights.text.common import decoder_tensors, fill_decoder
from mmtransformer.weights.text.gpt2 import is_gpt2

_KEYS = {
    "model.decoder.embed_tokens": "tok_embed",
    "model.decoder.embed_positions": "pos_embed",
    "model.decoder.layers.*.self_attn_layer_norm": "blocks.*.norm1",
    "model.decoder.layers.*.self_attn.[q_proj,k_proj,v_proj,out_proj]": "blocks.*.attn.[q_proj,k_proj,v_proj,out_proj]",
    "model.decoder.layers.*.final_layer_norm": "blocks.*.norm2",
    "model.decoder.layers.*.fc[1,2]": "blocks.*.mlp.fc[1,2]",
    "model.decoder.final_layer_norm": "last_norm",
    "lm_head": "lm_head",
}
_OFFSET = 2
_SIZES = {"ffn_dim" if target == "mlp_dim" else source: target for source, target in SIZES.items()}


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
    activation = activation_of(config, "activation_function", context, "relu")
    sizes = read_sizes(config, _SIZES, context)
    dim = sizes["dim"]
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
    decoder = TextDecoder(**sizes, mlp=MLPConfig(activation), tied=config.get("tie_word_embeddings", True))
    state = {name: t[_OFFSET:] if "embed_positions" in name else t for name, t in state.items()}
    return fill_decoder(decoder, _KEYS, state, context)


def decoder_to_opt(decoder: TextDecoder) -> dict[str, Tensor]:
    """Tensors named as in `OPTForCausalLM`; the two rows before the positions, which no token reads, are 0.

    Raises:
        ValueError: if the decoder is not of OPT's kind.
    """
    if not is_opt(decoder):
        raise ValueError(
            f"only a decoder of OPT's kind can be written as OPT; this one has context_dim {decoder.context_dim}, "
            f"{decoder.attention}, {decoder.mlp}, {decoder.norm}, {decoder.positions}"
        )
    source = decoder_tensors(decoder, _KEYS, "OPT")
    name = "model.decoder.embed_positions.weight"
    return source | {name: torch.cat((source[name].new_zeros(_OFFSET, decoder.dim), source[name]))}


def is_opt(decoder: TextDecoder) -> bool:
    """Whether a decoder can be written as OPT."""
    return is_gpt2(decoder) and decoder.context_dim is None and decoder.norm.eps == 1e-5


def opt_config(decoder: TextDecoder) -> dict[str, Any]:
    """The config.json of a decoder that `is_opt`."""
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        **write_sizes(decoder, _SIZES),
        "activation_function": SOURCE_ACTIVATIONS[decoder.mlp.activation],  # pyright: ignore[reportArgumentType]
        "word_embed_proj_dim": decoder.dim,
        "tie_word_embeddings": decoder.tied,
    }
