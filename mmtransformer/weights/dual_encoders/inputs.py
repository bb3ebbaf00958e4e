"""What a public dual encoder reads: the tokenizer and the image transform of its folder, and back."""

import json
from pathlib import Path
from typing import Any

from tokenizers import normalizers

from mmtransformer.dual_encoders.clip import CLIP
from mmtransformer.dual_encoders.text_tower import TextTower
from mmtransformer.images import ImageTransform
from mmtransformer.serialization.pretrained import read_json
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.processors.pixels import read_native, read_pixels, to_native_preprocessor, to_preprocessor

_TOKENIZER = "tokenizer_config.json"


def read_inputs(folder: Path, kind: str, model: CLIP) -> tuple[Tokenizer, ImageTransform]:
    """The tokenizer and the transform, whose ids and pixels are transformers'.

    Args:
        folder: the folder.
        kind: its `model_type`.
        model: the model that it holds.

    Raises:
        ValueError: if a part is missing or damaged, or does something that is not here.
    """
    tokenizer, siglip = Tokenizer.from_pretrained(folder), kind in ("siglip", "siglip2")
    config = read_json(folder / _TOKENIZER) if (folder / _TOKENIZER).exists() else {}
    side = config.get("padding_side", "left" if kind == "siglip2" else "right")  # Siglip2Tokenizer's own is left.
    if siglip and side != "right":
        raise ValueError(
            f"{folder / _TOKENIZER}: texts are filled up on the {side} there, and SigLIP reads their last place, with "
            f'padding on the right in training: put "padding_side": "right" into the file'
        )
    if kind == "siglip2":  # As Siglip2Tokenizer does, whatever class the folder names.
        before = tokenizer.backend.normalizer
        steps = [normalizers.Lowercase()] + ([] if before is None else [before])
        if '"Lowercase"' not in tokenizer.backend.to_str():
            tokenizer.backend.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
        return tokenizer, read_native(folder, patch_size=model.vision.patch_size)
    return tokenizer, read_pixels(folder, "Siglip" if siglip else "CLIP", size=model.vision.image_size[0])


def ids_of(tokenizer: Tokenizer) -> dict[str, int]:
    """A tokenizer's ids, by the names that a config.json has for them."""
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def preprocessor_of(model: CLIP, transform: ImageTransform) -> dict[str, Any]:
    """preprocessor_config.json for the model that transformers reads.

    Raises:
        ValueError: if transformers has no such transform for it.
    """
    naflex = model.loss == "sigmoid" and model.vision.patches.pos_embed.grid is not None
    return (to_native_preprocessor if naflex else to_preprocessor)(transform)


def write_inputs(folder: Path, model: CLIP, tokenizer: Tokenizer, pixels: dict[str, Any]) -> None:
    """Writes tokenizer and preprocessor_config.json beside a model that transformers reads.

    Args:
        folder: where to.
        model: the model.
        tokenizer: its tokenizer.
        pixels: what `preprocessor_of` says.
    """
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / _TOKENIZER).read_text("utf-8")) | {"model_max_length": model.max_len}
    if isinstance(model.text, TextTower) and model.text.pool == "last":
        config["padding_side"] = "right"  # Siglip2Tokenizer's own is left.
    for name, values in ((_TOKENIZER, config), ("preprocessor_config.json", pixels)):
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
