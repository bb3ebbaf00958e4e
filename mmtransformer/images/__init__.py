"""Image file to RGB to pixels: `load`, `ImageTransform`, `Augment`."""

from mmtransformer.images.files import ImageError, load
from mmtransformer.images.native import NativeSize
from mmtransformer.images.transforms import Augment, ImageTransform

__all__ = ["Augment", "ImageError", "ImageTransform", "NativeSize", "load"]
