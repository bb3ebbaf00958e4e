"""The text towers of transformers' dual encoders -> the library's, and back."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from mmtransformer.backbones.encoder import TextEncoder
from mmtransformer.dual_encoders.text_encoder_tower import TextEncoderTower
from mmtransformer.dual_encoders.text_tower import TextTower
from mmtransformer.weights.shared.configs import (
    SIZES,
    SOURCE_ACTIVATIONS,
    activation_of,
    only_these,
    read_sizes,
    write_sizes,
)
from mmtransformer.weights.shared.keys import export, fill, part
from mmtransformer.weights.text.bert import encoder_from_bert, encoder_to_bert
from mmtransformer.weights.text.roberta import ROBERTA_TYPES, encoder_from_roberta, encoder_to_roberta

Text = TextTower | TextEncoder | TextEncoderTower

LEGACY_END = 2
"""The `eos_token_id` with which transformers' CLIP takes the largest id of a text for its end."""

_TOWER = {
    "embeddings.[token,position]_embedding": "[tok,pos]_embed",
    "encoder.layers.*.layer_norm[1,2]": "blocks.*.norm[1,2]",
    "encoder.layers.*.self_attn.[q_proj,k_proj,v_proj,out_proj]": "blocks.*.attn.[q_proj,k_proj,v_proj,out_proj]",
    "encoder.layers.*.mlp.fc[1,2]": "blocks.*.mlp.fc[1,2]",
    "final_layer_norm": "norm",
}
_PROJECTED = {"pre_LN": "norm", "transformation": "proj"}
_BERT: dict[str, Any] = {
    "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
}  # fmt: skip
_CLIP: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_SIGLIP: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
_USUAL: dict[str, dict[str, Any]] = {  # What transformers takes for granted where a config.json does not say it.
    "clip": _CLIP,
    "metaclip_2": _CLIP,
    "siglip": _SIGLIP,
    "siglip2": _SIGLIP,
    "chinese_clip": _BERT,
    "vision-text-dual-encoder": _BERT,
    "altclip": {
        "vocab_size": 250002, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "max_position_embeddings": 514, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
        "pad_token_id": 1, "type_vocab_size": 1, "project_dim": 768,
    },
}  # fmt: skip


def text_from_transformers(
    kind: str, config: Mapping[str, Any], state: Mapping[str, Tensor], context: str, ids: Mapping[str, int]
) -> Text:
    """The text tower of a dual encoder.

    Args:
        kind: the dual encoder's `model_type`.
        config: its `text_config`.
        state: its tensors, named from the text tower on.
        context: what they come from, for errors.
        ids: the tokenizer's, as far as they are known: "pad_token_id", "eos_token_id".

    Raises:
        ValueError: for a tower that the library has not, and tensors that do not fit.
    """
    said = {**_USUAL[kind], **{name: value for name, value in config.items() if value is not None}}
    if kind == "altclip":
        own = {n.replace("encoder.layers.", "encoder.layer."): t for n, t in part(state, "roberta.").items()}
        tower = TextEncoderTower(encoder_from_roberta(said, own, context), embed_dim=said["project_dim"])
        rest = {name: tensor for name, tensor in state.items() if not name.startswith("roberta.")}
        fill(tower, _PROJECTED, rest, context, kept=("encoder.",))
        return tower
    if kind == "vision-text-dual-encoder":
        family = said.get("model_type", "bert")
        if family not in (*ROBERTA_TYPES, "bert"):
            raise ValueError(
                f"{context}: the text model is a {family!r:.40}, and bert, {', '.join(ROBERTA_TYPES)} are known here"
            )
        return TextEncoderTower(
            (encoder_from_bert if family == "bert" else encoder_from_roberta)(said, {**state}, context)
        )
    if kind == "chinese_clip":
        own = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
        return encoder_from_bert(said, own, context)
    siglip = kind in ("siglip", "siglip2")
    text = TextTower(
        **read_sizes(said, SIZES, context),
        causal=not siglip,
        pool="last" if siglip else _end(kind, said, ids),
        pad_id=ids.get("pad_token_id", said.get("pad_token_id", 1)) if siglip else None,
        add_bos_token=not siglip,
        activation=activation_of(said, "hidden_act", context),
        norm_eps=said["layer_norm_eps"],
    )
    own = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    fill(text, _TOWER, own, context)
    return text


