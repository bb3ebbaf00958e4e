"""What folders say of their pictures, transformers' and open_clip's -> an `ImageTransform` of the same pixels."""

from pathlib import Path
from typing import Any, Literal

from mmtransformer.images import ImageTransform, NativeSize
from mmtransformer.serialization.folder_config import OPEN_CLIP
from mmtransformer.serialization.pretrained import read_json

_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_SHORT_224 = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}

DEFAULTS: dict[str, dict[str, Any]] = {
    "Blip": {**_CLIP, "size": {"height": 384, "width": 384}},
    "CLIP": {**_CLIP, **_SHORT_224},
    "ChineseCLIP": {**_CLIP, **_SHORT_224},
    "Bit": {**_CLIP, **_SHORT_224},
    "Siglip": {**_HALF, "resample": 3, "size": {"height": 224, "width": 224}},
    "ViT": {**_HALF, "resample": 2, "size": {"height": 224, "width": 224}},
    "DeiT": {
        **_HALF, "resample": 3, "size": {"height": 256, "width": 256}, "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
    },
    "DINOv3ViT": {**_IMAGENET, "resample": 2, "size": {"height": 224, "width": 224}},
    "Idefics": {**_CLIP, "size": {"height": 224, "width": 224}},
    "Llava": {**_CLIP, **_SHORT_224},
}  # fmt: skip
_SIGLIP2 = {"Siglip2": {**_HALF, "resample": 2, "patch_size": 16, "max_num_patches": 256}}
"""What transformers' image processors take for granted where the file does not say it, by the stems of their names."""

