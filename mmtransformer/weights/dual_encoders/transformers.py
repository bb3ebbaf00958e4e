"""transformers' dual encoders, both towers -> `CLIP`, and back.

CLIP (arXiv:2103.00020) projects both sides without biases, SigLIP (arXiv:2303.15343) the text alone, with one. SigLIP 2
of one size is a SigLIP with another vocabulary; its NaFlex reads pictures of native size (arXiv:2502.14786). MetaCLIP 2
(arXiv:2507.22062) is a CLIP of many languages. Of Chinese-CLIP (arXiv:2211.01335), AltCLIP (arXiv:2211.06679) and
VisionTextDualEncoder a BERT or RoBERTa reads the texts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmtransformer.backbones.vit import ViT
from mmtransformer.dual_encoders.clip import CLIP
from mmtransformer.serialization.model_kinds import other_kind
from mmtransformer.serialization.pretrained import CONFIG, Pretrained, find_folder, read_json
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.text.tokenizer_files import find_token, read_backend, read_settings
from mmtransformer.weights.dual_encoders.open_clip import CONFIG as OPEN_CLIP
from mmtransformer.weights.dual_encoders.open_clip import open_clip_from_folder
from mmtransformer.weights.dual_encoders.text_towers import kind_of, text_from_transformers, text_to_transformers
from mmtransformer.weights.shared.configs import only_these
from mmtransformer.weights.shared.folders import read_tensors, write_folder
from mmtransformer.weights.shared.keys import export, fill, part
from mmtransformer.weights.vision.clip import save_clip_vision, vision_from_clip, vision_to_clip
from mmtransformer.weights.vision.siglip2 import vision_from_siglip2, vision_to_siglip2

_CLASSES = {
    "clip": ("CLIP", "CLIPModel"),
    "metaclip_2": ("MetaCLIP 2", "MetaClip2Model"),
    "siglip": ("SigLIP", "SiglipModel"),
    "siglip2": ("SigLIP 2", "Siglip2Model"),
    "chinese_clip": ("Chinese-CLIP", "ChineseCLIPModel"),
    "altclip": ("AltCLIP", "AltCLIPModel"),
    "vision-text-dual-encoder": ("VisionTextDualEncoder", "VisionTextDualEncoderModel"),
}
DUAL_ENCODER_TYPES = tuple(_CLASSES)
"""`model_type` of the dual encoders that are known."""

_TOWERS = tuple(f"{kind}_{tower}_model" for kind in DUAL_ENCODER_TYPES for tower in ("vision", "text"))


def dual_encoder_type(config: Mapping[str, Any], context: str) -> str:
    """Which of `DUAL_ENCODER_TYPES` a config.json of transformers is of.

    Raises:
        ValueError: if it is another model: a tower alone, a text model, a captioner.
    """
    kind = config.get("model_type")
    if kind in _TOWERS:
        raise ValueError(f'{context} is one tower alone ("{kind}"), which compares nothing: give the model with both')
    if kind not in DUAL_ENCODER_TYPES:
        known = ", ".join(DUAL_ENCODER_TYPES)
        raise ValueError(f"{context}: model_type is {kind!r:.40}, no dual encoder that is known here: {known} are")
    return kind


def clip_from_transformers(
    config: Mapping[str, Any], state: Mapping[str, Tensor], context: str, *, ids: Mapping[str, int] | None = None
) -> CLIP:
    """A `CLIP` with the weights of transformers' dual encoder; vectors are equal to 1e-5 in float32.

    Args:
        config: its configuration, as in `config.json`.
        state: its tensors.
        context: what they come from, for errors.
        ids: the tokenizer's "pad_token_id", which SigLIP's texts are filled up with, and "eos_token_id"; what is
            missing is as the config says.

    Raises:
        ValueError: for another family, a tower alone, and tensors that do not fit.
    """
    kind = dual_encoder_type(config, context)
    siglip = kind in ("siglip", "siglip2")
    vision = _vision(kind, config, state, context)
    own = part(state, "text_model.")
    text = text_from_transformers(kind, config.get("text_config") or {}, own, context, ids or {})
    embed_dim = None if siglip else config.get("projection_dim", 768 if kind == "altclip" else 512)
    model = CLIP(vision, text, embed_dim=embed_dim, text_bias=siglip, loss="sigmoid" if siglip else "softmax")
    rest = {n: t for n, t in state.items() if not n.startswith(("text_model.", "vision_model.")) or ".head." in n[:16]}
    scales = {name: rest.pop(name).reshape(()) for name in ("logit_scale", "logit_bias") if name in rest}
    fill(model, _heads(siglip), rest, context, kept=("vision.", "text."), extra=scales)
    return model.eval()


def _vision(kind: str, config: Mapping[str, Any], state: Mapping[str, Tensor], context: str) -> ViT:
    own = part(state, "vision_model.")
    if kind == "altclip":  # transformers 5 calls all layers so when it writes one.
        own = {name.replace("encoder.layer.", "encoder.layers."): tensor for name, tensor in own.items()}
    said = dict(config.get("vision_config") or {})
    if kind == "siglip2":
        return vision_from_siglip2(said | {"model_type": "siglip2_vision_model"}, own, context)
    inner = said.get("model_type", "vit")
    if kind == "vision-text-dual-encoder" and inner not in ("clip", "clip_vision_model"):
        raise ValueError(f"{context}: the vision model is a {inner!r:.40}, and clip_vision_model is known here")
    family = "siglip" if kind == "siglip" else "clip"
    return vision_from_clip(said | {"model_type": f"{family}_vision_model"}, own, context)


def _heads(siglip: bool) -> dict[str, str]:
    if siglip:
        return {"text_model.head": "text_proj"}
    return {"visual_projection": "image_proj", "text_projection": "text_proj"}


def clip_to_transformers(model: CLIP, ids: Mapping[str, int] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of transformers' dual encoder of this shape, one of `DUAL_ENCODER_TYPES`.

    Args:
        model: the model.
        ids: its tokenizer's "bos_token_id", "eos_token_id" and "pad_token_id", which transformers finds the end of
            texts by; None = what it takes for granted.

    Raises:
        ValueError: if a part has no counterpart in any of them.
    """
    vision, siglip, ids = model.vision, model.loss == "sigmoid", ids or {}
    native = siglip and vision.patches.pos_embed.grid is not None
    kind = kind_of(model.text, siglip=siglip, native=native, ids=ids)
    name, class_name = f"transformers' {_CLASSES[kind][0]}", _CLASSES[kind][1]
    only_these(
        name,
        {
            "embed_dim": (model.embed_dim is None, siglip),
            "pool_heads": (model.pool_heads, None),
            "text_bias": (model.text_bias, siglip),
            "class_token": (vision.class_token, not siglip),
            "pool": (vision.attn_pool is not None, siglip),
        },
    )
    vision_config, tower = (vision_to_siglip2 if native else vision_to_clip)(vision)
    vision_config["model_type"] = "clip_vision_model" if kind == "vision-text-dual-encoder" else f"{kind}_vision_model"
    tensors = {f"vision_model.{n}": t for n, t in tower.items()}
    text_config, own = text_to_transformers(kind, model.text, name, ids)
    tensors |= {f"text_model.{n}": t for n, t in own.items()}
    tensors |= export(model, _heads(siglip), name, kept=("vision.", "text.", "logit_"))
    shape = (1,) if siglip else ()
    for scalar in ("logit_scale", "logit_bias"):
        if (value := getattr(model, scalar)) is not None:
            tensors[scalar] = value.detach().reshape(shape).clone()
    widths = {} if siglip else {"projection_dim": model.dim}
    text_config |= {"projection_size": model.dim} if siglip else widths
    config = {
        "model_type": kind,
        "architectures": [class_name],
        **widths,
        "text_config": text_config,
        "vision_config": vision_config | widths,
    }
    return config, tensors


