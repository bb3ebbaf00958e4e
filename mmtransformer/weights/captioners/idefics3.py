"""transformers' Idefics3 and SmolVLM -> `Llava`, and back: squares of a SigLIP's patches, one matrix, a Llama.

Their tower finds an image's positions by fractions of its side (arXiv:2307.06304), in float32: for most sizes of a grid
every patch gets its own row of the table, for some it does not. A tile is a whole image, so only the first are taken.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.llava import Llava
from mmtransformer.connectors.projector import LinearProjector
from mmtransformer.images.tiles import split_tiles
from mmtransformer.serialization.pretrained import CONFIG, read_json
from mmtransformer.weights.captioners.parts.language_model import language_model, language_model_to, sorted_out
from mmtransformer.weights.processors.chat import ChatProcessor, GridBatch, tiles_together
from mmtransformer.weights.processors.pixels import read_tiles
from mmtransformer.weights.shared.configs import only, only_these
from mmtransformer.weights.shared.folders import model_from_folder, write_folder
from mmtransformer.weights.shared.keys import export, fill
from mmtransformer.weights.vision.clip import USUAL, pair, vision_from_clip, vision_to_clip

PROMPT = "Can you describe this image?"
"""What pictures are captioned after: the words that SmolVLM's makers show its use with."""
_AROUND = "<fake_token_around_image>"
_PROJ = {"proj": "fc"}
_LAYOUT = {
    r"model\.vision_model\.(.+)": r"vision.\1",
    r"model\.connector\.modality_projection\.(.+)": r"projector.\1",
    r"model\.text_model\.(.+)": r"text.model.\1",
    r"(lm_head\.weight)": r"text.\1",
}
_CLASSES = {"idefics3": "Idefics3ForConditionalGeneration", "smolvlm": "SmolVLMForConditionalGeneration"}
_USUAL: dict[str, Any] = {"image_token_id": 128257, "scale_factor": 2, "tie_word_embeddings": False}
_USUAL_VISION: dict[str, Any] = {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}
"""What transformers takes for granted where a config.json does not say it; of the tower, where it is no SigLIP's."""


def idefics3_from_state(config: Mapping[str, Any], state: Mapping[str, Tensor], context: str) -> Llava:
    """A `Llava` from what a hub folder holds: its config.json, and all of its tensors; equal to 1e-5 in float32.

    Raises:
        ValueError: if a part is of a kind that is not here.
    """
    config = _USUAL | {name: value for name, value in config.items() if value is not None}
    parts = sorted_out(state, _LAYOUT, context)
    tower = _USUAL_VISION | config.get("vision_config", {})
    tower |= {"model_type": "siglip_vision_model", "vision_use_head": False}
    vision = vision_from_clip(tower, parts["vision"], f"{context}, vision tower")
    _check_grid(vision.grid_size, context)
    text = {"model_type": "llama", "rms_norm_eps": 1e-5} | config.get("text_config", {})
    only(text, context, {"qk_layer_norms": False})
    tied = config["tie_word_embeddings"]
    decoder = language_model(text, parts["text"], f"{context}, language model", tied=tied)
    projector = LinearProjector(vision.dim, decoder.dim, pixel_shuffle=config["scale_factor"], bias=False)
    fill(projector, _PROJ, parts["projector"], f"{context}, projector")
    return Llava(vision, projector, decoder, config["image_token_id"], vision_feature_layers=None).eval()


def _check_grid(grid: tuple[int, int], context: str) -> None:
    """Refuses grids whose patches share positions there."""
    for n in grid:
        places = (torch.arange(n, dtype=torch.float32) * (1.0 / torch.tensor(n))).clamp(max=1 - 1e-6)
        if not torch.equal(torch.bucketize(places, torch.arange(1 / n, 1.0, 1 / n), right=True), torch.arange(n)):
            raise ValueError(
                f"{context}: in a grid of {grid[0]} x {grid[1]} patches, some share their position by rounding, which "
                f"is not done here"
            )