_SIDES = range(384, 2305, 384)
_SPLIT = {
    **_HALF, "resample": 1, "size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True, "do_pad": True,
}  # fmt: skip
TILES: dict[str, dict[str, Any]] = {
    "LlavaNext": {
        **_CLIP, **_SHORT_224, "do_pad": True,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    "LlavaOnevision": {
        **_CLIP, "size": {"height": 384, "width": 384}, "do_pad": True,
        "image_grid_pinpoints": [[height, width] for height in _SIDES for width in _SIDES],
    },
    "Idefics3": _SPLIT,
    "SmolVLM": _SPLIT,
}  # fmt: skip
"""The same of those that cut pictures into tiles."""

_SHORTEST = ("CLIP", "ChineseCLIP", "Bit", "Siglip", "Llava")
"""Those to which a size of one number is the shortest edge."""
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
    values, name, where = _checked(folder, kind, DEFAULTS)
    if "image_size" in values and name == "Idefics":
        values["size"] = values["image_size"]
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


def read_native(
    folder: Path, *, patch_size: int, backend: Literal["torchvision", "pil"] = "torchvision"
) -> ImageTransform:
    """The transform of a folder's SigLIP 2 image processor, which keeps a picture's shape (NaFlex).

    Args:
        folder: the folder.
        patch_size: side of the patches that the model reads, px.
        backend: see `ImageTransform`.

    Raises:
        ValueError: for another processor or other patches, and steps that are not known here, naming the key.
    """
    values, _, where = _checked(folder, "Siglip2", _SIGLIP2)
    if values["patch_size"] != patch_size:
        raise ValueError(f"{where}: patches of {values['patch_size']} px, and the model reads those of {patch_size}")
    return ImageTransform(
        resize="native",
        mean=tuple(values["image_mean"]),
        std=tuple(values["image_std"]),
        interpolation=_FILTERS[values["resample"]],
        backend=backend,
        native=NativeSize(patch_size, values["max_num_patches"]),
    )


def read_tiles(
    folder: Path, kind: str, *, size: int, backend: Literal["torchvision", "pil"] = "torchvision"
) -> tuple[ImageTransform, dict[str, Any]]:
    """The transform that makes tiles of the folder's image processor in transformers, and all that the folder says.

    Args:
        folder: the folder.
        kind: the processor where the file names none, one of `TILES`.
        size: the side of a tile that the model reads, px.
        backend: see `ImageTransform`.

    Raises:
        ValueError: for tiles of another size, and steps that are not known here, naming the key.
    """
    values, name, where = _checked(folder, kind, TILES)
    if "image_grid_pinpoints" in values:
        base = _size(values["size"], name, where)[1]
        tile = _size(values["crop_size"], name, where)[1] if "crop_size" in values else base
    else:
        side = values["max_image_size"].get("longest_edge")
        base = tile = (side, side)
    if base != tile or tile != (size, size):
        raise ValueError(f"{where}: tiles of {tile} px, whole views of {base} px, and the model reads {size} x {size}")
    mean, std = tuple(values["image_mean"]), tuple(values["image_std"])
    return ImageTransform(size, "squash", mean, std, _FILTERS[values["resample"]], backend=backend), values


def _checked(folder: Path, kind: str, known: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], str, str]:
    """What a folder's image processor does, with what goes without saying; the stem of its name; the file.

    Raises:
        ValueError: for another processor, and steps that are not known here.
    """
    values, where = read_preprocessor(folder), str(folder / "preprocessor_config.json")
    name = values.get("image_processor_type") or values.get("feature_extractor_type") or kind
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        name = str(name).removesuffix(ending)
    if name not in known:
        raise ValueError(f"{where}: the image processor {name!r} is not known here: {', '.join(known)} are")
    values = known[name] | {key: value for key, value in values.items() if value is not None}
    for key, usual in (_OUTSIDE | {"do_pad": known is TILES}).items():
        if values.get(key, usual) != usual:
            raise ValueError(f"{where}: {key} is {values[key]!r}; only {usual} is known here")
    if abs(values.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ValueError(f"{where}: rescale_factor is {values['rescale_factor']!r}, not 1/255")
    for key in ("image_mean", "image_std"):
        if isinstance(values[key], int | float):
            values[key] = [values[key]] * 3
        if not isinstance(values[key], list) or len(values[key]) != 3:
            raise ValueError(f"{where}: {key} is {values[key]!r:.80}, not a number for each of red, green and blue")
    if values["resample"] not in _FILTERS:
        raise ValueError(f"{where}: resample is {values['resample']!r}; 1 (lanczos), 2, 3 (bicubic) are known here")
    return values, name, where


def _size(value: Any, name: str, where: str) -> tuple[Literal["squash", "crop"], tuple[int, int]]:
    """How a size is meant, and its height and width; one number is a square, or of some the shortest edge."""
    if isinstance(value, int):
        return ("crop" if name in _SHORTEST else "squash"), (value, value)
    if isinstance(value, dict) and isinstance(edge := value.get("shortest_edge"), int) and len(value) == 1:
        return "crop", (edge, edge)
    if isinstance(value, dict) and all(isinstance(value.get(side), int) for side in ("height", "width")):
        return "squash", (value["height"], value["width"])
    raise ValueError(f"{where}: size {value!r} is neither a height and a width nor a shortest_edge")


def to_preprocessor(transform: ImageTransform) -> dict[str, Any]:
    """preprocessor_config.json of a transform, for a BLIP or CLIP image processor of transformers.

    Raises:
        ValueError: for one that they have not.
    """
    if transform.resize == "native":
        raise ValueError(
            "pictures keep sizes of their own, which of transformers' image processors SigLIP 2's alone lets them"
        )
    height, width = transform.size
    if transform.resize == "letterbox":
        raise ValueError("transformers has no image processor that letterboxes with the mean colour")
    full = [round(side / transform.crop_fraction) for side in (height, width)]
    cut = transform.resize == "crop" or transform.crop_fraction != 1
    size = {"shortest_edge": full[0]} if transform.resize == "crop" else {"height": full[0], "width": full[1]}
    filters = {name: number for number, name in _FILTERS.items()}
    return {
        "image_processor_type": "CLIPImageProcessor" if cut else "BlipImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": filters[transform.interpolation],
        "do_center_crop": cut,
        **({"crop_size": {"height": height, "width": width}} if cut else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        "do_convert_rgb": True,
    }


def to_native_preprocessor(transform: ImageTransform) -> dict[str, Any]:
    """preprocessor_config.json of a transform, for SigLIP 2's image processor in transformers.

    Raises:
        ValueError: for one that it has not: pictures of one size, or small ones that stay small.
    """
    if transform.resize != "native" or not transform.native.enlarge:
        raise ValueError(
            "SigLIP 2's image processor keeps pictures' shapes and enlarges small ones: resize native, native.enlarge "
            f"true, not {transform.resize}, {str(transform.native.enlarge).lower()}"
        )
    return {
        "image_processor_type": "Siglip2ImageProcessor",
        "do_resize": True,
        "resample": {name: number for number, name in _FILTERS.items()}[transform.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        "do_convert_rgb": True,
        "patch_size": transform.native.patch_size,
        "max_num_patches": transform.native.max_num_patches,
    }


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PIXELS = {"mean": [*MEAN], "std": [*STD]}
"""open_clip's, of OpenAI, unless its `preprocess_cfg` says others."""


def open_clip_pixels(
    folder: Path, image_size: tuple[int, int], *, backend: Literal["fast", "timm"] = "fast"
) -> ImageTransform:
    """The transform of a folder's `preprocess_cfg`, for a tower that reads images of this height and width.

    Args:
        folder: the folder.
        image_size: height and width.
        backend: see `ImageTransform`; "timm" is open_clip's own, by Pillow.

    Raises:
        ValueError: for steps that `ImageTransform` has not, naming the key.
    """
    said = read_json(folder / OPEN_CLIP).get("preprocess_cfg") or {}
    modes: dict[str, Literal["crop", "squash"]] = {"shortest": "crop", "squash": "squash"}
    mode, filled = said.get("resize_mode", "shortest"), said.get("interpolation", "bicubic")
    if mode not in modes or filled not in ("bicubic", "bilinear"):
        raise ValueError(f"{folder / OPEN_CLIP}: resize_mode {mode!r} with interpolation {filled!r} is not known here")
    height, width = image_size
    return ImageTransform(
        height if height == width else image_size,
        modes[mode],
        tuple(said.get("mean", PIXELS["mean"])),
        tuple(said.get("std", PIXELS["std"])),
        filled,
        backend=backend,
    )


def to_preprocess_cfg(transform: ImageTransform) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` of a transform."""
    mode = "shortest" if transform.resize == "crop" else transform.resize
    size = transform.size[0] if transform.size[0] == transform.size[1] else [*transform.size]
    said = {"size": size, "mode": "RGB", "mean": [*transform.mean], "std": [*transform.std]}
    return said | {"interpolation": transform.interpolation, "resize_mode": mode}
