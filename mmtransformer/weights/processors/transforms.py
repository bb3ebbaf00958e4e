"""How the pictures of a public tower become pixels: timm's data configs and transformers' image processors, both ways.

`ViT.transform` is what comes of them.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtransformer.backbones.vit import ViT
from mmtransformer.images import ImageTransform
from mmtransformer.weights.processors.pixels import read_native, read_pixels, to_native_preprocessor, to_preprocessor

_log = logging.getLogger(__name__)

_PROCESSORS = {
    "vit": "ViT", "deit": "DeiT", "clip": "CLIP", "clip_vision_model": "CLIP", "siglip": "Siglip",
    "siglip_vision_model": "Siglip", "dinov2": "Bit", "dinov2_with_registers": "Bit", "dinov3_vit": "DINOv3ViT",
}  # fmt: skip
"""By `model_type`, the image processor that transformers takes where preprocessor_config.json names none."""

_CROPS = {"center": "crop", "squash": "squash", "border": "letterbox"}
"""timm's `crop_mode`s, and the library's ways to make a picture fit."""


def timm_transform(data: Mapping[str, Any], image_size: tuple[int, int]) -> ImageTransform | None:
    """The transform of a timm data config (`pretrained_cfg`), at the tower's size; None where it is none of pictures.

    Args:
        data: with "interpolation", "crop_pct", "crop_mode", "mean" and "std"; what is missing is as in timm.
        image_size: the tower's, px.
    """
    resize = _CROPS.get(data.get("crop_mode") or "center")
    crop = data.get("crop_pct") or 0.875
    mean, std = (tuple(data.get(name) or ()) for name in ("mean", "std"))
    if resize is None or (resize == "letterbox" and crop != 1) or len(mean) != 3 or len(std) != 3:
        return None
    height, width = image_size
    size = height if height == width else image_size
    interpolation = data.get("interpolation") or "bicubic"
    interpolation = interpolation if interpolation in ("bilinear", "lanczos") else "bicubic"
    return ImageTransform(size, resize, mean, std, interpolation, crop, "timm")  # pyright: ignore[reportArgumentType]


def with_data(vit: ViT, model: Any) -> ViT:
    """The tower with the transform of the timm model that it came from."""
    vit.transform = timm_transform(getattr(model, "pretrained_cfg", None) or {}, vit.image_size)
    return vit


def to_timm_data(transform: ImageTransform) -> dict[str, Any]:
    """A timm data config of a transform, without its size; nothing of native sizes, which timm's has no word for."""
    if transform.resize == "native":
        return {}
    return {
        "interpolation": transform.interpolation,
        "crop_pct": transform.crop_fraction,
        "crop_mode": {ours: theirs for theirs, ours in _CROPS.items()}[transform.resize],
        "mean": list(transform.mean),
        "std": list(transform.std),
    }


def take_transform(vit: ViT, folder: Path, kind: str) -> None:
    """Gives the tower the transform and the size of its folder's preprocessor_config.json, where there is one.

    A picture of another size than the tower was made for is what its model reads in transformers (DINOv2 was made for
    518 px, and reads 224): positions are then resized. SigLIP 2's NaFlex reads pictures of native size. A processor
    that the library cannot imitate is said, no more.

    Args:
        vit: the tower.
        folder: where it comes from.
        kind: the folder's `model_type`.
    """
    if not any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        return
    try:
        if kind in ("siglip2", "siglip2_vision_model"):
            vit.transform = read_native(folder, patch_size=vit.patch_size)
        else:
            vit.transform = transform = read_pixels(folder, _PROCESSORS[kind])
            vit.set_input_size(transform.size)
    except ValueError as error:
        vit.transform = None
        _log.warning("how its pictures become pixels is not known: %s", error)


def write_transform(vit: ViT, folder: str | Path, *, native: bool = False) -> None:
    """Writes preprocessor_config.json beside a tower's weights, where it has a transform that transformers knows.

    Args:
        vit: the tower.
        folder: where to.
        native: whether transformers' tower reads pictures of native size (SigLIP 2's NaFlex).
    """
    transform, to = vit.transform, to_native_preprocessor if native else to_preprocessor
    if transform is not None and transform.resize != "letterbox" and (transform.resize == "native") == native:
        text = json.dumps(to(transform), indent=2)
        (Path(folder) / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")
