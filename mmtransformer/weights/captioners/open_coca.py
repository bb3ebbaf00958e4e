"""open_clip's CoCa (coca_ViT-B-32, coca_ViT-L-14) -> `OpenCoCa`, and back: open_clip_config.json and safetensors."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtransformer.backbones.patches import ViTPatchConfig
from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_blocks import ViTBlockConfig, ViTOutputConfig
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.published.open_coca import OpenCoCa
from mmtransformer.serialization.folder_config import OPEN_CLIP, folder_config
from mmtransformer.serialization.pretrained import find_folder
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.serialization.weight_files import read_safetensors, write_weights
from mmtransformer.serialization.writing import made_folder
from mmtransformer.text.clip_tokenizer import END, START, VOCABULARY, read_clip_vocabulary
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.processors.pixels import PIXELS, open_clip_pixels
from mmtransformer.weights.processors.processor import Processor
from mmtransformer.weights.shared.configs import only, only_these
from mmtransformer.weights.shared.folders import read_tensors
from mmtransformer.weights.shared.keys import export, fill, nested, part
from mmtransformer.weights.shared.pickles import read_pickle
from mmtransformer.weights.shared.vit import fill_vit, vit_tensors

WEIGHTS, _OLD = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
_ATTENTION = {
    "attn.in_proj_weight": "attn.[q,k,v]_proj.weight",
    "attn.in_proj_bias": "attn.[q,k,v]_proj.bias",
    "attn.out_proj": "attn.out_proj",
}
_BLOCK = _ATTENTION | {"ln_[1,2]": "norm[1,2]", "mlp.[c_fc,c_proj]": "mlp.[fc1,fc2]"}
_VISION = {
    "conv1": "patch_embed.proj",
    "ln_pre": "first_norm",
    **nested(_BLOCK, source="transformer.resblocks.*.", target="blocks.*."),
}
_KEYS = {
    "visual.attn_pool.query": "queries",
    "visual.attn_pool.ln_[q,k]": "norm_[queries,visual]",
    "visual.attn_pool.attn.[q,k,v]_proj_weight": "pool.[q,k,v]_proj.weight",
    "visual.attn_pool.attn.in_proj_bias": "pool.[q,k,v]_proj.bias",
    "visual.attn_pool.attn.out_proj": "pool.out_proj",
    "visual.ln_post": "norm_pooled",
    "visual.proj": "image_proj.weight",
    "text.token_embedding": "tok_embed",
    "text.positional_embedding": "pos_embed",
    "text.cls_emb": "end",
    **nested(_BLOCK, source="text.transformer.resblocks.*.", target="text_blocks.*."),
    "text.ln_final": "text_norm",
    "text.text_projection": "text_proj.weight",
    **nested(_BLOCK, source="text_decoder.resblocks.*.", target="blocks.*."),
    **nested(_BLOCK | {"ln_1_kv": "norm_context"}, source="text_decoder.cross_attn.*.", target="cross_blocks.*."),
    "text_decoder.ln_final": "last_norm",
    "text_decoder.text_projection": "lm_head.weight",
}
_TURNED = ("visual.proj", "text.text_projection", "text_decoder.text_projection")
_POSITIONS, _CLASS = "positional_embedding", "class_embedding"
_EPS = 1e-5
# What open_clip takes for granted.
_USUAL: dict[str, dict[str, Any]] = {
    "vision_cfg": {
        "image_size": 224, "layers": 12, "width": 768, "patch_size": 16, "head_width": 64, "mlp_ratio": 4.0,
        "attn_pooler_queries": 256, "attn_pooler_heads": 8,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    "multimodal_cfg": {"width": 512, "heads": 8, "layers": 12},
}  # fmt: skip


def open_coca_from_state(config: Mapping[str, Any], state: Mapping[str, Tensor], context: str) -> OpenCoCa:
    """An `OpenCoCa` from open_clip's `model_cfg` and all of its tensors; equal to 1e-5 in float32.

    Raises:
        ValueError: for a variant that differs in more than its sizes, or tensors that do not fit.
    """
    if missing := [name for name in ("embed_dim", *_USUAL) if name not in config]:
        raise ValueError(f"{context}: model_cfg has no {', '.join(missing)}: not a CoCa")
    vision, text, upper = (_USUAL[name] | config[name] for name in _USUAL)
    only(vision, f"{context}, vision_cfg", {"attentional_pool": True, "ls_init_value": None, "mlp_ratio": 4.0,
         "no_ln_pre": False, "pool_type": "tok", "timm_model_name": None}, "OpenCoCa")  # fmt: skip
    only(text, f"{context}, text_cfg", {"embed_cls": True, "ls_init_value": None, "mlp_ratio": 4.0,
         "no_causal_mask": False, "hf_model_name": None, "proj_bias": False}, "OpenCoCa")  # fmt: skip
    only(upper, f"{context}, multimodal_cfg", {"width": text["width"], "heads": text["heads"], "ls_init_value": None,
         "mlp_ratio": 4}, "OpenCoCa")  # fmt: skip
    only(config, context, {"embed_dim": text["width"]}, "OpenCoCa")
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    own = part(state, "visual.")
    tower = {n: t for n, t in own.items() if not n.startswith(("attn_pool.", "ln_post.")) and n != "proj"}
    vit = ViT(
        vision["image_size"],
        vision["patch_size"],
        vision["width"],
        vision["layers"],
        vision["width"] // vision["head_width"],
        patches=ViTPatchConfig(bias=False, pre_norm=True),
        block=ViTBlockConfig(activation, _EPS),
        output=ViTOutputConfig("none"),
    )
    fill_vit(vit, _VISION, tower, context, positions=_POSITIONS, prefix=[_CLASS])
    model = OpenCoCa(
        vit,
        text["vocab_size"],
        text["width"],
        text["layers"],
        upper["layers"],
        text["heads"],
        max_len=text["context_length"],
        num_queries=vision["attn_pooler_queries"],
        pool_heads=vision["attn_pooler_heads"],
        activation=activation,
        norm_eps=_EPS,
    )
    rest = {n: t for n, t in state.items() if not n.endswith("attn_mask") and n.removeprefix("visual.") not in tower}
    rest = {n: t.T.contiguous() if n in _TURNED else t for n, t in rest.items()}
    if (scale := rest.pop("logit_scale", None)) is None:
        raise ValueError(f"{context} has no tensor logit_scale")
    fill(model, _keys(model), rest, context, kept=("vision.",), extra={"logit_scale": scale.reshape(())})
    return model.eval()


def _keys(model: OpenCoCa) -> dict[str, str]:
    """Of a pool as wide as the vision encoder, open_clip keeps the three matrices as one."""
    if model.dim != model.vision.dim:
        return _KEYS
    keys = {name: ours for name, ours in _KEYS.items() if "_proj_weight" not in name or "in_proj" in name}
    return keys | {"visual.attn_pool.attn.in_proj_weight": "pool.[q,k,v]_proj.weight"}


def to_open_coca(model: OpenCoCa) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """open_clip's `model_cfg` of this model, and its tensors by their names there.

    Raises:
        ValueError: if a part has no counterpart there.
    """
    vision, context = model.vision, "open_clip's CoCa"
    side = vision.image_size[0]
    only_these(
        context,
        {
            "class_token": (vision.class_token, True),
            "num_registers": (vision.num_registers, 0),
            "block": (vision.block, ViTBlockConfig(model.activation, _EPS)),
            "activation": (model.activation in ("gelu", "quick_gelu"), True),
            "patches": (vision.patches, ViTPatchConfig(bias=False, pre_norm=True)),
            "output": (vision.output, ViTOutputConfig("none")),
            "mlp_dim": (vision.mlp_dim, 4 * vision.dim),
            "image_size": (vision.image_size, (side, side)),
            "norm_eps": (model.norm_eps, _EPS),
        },
    )
    config = {
        "embed_dim": model.dim,
        "vision_cfg": {
            "image_size": side,
            "layers": vision.depth,
            "width": vision.dim,
            "head_width": vision.dim // vision.num_heads,
            "patch_size": vision.patch_size,
            "attentional_pool": True,
            "attn_pooler_queries": model.num_queries,
            "attn_pooler_heads": model.pool_heads,
            "output_tokens": True,
        },
        "text_cfg": {
            "context_length": model.max_len,
            "vocab_size": model.vocab_size,
            "width": model.dim,
            "heads": model.num_heads,
            "layers": model.depth,
            "embed_cls": True,
            "output_tokens": True,
        },
        "multimodal_cfg": {
            "context_length": model.max_len,
            "vocab_size": model.vocab_size,
            "width": model.dim,
            "heads": model.num_heads,
            "layers": model.decoder_depth,
        },
        "custom_text": True,
    }
    tower = vit_tensors(vision, _VISION, context, positions=_POSITIONS, prefix=[_CLASS])
    tower |= {_POSITIONS: tower[_POSITIONS][0], _CLASS: tower[_CLASS][0, 0]}
    own = export(model, _keys(model), context, kept=("vision.", "logit_scale"))
    own = {"logit_scale": model.logit_scale.detach(), **own}
    own = {name: tensor.T.contiguous() if name in _TURNED else tensor for name, tensor in own.items()}
    more = {"quick_gelu": True} if model.activation == "quick_gelu" else {}
    return config | more, own | {f"visual.{name}": tensor for name, tensor in tower.items()}


def load_open_coca(source: str | Path) -> OpenCoCa:
    """A CoCa of open_clip from a folder as hubs have it, or the name of a hub's repository.

    Args:
        source: `open_clip_config.json` with `open_clip_model.safetensors`, or where that is not there
            `open_clip_pytorch_model.bin`, read as tensors alone.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    folder = find_folder(source)
    config = _model_config(folder)
    if (folder / WEIGHTS).exists():
        state = read_safetensors(folder / WEIGHTS)
    else:
        state = read_pickle(folder / _OLD) if (folder / _OLD).exists() else read_tensors(folder)
    with built_from(state, str(folder), filled=True):
        return open_coca_from_state(config, state, str(folder))


