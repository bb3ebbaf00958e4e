"""Llama and its kin as transformers names them -> `TextDecoder`, and back: Llama 1-3, Mistral, Qwen2, Qwen3, SmolLM3.

One table serves them all: Qwen2 has biases of queries, keys and values, Qwen3 norms of queries and keys, Mistral a
window, SmolLM3 blocks without rotation. SmolLM, SmolLM2, TinyLlama and many others call themselves "llama".
"""

from typing import Any

from torch import Tensor

from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.layers.config import AttentionConfig, MLPConfig, NormConfig, PositionConfig
from mmtransformer.weights.shared.configs import SIZES, UnsupportedModel, only, read_sizes, write_sizes
from mmtransformer.weights.text.common import decoder_tensors, fill_decoder

LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""`model_type` of the families whose tensors have these names."""

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
_USUAL: dict[str, Any] = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "rms_norm_eps": 1e-6}
USUAL: dict[str, dict[str, Any]] = {
    "llama": _USUAL | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _USUAL
    | {"vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": _USUAL
    | {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": _USUAL
    | {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768, "num_key_value_heads": 32},
}
"""What transformers takes for granted where a captioner's config.json says nothing of its language model."""

_THETA = {"smollm3": 2_000_000.0}  # where neither theta nor rotary parameters are written


_KEYS = {
    "model.embed_tokens": "tok_embed",
    "model.layers.*.input_layernorm": "blocks.*.norm1",
    "model.layers.*.self_attn.[q_proj,k_proj,v_proj,o_proj]": "blocks.*.attn.[q_proj,k_proj,v_proj,out_proj]",
    "model.layers.*.self_attn.[q,k]_norm": "blocks.*.attn.[q,k]_norm",
    "model.layers.*.post_attention_layernorm": "blocks.*.norm2",
    "model.layers.*.mlp.[gate,up,down]_proj": "blocks.*.mlp.[gate,up,down]_proj",
    "model.norm": "last_norm",
    "lm_head": "lm_head",
}


def decoder_from_llama(config: dict[str, Any], state: dict[str, Tensor], context: str) -> TextDecoder:
    """A `TextDecoder` with the weights of Llama or one of its kin.

    Args:
        config: its configuration, as its config.json has it; `model_type` is one of `LLAMAS`.
        state: tensors named as in `LlamaForCausalLM`, or as in `LlamaModel` (without "model.").
        context: what they come from, for errors.

    Raises:
        ValueError: for a variant that differs in more than its sizes, or tensors that do not fit.
    """
    family = config["model_type"]
    only(config, context, {"hidden_act": "silu", "mlp_bias": False, "quantization_config": None})
    theta, scaling = rope_of(config, context)
    decoder = TextDecoder(
        **read_sizes(config, SIZES, context),
        attention=AttentionConfig(
            num_kv_heads=config.get("num_key_value_heads"),
            head_dim=config.get("head_dim", 128 if family == "qwen3" else None),
            bias=family == "qwen2" or bool(config.get("attention_bias")),
            out_bias=family != "qwen2" and bool(config.get("attention_bias")),
            qk_norm="rms" if family == "qwen3" else None,
            window=_window(config, context),
        ),
        mlp=MLPConfig("swiglu", bias=False),
        norm=NormConfig("rms", config.get("rms_norm_eps", 1e-6)),
        positions=PositionConfig(
            "rotary", theta, scaling, _nope_interval(config, context) if family == "smollm3" else None
        ),
        tied=config.get("tie_word_embeddings", family == "smollm3"),
    )
    return fill_decoder(decoder, _KEYS, state, context)


