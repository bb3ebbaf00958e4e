"""transformers' PaliGemma 1 and 2 -> `PaliGemma`, and back.

Their files have the layouts of LLaVA's (see there); written is the first, which every version reads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.published.paligemma import PaliGemma
from mmtransformer.serialization.pretrained import CONFIG, read_json
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.captioners.parts.language_model import language_model, sorted_out
from mmtransformer.weights.processors.generation_config import GENERATION, read_ends
from mmtransformer.weights.processors.pixels import read_pixels
from mmtransformer.weights.processors.processor import Processor
from mmtransformer.weights.processors.tokens import PromptTokenizer
from mmtransformer.weights.shared.configs import only_these
from mmtransformer.weights.shared.folders import model_from_folder, write_folder
from mmtransformer.weights.shared.keys import export, fill
from mmtransformer.weights.text.gemma import decoder_to_gemma, gemma_of
from mmtransformer.weights.vision.clip import vision_from_clip, vision_to_clip

_PROJ = {"linear": "fc"}
_LAYOUT = {
    r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)": r"vision.\1",
    r"(?:model\.)?multi_modal_projector\.(.+)": r"projector.\1",
    r"language_model\.((?:model|lm_head)\..+)": r"text.\1",
    r"model\.language_model\.(.+)": r"text.model.\1",
    r"(lm_head\.weight)": r"text.\1",
}
PROMPT = "caption en"
"""The documented prompt of captioning: "caption", and the language."""

# What transformers takes for granted where a config.json says nothing of a part; where it says some of its sizes, the
# others are those of its kind.
_VISION = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4096, "patch_size": 14,
           "image_size": 224, "num_hidden_layers": 27, "num_attention_heads": 16, "vision_use_head": False}  # fmt: skip
_TEXT = {"model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 16384,
         "num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 257152}  # fmt: skip
_IMAGE_TOKEN = 256000


def paligemma_from_state(config: Mapping[str, Any], state: Mapping[str, Tensor], context: str) -> PaliGemma:
    """A `PaliGemma` from what a hub folder holds: its config.json, and all of its tensors; equal to 1e-5 in float32.

    transformers counts positions from 1 there; rotary positions are relative, so that it changes nothing.

    Raises:
        ValueError: if a part is of a kind that is not here.
    """
    parts = sorted_out(state, _LAYOUT, context)
    tower, text = config.get("vision_config") or _VISION, config.get("text_config") or _TEXT
    tower, text = {"model_type": "siglip_vision_model", **tower}, {"model_type": "gemma", **text}
    if "head.probe" not in parts["vision"]:  # nobody reads it here, so some files leave it out
        tower["vision_use_head"] = False
    vision = vision_from_clip(tower, parts["vision"], f"{context}, vision tower")
    tied = config.get("tie_word_embeddings", True)
    decoder = language_model(text, parts["text"], f"{context}, language model", tied=tied)
    if not isinstance(decoder, TextDecoder) or not gemma_of(decoder):
        raise ValueError(f'{context}: the language model is a "{text.get("model_type")}", not a gemma or gemma2')
    image_token = config.get("image_token_id", config.get("image_token_index", _IMAGE_TOKEN))
    model = PaliGemma(vision, decoder, image_token_id=image_token)
    fill(model.projector, _PROJ, parts["projector"], f"{context}, projector")
    return model.eval()


def to_paligemma(model: PaliGemma) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What transformers needs to hold this model: its config.json, and its tensors by their first names there.

    Raises:
        ValueError: if a part has no counterpart there.
    """
    context = "transformers' PaliGemma"
    fits, known = gemma_of(model.decoder), model.image_token_id is not None
    only_these(
        context,
        {
            "a decoder of Gemma's kind": (bool(fits), True),
            "a vision encoder with a class token": (model.vision.class_token, False),
            "an image_token_id": (known, True),
        },
    )
    vision, tower = vision_to_clip(model.vision)
    text, words = decoder_to_gemma(model.decoder, fits[0])
    config = {
        "model_type": "paligemma",
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "vision_config": vision | {"projection_dim": model.decoder.dim},
        "text_config": text | {"num_image_tokens": model.vision.grid_size[0] * model.vision.grid_size[1]},
        "projection_dim": model.decoder.dim,
        "hidden_size": model.decoder.dim,
        "vocab_size": model.vocab_size,
        "image_token_index": model.image_token_id,
        "tie_word_embeddings": model.decoder.tied,
    }
    tensors = {f"language_model.{name}": tensor for name, tensor in words.items()}
    tensors |= {f"vision_tower.vision_model.{name}": tensor for name, tensor in tower.items()}
    tensors |= {
        f"multi_modal_projector.{name}": tensor for name, tensor in export(model.projector, _PROJ, context).items()
    }
    return config, tensors


def load_paligemma(source: str | Path) -> PaliGemma:
    """A PaliGemma 1 or 2 from a folder as hubs have it, or the name of a hub's repository.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    return model_from_folder(source, paligemma_from_state, "paligemma")


def save_paligemma(model: PaliGemma, folder: str | Path) -> None:
    """Writes a folder that transformers reads: `config.json` and `model.safetensors`.

    Raises:
        ValueError: if a part has no counterpart there, before anything is written.
    """
    write_folder(folder, *to_paligemma(model))


class PaliGemmaProcessor(Processor):
    """Prompts of PaliGemma: bos, the text, and a line feed, behind the image.

    Args:
        folder: the model's folder.
    """

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / CONFIG)
        text, tower = config.get("text_config") or {}, config.get("vision_config") or {}
        said = (folder / GENERATION).exists() or "eos_token_id" in config | text
        super().__init__(
            Tokenizer.from_pretrained(folder),
            read_pixels(folder, "Siglip", size=tower.get("image_size", _VISION["image_size"])),
            eos_ids=read_ends(folder, "text_config") if said else (1,),
            prompt=PROMPT,
        )
        self.encode = PromptTokenizer(folder)

    def prompt_ids(self, text: str | None, batch: CaptionBatch, sample: int) -> list[int]:
        """Bos, the text and a line feed, read as one string; see `Processor`."""
        return [self.tokenizer.bos_id, *self.encode(f"{text}\n", special=False)]
