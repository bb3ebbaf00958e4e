"""What saved models have in common: where they compute, and the folder that holds all that belongs to one."""

import json
import math
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, Self, TypeVar, cast, get_args

import torch
from PIL.Image import Image
from torch import nn

from mmtransformer.generation.config import GenerationConfig
from mmtransformer.images import ImageTransform
from mmtransformer.layers.config import check_configs
from mmtransformer.layers.kernels import bfloat16_hardware
from mmtransformer.layers.weight_prepacking import Precision, PrepackedLinear, int8_pays
from mmtransformer.serialization.folder_config import folder_config
from mmtransformer.serialization.model_kinds import import_path, imported_class, not_imported
from mmtransformer.serialization.pretrained import read_json
from mmtransformer.serialization.printable import counted, fenced, json_text, markup
from mmtransformer.serialization.untrusted import settings_of
from mmtransformer.serialization.writing import write_whole
from mmtransformer.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mmtransformer.diffusion.image_generation import ImageGenerationConfig
    from mmtransformer.weights.families import Family

PREPROCESSOR, GENERATION, CARD = "preprocessor.json", "generation_config.json", "README.md"
_MOST_PIXELS = 4096 * 4096
_SHOWN = 4  # classes
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}

ImageLike = str | Path | bytes | BinaryIO | Image
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
S = TypeVar("S", "GenerationConfig", "ImageGenerationConfig")


class Pipeline(Generic[M]):
    """What all pipelines are: a model on a device, with what it reads and writes around it."""

    model: M
    device: torch.device
    precision: Precision = "fp32"

    def __repr__(self) -> str:
        tokenizer: Tokenizer | None = getattr(self, "tokenizer", None)
        classes: Sequence[str] = getattr(self, "classes", ())
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        parts = [type(self.model).__name__, f"{size:.1f} million parameters"]
        if tokenizer is not None:
            known = ", ".join(tokenizer.languages)
            parts += [f"{tokenizer.vocab_size} tokens", *([f"languages {known}"] if known else [])]
        if classes:
            more = ", ..." if len(classes) > _SHOWN else ""
            parts.append(f"{counted(len(classes), 'class', 'classes')}: {', '.join(classes[:_SHOWN])}{more}")
        kept = next((_SHORT[p.dtype] for p in self.model.parameters() if p.dtype in _SHORT), self.precision)
        return f"{type(self).__name__}({', '.join(parts)}, {kept} on {self.device})"

    def to(self, device: torch.device | str) -> Self:
        """Moves the model, as `nn.Module.to`.

        Raises:
            ValueError: If there is no such device, or weights are of 8 bits or prepacked for another kind, as they are
                on a CPU: an `ImageCaptioner`'s from its first picture on, others' from their loading on.
        """
        found = pick_device(device)
        prepacked = self.precision == "int8" or any(isinstance(part, PrepackedLinear) for part in self.model.modules())
        if found.type != self.device.type and prepacked:
            raise ValueError(
                f"the weights are prepacked for {self.device}, so they cannot go to {found}; load the model there: "
                f'from_pretrained(..., device="{found}")'
            )
        self.model.to(found)
        self.device = found
        return self


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device that is named, or else a GPU if there is one.

    Raises:
        ValueError: If there is no such device here.
    """
    if device is not None:
        try:
            found = torch.device(device)
        except RuntimeError:
            raise ValueError(f"device {device} is unknown to torch; choose cpu, cuda or mps") from None
        try:
            torch.empty(0, device=found)
        except (RuntimeError, AssertionError):
            raise ValueError(f"device {device} is not available; leave device out to use the default") from None
        return found
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_precision(
    precision: str, dtype: str | None, device: torch.device | str | None, decoder: nn.Module | None = None
) -> Precision:
    """The precision to caption in; "auto" is what is measured fastest and safe on the device, and says what it took.

    That is int8 for a language model larger than a CPU's cache (`int8_pays`), else bf16 where the device is faster in
    bfloat16 (`bfloat16_hardware`), else fp32.

    Args:
        precision: "auto", or as `for_inference` has it.
        dtype: The same in transformers' words, "auto", "float32" or "bfloat16", in its place; "auto" is not the
            format of the files, as it is there.
        device: Where to compute; None = where `pick_device` says.
        decoder: The language model, as it was loaded.

    Raises:
        ValueError: If both are given, or one is unknown.
    """
    if dtype is not None:
        words = {"auto": "auto", "float32": "fp32", "bfloat16": "bf16"}
        name = str(dtype).removeprefix("torch.")
        if name not in words:
            raise ValueError(f'dtype must be one of {", ".join(words)}, not "{name:.40}"')
        if precision not in ("fp32", words[name]):
            raise ValueError(f"dtype ({name}) and precision ({precision}) say two things: give one of them")
        precision = words[name]
    if precision != "auto":
        if precision not in get_args(Precision):
            raise ValueError(f'precision must be one of {", ".join(get_args(Precision))}, not "{precision:.40}"')
        return cast(Precision, precision)
    where = pick_device(device)
    if decoder is not None and int8_pays(decoder, where):
        sys.stderr.write("precision: int8 on cpu, whose cache is smaller than the language model\n")
        return "int8"
    found = bfloat16_hardware(where)
    taken: Precision = "bf16" if found.fast else "fp32"
    sys.stderr.write(f"precision: {taken} on {where.type}, which has {found.words}\n")
    return taken


def fast_autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU that has it; elsewhere nothing changes."""
    on = device.type == "cuda" and bfloat16_hardware(device).fast
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def check_count(name: str, count: int) -> None:
    """Refuses what is no number of things, one at least.

    Raises:
        ValueError: naming it.
    """
    if type(count) is not int or count < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, not {count!r:.80}")


