"""transformers' CLIP, SigLIP and Chinese-CLIP, both towers -> `CLIP`, and back.

CLIP (arXiv:2103.00020) projects both sides without biases, SigLIP (arXiv:2303.15343) the text alone, with one. SigLIP 2
of one size is a SigLIP with another vocabulary. Chinese-CLIP (arXiv:2211.01335) is a CLIP whose text tower is a BERT.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmtransformer.backbones.encoder import TextEncoder
from mmtransformer.backbones.vit import ViT
from mmtransformer.contrast.clip import CLIP
from mmtransformer.contrast.text_tower import TextTower
from mmtransformer.serialization.pretrained import CONFIG, Pretrained, find_folder, read_json
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.serialization.uses import other_kind
from mmtransformer.text.tokenizer_files import find_token, read_backend, read_settings
from mmtransformer.weights.contrast.open_clip import CONFIG as OPEN_CLIP
from mmtransformer.weights.contrast.open_clip import open_clip_from_folder
from mmtransformer.weights.shared.configs import (
    SIZES,
    SOURCE_ACTIVATIONS,
    activation_of,
    only_these,
    read_sizes,
    write_sizes,
)
from mmtransformer.weights.shared.folders import read_tensors, write_folder
from mmtransformer.weights.shared.keys import export, fill, part
from mmtransformer.weights.text.bert import encoder_from_bert, encoder_to_bert
from mmtransformer.weights.vision.clip import save_clip_vision, vision_from_clip, vision_to_clip

DUAL_TYPES = ("clip", "siglip", "chinese_clip")
"""`model_type` of the dual models that are known."""

_TOWERS = ("clip_vision_model", "clip_text_model", "siglip_vision_model", "siglip_text_model",
           "chinese_clip_vision_model", "chinese_clip_text_model")  # fmt: skip
_TEXT = {
    "embeddings.[token,position]_embedding": "[tok,pos]_embed",
    "encoder.layers.*.layer_norm[1,2]": "blocks.*.norm[1,2]",
    "encoder.layers.*.self_attn.[q_proj,k_proj,v_proj,out_proj]": "blocks.*.attn.[q_proj,k_proj,v_proj,out_proj]",
    "encoder.layers.*.mlp.fc[1,2]": "blocks.*.mlp.fc[1,2]",
    "final_layer_norm": "norm",
}
_USUAL: dict[str, dict[str, Any]] = {  # What transformers takes for granted where a config.json does not say it.
    "clip": {
        "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
    "siglip": {
        "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    "chinese_clip": {
        "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    },
}  # fmt: skip
_BUFFERS = ["text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"]  # of old files


def dual_type(config: Mapping[str, Any], context: str) -> str:
    """Which of `DUAL_TYPES` a config.json of transformers is of.

    Raises:
        ValueError: if it is another model: a tower alone, a text model, a captioner.
    """
    kind = config.get("model_type")
    if kind in _TOWERS:
        raise ValueError(f'{context} is one tower alone ("{kind}"), which compares nothing: give the model with both')
    if kind not in DUAL_TYPES:
        raise ValueError(
            f"{context}: model_type is {kind!r:.40}, no dual model that is known here: {', '.join(DUAL_TYPES)} are"
        )
    return kind


def clip_from_transformers(
    config: Mapping[str, Any], state: Mapping[str, Tensor], context: str, *, pad_id: int | None = None
) -> CLIP:
    """A `CLIP` with the weights of transformers' dual model; vectors are equal to 1e-5 in float32.

    Args:
        config: its configuration, as in `config.json`.
        state: its tensors.
        context: what they come from, for errors.
        pad_id: of a SigLIP, the token that texts are filled up with; None = what the config says.

    Raises:
        ValueError: for another family, a tower alone, and tensors that do not fit.
    """
    kind = dual_type(config, context)
    siglip = kind == "siglip"
    said = {**_USUAL[kind], **(config.get("text_config") or {})}
    vision = vision_from_clip(
        {**(config.get("vision_config") or {}), "model_type": f"{'siglip' if siglip else 'clip'}_vision_model"},
        {name: tensor for name, tensor in state.items() if name.startswith("vision_model.")},
        context,
    )
    own = part(state, "text_model.")
    text: TextTower | TextEncoder
    if kind == "chinese_clip":
        text = encoder_from_bert(said, {n: t for n, t in own.items() if not n.startswith("pooler.")}, context)
    else:
        text = TextTower(
            **read_sizes(said, SIZES, context),
            causal=not siglip,
            pool="last" if siglip else "end",
            pad_id=(said.get("pad_token_id", 1) if pad_id is None else pad_id) if siglip else None,
            opens=not siglip,
            activation=activation_of(said, "hidden_act", context),
            norm_eps=said["layer_norm_eps"],
        )
        tower = {name: tensor for name, tensor in own.items() if not name.startswith("head.")}
        fill(text, _TEXT, tower, context, ignored=["embeddings.position_ids"])
    embed_dim = None if siglip else config.get("projection_dim", 512)
    model = CLIP(
        vision, text, embed_dim=embed_dim, text_bias=siglip, loss="sigmoid" if siglip else "softmax"
    )  # fmt: skip
    rest = {n: t for n, t in state.items() if not n.startswith(("text_model.", "vision_model.")) or ".head." in n[:16]}
    scales = {name: rest.pop(name).reshape(()) for name in ("logit_scale", "logit_bias") if name in rest}
    fill(model, _heads(kind), rest, context, kept=("vision.", "text."), extra=scales, ignored=_BUFFERS)
    return model.eval()


def _heads(kind: str) -> dict[str, str]:
    if kind == "siglip":
        return {"text_model.head": "text_proj"}
    return {"visual_projection": "image_proj", "text_projection": "text_proj"}


def clip_to_transformers(model: CLIP) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of transformers' dual model of this shape: CLIP, SigLIP or Chinese-CLIP.

    Raises:
        ValueError: if a part has no counterpart in any of them.
    """
    text, vision = model.text, model.vision
    siglip = model.loss == "sigmoid"
    kind = "siglip" if siglip else "clip" if isinstance(text, TextTower) else "chinese_clip"
    name = {"siglip": "SigLIP", "clip": "CLIP", "chinese_clip": "Chinese-CLIP"}[kind]
    only_these(
        f"transformers' {name}",
        {
            "embed_dim": (model.embed_dim is None, siglip),
            "pool_heads": (model.pool_heads, None),
            "text_bias": (model.text_bias, siglip),
            "class_token": (vision.class_token, not siglip),
            "pool": (vision.attn_pool is not None, siglip),
        },
    )
    vision_config, tower = vision_to_clip(vision)
    tensors = {f"vision_model.{n}": t for n, t in tower.items()}
    vision_config["model_type"] = f"{kind}_vision_model"
    if isinstance(text, TextEncoder):
        only_these("transformers' Chinese-CLIP", {"heads": ((text.word_head, text.sentence_head), (False, False))})
        own = {n.removeprefix("bert."): t for n, t in encoder_to_bert(text).items() if "pooler." not in n}
        more = {"type_vocab_size": text.num_types, "hidden_dropout_prob": text.dropout}
    else:
        facts = {
            "causal": (text.causal, not siglip),
            "pool": (text.pool, "last" if siglip else "end"),
            "opens": (text.opens, not siglip),
        }
        only_these(f"transformers' {name}", facts)
        own = export(text, _TEXT, f"transformers' {name}")
        # An end that is no id lets transformers look for the largest id, where it must not be.
        more = {"pad_token_id": text.pad_id, "projection_size": model.width} if siglip else {}
    tensors |= {f"text_model.{n}": t for n, t in own.items()}
    tensors |= export(model, _heads(kind), f"transformers' {name}", kept=("vision.", "text.", "logit_"))
    shape = (1,) if siglip else ()
    for scalar in ("logit_scale", "logit_bias"):
        if (value := getattr(model, scalar)) is not None:
            tensors[scalar] = value.detach().reshape(shape).clone()
    text_config = {
        "model_type": f"{kind}_text_model",
        **write_sizes(text, SIZES),
        "hidden_act": SOURCE_ACTIVATIONS.get(text.activation, text.activation),
        "layer_norm_eps": text.norm_eps,
        **more,
    }
    widths = {} if siglip else {"projection_dim": model.width}
    class_name = {"siglip": "SiglipModel", "clip": "CLIPModel", "chinese_clip": "ChineseCLIPModel"}[kind]
    config = {
        "model_type": kind,
        "architectures": [class_name],
        **widths,
        "text_config": text_config | widths,
        "vision_config": vision_config | widths,
    }
    return config, tensors


