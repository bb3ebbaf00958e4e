"""GPT-2 (Radford et al. 2019) as transformers names it -> `TextDecoder`, and back; cross-attention too."""

from typing import Any

from torch import Tensor

from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.layers.blocks import Activation
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

ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}
"""transformers' names of activations, and ours."""


def _table(depth: int, *, cross: bool, tied: bool) -> list[Row]:
    rows = [
        Row("transformer.wte.weight", ("tok_embed.weight",)),
        Row("transformer.wpe.weight", ("pos_embed.weight",)),
    ]
    for i in range(depth):
        theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
        rows += layer(f"{theirs}.ln_1", f"{ours}.norm1")
        rows += layer(f"{theirs}.attn.c_attn", *(f"{ours}.attn.{n}_proj" for n in "qkv"), transposed=True)
        rows += layer(f"{theirs}.attn.c_proj", f"{ours}.attn.out_proj", transposed=True)
        if cross:
            theirs_cross, ours_cross = f"{theirs}.crossattention", f"{ours}.cross_attn"
            rows += layer(f"{theirs}.ln_cross_attn", f"{ours}.norm_cross")
            rows += layer(f"{theirs_cross}.q_attn", f"{ours_cross}.q_proj", transposed=True)
            rows += layer(
                f"{theirs_cross}.c_attn", *(f"{ours_cross}.{n}_proj" for n in "kv"), transposed=True
            )
            rows += layer(f"{theirs_cross}.c_proj", f"{ours_cross}.out_proj", transposed=True)
        rows += layer(f"{theirs}.ln_2", f"{ours}.norm2")
        rows += layer(f"{theirs}.mlp.c_fc", f"{ours}.mlp.fc1", transposed=True)
        rows += layer(f"{theirs}.mlp.c_proj", f"{ours}.mlp.fc2", transposed=True)
    rows += layer("transformer.ln_f", "last_norm")
    return rows if tied else rows + [Row("lm_head.weight", ("lm_head.weight",))]


def decoder_from_gpt2(config: dict[str, Any], state: dict[str, Tensor], context: str) -> TextDecoder:
    """A `TextDecoder` with GPT-2's weights.

    Args:
        config: GPT-2's configuration, as its config.json has it.
        state: tensors named as in `GPT2LMHeadModel`, or as in `GPT2Model` (without "transformer.").
        context: what they come from, for errors.

    Raises:
        ValueError: for a GPT-2 variant that differs in more than its size, or tensors that do not fit.
    """
    name = config.get("activation_function", "gelu_new")
    if name not in ACTIVATIONS:
        raise UnsupportedModel(f"{context}: TextDecoder has no activation like {name}")
    if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
        raise UnsupportedModel(
            f"{context} scales attention by layer, or not at all: TextDecoder scales by 1 / sqrt(head_dim)"
        )
    only(config, context, {"quantization_config": None})
    vocab_size, dim, depth, heads, max_len = need(
        config, ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"), context
    )
    cross, tied = bool(config.get("add_cross_attention")), config.get("tie_word_embeddings", True)
    decoder = TextDecoder(
        vocab_size,
        dim,
        depth,
        heads,
        max_len=max_len,
        mlp_dim=config.get("n_inner"),
        cross_dim=dim if cross else None,
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        mlp=ACTIVATIONS[name],
        tied=tied,
    )
    state = prefixed(state, "transformer.")
    ignored = [n for n in state if n.endswith((".attn.bias", ".attn.masked_bias", ".crossattention.bias"))]
    table = _table(depth, cross=cross, tied=tied)
    expand_size = tied_head(state, "transformer.wte.weight", context) if tied else []
    ours = convert(table, state, context, ignored=ignored + expand_size)
    load_strictly(decoder, ours, context)
    return decoder.eval()


def is_gpt2(decoder: TextDecoder) -> bool:
    """Whether a decoder can be written as GPT-2."""
    kind = (decoder.norm, decoder.positions, decoder.bias, decoder.qk_norm, decoder.window)
    heads = decoder.num_kv_heads in (None, decoder.num_heads)
    width = decoder.head_dim in (None, decoder.dim // decoder.num_heads)
    crosses = decoder.cross_dim is None or (decoder.cross_dim == decoder.dim and decoder.cross_every == 1)
    shape = decoder.pre_norm and decoder.embed_scale == 1 and decoder.mlp in ACTIVATIONS.values()
    return kind == ("layer", "learned", "all", None, None) and heads and width and crosses and shape


def decoder_to_gpt2(decoder: TextDecoder) -> dict[str, Tensor]:
    """Tensors named as in `GPT2LMHeadModel`.

    Raises:
        ValueError: if the decoder is not of GPT-2's kind.
    """
    if not is_gpt2(decoder):
        kind = (decoder.norm, decoder.positions, decoder.bias, decoder.qk_norm)
        raise ValueError(
            f"only a decoder of GPT-2's kind can be written as GPT-2; this one has {kind}, mlp {decoder.mlp}, "
            f"num_kv_heads {decoder.num_kv_heads}, head_dim {decoder.head_dim}, cross_dim {decoder.cross_dim}, "
            f"cross_every {decoder.cross_every}, window {decoder.window}, pre_norm {decoder.pre_norm}"
        )
    table = _table(decoder.depth, cross=decoder.cross_dim is not None, tied=decoder.tied)
    theirs = convert_back(table, dict(decoder.state_dict()))
    return {"lm_head.weight": theirs["transformer.wte.weight"]} | theirs


def gpt2_config(decoder: TextDecoder) -> dict[str, Any]:
    """The config.json of a decoder that `is_gpt2`."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": decoder.vocab_size,
        "n_embd": decoder.dim,
        "n_layer": decoder.depth,
        "n_head": decoder.num_heads,
        "n_positions": decoder.max_len,
        "n_inner": decoder.mlp_dim,
        "layer_norm_epsilon": decoder.norm_eps,
        "activation_function": names[decoder.mlp],
        "add_cross_attention": decoder.cross_dim is not None,
        "tie_word_embeddings": decoder.tied,
    }