def _model_config(folder: Path) -> dict[str, Any]:
    config = folder_config(folder).get("model_cfg")
    if not isinstance(config, dict):
        raise ValueError(f'{folder / OPEN_CLIP} has no "model_cfg"')
    return config


class OpenCocaProcessor(Processor):
    """Prompts of open_clip's CoCa: the start of a text, then the words that a caption goes on from.

    Where a folder has no tokenizer, it is CLIP's, of `bpe_simple_vocab_16e6.txt.gz`: in the folder, or of an open_clip
    that is installed.

    Args:
        folder: the model's folder.

    Raises:
        ValueError: if a file is missing or damaged.
    """

    keeps_prompt = True
    usual_search = {"num_beams": 6, "min_new_tokens": 4, "max_new_tokens": 29}  # noqa: RUF012 (as open_clip's generate)

    def __init__(self, folder: Path) -> None:
        vision = _USUAL["vision_cfg"] | _model_config(folder).get("vision_cfg", {})
        tokenizer = _tokenizer(folder)
        side = vision["image_size"]
        super().__init__(tokenizer, open_clip_pixels(folder, (side, side), backend="timm"), eos_ids=[tokenizer.eos_id])

    def prompt_ids(self, text: str | None, batch: CaptionBatch, sample: int) -> list[int]:
        """The start and the words; see `Processor`."""
        return [self.tokenizer.bos_id, *([] if text is None else self.tokenizer.encode(text))]


