"""Gemma 1 and 2 (arXiv:2403.08295, arXiv:2408.00118) as transformers names them -> `TextDecoder`, and back."""

from typing import Any

from torch import Tensor

from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.layers.config import AttentionConfig, MLPConfig, NormConfig, PositionConfig
from mmtransformer.weights.shared.configs import SIZES, UnsupportedModel, only, read_sizes, write_sizes
from mmtransformer.weights.text.common import decoder_tensors, fill_decoder
from mmtransformer.weights.text.llama import rope_of

GEMMAS = ("gemma", "gemma2")
"""`model_type` of the families."""

_KEYS = {
    "model.embed_tokens": "tok_embed",
    "model.layers.*.input_layernorm": "blocks.*.norm1",
    "model.layers.*.self_attn.[q_proj,k_proj,v_proj,o_proj]": "blocks.*.attn.[q_proj,k_proj,v_proj,out_proj]",
    "model.layers.*.mlp.[gate,up,down]_proj": "blocks.*.mlp.[gate,up,down]_proj",
    "model.norm": "last_norm",
    "lm_head": "lm_head",
}
_NORMS = {
    "gemma": {"model.layers.*.post_attention_layernorm": "blocks.*.norm2"},
    "gemma2": {
        "model.layers.*.[post_attention,post_feedforward]_layernorm": "blocks.*.post_norm[1,2]",
        "model.layers.*.pre_feedforward_layernorm": "blocks.*.norm2",
    },
}
_COMMON: dict[str, Any] = {
    "vocab_size": 256000, "head_dim": 256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    "attention_bias": False, "tie_word_embeddings": True,
}  # fmt: skip
USUAL: dict[str, dict[str, Any]] = {
    "gemma": _COMMON
    | {"hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": _COMMON
    | {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
    | {"sliding_window": 4096, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
}
"""What transformers takes for granted where a config.json does not say it."""


def decoder_from_gemma(config: dict[str, Any], state: dict[str, Tensor], context: str) -> TextDecoder:
    """A `TextDecoder` with the weights of a Gemma 1 or 2.

    Args:
        config: its configuration, as its config.json has it; `model_type` is one of `GEMMAS`.
        state: tensors named as in `GemmaForCausalLM`, or as in `GemmaModel` (without "model.").
        context: what they come from, for errors.

    Raises:
        ValueError: for a variant that differs in more than its sizes, or tensors that do not fit.
    """
    family = config["model_type"]
    config, second = USUAL[family] | config, family == "gemma2"
    # "gelu" in the files of Gemma 1 means the tanh form too.
    act = "hidden_activation" if second else "hidden_act"
    if config[act] not in ("gelu_pytorch_tanh", *["gelu"] * (not second)):
        raise UnsupportedModel(f"{context}: {act} is {config[act]!r}, not 'gelu_pytorch_tanh'")
    only(config, context, {"quantization_config": None})
    theta, scaling = rope_of(config, context)
    window = config["sliding_window"] if second else None
    decoder = TextDecoder(
        **read_sizes(config, SIZES, context),
        attention=AttentionConfig(
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            bias=config["attention_bias"],
            window=window,
            full_interval=None if window is None else _full_interval(config, context),
            softcap=config["attn_logit_softcapping"] if second else None,
            scale_dim=config["query_pre_attn_scalar"] if second else None,
        ),
        mlp=MLPConfig("geglu_tanh", bias=False),
        norm=NormConfig("rms_offset", config["rms_norm_eps"], post=second),
        positions=PositionConfig("rotary", theta, scaling, embed_scale=config["hidden_size"] ** 0.5),
        logit_softcap=config["final_logit_softcapping"] if second else None,
        tied=config["tie_word_embeddings"],
    )
    return fill_decoder(decoder, _KEYS | _NORMS[family], state, context)


def _full_interval(config: dict[str, Any], context: str) -> int:
    """Gemma 2: the last of every two layers has no window."""
    kinds = config.get("layer_types")
    want = ["full_attention" if i % 2 else "sliding_attention" for i in range(config["num_hidden_layers"])]
    if kinds is not None and list(kinds) != want:
        raise UnsupportedModel(f"{context}: layer_types {kinds} do not begin with a window and alternate")
    return 2


def gemma_of(decoder: TextDecoder) -> list[str]:
    """The one of the families that a decoder can be written as, or none."""
    d, own = decoder, decoder.attention
    plain = own.qk_norm is None and own.out_bias in (None, own.bias) and d.context_dim is None and not d.mlm_head
    shape = (d.norm.kind, d.norm.pre, d.norm.embed, d.mlp.activation, d.positions.kind, d.positions.nope_interval)
    scaled = d.positions.embed_scale == d.dim**0.5
    if not plain or not scaled or shape != ("rms_offset", True, False, "geglu_tanh", "rotary", None):
        return []
    if d.norm.post:
        return ["gemma2"] if own.window is None or own.full_interval == 2 else []
    first = (own.window, own.softcap, own.scale_dim, d.logit_softcap) == (None, None, None, None)
    return ["gemma"] if first else []


def decoder_to_gemma(decoder: TextDecoder, family: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json of a decoder as the one that `gemma_of` says, and its tensors by their names there."""
    own = decoder.attention
    head_dim = own.head_dim or decoder.dim // decoder.num_heads
    config = {
        "model_type": family,
        "architectures": [{"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM"}[family]],
        **write_sizes(decoder, SIZES),
        "num_key_value_heads": own.num_kv_heads or decoder.num_heads,
        "head_dim": head_dim,
        "rms_norm_eps": decoder.norm.eps,
        "rope_theta": decoder.positions.theta,
        "rope_scaling": decoder.positions.scaling,
        "attention_bias": own.bias,
        "tie_word_embeddings": decoder.tied,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
    }
    if family == "gemma2":
        config |= {
            "query_pre_attn_scalar": own.scale_dim or head_dim,
            "sliding_window": own.window,
            "attn_logit_softcapping": own.softcap,
            "final_logit_softcapping": decoder.logit_softcap,
        }
    return config, decoder_tensors(decoder, _KEYS | _NORMS[family], "Gemma")
