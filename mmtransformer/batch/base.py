"""What every batch is: a dataclass of tensors that move together, and what is refused of its masks and ids."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

_NUM_TARGETS = "_num_targets"


def num_targets(loss_mask: Tensor) -> int | None:
    """How many tokens behind the first of each row (n q) a mask asks for, where that was counted before it came to its
    device (`Batch.to`), so that nobody need wait for the device to know; None = it was not.
    """
    return getattr(loss_mask, _NUM_TARGETS, None)


def as_mask(mask: Tensor, name: str) -> Tensor:
    """A mask of whole numbers, as transformers' tokenizers give it, as bool.

    Raises:
        ValueError: naming the mask, if it holds fractions, or other numbers than 0 and 1 (`~` of whole numbers does).
    """
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or not bool(((mask == 0) | (mask == 1)).all()):
        others = "" if mask.is_floating_point() else " with others"
        raise ValueError(f"{name} must be bool (True = yes), or whole numbers 0 or 1; got {mask.dtype}{others}")
    return mask.bool()


def check_shape(x: Tensor | None, name: str, shape: Sequence[int], of: str) -> None:
    """Refuses a mask of another shape than what it is a mask of: torch would stretch one row or column over all.

    Args:
        x: the mask, or numbers that stand beside tokens as one does; None = there is none.
        name: what it is called.
        shape: the shape that it must have.
        of: what has that shape.

    Raises:
        ValueError: naming both shapes.
    """
    if x is not None and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} {tuple(x.shape)} is not of the {of} {tuple(shape)}")


def vocabulary_error(tokens: Tensor, vocab_size: int, reader: str = "a decoder") -> ValueError:
    """What to say where an id is outside the table: on CPUs only, elsewhere the look at the ids would be a wait."""
    return ValueError(
        f"token ids from {int(tokens.min())} to {int(tokens.max())} were given to {reader} with a vocabulary of "
        f"{vocab_size}: model and tokenizer do not belong together"
    )


def with_images(pixels: Tensor) -> Tensor:
    """Pixels (b 3 height width) of one image a sample, as (b 1 3 height width).

    Raises:
        ValueError: if they have another number of dimensions.
    """
    if pixels.ndim != 4:
        raise ValueError(
            "pixels are (samples, images of a sample, 3, height, width), or (samples, 3, height, width) with one image "
            f"each, not {tuple(pixels.shape)}"
        )
    return pixels[:, None]


@dataclass  # not frozen: Lightning casts its tensors in place for true float64 and bfloat16
class Batch:
    """What a loader yields: a dataclass of tensors, with names or whatever else belongs to them.

    A subclass, a dataclass too, names the fields. Printed, a tensor is its type, shape and device.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__repr__" not in vars(cls):  # else `dataclass` writes one, of all numbers
            cls.__repr__ = Batch.__repr__

    def __repr__(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        said = ", ".join(f"{name}={_shown(value)}" for name, value in values if value is not None and value != ())
        return f"{type(self).__name__}({said})"

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The batch with its tensors on another device.

        A `loss_mask` that leaves the CPU takes along how many tokens it asks for (`num_targets`).
        """
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        moved = {k: x.to(device, non_blocking=non_blocking) for k, x in values if isinstance(x, Tensor)}
        mask: Tensor | None = getattr(self, "loss_mask", None)
        if mask is not None and mask.ndim == 2 and mask.device.type == "cpu" != moved["loss_mask"].device.type:
            setattr(moved["loss_mask"], _NUM_TARGETS, int(mask[:, 1:].sum()))
        return replace(self, **moved)

    def pin_memory(self) -> Self:
        """The batch with its tensors in page-locked memory, for copies beside the computation."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return replace(self, **{k: x.pin_memory() for k, x in values if isinstance(x, Tensor)})


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return reprlib.repr(value)
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} {value.device}"
