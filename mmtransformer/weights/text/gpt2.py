"""GPT-2 (Radford et al. 2019) as transformers names it -> `TextDecoder`, and back; cross-attention too."""

from typing import Any

from torch import Tensor

from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.layers.config import AttentionConfig, MLPConfig, NormConfig, PositionConfig
from mmtransformer.weights.shared.configs import (
    SOURCE_ACTIVATIONS,
    UnsupportedModel,
    activation_of,
    only,
    read_sizes,
    write_sizes,
)
from mmtransformer.weights.text.common import decoder_tensors, fill_decoder

_KEYS = {
    "transformer.wte": "tok_embed",
    "transformer.wpe": "pos_embed",
    "transformer.h.*.ln_[1,2]": "blocks.*.norm[1,2]",
    "transformer.h.*.attn.c_attn": "blocks.*.attn.[q,k,v]_proj",
    "transformer.h.*.attn.c_proj": "blocks.*.attn.out_proj",
    "transformer.h.*.ln_cross_attn": "blocks.*.norm_cross",
    "transformer.h.*.crossattention.q_attn": "blocks.*.cross_attn.q_proj",
    "transformer.h.*.crossattention.c_attn": "blocks.*.cross_attn.[k,v]_proj",
    "transformer.h.*.crossattention.c_proj": "blocks.*.cross_attn.out_proj",
    "transformer.h.*.mlp.[c_fc,c_proj]": "blocks.*.mlp.[fc1,fc2]",
    "transformer.ln_f": "last_norm",
    "lm_head": "lm_head",
}
_SIZES = {
    "vocab_size": "vocab_size",
    "n_embd": "dim",
    "n_layer": "depth",
    "n_head": "num_heads",
    "n_positions": "max_len",
}
_TRANSPOSED = ("c_attn", "c_proj", "c_fc", "q_attn")
_BUFFERS = (".attn.bias", ".crossattention.bias")


def decoder_from_gpt2(config: dict[str, Any], state: dict[str, Tensor], context: str) -> TextDecoder:
    """A `TextDecoder` with GPT-2's weights.

    Args:
        config: GPT-2's configuration, as its config.json has it.
        state: tensors named as in `GPT2LMHeadModel`, or as in `GPT2Model` (without "transformer.").
        context: what they come from, for errors.

    Raises:
        ValueError: for a GPT-2 variant that differs in more than its size, or tensors that do not fit.
    """
    activation = activation_of(config, "activation_function", context, "gelu_new")
    if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
        raise UnsupportedModel(
            f"{context} scales attention by layer, or not at all: TextDecoder scales by 1 / sqrt(head_dim)"
        )
    only(config, context, {"quantization_config": None})
    sizes = read_sizes(config, _SIZES, context)
    decoder = TextDecoder(
        **sizes,
        mlp_dim=config.get("n_inner"),
        context_dim=sizes["dim"] if config.get("add_cross_attention") else None,
        mlp=MLPConfig(activation),
        norm=NormConfig(eps=config.get("layer_norm_epsilon", 1e-5)),
        tied=config.get("tie_word_embeddings", True),
    )
    return fill_decoder(decoder, _KEYS, state, context, transposed=_TRANSPOSED, buffers=_BUFFERS)


def is_gpt2(decoder: TextDecoder) -> bool:
    """Whether a decoder can be written as GPT-2."""
    heads, width = (decoder.num_heads, None), (decoder.dim // decoder.num_heads, None)
    attention = [AttentionConfig(h, c, out_bias=out) for h in heads for c in width for out in (None, True)]
    crosses = decoder.context_dim is None or (
        decoder.context_dim == decoder.dim and decoder.cross_attn_every_n_layers == 1
    )
    mlp = decoder.mlp.activation in SOURCE_ACTIVATIONS and decoder.mlp.bias
    shape = decoder.norm == NormConfig(eps=decoder.norm.eps) and decoder.positions == PositionConfig()
    shape = shape and decoder.logit_softcap is None
    return decoder.attention in attention and crosses and mlp and shape


def decoder_to_gpt2(decoder: TextDecoder) -> dict[str, Tensor]:
    """Tensors named as in `GPT2LMHeadModel`.

    Raises:
        ValueError: if the decoder is not of GPT-2's kind.
    """
    if not is_gpt2(decoder):
        raise ValueError(
            f"only a decoder of GPT-2's kind can be written as GPT-2; this has "
            f"context_dim {decoder.context_dim}, every {decoder.cross_attn_every_n_layers}, {decoder.attention}, "
            f"{decoder.mlp}, {decoder.norm}, {decoder.positions}"
        )
    return decoder_tensors(decoder, _KEYS, "GPT-2", transposed=_TRANSPOSED)


def gpt2_config(decoder: TextDecoder) -> dict[str, Any]:
    """The config.json of a decoder that `is_gpt2`."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **write_sizes(decoder, _SIZES),
        "n_inner": decoder.mlp_dim,
        "layer_norm_epsilon": decoder.norm.eps,
        "activation_function": SOURCE_ACTIVATIONS[decoder.mlp.activation],  # pyright: ignore[reportArgumentType]
        "add_cross_attention": decoder.context_dim is not None,
        "tie_word_embeddings": decoder.tied,
    }