def _tokenizer(folder: Path) -> Tokenizer:
    """A folder's tokenizer, or CLIP's."""
    if any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return Tokenizer.from_pretrained(folder)
    found = importlib.util.find_spec("open_clip")
    places = [folder, *(Path(place) for place in (found.submodule_search_locations or () if found else ()))]
    for place in places:
        if (place / VOCABULARY).exists():
            backend = read_clip_vocabulary(place / VOCABULARY)
            return Tokenizer(backend, bos_token=START, eos_token=END, pad_token=END)
    raise ValueError(
        f"{folder} has no tokenizer, and open_clip, which has CLIP's, is not installed: pip install open_clip_torch, "
        f"or `hf download openai/clip-vit-base-patch32 tokenizer.json tokenizer_config.json --local-dir {folder}`"
    )


def save_open_coca(model: OpenCoCa, folder: str | Path, *, pixels: Mapping[str, Any] | None = None) -> None:
    """Writes a folder that open_clip reads (`local-dir:FOLDER`): its config and tensors.

    Args:
        model: the model.
        folder: where to.
        pixels: open_clip's `preprocess_cfg`; OpenAI's mean and std unless told.

    Raises:
        ValueError: if a part has no counterpart there, before anything is written.
    """
    config, tensors = to_open_coca(model)
    folder = made_folder(folder)
    whole = {"model_cfg": config, "preprocess_cfg": dict(PIXELS if pixels is None else pixels)}
    write_weights(folder / WEIGHTS, tensors)
    (folder / OPEN_CLIP).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
