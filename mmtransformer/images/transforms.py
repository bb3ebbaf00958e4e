"""RGB to pixels: what a model sees, and random changes before it while training.

Shapes: h height, w width of the pixels.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.nn import functional

from mmtransformer.images.files import Source, load
from mmtransformer.images.native import NativeSize
from mmtransformer.layers.config import known_fields

_MOST = 1e4  # of colours from 0 to 1
_LEAST_STD = 1e-4  # smaller ones would take pixels out of float16's range, and then float32's
_GAP = 2  # between what a scaled decoding keeps and what is seen
_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


@known_fields
@dataclass(frozen=True)
class ImageTransform:
    """Turns a picture into the pixels that a model sees, the same every time; saved with the model.

    Args:
        image_size: Height and width of the pixels, or one number for both; with "native" it is that of a square
            picture, whatever is given.
        resize: How a picture of another shape is made to fit: "squash" stretches it, "crop" keeps its shape
            and cuts the middle out, "letterbox" keeps all of it and fills up with the mean colour, "native" keeps all
            of it and about its shape, so that pixels are of many sizes (`native`; NaFlex, arXiv:2502.14786).
        mean: Mean of red, green, blue, of colours from 0 to 1; it becomes 0.
        std: Standard deviation of red, green, blue.
        interpolation: "bicubic", "bilinear" or "lanczos", all with antialiasing.
        crop_fraction: With "crop" and "squash", the part of the resized picture's sides that is kept: the crop of 224
            from a short side of 248 is 224 / 248 (DeiT, and timm's `crop_pct`).
        backend: Whose pixels they are. "fast" resizes with torch's kernel for bytes, in a fraction of Pillow's time and
            within three levels of 255 of it, 0.01 of a level on the mean where pictures are made smaller ("lanczos" is
            Pillow's), and lets large JPEGs of training be decoded smaller, a level away on the mean (`decode_size`).
            The others are the same to the bit: "timm" resizes with Pillow; "torchvision" is what transformers' image
            processors do today, on tensors of bytes, and "pil" what they do with Pillow. Where the rest is odd, timm
            and "fast" cut the middle half a pixel further on.
        native: How large pictures become with "native".
    """

    image_size: tuple[int, int] | int = 224
    resize: Literal["squash", "crop", "letterbox", "native"] = "squash"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    crop_fraction: float = 1.0
    backend: Literal["fast", "timm", "torchvision", "pil"] = "fast"
    native: NativeSize = NativeSize()  # noqa: RUF009 (frozen)

    def __post_init__(self):
        if self.resize == "native":
            object.__setattr__(self, "image_size", self.native.square)
        for field in ("image_size", "mean", "std"):  # JSON and YAML have lists only
            if isinstance(value := getattr(self, field), list):
                object.__setattr__(self, field, tuple(value))
        if (
            not isinstance(self.size, tuple)
            or len(self.size) != 2
            or not all(type(n) is int and n > 0 for n in self.size)
        ):
            raise ValueError(f"image_size is {self.image_size}, must be one or two positive whole numbers")
        if self.resize not in ("squash", "crop", "letterbox", "native"):
            raise ValueError(f'resize is {self.resize!r}, must be "squash", "crop", "letterbox" or "native"')
        if self.interpolation not in _RESAMPLING:
            raise ValueError(f'interpolation is {self.interpolation!r}, must be "bicubic", "bilinear" or "lanczos"')
        if self.backend not in ("fast", "timm", "torchvision", "pil"):
            raise ValueError(f'backend is {self.backend!r}, must be "fast", "timm", "torchvision" or "pil"')
        for name, values, least in (("mean", self.mean, -_MOST), ("std", self.std, _LEAST_STD)):
            three = isinstance(values, tuple) and len(values) == 3 and all(isinstance(x, (int, float)) for x in values)
            if not three or not all(least <= x <= _MOST for x in values):
                raise ValueError(f"{name} is {values!r:.80}, must be three numbers from {least:g} to {_MOST:g}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction is {self.crop_fraction}, must be above 0 and at most 1")
        if self.crop_fraction != 1 and self.resize in ("letterbox", "native"):
            raise ValueError(
                f'crop_fraction is {self.crop_fraction}, but resize is "{self.resize}", which cuts nothing'
            )

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of the pixels; with "native" those of a square picture."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def patch_size(self) -> int | None:
        """Side of the patches that pictures of many sizes are cut into, px; None where all have one size."""
        return self.native.patch_size if self.resize == "native" else None

    def __call__(self, image: Source) -> Tensor:
        """Returns the pixels of a picture.

        Args:
            image: A picture, or what `load` takes for one, such as a path; modes other than RGB are treated as there.

        Returns:
            (3 h w) float32; with "native" h and w are the picture's own, whole patches.
        """
        if not isinstance(image, Image.Image) or image.mode != "RGB":
            image = load(image)
        if self.resize == "native":
            return self.normalized(self.resized(image, self.native.size_for(image.height, image.width)))
        if self.resize != "letterbox":
            return self.normalized(self._crop(image))
        full_h, full_w = self.size
        fit = min(full_h / image.height, full_w / image.width)
        height = min(full_h, max(1, round(image.height * fit)))
        width = min(full_w, max(1, round(image.width * fit)))
        top, left = (full_h - height) // 2, (full_w - width) // 2
        pixels = torch.zeros(3, full_h, full_w)
        pixels[:, top : top + height, left : left + width] = self.normalized(self.resized(image, (height, width)))
        return pixels

    def resized(
        self, image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
    ) -> Tensor:
        """Returns a picture of mode RGB at a size (height, width), as bytes (3 h w); `box`: a part of it, in Pillow's
        order (left, top, right, bottom).
        """
        wide, on_tensors = (size[1], size[0]), self.backend == "torchvision"
        if on_tensors:
            image = image if box is None else image.crop([round(x) for x in box])  # pyright: ignore[reportArgumentType]
        elif box is not None or (image.size != wide and (self.backend != "fast" or self.interpolation == "lanczos")):
            image = image.resize(wide, _RESAMPLING[self.interpolation], box=box)
        # Colours last in memory, where torch resizes them twice as fast.
        data = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if on_tensors:
            from torchvision.transforms.v2 import InterpolationMode
            from torchvision.transforms.v2 import functional as vision

            data = vision.resize(data, [*size], interpolation=InterpolationMode(self.interpolation), antialias=True)
        elif image.size != wide:
            data = functional.interpolate(data[None], size, mode=self.interpolation, antialias=True)[0]
        return data

    def normalized(self, pixels: Tensor) -> Tensor:
        """Returns bytes (... 3 h w) as float32 with the mean taken off, in units of the standard deviation."""
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if self.backend == "torchvision":  # in this order
            shift, scale = _constants(self.mean, self.std, False)
            return pixels.sub_(shift).div_(scale)
        shift, scale = _constants(self.mean, self.std, True)
        return pixels.mul_(scale).sub_(shift)

    def _crop(self, image: Image.Image) -> Tensor:
        """Resizes so that the crop and its margin just fit, and cuts the middle out."""
        (height, width), (full_h, full_w) = self.size, self._full_size
        if self.resize == "crop" and image.width * full_h >= image.height * full_w:  # the height just fits
            full_w = max(full_w, int(full_h * image.width / image.height))
        elif self.resize == "crop":
            full_h = max(full_h, int(full_w * image.height / image.width))
        top, left = (full_h - height) / 2, (full_w - width) / 2
        top, left = (round(top), round(left)) if self.backend in ("fast", "timm") else (int(top), int(left))
        if full_h * full_w <= 16 * height * width:
            return self.resized(image, (full_h, full_w))[:, top : top + height, left : left + width]
        # A 20000 x 1 picture would become 4,960,000 x 248 on the way: resize the part that is seen.
        per_h, per_w = image.height / full_h, image.width / full_w
        box = (left * per_w, top * per_h, (left + width) * per_w, (top + height) * per_h)
        return self.resized(image, (height, width), (*box[:2], min(box[2], image.width), min(box[3], image.height)))

    @cached_property
    def _full_size(self) -> tuple[int, int]:
        """Height and width of what the crop is cut from, in a picture of just this shape."""
        height, width = (int(side / self.crop_fraction + 1e-6) for side in self.size)
        return height, width  # 224 / (224 / 248) may be a hair below 248

    def decode_size(
        self, augment: "Augment | None" = None, generator: torch.Generator | None = None
    ) -> tuple[float, float] | None:
        """Height and width of a picture of training that suffice, `at_least` of `mmtransformer.images.load`.

        It is twice what is seen (the `reducing_gap` of Pillow's thumbnails): what is left out of the decoding is then
        finer than what the resizing takes out by itself.

        Args:
            augment: What crops the picture first.
            generator: In the state that `augment` will be given another one in.

        Returns:
            In px; None where all of the picture is to be decoded, which is so unless `backend` is "fast", and where
            the size follows from the picture's shape ("native").
        """
        if self.backend != "fast" or self.resize == "native":
            return None
        height, width = (1.0, 1.0) if augment is None or generator is None else augment.crop_fractions(generator)
        return _GAP * self._full_size[0] / height, _GAP * self._full_size[1] / width

    def to_dict(self) -> dict[str, Any]:
        """Returns the arguments as plain values, for JSON; without `native` where it says nothing."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if self.resize != "native":
            del values["native"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Makes the transform that `to_dict` described; an unknown key is an error.

        Those of before 2026-11-29 that name no backend have timm's.
        """
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise ValueError(f"unknown keys of an image transform: {unknown}; known: {known}")
        values = cls.of_saved(values)
        if isinstance(native := values.get("native"), Mapping):
            values["native"] = NativeSize(**native)
        return cls(**values)

    @staticmethod
    def of_saved(values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a saved model; where they are older than "fast" and name no backend, it is "timm"."""
        return {"backend": "timm", **values}


@lru_cache(16)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], scale_first: bool) -> tuple[Tensor, Tensor]:
    """What is taken off bytes from 0 to 255 and what they are divided by, or multiplied by before, each (3 1 1)."""
    means, stds = torch.tensor((mean, std), device="cpu").view(2, 3, 1, 1)
    return (means / stds, 1 / (255 * stds)) if scale_first else (means * 255, stds * 255)


@known_fields
@dataclass(frozen=True)
class Augment:
    """Changes a picture at random before the `ImageTransform`, as a function of a generator alone.

    Args:
        scale: Smallest and largest part of the area that a random crop keeps; (1, 1) for no crop.
        flip: Whether to mirror half of the pictures. Not where captions say left and right.
        jitter: How far brightness, contrast and saturation change: by factors 1 - jitter to 1 + jitter.
        ratio: Narrowest and widest shape of the crop, relative to the picture's own shape.
    """

    scale: tuple[float, float] = (0.8, 1.0)
    flip: bool = False
    jitter: float = 0.0
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self):
        object.__setattr__(self, "scale", tuple(self.scale))
        object.__setattr__(self, "ratio", tuple(self.ratio))
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {self.scale}, must be two numbers with 0 < smallest <= largest <= 1")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is {self.ratio}, must be two numbers with 0 < narrowest <= widest")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter is {self.jitter}, must be from 0 to 1")

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """Returns the changed picture; eight numbers are drawn, whatever the settings."""
        area, shape, x, y, side, *colour = torch.rand(8, generator=generator, dtype=torch.float64).tolist()
        if image.mode != "RGB":
            image = load(image)
        if self.scale != (1, 1):
            image = self._crop(image, self._kept(area, shape), x, y)
        if self.flip and side < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.jitter:
            tools = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
            for tool, draw in zip(tools, colour, strict=True):
                image = tool(image).enhance(1 + self.jitter * (2 * draw - 1))
        return image

    def crop_fractions(self, generator: torch.Generator) -> tuple[float, float]:
        """The parts of the height and of the width that the crop keeps which a generator of this state makes."""
        area, shape = torch.rand(8, generator=generator, dtype=torch.float64)[:2].tolist()
        return (1.0, 1.0) if self.scale == (1, 1) else self._kept(area, shape)

    def _kept(self, area: float, shape: float) -> tuple[float, float]:
        part = self.scale[0] + area * (self.scale[1] - self.scale[0])
        narrow, wide = self.ratio
        ratio = narrow * (wide / narrow) ** shape
        ratio = min(max(ratio, part), 1 / part)  # a wider one would not fit into the picture
        return (part / ratio) ** 0.5, (part * ratio) ** 0.5

    def _crop(self, image: Image.Image, kept: tuple[float, float], x: float, y: float) -> Image.Image:
        """Cuts a part out; `kept` are the parts of height and width, x and y draws from 0 to 1."""
        width = min(image.width, max(1, round(image.width * kept[1])))
        height = min(image.height, max(1, round(image.height * kept[0])))
        left, top = round(x * (image.width - width)), round(y * (image.height - height))
        box = (left, top, left + width, top + height)
        return image.resize((width, height), Image.Resampling.NEAREST, box=box)  # crop() warns if large


def check_transform(transform: object) -> None:
    """Refuses what makes pixels in another way than by an `ImageTransform`: its size and settings are read and saved.

    Raises:
        TypeError: naming it, and how a class of one's own is made.
    """
    if not isinstance(transform, ImageTransform):
        raise TypeError(
            f"transform must be an ImageTransform, not {type(transform).__name__}: derive a class of your own from it, "
            f"as class Mine(ImageTransform), whose __call__(self, image) returns the pixels, (3 h w) of its image_size"
        )
