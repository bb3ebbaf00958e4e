"""preprocessor_config.json and processor_config.json -> an `ImageTransform` of the same pixels."""

from pathlib import Path
from typing import Any, Literal

from mmtransformer.images import ImageTransform
from mmtransformer.serialization.pretrained import read_json

_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_SHORT_224 = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}

DEFAULTS: dict[str, dict[str, Any]] = {
    "Blip": {**_CLIP, "size": {"height": 384, "width": 384}},
    "CLIP": {**_CLIP, **_SHORT_224},
    "Bit": {**_CLIP, **_SHORT_224},
    "Siglip": {**_HALF, "resample": 3, "size": {"height": 224, "width": 224}},
    "ViT": {**_HALF, "resample": 2, "size": {"height": 224, "width": 224}},
    "DeiT": {
        **_HALF, "resample": 3, "size": {"height": 256, "width": 256}, "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
    },
    "Idefics": {**_CLIP, "size": {"height": 224, "width": 224}},
}  # fmt: skip
"""What transformers' image processors take for granted where the file does not say it, by the stems of their names."""

_FILTERS: dict[Any, Literal["lanczos", "bilinear", "bicubic"]] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
_OUTSIDE = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": False}


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """What a folder says of its pictures: processor_config.json where that holds it, else preprocessor_config.json.

    Raises:
        ValueError: if neither does.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (path := folder / name).exists():
            values = read_json(path)
            own = values.get("image_processor") if name.startswith("processor") else values
            if isinstance(own, dict):
                return own
    raise ValueError(
        f"{folder} has no preprocessor_config.json, which says how a picture becomes pixels: take it from where the "
        f"model came from"
    )


def read_pixels(
    folder: Path, kind: str, *, backend: Literal["torchvision", "pil"] = "torchvision", size: int | None = None
) -> ImageTransform:
    """The transform whose pixels are those of the folder's image processor in transformers.

    Args:
        folder: the folder.
        kind: the processor where the file names none, one of `DEFAULTS`.
        backend: see `ImageTransform`; transformers picks torchvision where that is installed.
        size: what the model reads, which must be what comes out; None = anything.

    Raises:
        ValueError: for steps that `ImageTransform` has not, naming the key.
    """
    values, where = read_preprocessor(folder), str(folder / "preprocessor_config.json")
    name = values.get("image_processor_type") or values.get("feature_extractor_type") or kind
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        name = str(name).removesuffix(ending)
    if name not in DEFAULTS:
        raise ValueError(f"{where}: the image processor {name!r} is not known here: {', '.join(DEFAULTS)} are")
    values = DEFAULTS[name] | {key: value for key, value in values.items() if value is not None}
    if "image_size" in values and name == "Idefics":
        values["size"] = values["image_size"]
    for key, usual in _OUTSIDE.items():
        if values.get(key, usual) != usual:
            raise ValueError(f"{where}: {key} is {values[key]!r}; only {usual} is known here")
    if abs(values.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ValueError(f"{where}: rescale_factor is {values['rescale_factor']!r}, not 1/255")
    if values["resample"] not in _FILTERS:
        raise ValueError(f"{where}: resample is {values['resample']!r}; 1 (lanczos), 2, 3 (bicubic) are known here")
    resize, resized = _size(values["size"], name, where)
    height, width = resized
    if values.get("do_center_crop"):
        height, width = _size(values["crop_size"], name, where)[1]
    if resize == "crop" and not values.get("do_center_crop"):
        raise ValueError(f"{where}: the size is a shortest_edge without do_center_crop: pictures of many sizes")
    if height * resized[1] != width * resized[0] or height > resized[0] or (resize == "crop" and height != width):
        raise ValueError(f"{where}: a crop of {height} x {width} from {values['size']} is not known here")
    if size is not None and (height, width) != (size, size):
        raise ValueError(f"{where}: gives pixels of {height} x {width}, and the model reads {size} x {size}")
    return ImageTransform(
        height if height == width else (height, width),
        resize,
        tuple(values["image_mean"]),
        tuple(values["image_std"]),
        _FILTERS[values["resample"]],
        height / resized[0],
        backend,
    )


def _size(value: Any, name: str, where: str) -> tuple[Literal["squash", "crop"], tuple[int, int]]:
    """How a size is meant, and its height and width; one number is a square, or CLIP's shortest edge."""
    if isinstance(value, int):
        return ("crop" if name in ("CLIP", "Bit") else "squash"), (value, value)
    if isinstance(value, dict) and isinstance(edge := value.get("shortest_edge"), int) and len(value) == 1:
        return "crop", (edge, edge)
    if isinstance(value, dict) and all(isinstance(value.get(side), int) for side in ("height", "width")):
        return "squash", (value["height"], value["width"])
    raise ValueError(f"{where}: size {value!r} is neither a height and a width nor a shortest_edge")