def _end(kind: str, said: Mapping[str, Any], ids: Mapping[str, int]) -> Literal["eos", "argmax"]:
    """Where transformers' CLIP gathers a text: at its end, or in old configs at its largest id, mostly the same."""
    legacy = kind == "clip" and said.get("eos_token_id") == LEGACY_END
    return "argmax" if legacy and ids.get("eos_token_id", said["vocab_size"] - 1) < said["vocab_size"] - 1 else "eos"


def kind_of(text: Text, *, siglip: bool, native: bool, ids: Mapping[str, int]) -> str:
    """Which of transformers' dual encoders has this text tower.

    Args:
        text: the tower.
        siglip: whether the model's loss is the sigmoid's.
        native: whether its vision tower reads pictures of native size.
        ids: the tokenizer's.
    """
    if siglip:
        return "siglip2" if native else "siglip"
    if isinstance(text, TextEncoderTower):
        return "vision-text-dual-encoder" if text.embed_dim is None else "altclip"
    if isinstance(text, TextEncoder):
        return "chinese_clip"
    return "metaclip_2" if text.pool == "eos" and ids.get("eos_token_id") == LEGACY_END else "clip"


def text_to_transformers(
    kind: str, text: Text, name: str, ids: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `text_config` and the tensors of a text tower, named from the text tower on.

    Args:
        kind: the dual encoder's `model_type`, as `kind_of` has it.
        text: the tower.
        name: what the dual encoder is called, for errors.
        ids: the tokenizer's "bos_token_id", "eos_token_id", "pad_token_id"; none = what transformers takes for granted.

    Raises:
        ValueError: if a part has no counterpart there.
    """
    if isinstance(text, TextTower):
        siglip = kind in ("siglip", "siglip2")
        pool = "last" if siglip else "argmax" if text.pool == "argmax" else "eos"
        only_these(
            name,
            {
                "causal": (text.causal, not siglip),
                "pool": (text.pool, pool),
                "add_bos_token": (text.add_bos_token, not siglip),
            },
        )
        config = {
            "model_type": f"{kind}_text_model",
            **write_sizes(text, SIZES),
            "hidden_act": SOURCE_ACTIVATIONS.get(text.activation, text.activation),
            "layer_norm_eps": text.norm_eps,
            **ids,
            **({"pad_token_id": text.pad_id} if siglip else {}),
        }
        if text.pool == "argmax":
            config["eos_token_id"] = LEGACY_END
        return config, export(text, _TOWER, name)
    encoder = text.encoder if isinstance(text, TextEncoderTower) else text
    only_these(name, {"heads": ((encoder.mlm_head, encoder.nsp_head), (False, False))})
    if kind == "altclip":
        assert isinstance(text, TextEncoderTower)
        config, tensors = encoder_to_roberta(encoder, ids.get("pad_token_id", 1))
        tensors = {f"roberta.{n}": t for n, t in tensors.items() if not n.startswith("pooler.")}
        tensors |= export(text, _PROJECTED, name, kept=("encoder.",))
        return {"model_type": "altclip_text_model", **config, "project_dim": text.dim}, tensors
    tensors = {n.removeprefix("bert."): t for n, t in encoder_to_bert(encoder).items()}
    if kind == "chinese_clip":
        tensors = {n: t for n, t in tensors.items() if not n.startswith("pooler.")}
    config = {
        "model_type": "bert" if kind == "vision-text-dual-encoder" else f"{kind}_text_model",
        **write_sizes(encoder, SIZES),
        "hidden_act": SOURCE_ACTIVATIONS.get(encoder.activation, encoder.activation),
        "layer_norm_eps": encoder.norm_eps,
        "type_vocab_size": encoder.num_types,
        "hidden_dropout_prob": encoder.dropout,
    }
    if kind == "vision-text-dual-encoder":
        config |= {"attention_probs_dropout_prob": encoder.dropout, **ids}
    return config, tensors