def load_clip(source: str | Path) -> CLIP:
    """Two towers from what is there: for recipes too (`class_path: mmtransformer.weights.load_clip`).

    Args:
        source: a folder, or the name of a hub's repository: a CLIP of this library; transformers' CLIP, SigLIP, SigLIP
            2 of one size or Chinese-CLIP; open_clip's (`open_clip_config.json` with its safetensors).

    Raises:
        ValueError: naming what is missing or does not fit: another family, a tower alone.
    """
    folder = find_folder(source)
    if not (folder / CONFIG).exists() and (folder / OPEN_CLIP).exists():
        return open_clip_from_folder(folder)
    config = read_json(folder / CONFIG)
    if "class" in config:
        model = Pretrained.from_pretrained(folder)
        if not isinstance(model, CLIP):
            raise other_kind(folder, type(model), CLIP.__name__)
        return model
    dual_type(config, str(folder / CONFIG))
    state = read_tensors(folder)
    with built_from(state, str(folder)):
        return clip_from_transformers(config, state, str(folder), pad_id=_padding(folder))


def _padding(folder: Path) -> int | None:
    """The id of the tokenizer's padding; None where there is no tokenizer, or none that says."""
    if not (folder / "tokenizer.json").exists():
        return None
    settings = read_settings(folder)
    vocab = read_backend(folder, settings).get_vocab()
    settings.pop(CONFIG, None)  # SigLIP's names ids of another vocabulary.
    token = find_token(folder, settings, vocab, "pad")
    return None if token is None else vocab[token]


def save_clip(model: nn.Module, folder: str | Path) -> None:
    """Writes a folder that transformers reads: a CLIPModel, SiglipModel or ChineseCLIPModel; of a `ViT`, a tower alone.

    Raises:
        ValueError: if transformers has no such model, before anything is written.
    """
    if isinstance(model, ViT):
        return save_clip_vision(model, folder)
    if not isinstance(model, CLIP):
        raise ValueError(f"a {type(model).__name__} is neither a CLIP nor a vision tower")
    write_folder(folder, *clip_to_transformers(model))
    return None