def rope_of(config: dict[str, Any], context: str) -> tuple[float, dict[str, Any] | None]:
    """The base and the scaling of a hub config's rotary positions, in the old spelling or the new.

    Numbers that transformers takes from elsewhere in the config are filled in.
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = found.pop("rope_theta", None) or config.get("rope_theta") or _THETA.get(config["model_type"], 1e4)
    kind = found.get("rope_type", found.get("type", "default"))
    share = found.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if any(isinstance(value, dict) for value in found.values()):
        raise UnsupportedModel(f"{context}: layers have different rotary positions, and TextDecoder's all the same")
    if share != 1.0 and kind != "proportional":
        raise UnsupportedModel(f"{context}: only {share} of a head's channels turn; TextDecoder turns all")
    if kind == "default":
        return theta, None
    longest = config.get("max_position_embeddings")
    if kind in ("llama3", "yarn", "longrope"):
        old = config.get("original_max_position_embeddings")
        found["original_max_position_embeddings"] = old or found.get("original_max_position_embeddings") or longest
        if found.get("factor") is None and longest:
            found["factor"] = longest / found["original_max_position_embeddings"]
    return float(theta), found | {"rope_type": kind}


def _window(config: dict[str, Any], context: str) -> int | None:
    """The sliding window of all layers, or None."""
    family, window = config["model_type"], config.get("sliding_window")
    if family == "mistral":
        window = config.get("sliding_window", 4096)
    elif not config.get("use_sliding_window") or family == "llama":
        return None
    kinds = config.get("layer_types")
    depth = config["num_hidden_layers"]
    if family == "mistral" and not kinds:
        return window
    if not kinds:
        first = config.get("max_window_layers", 28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(depth)]
    sliding = [kind == "sliding_attention" for kind in kinds]
    if any(sliding) and not all(sliding):
        raise UnsupportedModel(
            f"{context}: {sum(sliding)} of {depth} layers have a window ({window}), and TextDecoder's all or none"
        )
    return window if any(sliding) else None


def _nope_interval(config: dict[str, Any], context: str) -> int | None:
    """SmolLM3: the last of every so many layers has no rotary positions."""
    depth, every = config["num_hidden_layers"], config.get("no_rope_layer_interval", 4)
    layers = config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(depth)]
    layers = [int(bool(rotated)) for rotated in layers[:depth]]
    if all(layers):
        return None
    every = layers.index(0) + 1
    if layers != [int((i + 1) % every != 0) for i in range(depth)]:
        raise UnsupportedModel(f"{context}: no_rope_layers {layers} are not the last of every so many")
    return every


def _biases(decoder: TextDecoder) -> str:
    """Which of the attention's layers have biases."""
    bias, out = decoder.attention.bias, decoder.attention.out_bias
    names = {(True, True): "all", (True, False): "qkv", (False, False): "none"}
    return names.get((bias, bias if out is None else out), "out")


def llamas_of(decoder: TextDecoder) -> list[str]:
    """Which of the families a decoder can be written as, the plainest first."""
    d, attention, positions, bias = decoder, decoder.attention, decoder.positions, _biases(decoder)
    shape = (d.norm.kind, d.norm.pre, d.mlp.activation, positions.kind, positions.embed_scale, d.context_dim)
    more = (d.norm.embed, d.norm.post, attention.softcap, attention.scale_dim, attention.full_interval, d.logit_softcap)
    if shape != ("rms", True, "swiglu", "rotary", 1.0, None) or any(more):
        return []
    plain, whole = attention.qk_norm is None and bias in ("all", "none"), attention.window is None
    rotated = positions.nope_interval is None
    fits = {
        "llama": plain and whole and rotated and d.dim % d.num_heads == 0,  # as transformers' Llama asks
        "mistral": plain and rotated and bias == "none",
        "qwen2": attention.qk_norm is None and bias == "qkv" and rotated,
        "qwen3": attention.qk_norm == "rms" and bias in ("all", "none") and rotated,
        "smollm3": plain and whole and attention.head_dim in (None, d.dim // d.num_heads),
    }
    return [name for name, fit in fits.items() if fit]


def decoder_to_llama(decoder: TextDecoder) -> dict[str, Tensor]:
    """Tensors named as in `LlamaForCausalLM`.

    Raises:
        ValueError: if the decoder is of none of the families.
    """
    if not llamas_of(decoder):
        raise ValueError(
            f"only a decoder of one of the kinds {', '.join(LLAMAS)} can be written as such; this one has context_dim "
            f"{decoder.context_dim}, {decoder.attention}, {decoder.mlp}, {decoder.norm}, {decoder.positions}"
        )
    return decoder_tensors(decoder, _KEYS, "Llama")


def llama_config(decoder: TextDecoder, family: str) -> dict[str, Any]:
    """The config.json of a decoder, as one of `llamas_of` it."""
    config = {
        "model_type": family,
        "architectures": [_CLASSES[family]],
        **write_sizes(decoder, SIZES),
        "num_key_value_heads": decoder.attention.num_kv_heads or decoder.num_heads,
        "head_dim": decoder.attention.head_dim or decoder.dim // decoder.num_heads,
        "rms_norm_eps": decoder.norm.eps,
        "hidden_act": "silu",
        "rope_theta": decoder.positions.theta,
        "rope_scaling": decoder.positions.scaling,
        "tie_word_embeddings": decoder.tied,
        "attention_bias": _biases(decoder) == "all",
        "sliding_window": decoder.attention.window,
    }
    if decoder.attention.window is not None and family != "mistral":
        config |= {"use_sliding_window": True, "max_window_layers": 0}
    if family == "smollm3":
        every = decoder.positions.nope_interval or decoder.depth + 1
        config["no_rope_layers"] = [int((i + 1) % every != 0) for i in range(decoder.depth)]
    return config