def check_cores(name: str, count: int) -> None:
    """Refuses more processes than a CPU has cores (two always go): each holds the model, and they would only wait.

    Raises:
        ValueError: naming it.
    """
    if count > (most := max(2, os.cpu_count() or 1)):
        raise ValueError(f"{name} ({count}): a CPU takes a process for each of its cores, {most} at most here")


def listed(images: Any, instead: str = "") -> tuple[list[Any], list[str | None]]:
    """Pictures in a list: one alone, or those of a list, a table's column or the like.

    Returns:
        The pictures; and what errors call each, where it has no name of its own: its place in the list.

    Args:
        images: What a user has given.
        instead: What takes an iterator, and any number of pictures.

    Raises:
        ValueError: If they are an iterator, of which nobody knows how many pictures it would hold in memory.
    """
    one = isinstance(images, (str, bytes, bytearray, memoryview, Path, Image, torch.Tensor)) or hasattr(images, "read")
    if isinstance(images, Iterator) and not one:
        what = f", or {instead}, which takes any number" * bool(instead)
        raise ValueError(f"images are given by a {type(images).__name__}: give a list of them, [*images]{what}")
    numbers = getattr(getattr(images, "dtype", None), "kind", "O") not in "OUT"  # an array of pixels, not of paths
    if one or numbers or not isinstance(images, Collection):
        return [images], [None]
    own = [isinstance(x, str | Path) or getattr(x, "filename", "") or getattr(x, "name", "") for x in images]
    return [*images], [None if name else f"images[{i}]" for i, name in enumerate(own)]


def texts_of(texts: Any, what: str = "texts") -> list[str]:
    """Texts in a list: one alone, or those of a list, a table's column or the like.

    Raises:
        ValueError: If they are none.
    """
    found = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    if others := [text for text in found if not isinstance(text, str)]:
        raise ValueError(f"{what} must be a text, or a list of them, not {others[0]!r:.80}")
    return found


def settings_for(given: S | None, own: S, changes: Mapping[str, Any]) -> S:
    """The settings of a call: those that it gives, or a model's own, with single ones changed.

    Raises:
        TypeError: If what is given holds no settings, or there is no such setting; names the nearest.
        ValueError: If they make no sense.
    """
    found = own if given is None else given
    if type(found) is not type(own):
        check_configs(generation=(found, type(own)))
    if isinstance(given, GenerationConfig) and given.min_new_tokens:  # by the caller, not saved with a model
        found = given.asked("min_new_tokens")
    return found.updated(**changes) if changes else found


