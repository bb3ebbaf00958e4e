"""How pictures of a run become pixels: as the recipe says, else as its vision encoder reads them."""

from dataclasses import replace
from typing import Literal

from mmtransformer.images import ImageTransform, NativeSize
from mmtransformer.images.transforms import check_transform

Resize = Literal["squash", "crop", "letterbox", "native"]

_DEFAULT = "the default; the vision encoder (the folder that it is loaded from) does not say"


def fitted(transform: ImageTransform, resize: Resize | None, patch_size: int = 16) -> ImageTransform:
    """The transform with another way to make a picture fit; one that cuts nothing keeps no margin.

    Args:
        transform: the transform.
        resize: the other way; None = its own. With "native" a picture gets as many patches as there were before.
        patch_size: of the vision encoder, px.
    """
    if resize is None or resize == transform.resize:
        return transform
    height, width = transform.size
    native = NativeSize(patch_size, max(1, (height // patch_size) * (width // patch_size)))
    return replace(
        transform,
        resize=resize,
        crop_fraction=transform.crop_fraction if resize == "crop" else 1.0,
        native=native if resize == "native" else transform.native,
    )


def of_tower(
    transform: ImageTransform | None,
    resize: Resize | None,
    own: ImageTransform,
    patch_size: int = 16,
    known: bool = True,
) -> tuple[ImageTransform, str]:
    """What a run reads pictures as, and a line that says so.

    Args:
        transform: what the recipe says; None = nothing.
        resize: how pictures are made to fit in place of the vision encoder's own way.
        own: the vision encoder's own transform.
        patch_size: side of its patches, px.
        known: whether the vision encoder says so itself; else `own` is the default for its size.
    """
    found = fitted(own, resize, patch_size) if transform is None else transform
    if transform is None:
        whose = "the vision encoder's own" if known else _DEFAULT
        told = f", but resize {resize}, as data.resize says" if found.resize != own.resize else ""
        return found, f"pixels: {described(found)}, {whose}{told}"
    other = (
        f"; the vision encoder's own ({described(own)}) are taken without data.transform"
        if known and found != own
        else ""
    )
    return found, f"pixels: {described(found)}, as data.transform says{other}"


def of_one_size(transform: ImageTransform, reader: str) -> ImageTransform:
    """The transform itself, for what reads pictures of one size only.

    Raises:
        ValueError: if pictures keep sizes of their own.
    """
    check_transform(transform)
    if transform.patch_size is not None:
        raise ValueError(f'{reader} pictures of one size: set resize to "squash", "crop" or "letterbox", not "native"')
    return transform


def described(transform: ImageTransform) -> str:
    """A transform in a few words."""
    height, width = transform.size
    if transform.resize == "native":
        native, mean = transform.native, " ".join(f"{x:.3g}" for x in transform.mean)
        size = f"native size, at most {native.max_num_patches} patches of {native.patch_size} px"
        return f"{size}, {transform.interpolation}, mean {mean}"
    cut = f" {transform.crop_fraction:.3g}" if transform.crop_fraction != 1 else ""
    mean = " ".join(f"{x:.3g}" for x in transform.mean)
    return f"{height} x {width} px, {transform.resize}{cut}, {transform.interpolation}, mean {mean}"
