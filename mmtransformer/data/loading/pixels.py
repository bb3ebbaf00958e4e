"""How pictures of a run become pixels: as the recipe says, else as its vision encoder reads them."""

from dataclasses import replace
from typing import Literal

from mmtransformer.images import ImageTransform

Resize = Literal["squash", "crop", "letterbox"]


def fitted(transform: ImageTransform, resize: Resize | None) -> ImageTransform:
    """The transform with another way to make a picture fit; one that cuts nothing keeps no margin."""
    if resize is None or resize == transform.resize:
        return transform
    return replace(transform, resize=resize, crop_fraction=transform.crop_fraction if resize == "crop" else 1.0)


def of_tower(image: ImageTransform | None, resize: Resize | None, own: ImageTransform) -> tuple[ImageTransform, str]:
    """What a run reads pictures as, and a line that says so.

    Args:
        image: what the recipe says; None = nothing.
        resize: how pictures are made to fit in place of the vision encoder's own way.
        own: the vision encoder's own transform.
    """
    found = fitted(own, resize) if image is None else image
    if image is None:
        told = f", but resize {resize}, as data.resize says" if found.resize != own.resize else ""
        return found, f"pixels: {described(found)}, the vision encoder's own{told}"
    other = f"; the vision encoder's own ({described(own)}) are taken without data.image" if found != own else ""
    return found, f"pixels: {described(found)}, as data.image says{other}"


def described(transform: ImageTransform) -> str:
    """A transform in a few words."""
    height, width = transform.size
    cut = f" {transform.crop_fraction:.3g}" if transform.crop_fraction != 1 else ""
    mean = " ".join(f"{x:.3g}" for x in transform.mean)
    return f"{height} x {width} px, {transform.resize}{cut}, {transform.interpolation}, mean {mean}"
