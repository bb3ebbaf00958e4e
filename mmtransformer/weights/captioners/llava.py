"""transformers' LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision -> `Llava`, and back.

Their files have four layouts: as first published, as transformers 4.52 wrote them, as it holds them in memory, and as
it writes them now. All are read; written is the first, which every version reads.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.llava import Llava
from mmtransformer.captioners.tiles import TileConfig, TiledBatch
from mmtransformer.connectors.projector import MLPProjector
from mmtransformer.images.tiles import fitted_tiles
from mmtransformer.weights.captioners.parts.language_model import language_model, language_model_to, sorted_out
from mmtransformer.weights.processors.chat import ChatProcessor, tiles_together
from mmtransformer.weights.processors.pixels import read_pixels, read_tiles
from mmtransformer.weights.shared.configs import only, only_these
from mmtransformer.weights.shared.folders import model_from_folder, read_config, write_folder
from mmtransformer.weights.shared.keys import export, fill
from mmtransformer.weights.vision.clip import USUAL, pair, vision_from_clip, vision_to_clip

_PROJ = {"linear_[1,2]": "fc[1,2]"}
PROMPT = "Describe the image concisely."
"""What pictures are captioned after: the first of those that LLaVA learned short descriptions by (arXiv:2304.08485)."""
_PLAIN = "USER: <image>\n{} ASSISTANT:"
"""LLaVA 1.5's prompts, where a folder has no chat template."""
_LAYOUT = {
    r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)": r"vision.\1",
    r"(?:model\.)?multi_modal_projector\.(.+)": r"projector.\1",
    r"(?:model\.)?image_newline": "newline.newline",
    r"language_model\.((?:model|lm_head)\..+)": r"text.\1",
    r"model\.language_model\.(.+)": r"text.model.\1",
    r"(lm_head\.weight)": r"text.\1",
}
"""The names of all four layouts, and where they belong."""

_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}
_CLIP_L = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14,
           "image_size": 336, "num_hidden_layers": 24, "num_attention_heads": 16}  # fmt: skip
_SO400M = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14,
           "image_size": 384, "num_hidden_layers": 26, "num_attention_heads": 16, "vision_use_head": False}  # fmt: skip
