"""A recipe's public vision encoder by one key: widths that follow from it, and its own pixels."""

from typing import Any

from mmtransformer.images import ImageTransform
from mmtransformer.weights.vision.load import tower_width

_READERS = ("connector", "projector", "qformer")
"""Parts beside a captioner's `vision` that read its tokens."""


def fit_widths(config: Any) -> list[str]:
    """Gives the parts that read a `load_vit` the width of its tokens: no other one would do.

    Args:
        config: a parsed configuration, or a part of one; changed in place.

    Returns:
        What was changed, a line each.
    """
    said: list[str] = []
    for value in list(vars(config).values()):
        if hasattr(value, "__dict__"):
            said += fit_widths(value)
    source = _source(getattr(config, "vision", None))
    if source is None or (width := tower_width(source)) is None:
        return said
    parts: list[tuple[str, Any]] = [(name, getattr(config, name, None)) for name in _READERS]
    found = [  # a `PerceiverResampler` keeps the width
        (name, "visual_dim" if "visual_dim" in part.init_args else "dim", part)
        for name, part in parts
        if hasattr(part, "init_args")
    ]
    if not found and hasattr(decoder := getattr(config, "decoder", None), "init_args"):
        found.append(("decoder", "context_dim", decoder))
    for name, key, part in found:
        if isinstance(old := part.init_args.get(key), int) and old != width:
            part.init_args[key] = width
            said.append(f"{name}.{key}: {width}, the width of {source}'s tokens, in place of {old}")
    return said


def _source(vision: Any) -> Any:
    """What a part of a configuration loads its vision encoder from; None = it does not."""
    if str(getattr(vision, "class_path", "")).rpartition(".")[2] != "load_vit":
        return None
    return getattr(getattr(vision, "init_args", None), "source", None)


def use_transform(model: Any, data: Any) -> str | None:
    """Has the data read pictures as the vision encoder does, unless told otherwise; what is to be said of it."""
    inner = getattr(model, "captioner", None) or getattr(model, "model", None)
    vision = getattr(inner, "vision", None)
    if vision is None or not hasattr(data, "use_vision_transform"):
        return None
    height, width = vision.image_size
    own = vision.transform or ImageTransform(height if height == width else (height, width))
    return data.use_vision_transform(own, getattr(vision, "patch_size", 16), known=vision.transform is not None)
