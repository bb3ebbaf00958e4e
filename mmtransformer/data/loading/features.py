"""Visual tokens of a frozen vision tower, computed once and read back from a memory-mapped file.

The file is a plain safetensors file, `<split>-<key>.safetensors`, and the key is a hash of all that the features depend
on: every weight and setting of the tower, the transform, the pictures, the number format. So a stale cache cannot be
used: something else has another name. It is written beside its final name and renamed when it is whole. Beside the
tokens stands a check sum of each picture's, which is compared when a process reads them first.

Shapes: m copies of a picture (as it is, and mirrored).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mmtransformer.data.loading.source import Pairs
from mmtransformer.images import ImageError, ImageTransform
from mmtransformer.layers.config import known_fields
from mmtransformer.serialization.checksums import block_crc32
from mmtransformer.serialization.printable import counted
from mmtransformer.serialization.writing import alone

_DTYPES = {"float16": (torch.float16, "F16"), "bfloat16": (torch.bfloat16, "BF16"), "float32": (torch.float32, "F32")}
_FORMAT = 2  # raise it when the meaning of the file changes


@known_fields
@dataclass(frozen=True)
class FeatureCacheConfig:
    """How the visual tokens of a frozen vision encoder are kept.

    Args:
        folder: The folder.
        flip: Keep mirrored visual tokens as well, and use them half of the time in training.
        dtype: Their type.

    Raises:
        ValueError: If `dtype` is none of these.
    """

    folder: str = "features"
    flip: bool = False
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, must be one of {', '.join(_DTYPES)}")


class FeatureCache:
    """The visual tokens of a split, on disk; reading one copies nothing.

    Make one with `FeatureCache.build(...)`, which opens the file if it is there.

    Args:
        path: The file.
        size: How many pictures it must hold; any number unless told.

    Raises:
        ValueError: If the file is damaged, or of another number of pictures.
    """

    def __init__(self, path: str | Path, size: int | None = None):
        self.path = Path(path)
        self._open()
        if size is not None and len(self) != size:
            raise ValueError(f"{self.path}: holds {counted(len(self), 'picture')}, and the split has {size}; delete it")

    def _open(self) -> None:
        try:
            # get_tensor maps the file privately: pages are read when touched and shared between processes.
            with safe_open(self.path, "pt") as file:
                self.tokens: Tensor = file.get_tensor("visual_tokens")
                # Of files of before there are none.
                self._sums: Tensor | None = file.get_tensor("checksums") if "checksums" in file.keys() else None  # noqa: SIM118
                self.errors: dict[int, str] = {
                    int(i): error for i, error in json.loads(file.metadata()["errors"]).items()
                }
        except Exception as error:  # safetensors raises its own kind, and KeyError
            raise ValueError(f"{self.path}: not a feature cache, or damaged ({error}); delete it") from error
        self._bytes, self._checked = self.path.stat().st_size, bytearray(len(self))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # a worker maps the file itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._open()

    def __len__(self) -> int:
        """The number of pictures."""
        return self.tokens.shape[0]

    def __getitem__(self, key: tuple[int, bool]) -> Tensor:
        """Return the visual tokens (p d) of picture `i`, mirrored or not: `cache[i, mirrored]`.

        Raises:
            ImageError: If the picture could not be read when the cache was made.
            ValueError: If the cache has no mirrored copies, was cut since it was opened, or is damaged here.
        """
        i, mirrored = key
        if self.path.stat().st_size != self._bytes:  # To touch what is gone would kill the process.
            raise ValueError(f"{self.path}: was {self._bytes:,} bytes and has another size now; delete it")
        if i in self.errors:
            raise ImageError(self.errors[i])
        if mirrored and self.tokens.shape[1] < 2:
            raise ValueError(f"{self.path}: has no mirrored copies; build it with flip=True")
        if self._sums is not None and not self._checked[i]:
            if block_crc32(self.tokens[i]) != int.from_bytes(self._sums[i].numpy().tobytes(), "little"):
                raise ValueError(f"{self.path}: damaged at picture {i}; delete it, and it is computed anew")
            self._checked[i] = 1
        return self.tokens[i, int(mirrored)]

    @classmethod
    def build(
        cls,
        vision: nn.Module,
        pairs: Pairs,
        transform: ImageTransform,
        config: FeatureCacheConfig,
        *,
        encode: Callable[[Tensor], Tensor] | None = None,
        autocast: torch.dtype | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
        name: str = "features",
        progress: bool = True,
    ) -> "FeatureCache":
        """Open the cache of a split, computing it first if there is none.

        Several processes may call this at once: one computes and the others wait for it.

        Args:
            vision: The frozen tower; its weights, settings and structure are part of the key.
            pairs: The pictures. With a method `fingerprint(i) -> str` it tells when a picture has changed; without, a
                sample of the pictures is read and compared.
            transform: From picture to pixels.
            config: The folder that the file goes to, whether mirrored copies are stored as well, and the number format.
            encode: From pixels (b 3 height width) to visual tokens (b p d); `vision.forward_features` unless told.
            autocast: The number format of the computation; None computes in that of the weights.
            batch_size: Pictures computed at once.
            num_workers: Processes that read pictures.
            device: Where to compute. The tower is moved there and back.
            name: What the file name starts with, such as the split.
            progress: Show a progress bar.

        Raises:
            ValueError: If the disk is too full or a feature does not fit the number format.
        """
        key = cache_key(vision, pairs, transform, flip=config.flip, dtype=config.dtype, autocast=autocast)
        folder = Path(config.folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.-]", "_", name)
        path = folder / f"{name}-{key}.safetensors"
        if not path.is_file():
            with alone(folder / f".{path.name}.lock") as held:
                if not path.is_file():
                    for litter in folder.glob(f".{path.name}.*.part") if held else ():
                        litter.unlink(missing_ok=True)
                    loader = DataLoader(
                        _Images(pairs, transform),
                        batch_size,
                        num_workers=num_workers,
                        collate_fn=list,
                        generator=torch.Generator(),
                    )
                    run, device = encode or getattr(vision, "forward_features", vision), torch.device(device)

                    def copies(pixels: Tensor) -> Tensor:
                        """From pixels (b 3 height width) to the tokens of all copies (b m p d), as they are stored."""
                        both = torch.cat([pixels, pixels.flip(-1)]) if config.flip else pixels
                        with torch.autocast(device.type, autocast, enabled=autocast is not None):
                            tokens = run(both.to(device)).to(_DTYPES[config.dtype][0]).cpu()
                        return tokens.unflatten(0, (-1, len(pixels))).transpose(0, 1).contiguous()

                    bar = tqdm(total=len(pairs), desc=f"visual tokens of {name}", unit="picture", disable=not progress)
                    with bar, _frozen_on(vision, device):
                        _write(path, pairs, loader, copies, config, bar)
        return cls(path, len(pairs))


def cache_key(
    vision: nn.Module,
    pairs: Pairs,
    transform: ImageTransform,
    *,
    flip: bool,
    dtype: str,
    autocast: torch.dtype | None = None,
) -> str:
    """Hash all that the features of a split depend on.

    Args:
        vision: The tower: every tensor's name, shape, type and bytes; class and plain settings of every module.
        pairs: The names of the pictures, and their fingerprints (or the pixels of 32 of them).
        transform: All its settings.
        flip: Whether mirrored copies are stored.
        dtype: The number format of the file.
        autocast: The number format of the computation.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        digest.update(json.dumps(parts).encode() + b"\n")

    add(_FORMAT, flip, dtype, str(autocast), type(transform).__qualname__, transform.to_dict())
    for path, module in vision.named_modules():
        add(path, type(module).__module__, type(module).__qualname__, module.extra_repr())
        add({k: v for k, v in sorted(vars(module).items()) if k[0] != "_" and k != "training" and _is_plain(v)})
    for path, tensor in vision.state_dict().items():
        tensor = tensor.detach().to("cpu").contiguous()
        add(path, list(tensor.shape), str(tensor.dtype))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    fingerprint: Callable[[int], str] | None = getattr(pairs, "fingerprint", None)
    for i in range(len(pairs)):
        add(pairs.name(i), fingerprint(i) if fingerprint else None)
    if fingerprint is None:
        for i in range(0, len(pairs), max(1, len(pairs) // 32)):
            with contextlib.suppress(ImageError):
                digest.update(pairs.image(i).tobytes())
    return digest.hexdigest()[:16]


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


class _Images(Dataset[tuple[int, Tensor | str]]):
    """The pixels (3 height width) of every picture, or what is wrong with it."""

    def __init__(self, pairs: Pairs, transform: ImageTransform):
        self.pairs, self.transform = pairs, transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.transform(self.pairs.image(index))
        except ImageError as error:
            return index, str(error)


def _write(
    path: Path,
    pairs: Pairs,
    loader: DataLoader,
    copies: Callable[[Tensor], Tensor],
    config: FeatureCacheConfig,
    bar: tqdm,
) -> None:
    """Compute the features and write them to `path` in one piece; pictures that cannot be read are left blank."""
    total, room = len(pairs), _header_room(len(pairs))
    errors: dict[int, str] = {}
    sums = bytearray(4 * total)
    one: tuple[int, ...] = ()  # the shape of a picture's features (m p d), known after the first pass
    step = 0
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file, torch.inference_mode():
            for batch in loader:
                errors |= {i: error for i, error in batch if isinstance(error, str)}
                good = [(i, pixels) for i, pixels in batch if isinstance(pixels, Tensor)]
                tokens = copies(torch.stack([pixels for _, pixels in good])) if good else ()
                for (i, _), token in zip(good, tokens, strict=True):
                    if not token.isfinite().all():
                        raise ValueError(
                            f"the visual tokens of picture {i} ({pairs.name(i)}) are not finite in {config.dtype}; "
                            f"use bfloat16 or float32, or look at the weights"
                        )
                    if not one:
                        one, step = tuple(token.shape), token.nbytes
                        _check_space(path, total, step, config.flip)
                    file.seek(room + i * step)
                    file.write(token.view(torch.uint8).numpy().data)
                    sums[4 * i : 4 * i + 4] = block_crc32(token).to_bytes(4, "little")
                bar.update(len(batch))
            if not one:
                raise ValueError(
                    f"none of the {counted(total, 'picture')} can be read; the first: {next(iter(errors.values()))}"
                )
            file.truncate(room + total * step)
            file.seek(room + total * step)
            file.write(sums)
            file.seek(0)
            file.write(_header((total, *one), total * step, _DTYPES[config.dtype][1], errors))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_space(path: Path, total: int, step: int, flip: bool) -> None:
    free = shutil.disk_usage(path.parent).free
    if total * step + _header_room(total) > free:
        raise ValueError(
            f"{path}: the features of {total} pictures take {total * step:,} bytes and the disk has {free:,} free; "
            f"set the cache folder to a larger disk{', or turn flips off' if flip else ''}"
        )


def _header_room(total: int) -> int:
    """Bytes kept for the header: it holds the errors, 1 % of pictures with a few hundred letters each."""
    return 4096 + 64 * -(-total * 20 // 64)


def _header(shape: tuple[int, ...], size: int, code: str, errors: dict[int, str]) -> bytes:
    """Make safetensors' header for the room left for it: 8 bytes of size, then JSON filled up with spaces."""
    room = _header_room(shape[0]) - 8
    for letters in (300, 100, 30, 10, 0):
        short = json.dumps({str(i): error[:letters] for i, error in errors.items()}, ensure_ascii=False)
        header = {
            "__metadata__": {"errors": short},
            "visual_tokens": {"dtype": code, "shape": list(shape), "data_offsets": [0, size]},
            "checksums": {"dtype": "U8", "shape": [shape[0], 4], "data_offsets": [size, size + 4 * shape[0]]},
        }
        text = json.dumps(header, ensure_ascii=False).encode()
        if len(text) <= room:
            return room.to_bytes(8, "little") + text.ljust(room)
    raise ValueError(
        f"{len(errors)} of {counted(shape[0], 'picture')} cannot be read; the first: {next(iter(errors.values()))}"
    )


@contextlib.contextmanager
def _frozen_on(vision: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Put a tower into evaluation mode on a device, and back."""
    modes = {module: module.training for module in vision.modules()}
    home = next((p.device for p in vision.parameters()), torch.device("cpu"))
    vision.eval().to(device)
    try:
        yield
    finally:
        vision.to(home)
        for module, training in modes.items():
            module.training = training