def to_idefics3(model: Llava, family: str = "smolvlm") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What transformers needs to hold this model: its config.json, and its tensors by their names there.

    Args:
        model: the model.
        family: "smolvlm" or "idefics3", which differ in their names alone.

    Raises:
        ValueError: if a part has no counterpart there.
    """
    context, vision = f"transformers' {_CLASSES[family]}", model.vision
    if not isinstance(model.projector, LinearProjector):
        raise ValueError(f"{context} has a LinearProjector, not a {type(model.projector).__name__}")
    only_these(
        context,
        {
            "projector.bias": (model.projector.bias, False),
            "vision_feature_layers": (model.vision_feature_layers, None),
            "keep_prefix_tokens": (model.keep_prefix_tokens, False),
            "class_token": (vision.class_token, False),
            "pool": (vision.pool, "mean"),
            "tiles": (model.tiles.pinpoints, ()),
        },
    )
    _check_grid(vision.grid_size, context)
    tower, vision_tensors = vision_to_clip(vision)
    text, text_tensors = language_model_to(model.decoder, context)
    config = {
        "model_type": family,
        "architectures": [_CLASSES[family]],
        "vision_config": {**tower, "model_type": f"{family}_vision"},
        "text_config": text,
        "image_token_id": model.image_token_id,
        "scale_factor": model.projector.pixel_shuffle,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    del config["vision_config"]["vision_use_head"]
    tensors = {f"model.vision_model.{name}": tensor for name, tensor in vision_tensors.items()}
    projector = export(model.projector, _PROJ, context)
    tensors |= {f"model.connector.modality_projection.{name}": tensor for name, tensor in projector.items()}
    for name, tensor in text_tensors.items():
        tensors[name.replace("model.", "model.text_model.", 1) if name.startswith("model.") else name] = tensor
    return config, tensors


def load_idefics3(source: str | Path) -> Llava:
    """An Idefics3 or SmolVLM from a folder as hubs have it, or the name of a hub's repository.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    return model_from_folder(source, idefics3_from_state, *_CLASSES)


class Idefics3Processor(ChatProcessor):
    """Pictures and prompts of Idefics3 and SmolVLM: tiles row by row, each behind its number, then the whole view.

    Args:
        folder: the model's folder.
    """

    def __init__(self, folder: Path) -> None:
        config = _USUAL | read_json(folder / CONFIG)
        tower = USUAL[False] | _USUAL_VISION | (config.get("vision_config") or {})
        side, factor = pair(tower["image_size"])[0], config["scale_factor"]
        stem = "SmolVLM" if config.get("model_type") == "smolvlm" else "Idefics3"
        transform, self.values = read_tiles(folder, stem, size=side)
        super().__init__(folder, transform, config["image_token_id"], prompt=PROMPT)
        self.count = (side // pair(tower["patch_size"])[0] // factor) ** 2
        size = self.values["size"]
        if not isinstance(size, dict) or not isinstance(edge := size.get("longest_edge"), int):
            raise ValueError(f"{folder}: the image processor's size {size!r:.80} is no longest_edge")
        self.longest_edge = edge

    def prepare(self, image: Image) -> Any:
        """The pixels of its tiles, and their rows and columns; see `Processor`."""
        return split_tiles(image, self.transform, self.longest_edge, split=bool(self.values["do_image_splitting"]))

    def batch_of(self, prepared: Sequence[Any]) -> CaptionBatch:
        """Pictures as a batch without texts; see `Processor`."""
        tokens, pixels, real = tiles_together([tiles for tiles, _ in prepared])
        grids = tuple(grid for _, grid in prepared)
        return GridBatch(tokens, tokens.bool(), tokens.bool(), pixels, image_mask=real, grids=grids)

    def placeholders(self, batch: CaptionBatch, sample: int) -> str:
        """Those of each tile behind what says its row and column, those of the whole view last."""
        assert isinstance(batch, GridBatch)
        rows, columns = batch.grids[sample]
        tokens = self.image_token * self.count
        lines = [
            "".join(f"{_AROUND}<row_{row + 1}_col_{column + 1}>{tokens}" for column in range(columns)) + "\n"
            for row in range(rows)
        ]
        return "".join(lines) + "\n" * bool(rows) + f"{_AROUND}<global-img>{tokens}{_AROUND}"


def save_idefics3(model: Llava, folder: str | Path, family: str = "smolvlm") -> None:
    """Writes a folder that transformers reads: `config.json` and `model.safetensors`.

    Args:
        model: the model.
        folder: where to.
        family: see `to_idefics3`.

    Raises:
        ValueError: if a part has no counterpart there, before anything is written.
    """
    write_folder(folder, *to_idefics3(model, family))