_SIDES = range(384, 2305, 384)
# What transformers takes for granted: these towers where a config.json says nothing of one; where it says some sizes of
# its tower, the others are those of its kind (`clip.USUAL`).
_USUAL: dict[str, dict[str, Any]] = {
    "llava": {"image_token_index": 32000, "vision_feature_select_strategy": "default", "vision_feature_layer": -2},
    "llava_next": {
        "image_token_index": 32000,
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -2,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    "llava_onevision": {
        "image_token_index": 151646,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "image_grid_pinpoints": [[height, width] for height in _SIDES for width in _SIDES],
        "vision_aspect_ratio": "anyres_max_9",
    },
}


def llava_from_state(config: Mapping[str, Any], state: Mapping[str, Tensor], context: str) -> Llava:
    """A `Llava` from what a hub folder holds: its config.json, and all of its tensors; equal to 1e-5 in float32.

    Raises:
        ValueError: if a part is of a kind that is not here.
    """
    config = _whole(config)
    kind = config["model_type"]
    only(config, context, {"projector_hidden_act": "gelu", "use_image_newline_parameter": True}, "Llava")
    parts = sorted_out(state, _LAYOUT, context)
    if "head.probe" not in parts["vision"]:  # nobody reads it here, so some files leave it out
        config["vision_config"]["vision_use_head"] = False
    vision = vision_from_clip(config["vision_config"], parts["vision"], f"{context}, vision tower")
    text = {"model_type": "qwen2" if kind == "llava_onevision" else "llama"} | config.get("text_config", {})
    tied = config.get("tie_word_embeddings", False)
    if kind != "llava_next":
        tied = tied or text.get("tie_word_embeddings", False)
    decoder = language_model(text, parts["text"], f"{context}, language model", tied=tied)
    layers = config["vision_feature_layer"]
    layers = (layers,) if isinstance(layers, int) else tuple(layers)
    if 0 in layers or any(not -vision.depth <= layer <= vision.depth for layer in layers):
        raise ValueError(f"{context}: vision_feature_layer is {layers}, of a tower of {vision.depth} blocks")
    if (keep := config["vision_feature_select_strategy"] == "full") is False and not vision.class_token:
        raise ValueError(f"{context}: vision_feature_select_strategy is not full, but the tower has no class token")
    projector = MLPProjector(
        vision.dim * len(layers), decoder.dim, input_norm=False, bias=config.get("multimodal_projector_bias", True)
    )
    fill(projector, _PROJ, parts["projector"], f"{context}, projector")
    model = Llava(
        vision,
        projector,
        decoder,
        config["image_token_index"],
        # There, 0 stands before the first block.
        vision_feature_layers=tuple(layer if layer < 0 else layer - 1 for layer in layers),
        keep_prefix_tokens=keep and vision.class_token,
        tiles=_tiles(config, context),
    )
    fill(model, {"newline": "newline"}, parts["newline"], context, kept=("vision.", "projector.", "decoder."))
    return model.eval()


def _whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, with what goes without saying."""
    kind = config["model_type"]
    found = _USUAL[kind] | {name: value for name, value in config.items() if value is not None}
    if "image_token_id" in found:  # its newer name
        found["image_token_index"] = found["image_token_id"]
    usual = _SO400M if kind == "llava_onevision" else _CLIP_L
    tower = {"model_type": usual["model_type"], **found.get("vision_config", usual)}
    return found | {"vision_config": tower}


def _tiles(config: Mapping[str, Any], context: str) -> TileConfig:
    if config["model_type"] == "llava":
        return TileConfig()
    points = tuple((height, width) for height, width in config["image_grid_pinpoints"])
    if config["model_type"] == "llava_next":
        return TileConfig(points)
    found = re.fullmatch(r"anyres_max_(\d+)", str(config["vision_aspect_ratio"]))
    if found is None:
        raise ValueError(f"{context}: vision_aspect_ratio is {config['vision_aspect_ratio']!r}, not anyres_max_...")
    return TileConfig(points, int(found[1]), single_only=True)


def to_llava(model: Llava) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What transformers needs to hold this model: its config.json, and its tensors by their first names there.

    Without tiles it is a LlavaForConditionalGeneration, with them a LlavaNextForConditionalGeneration, or, where only a
    picture by itself is cut, a LlavaOnevisionForConditionalGeneration.

    Raises:
        ValueError: if a part has no counterpart there.
    """
    projector, tiles, vision = model.projector, model.tiles, model.vision
    kind = "llava_onevision" if tiles.single_only else "llava_next" if tiles.pinpoints else "llava"
    context = f"transformers' {_CLASSES[kind]}"
    if not isinstance(projector, MLPProjector) or model.vision_feature_layers is None:
        raise ValueError(f"{context} has an MLPProjector that reads tokens before the last norm")
    only_these(
        context,
        {
            "projector.input_norm": (projector.input_norm, False),
            "projector.pixel_shuffle": (projector.pixel_shuffle, 1),
            "projector.hidden_dim": (projector.hidden_dim, projector.dim),
            "keep_prefix_tokens": (model.keep_prefix_tokens, model.keep_prefix_tokens and vision.class_token),
            "tiles.max_tiles": (bool(tiles.max_tiles), tiles.single_only),
        },
    )
    tower, vision_tensors = vision_to_clip(vision)
    text, text_tensors = language_model_to(model.decoder, context)
    layers = [layer if layer < 0 else layer + 1 for layer in model.vision_feature_layers]
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": [_CLASSES[kind]],
        "vision_config": tower,
        "text_config": text,
        "image_token_index": model.image_token_id,
        "image_seq_length": vision.grid_size[0] * vision.grid_size[1],
        "vision_feature_layer": layers[0] if len(layers) == 1 else layers,
        "vision_feature_select_strategy": "full" if model.keep_prefix_tokens or not vision.class_token else "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": projector.bias,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    tensors = {f"language_model.{name}": tensor for name, tensor in text_tensors.items()}
    tensors |= {f"vision_tower.vision_model.{name}": tensor for name, tensor in vision_tensors.items()}
    tensors |= {f"multi_modal_projector.{name}": tensor for name, tensor in export(projector, _PROJ, context).items()}
    if model.newline is not None:
        config["image_grid_pinpoints"] = [list(point) for point in tiles.pinpoints]
        tensors["image_newline"] = model.newline.detach()
    if tiles.single_only:
        config["vision_aspect_ratio"] = f"anyres_max_{tiles.max_tiles}"
    return config, tensors


def load_llava(source: str | Path) -> Llava:
    """A LLaVA 1.5, LLaVA-NeXT or LLaVA-OneVision from a folder as hubs have it, or the name of a hub's repository.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    return model_from_folder(source, llava_from_state, *_USUAL)


class LlavaProcessor(ChatProcessor):
    """Pictures and prompts of LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision; see `ChatProcessor`.

    Args:
        folder: the model's folder.
    """

    def __init__(self, folder: Path) -> None:
        config = _whole(read_config(folder, *_USUAL))
        kind, tower = config["model_type"], config["vision_config"]
        side, self.values = tower.get("image_size", 224), dict[str, Any]()
        name = "SigLIP" if tower["model_type"].startswith("siglip") else "CLIP"
        if kind == "llava":
            transform = read_pixels(folder, name, size=side)
        else:
            stem = "LlavaNext" if kind == "llava_next" else "LlavaOnevision"
            transform, self.values = read_tiles(folder, stem, size=side)
        super().__init__(
            folder, transform, config["image_token_index"], prompt=PROMPT, plain=_PLAIN if kind == "llava" else None
        )
        self.tiles, self.tile = _tiles(config, str(folder)), (side, side)
        points = [tuple(point) for point in self.values.get("image_grid_pinpoints", ())]
        if points != [*self.tiles.pinpoints]:
            raise ValueError(f"{folder}: image_grid_pinpoints of config.json and of preprocessor_config.json differ")
        patch = pair(USUAL[name == "CLIP"]["patch_size"] if "patch_size" not in tower else tower["patch_size"])[0]
        self.grid = (side // patch, side // patch)
        self.count = self.grid[0] * self.grid[1] + (
            name == "CLIP" and config["vision_feature_select_strategy"] == "full"
        )

    def prepare(self, image: Image) -> Any:
        """Its pixels, or those of its tiles and its size, where the model reads tiles; see `Processor`."""
        if not self.tiles.pinpoints:
            return super().prepare(image)
        return fitted_tiles(image, self.transform, self.tiles.pinpoints), (image.height, image.width)

    def batch_of(self, prepared: Sequence[Any]) -> CaptionBatch:
        """Pictures as a batch without texts; see `Processor`."""
        if not self.tiles.pinpoints:
            return super().batch_of(prepared)
        tokens, pixels, real = tiles_together([tiles for tiles, _ in prepared])
        sizes = torch.tensor([size for _, size in prepared])[:, None]
        return TiledBatch(tokens, tokens.bool(), tokens.bool(), pixels, image_mask=real, image_sizes=sizes)

    def placeholders(self, batch: CaptionBatch, sample: int) -> str:
        """One for each token of the picture; see `ChatProcessor`."""
        sizes: Tensor | None = getattr(batch, "image_sizes", None)
        if sizes is None:
            return self.image_token * self.count
        height, width = sizes[sample, 0].tolist()
        tiles = self.tiles.tiles((height, width), self.tile)
        return self.image_token * self.tiles.num_tokens((height, width), tiles, self.grid)


def save_llava(model: Llava, folder: str | Path) -> None:
    """Writes a folder that transformers reads: `config.json` and `model.safetensors`.

    Raises:
        ValueError: if a part has no counterpart there, before anything is written.
    """
    write_folder(folder, *to_llava(model))