def load_clip(source: str | Path) -> CLIP:
    """Two towers from what is there: for recipes too (`class_path: mmtransformer.weights.load_clip`).

    Args:
        source: a folder, or the name of a hub's repository: a CLIP of this library; transformers' CLIP, MetaCLIP 2,
            SigLIP, SigLIP 2 of one size or of native sizes (NaFlex), Chinese-CLIP, AltCLIP, or a CLIP tower with a BERT
            or RoBERTa (VisionTextDualEncoder); open_clip's (`open_clip_config.json` with its safetensors).

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
    dual_encoder_type(config, str(folder / CONFIG))
    state = read_tensors(folder)
    with built_from(state, str(folder)):
        return clip_from_transformers(config, state, str(folder), ids=_ids(folder))


def _ids(folder: Path) -> dict[str, int]:
    """The ids of the tokenizer's padding and end, as far as there is a tokenizer that says."""
    if not (folder / "tokenizer.json").exists():
        return {}
    settings = read_settings(folder)
    vocab = read_backend(folder, settings).get_vocab()
    settings.pop(CONFIG, None)  # SigLIP's names ids of another vocabulary.
    found = {roles[0]: find_token(folder, settings, vocab, *roles) for roles in (("pad",), ("eos", "sep"))}
    return {f"{role}_token_id": vocab[token] for role, token in found.items() if token is not None}


def save_clip(model: nn.Module, folder: str | Path, *, ids: Mapping[str, int] | None = None) -> None:
    """Writes a folder that transformers reads as one of its dual encoders; of a `ViT`, a tower alone.

    Args:
        model: the model.
        folder: where to.
        ids: see `clip_to_transformers`.

    Raises:
        ValueError: if transformers has no such model, before anything is written.
    """
    if isinstance(model, ViT):
        return save_clip_vision(model, folder)
    if not isinstance(model, CLIP):
        raise ValueError(f"a {type(model).__name__} is neither a CLIP nor a vision tower")
    write_folder(folder, *clip_to_transformers(model, ids))
    return None