def in_batches(things: Sequence[T], batch_size: int) -> list[Sequence[T]]:
    """Things a batch at a time.

    Raises:
        ValueError: if no batch could be made.
    """
    check_count("batch_size", batch_size)
    return [things[start : start + batch_size] for start in range(0, len(things), batch_size)]


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer with more tokens than a model scores.

    Raises:
        ValueError: if they do not belong together.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model scores {vocab_size}; they do not belong "
            f"together"
        )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes settings for people to read."""
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def public_family(folder: Path) -> "Family | None":
    """The family of a public model's folder; families are looked up for no other, since that imports them all."""
    if "class" in folder_config(folder):
        return None
    from mmtransformer.weights.captioner_folders import captioner_family

    return captioner_family(folder)


def refuse_public(folder: Path) -> None:
    """Refuses the folder of a public model, where a model of this library is wanted, and says what reads it.

    Raises:
        ValueError: naming the folder.
    """
    if "class" in folder_config(folder):
        return
    from mmtransformer.weights.captioner_folders import readers_of

    if readers := readers_of(folder):
        raise ValueError(f"{folder} holds a public model, which is read by {', and by '.join(readers)}")


def read_generation(path: Path, default: GenerationConfig) -> GenerationConfig:
    """How a saved model searches; the default, if its folder does not say.

    Raises:
        ValueError: naming the file, if it is damaged or asks for what makes no sense.
    """
    return settings_of(GenerationConfig, read_json(path), str(path)) if path.exists() else default


def transform_settings(transform: ImageTransform) -> dict[str, Any]:
    """What `read_transform` reads: a transform's settings, and of a class of one's own its import path.

    Raises:
        ValueError: if it could not be made again.
    """
    values, kind = transform.to_dict(), type(transform)
    if kind is ImageTransform:
        return values
    what = f"the transform ({import_path(kind)}) cannot be saved"
    if imported_class(import_path(kind), ImageTransform) is not kind:
        raise ValueError(f"{what}: it is not found under this name again; let the class stand at the top of a module")
    try:
        settings_of(kind, json.loads(json.dumps(values)), what)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from None
    return {"class": import_path(kind), **values}


def read_transform(path: Path, model_size: tuple[int, int] | None = None) -> ImageTransform:
    """How a saved model's pictures become pixels.

    Args:
        path: The file.
        model_size: Height and width, px, that the model's positions were learned for; each side of the pixels may be
            four times as large, with positions resized. Sixteen times the patches cost 256 times the attention.

    Raises:
        ValueError: naming the file, if it is missing, damaged or asks for what makes no sense.
    """
    values, kind = ImageTransform.of_saved(read_json(path)), ImageTransform
    if (name := values.pop("class", None)) is not None and (kind := imported_class(name, ImageTransform)) is None:
        raise not_imported(name, str(path))
    transform = settings_of(kind, values, str(path))
    if (pixels := math.prod(transform.size)) > _MOST_PIXELS:
        raise ValueError(
            f"{path}: image_size is {transform.image_size}: {pixels:,} pixels are more than {_MOST_PIXELS:,}"
        )
    if model_size and any(side > 4 * own for side, own in zip(transform.size, model_size, strict=True)):
        raise ValueError(
            f"{path}: image_size is {transform.image_size}, more than four times what the model's positions are for, "
            f"{model_size[0]} x {model_size[1]} px; put its own size there"
        )
    return transform


def write_card(
    folder: Path, model: nn.Module, *, task: str, about: str, usage: str, languages: Sequence[str] = (), note: str
) -> None:
    """Writes a model card, as a hub shows it.

    Args:
        folder: The model's folder.
        model: The model.
        task: The hub's word for what it does.
        about: What it is and does.
        usage: The lines of Python that use it; FOLDER stands for the folder's name.
        languages: What it writes.
        note: How it was trained, its scores.
    """
    folder = folder.resolve()
    title = markup(folder.parent.name if folder.name == "model" else folder.name)
    head = ["library_name: mmtransformer", f"pipeline_tag: {task}"]
    head += [f"language: [{', '.join(languages)}]"] if languages else []
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters"
    code = usage.replace('"FOLDER"', json_text(folder.name))
    parts = ["\n".join(["---", *head, "---"]), f"# {title}", f"{about}: {size}.", fenced(code, "python"), note]
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
