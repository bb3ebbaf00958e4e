"""Bringing an image index up to date: only pictures that are new or have changed are computed."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

import PIL
import torch
from torch import Tensor, nn

from mmtransformer.data.image_files import ImageFiles
from mmtransformer.images import ImageError, ImageTransform, load
from mmtransformer.pipelines.base import check_count
from mmtransformer.pipelines.many_images import default_threads, load_ahead
from mmtransformer.pipelines.search.index_file import IndexFile, Stamp
from mmtransformer.serialization.pretrained import Pretrained, to_config


class Encoder(Protocol):
    """What is asked of an `ImageTextEmbedder`.

    Shapes: e width of the vectors.
    """

    @property
    def model(self) -> nn.Module:
        """The model, all of whose weights vectors may depend on."""
        ...

    @property
    def transform(self) -> ImageTransform:
        """How a picture becomes pixels; called by several threads at once."""
        ...

    def encode_images(self, images: list[Any], *, batch_size: int = 64) -> Tensor:
        """Pictures, or their pixels (3 height width) -> unit vectors (n e), float32 on the CPU."""
        ...

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Texts -> unit vectors (n e), float32 on the CPU."""
        ...


def fingerprint(encoder: Encoder) -> str:
    """A hash of all that vectors depend on: every weight, the model's arguments and the image transform.

    Returns:
        32 hexadecimal digits.
    """
    state = encoder.model.state_dict()
    built = to_config(encoder.model) if isinstance(encoder.model, Pretrained) else repr(encoder.model)

    def digest(name: str) -> bytes:
        tensor = state[name].detach().cpu().contiguous()
        data = hashlib.sha256(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        data.update(tensor.reshape(-1).view(torch.uint8).numpy())
        return data.digest()

    with ThreadPoolExecutor(default_threads()) as pool:  # hashlib lets other threads run
        parts = b"".join(pool.map(digest, sorted(state)))
    described = json.dumps([built, encoder.transform.to_dict()], sort_keys=True, default=str).encode()
    return hashlib.sha256(parts + described).hexdigest()[:32]


@dataclass(frozen=True)
class Changes:
    """What an update has found.

    Args:
        new: Pictures that were not in the index.
        changed: Pictures whose file has other bytes now.
        gone: Pictures that are no longer there.
        computed: How many went through the model; a file that was moved, or only touched, does not.
        bad: Pictures that cannot be used -> what is wrong, all of them.
        tried: Those of `bad` that were tried in this update; the others had not changed.
        hidden: Pictures that are hidden, or in hidden folders, and are left out.
    """

    new: int = 0
    changed: int = 0
    gone: int = 0
    computed: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    tried: Sequence[str] = ()
    hidden: int = 0


class Update:
    """One update of an index.

    Args:
        encoder: The model.
        old: What the index holds.
        images: The pictures, named by their whole paths.
        names: Their names in the index.
    """

    def __init__(self, encoder: Encoder, old: IndexFile, images: ImageFiles, names: Sequence[str]) -> None:
        self.encoder, self.old, self.images, self.names = encoder, old, images, names
        self.readers = readers()
        self._stamps = [images.stamp(i) for i in range(len(images))]
        rows = {name: row for row, name in enumerate(old.names)}
        self._before = [rows.get(name, -1) for name in names]
        stamps: list[list[int]] = old.stamps.tolist()
        self._rows = [row if row >= 0 and _same(stamps[row], stamp) else -1
                      for row, stamp in zip(self._before, self._stamps, strict=True)]  # fmt: skip
        self._bad: dict[str, tuple[int, int, str]] = {}
        if old.readers == self.readers:
            for name, stamp in zip(names, self._stamps, strict=True):
                if name in old.bad and _same(old.bad[name], stamp):
                    self._bad[name] = old.bad[name]
        self._errors = {name: said for name, (_, _, said) in self._bad.items()}
        self.todo = [i for i, row in enumerate(self._rows) if row < 0 and names[i] not in self._bad]
        present = set(names)
        self._gone = [row for name, row in rows.items() if name not in present]
        self._touched = False
        self._hashes: list[bytes] = []
        self._vectors = torch.empty(0, 0, dtype=torch.float16)

    @property
    def needed(self) -> bool:
        """Whether the index is another one than before; asked after `run`."""
        moved = [row for row in self._rows if row >= 0] != [*range(len(self.old.names))] or self._gone or self._touched
        return bool(moved or self._bad != self.old.bad or (self._bad and self.readers != self.old.readers))

    def run(
        self,
        *,
        batch_size: int,
        save: Callable[[IndexFile], object],
        save_every: float,
        step: Callable[[str, ImageError | None], object],
    ) -> tuple[IndexFile, Changes]:
        """Computes what is to be computed.

        Args:
            batch_size: Pictures at once.
            save: Is given what is there, from time to time.
            save_every: Seconds between, at the least; more where saving takes long, 5 % of the time at the most.
            step: Is told of each picture that was to be computed, and what is wrong with it.

        Returns:
            The index, with the pictures in their order, and what was found.
        """
        check_count("batch_size", batch_size)
        known = _rows_of(self.old.hashes) if self.todo else {}
        threads, wait, saved = default_threads(), save_every, time.monotonic()
        tried: list[str] = []
        waiting: list[tuple[int, bytes, Tensor]] = []
        loaded = load_ahead(
            lambda i: self._prepared(i, known), self.todo, threads=threads, ahead=2 * batch_size + threads
        )
        try:
            for i, digest, found in loaded:
                name = self.names[i]
                if isinstance(found, Tensor):
                    assert digest is not None
                    waiting.append((i, digest, found))
                elif isinstance(found, ImageError):
                    tried.append(name)
                    self._refused(i, found, remembered=digest is not None)
                else:
                    self._rows[i], self._touched = found, True
                step(name, found if isinstance(found, ImageError) else None)
                if len(waiting) == batch_size:
                    self._encode(waiting, known)
                    waiting = []
                    if time.monotonic() - saved > wait:
                        start = time.monotonic()
                        save(self._so_far())
                        saved = time.monotonic()
                        wait = max(save_every, 20 * (saved - start))
        except (KeyboardInterrupt, SystemExit):  # Ctrl+C and SIGTERM
            if self._hashes:
                save(self._so_far())
            raise
        self._encode(waiting, known)
        return self._whole(), self._changes(tried)

    def _refused(self, i: int, error: ImageError, *, remembered: bool) -> None:
        """Notes a picture that cannot be used; what could not even be read may be readable the next time."""
        name, stamp = self.names[i], self._stamps[i]
        self._errors[name] = str(error)
        if remembered and stamp is not None:
            self._bad[name] = (*stamp, str(error))

    def _prepared(self, i: int, known: dict[bytes, int]) -> tuple[int, bytes | None, Tensor | int | ImageError]:
        """The hash of a picture's bytes, and the row of the same ones, or the picture's pixels."""
        try:
            data = self.images.data(i)
        except ImageError as error:
            return i, None, error
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if (row := known.get(digest)) is not None:
            return i, digest, row
        try:
            return i, digest, self.encoder.transform(load(data, name=self.images.name(i)))
        except ImageError as error:
            return i, digest, error

    def _encode(self, waiting: Sequence[tuple[int, bytes, Tensor]], known: dict[bytes, int]) -> None:
        if not waiting:
            return
        vectors = self.encoder.encode_images([pixels for _, _, pixels in waiting], batch_size=len(waiting)).half()
        if not (finite := vectors.isfinite().all(1)).all():
            name = self.names[waiting[int((~finite).nonzero()[0])][0]]
            raise ValueError(f"the model gives {name} a vector that is not finite: look at its weights (mmt check)")
        if not self._vectors.numel():  # room for all, of which the system gives what is written to
            self._vectors = torch.empty(len(self.todo), vectors.shape[1], dtype=torch.float16)
        at, before = len(self._hashes), len(self.old.names)
        self._vectors[at : at + len(vectors)] = vectors
        for n, (i, digest, _) in enumerate(waiting):
            self._rows[i] = before + at + n
            known[digest] = before + at + n
            self._hashes.append(digest)

    def _so_far(self) -> IndexFile:
        """What is there already: pictures that are to be computed anew as they were, and what is gone."""
        entries = [
            (name, row, self._stamps[i]) if row >= 0 else (name, before, None)
            for i, (name, row, before) in enumerate(zip(self.names, self._rows, self._before, strict=True))
            if row >= 0 or before >= 0
        ]
        return self._of([*entries, *((self.old.names[row], row, None) for row in self._gone)])

    def _whole(self) -> IndexFile:
        found = zip(self.names, self._rows, self._stamps, strict=True)
        return self._of([(name, row, stamp or (-1, -1)) for name, row, stamp in found if row >= 0])

    def _of(self, entries: Sequence[tuple[str, int, Stamp | None]]) -> IndexFile:
        """An index of entries: name, row among the old and the new vectors, stamp (the old one's, if None)."""
        old, before = self.old, len(self.old.names)
        rows = torch.tensor([row for _, row, _ in entries], dtype=torch.long)
        is_old = rows < before
        vectors = torch.empty(len(rows), (self._vectors if self._vectors.numel() else old.embeddings).shape[1]).half()
        hashes = torch.empty(len(rows), old.hashes.shape[1], dtype=torch.uint8)
        if before:
            vectors[is_old], hashes[is_old] = old.embeddings[rows[is_old]], old.hashes[rows[is_old]]
        if self._hashes:
            new = rows[~is_old] - before
            vectors[~is_old] = self._vectors[new]
            made = torch.frombuffer(bytearray(b"".join(self._hashes)), dtype=torch.uint8).view(len(self._hashes), -1)
            hashes[~is_old] = made[new]
        stamps = [old.stamps[row].tolist() if stamp is None else stamp for _, row, stamp in entries]
        return IndexFile(
            old.model,
            old.root,
            old.places,
            [name for name, _, _ in entries],
            vectors,
            hashes,
            torch.tensor(stamps, dtype=torch.int64).view(-1, 2),
            self._bad,
            self.readers,
            old.model_name,
        )

    def _changes(self, tried: Sequence[str]) -> Changes:
        there = [(i, row) for i, row in enumerate(self._rows) if row >= 0]
        changed = sum(row != self._before[i] and self._before[i] >= 0 for i, row in there)
        new = sum(self._before[i] < 0 for i, _ in there)
        return Changes(new, changed, len(self._gone), len(self._hashes), self._errors, tried, len(self.images.hidden))


def _same(kept: Sequence[Any], stamp: Stamp | None) -> bool:
    return stamp is not None and (kept[0], kept[1]) == stamp


def _rows_of(hashes: Tensor) -> dict[bytes, int]:
    data, size = hashes.numpy().tobytes(), hashes.shape[1]
    return {data[at : at + size]: at // size for at in range(0, len(data), size)}


def readers() -> str:
    """What reads pictures here: what cannot be read today may be tomorrow, with another Pillow or pillow-heif."""
    return f"Pillow {PIL.__version__}" + (" pillow-heif" if find_spec("pillow_heif") else "")
