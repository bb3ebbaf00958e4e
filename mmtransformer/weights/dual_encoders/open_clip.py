"""open_clip's dual encoders -> `CLIP`, and back: open_clip_config.json and safetensors.

What open_clip calls a custom text model has its text tower's tensors below "text.", the others beside "visual.".
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtransformer.backbones.patches import ViTPatchConfig
from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_blocks import ViTBlockConfig, ViTOutputConfig
from mmtransformer.dual_encoders.clip import CLIP
from mmtransformer.dual_encoders.text_tower import TextTower
from mmtransformer.layers.config import Activation
from mmtransformer.serialization.folder_config import OPEN_CLIP
from mmtransformer.serialization.pretrained import read_json
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.serialization.weight_files import read_safetensors, write_weights
from mmtransformer.serialization.writing import made_folder
from mmtransformer.weights.processors.pixels import PIXELS
from mmtransformer.weights.shared.configs import only, only_these
from mmtransformer.weights.shared.keys import export, fill, nested, part
from mmtransformer.weights.shared.vit import fill_vit, vit_tensors

CONFIG, WEIGHTS = OPEN_CLIP, "open_clip_model.safetensors"
_BLOCK = {
    "ln_[1,2]": "norm[1,2]",
    "attn.in_proj_weight": "attn.[q,k,v]_proj.weight",
    "attn.in_proj_bias": "attn.[q,k,v]_proj.bias",
    "attn.out_proj": "attn.out_proj",
    "mlp.[c_fc,c_proj]": "mlp.[fc1,fc2]",
}
_BLOCKS = nested(_BLOCK, source="transformer.resblocks.*.", target="blocks.*.")
_VISION = {"conv1": "patch_embed.proj", "ln_pre": "first_norm", **_BLOCKS, "ln_post": "pool_norm"}
_TEXT = {"token_embedding": "tok_embed", "positional_embedding": "pos_embed.weight", **_BLOCKS, "ln_final": "norm"}
_POSITIONS, _CLASS = "positional_embedding", "class_embedding"
_EPS = 1e-5
# What open_clip takes for granted.
_USUAL: dict[str, dict[str, Any]] = {
    "vision_cfg": {
        "image_size": 224, "layers": 12, "width": 768, "patch_size": 16, "head_width": 64, "mlp_ratio": 4.0,
    },
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0,
    },
}  # fmt: skip
_VISION_ONLY = {
    "timm_model_name": None, "attentional_pool": False, "pool_type": "tok", "no_ln_pre": False, "ls_init_value": None,
    "input_patchnorm": False, "pos_embed_type": "learnable", "final_ln_after_pool": False,
    "global_average_pool": False,
}  # fmt: skip
_TEXT_ONLY = {
    "hf_model_name": None, "embed_cls": False, "pool_type": "argmax", "no_causal_mask": False, "ls_init_value": None,
    "proj_bias": False, "proj_type": "linear", "final_ln_after_pool": False,
}  # fmt: skip


def clip_from_open_clip(config: Mapping[str, Any], state: Mapping[str, Tensor], context: str) -> CLIP:
    """A `CLIP` from open_clip's `model_cfg` and all of its tensors; equal to 1e-5 in float32.

    Raises:
        ValueError: for a variant that differs in more than its sizes (a tower of timm's, another text model), or
            tensors that do not fit.
    """
    if missing := [name for name in ("embed_dim", *_USUAL) if not isinstance(config.get(name), int | dict)]:
        raise ValueError(f"{context}: model_cfg has no {', '.join(missing)}: not a dual encoder")
    if "multimodal_cfg" in config:
        raise ValueError(f"{context} is a CoCa, which captions too: `load_open_coca` reads it")
    vision, text = (_USUAL[name] | config[name] for name in _USUAL)
    only(vision, f"{context}, vision_cfg", _VISION_ONLY, "CLIP")
    only(text, f"{context}, text_cfg", _TEXT_ONLY, "CLIP")
    activation: Activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    custom = any(name.startswith("text.") for name in state)
    words = part(state, "text.") if custom else {n: t for n, t in state.items() if not n.startswith("visual.")}
    own = part(state, "visual.")
    if lost := [
        name for name, there in (("visual.proj", own), ("text_projection", words)) if name.split(".")[-1] not in there
    ]:
        raise ValueError(f"{context} has no tensor {', '.join(lost)}")
    size = vision["image_size"]
    vit = ViT(
        tuple(size) if isinstance(size, list) else size,
        vision["patch_size"],
        vision["width"],
        vision["layers"],
        vision["width"] // vision["head_width"],
        mlp_dim=int(vision["width"] * vision["mlp_ratio"]),
        patches=ViTPatchConfig(bias=False, pre_norm=True),
        block=ViTBlockConfig(activation, _EPS),
        output=ViTOutputConfig("pooled"),
    )
    projections = {"image_proj.weight": own.pop("proj").T, "text_proj.weight": words.pop("text_projection").T}
    fill_vit(vit, _VISION, own, context, positions=_POSITIONS, prefix=[_CLASS])
    tower = TextTower(
        text["vocab_size"],
        text["width"],
        text["layers"],
        text["heads"],
        max_len=text["context_length"],
        mlp_dim=int(text["width"] * text["mlp_ratio"]),
        activation=activation,
        norm_eps=_EPS,
    )
    words = {name: tensor for name, tensor in words.items() if name not in ("attn_mask", "logit_scale")}
    fill(tower, _TEXT, words, context)
    if "logit_scale" not in state:
        raise ValueError(f"{context} has no tensor logit_scale")
    extra = projections | {"logit_scale": state["logit_scale"].reshape(())}
    model = CLIP(vit, tower, embed_dim=config["embed_dim"])
    fill(model, {}, {}, context, kept=("vision.", "text."), extra=extra)
    return model.eval()


def clip_to_open_clip(model: CLIP) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """open_clip's `model_cfg` of this model, and its tensors by their names there.

    Raises:
        ValueError: if a part has no counterpart there.
    """
    vit, text, name = model.vision, model.text, "open_clip's CLIP"
    if not isinstance(text, TextTower):
        raise ValueError(f"{name} has nothing like a text tower of class {type(text).__name__}")
    only_these(
        name,
        {
            "loss": (model.loss, "softmax"),
            "pool_heads": (model.pool_heads, None),
            "text_bias": (model.text_bias, False),
            "embed_dim": (model.embed_dim is None, False),
            "class_token": (vit.class_token, True),
            "num_registers": (vit.num_registers, 0),
            "activation": (text.activation in ("gelu", "quick_gelu"), True),
            "block": (vit.block, ViTBlockConfig(text.activation, _EPS)),
            "patches": (vit.patches, ViTPatchConfig(bias=False, pre_norm=True)),
            "output": (vit.output, ViTOutputConfig("pooled")),
            "pool": (vit.pool, "class"),
            "text pooling": ((text.causal, text.pool, text.add_bos_token), (True, "eos", True)),
            "norm_eps": (text.norm_eps, _EPS),
        },
    )
    config = {
        "embed_dim": model.dim,
        "vision_cfg": {
            "image_size": vit.image_size[0] if vit.image_size[0] == vit.image_size[1] else list(vit.image_size),
            "layers": vit.depth,
            "width": vit.dim,
            "head_width": vit.dim // vit.num_heads,
            "patch_size": vit.patch_size,
            "mlp_ratio": vit.mlp_dim / vit.dim,
        },
        "text_cfg": {
            "context_length": text.max_len,
            "vocab_size": text.vocab_size,
            "width": text.dim,
            "heads": text.num_heads,
            "layers": text.depth,
            "mlp_ratio": text.mlp_dim / text.dim,
        },
        **({"quick_gelu": True} if text.activation == "quick_gelu" else {}),
    }
    tower = vit_tensors(vit, _VISION, name, positions=_POSITIONS, prefix=[_CLASS])
    tower |= {_POSITIONS: tower[_POSITIONS][0], _CLASS: tower[_CLASS][0, 0]}
    tower["proj"] = model.image_proj.weight.detach().T.contiguous()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    words = export(text, _TEXT, name) | {"text_projection": model.text_proj.weight.detach().T.contiguous()}
    scale = {"logit_scale": model.logit_scale.detach()}
    return config, scale | words | {f"visual.{n}": tensor for n, tensor in tower.items()}


def open_clip_from_folder(folder: Path) -> CLIP:
    """A `CLIP` from a folder as hubs have it: `open_clip_config.json` and `open_clip_model.safetensors`.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    config = read_json(folder / CONFIG).get("model_cfg")
    if not isinstance(config, dict):
        raise ValueError(f'{folder / CONFIG} has no "model_cfg"')
    state = read_safetensors(folder / WEIGHTS)
    with built_from(state, str(folder)):
        return clip_from_open_clip(config, state, str(folder))


def save_open_clip(model: CLIP, folder: str | Path, *, pixels: Mapping[str, Any] | None = None) -> None:
    """Writes a folder that open_clip reads (`local-dir:FOLDER`): its config and tensors.

    Args:
        model: the model.
        folder: where to.
        pixels: open_clip's `preprocess_cfg`; OpenAI's mean and std unless told.

    Raises:
        ValueError: if a part has no counterpart there, before anything is written.
    """
    config, tensors = clip_to_open_clip(model)
    folder = made_folder(folder)
    write_weights(folder / WEIGHTS, tensors)
    whole = {"model_cfg": config, "preprocess_cfg": dict(PIXELS if pixels is None else pixels)}
    (folder / CONFIG).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
