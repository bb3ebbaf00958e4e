"""transformers' GPT-2 -> `TextDecoder`, and back, with cross-attention where it has one."""

from typing import Any

from torch import Tensor, nn

from mmtransformer.blocks import Activation
from mmtransformer.decoder import TextDecoder
from mmtransformer.pretrained import load_strictly
from mmtransformer.weights.table import Row, layer, to_ours, to_theirs


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


def decoder_from_gpt2(config: Any, state: dict[str, Tensor], where: str) -> TextDecoder:
    """A `TextDecoder` with GPT-2's weights.

    Args:
        config: GPT-2's configuration (an object with transformers' attributes).
        state: tensors named as in `GPT2LMHeadModel`, or as in `GPT2Model` (without "transformer.").
        where: what they come from, for errors.

    Raises:
        ValueError: for a GPT-2 variant that differs in more than its size.
    """
    activations: dict[str, Activation] = {
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu": "gelu",
        "relu": "relu",
    }
    if config.activation_function not in activations:
        raise ValueError(f"{where}: TextDecoder has no activation like {config.activation_function}")
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise ValueError(
            f"{where} scales attention by layer, or not at all: TextDecoder scales by 1 / sqrt(head_dim)"
        )
    cross, tied = bool(config.add_cross_attention), bool(config.tie_word_embeddings)
    decoder = TextDecoder(
        config.vocab_size,
        config.n_embd,
        config.n_layer,
        config.n_head,
        max_len=config.n_positions,
        mlp_dim=config.n_inner,
        cross_dim=config.n_embd if cross else None,
        norm_eps=config.layer_norm_epsilon,
        mlp=activations[config.activation_function],
        tied=tied,
    )
    if not any(name.startswith("transformer.") for name in state):
        state = {
            name if name == "lm_head.weight" else f"transformer.{name}": tensor
            for name, tensor in state.items()
        }
    buffers = [
        name for name in state if name.endswith((".attn.bias", ".attn.masked_bias", ".crossattention.bias"))
    ]
    copies = ["lm_head.weight"] if tied else []
    table = _table(config.n_layer, cross=cross, tied=tied)
    ours = to_ours(table, state, where, ignored=copies + buffers)
    load_strictly(decoder, ours, where)
    return decoder.eval()


def decoder_to_gpt2(decoder: TextDecoder) -> dict[str, Tensor]:
    """Tensors named as in `GPT2LMHeadModel`.

    Raises:
        ValueError: if the decoder is not of GPT-2's kind.
    """
    kind = (decoder.norm, decoder.positions, decoder.bias, decoder.qk_norm)
    heads = decoder.num_kv_heads in (None, decoder.num_heads) and decoder.head_dim in (
        None,
        decoder.dim // decoder.num_heads,
    )
    crosses = decoder.cross_dim is None or (decoder.cross_dim == decoder.dim and decoder.cross_every == 1)
    if not (kind == ("layer", "learned", "all", None) and heads and crosses and decoder.mlp != "swiglu"):
        raise ValueError(
            f"only a decoder of GPT-2's kind can be written as GPT-2; this one has {kind}, mlp {decoder.mlp}, "
            f"num_kv_heads {decoder.num_kv_heads}, head_dim {decoder.head_dim}, cross_dim {decoder.cross_dim}, "
            f"cross_every {decoder.cross_every}"
        )
    table = _table(decoder.depth, cross=decoder.cross_dim is not None, tied=decoder.tied)
    theirs = to_theirs(table, dict(decoder.state_dict()))
    return {"lm_head.weight": theirs["transformer.wte.weight"]} | theirs


def from_transformers(model: nn.Module) -> TextDecoder:
    """A `TextDecoder` with the weights of a transformers language model; equal to 1e-4 in float32.

    Raises:
        ValueError: if the model's family is not known here.
    """
    config: Any = model.config
    if config.model_type == "gpt2":
        return decoder_from_gpt2(config, model.state_dict(), f"transformers' {type(model).__name__}")
    raise ValueError(f'the family "{config.model_type}" is not known: gpt2 is')
