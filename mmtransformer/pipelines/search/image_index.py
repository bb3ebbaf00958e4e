"""ImageIndex: many pictures, found by texts, by other pictures, and by each other.

Shapes: n pictures of the index, d width of their vectors.
"""

import dataclasses
import glob
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mmtransformer.data.image_files import ImageFiles
from mmtransformer.images import ImageError, load
from mmtransformer.pipelines.base import ImageLike, check_count, listed
from mmtransformer.pipelines.search.index_file import ANEW, SUFFIX, IndexFile
from mmtransformer.pipelines.search.index_update import Changes, Encoder, Update, fingerprint
from mmtransformer.pipelines.search.nearest import groups_alike, nearest
from mmtransformer.serialization.printable import counted

ALIKE = 0.95
"""The least cosine of near duplicates, unless told (docs/search.md has what it was measured on)."""

OnError = Callable[[str, ImageError], object]


@dataclass(frozen=True)
class Match:
    """A picture that was found.

    Args:
        name: Its path below the index's root.
        path: Its whole path; a picture in an archive has the archive's before its own.
        score: The cosine of its vector and the query's, from -1 to 1.
    """

    name: str
    path: str
    score: float


@dataclass(frozen=True)
class Duplicate(Match):
    """A picture of a group that is alike; `score` is the cosine with the first of the group.

    Args:
        exact: Whether its file has the same bytes as one before it in the group.
    """

    exact: bool = False


class ImageIndex:
    """Pictures of folders, patterns and archives by their vectors; made by `build`, or read from a file by `load`.

    Nothing is written beside the pictures: the index lies where `path` says, or in memory alone.

    Args:
        encoder: The model, an `ImageTextEmbedder`.
        contents: What the index holds.
        path: Its file; None = in memory alone.
        model: The encoder's `fingerprint`, where it is known.

    Raises:
        ValueError: If another model has made the index.
    """

    def __init__(
        self, encoder: Encoder, contents: IndexFile, path: str | Path | None = None, *, model: str | None = None
    ) -> None:
        self.encoder, self.contents = encoder, contents
        self.path = None if path is None else Path(path)
        self.changes = Changes()
        if (mine := model or fingerprint(encoder)) != contents.model:
            whose = f'another model ("{contents.model_name}")' if contents.model_name else "another model"
            raise ValueError(
                f"{path or 'the index'}: made by {whose}, whose vectors say nothing to this one; take that model, name "
                f"another file, or delete this one, and it is made anew ({contents.model:.8} is not {mine:.8})"
            )

    def __len__(self) -> int:
        """The number of pictures that can be found."""
        return len(self.contents.names)

    def __repr__(self) -> str:
        width = self.contents.embeddings.shape[1]
        return f"ImageIndex({counted(len(self), 'picture')} of {self.contents.root}, vectors of width {width})"

    # ------------------------------------------------------------------------------------------- made and kept

    @classmethod
    def build(
        cls,
        encoder: Encoder,
        places: str | Path | Sequence[str | Path],
        *,
        path: str | Path | None = None,
        model: str | None = None,
        model_name: str = "",
        batch_size: int = 32,
        progress: bool = False,
        on_error: OnError | None = None,
    ) -> Self:
        """The index of pictures: gone on with where `path` is one already, and brought up to date.

        Args:
            encoder: The model.
            places: Files, folders (with all below), patterns, zips, tars; see `ImageFiles`.
            path: The file to keep it in; None = in memory alone.
            model: The encoder's `fingerprint`, where it is known.
            model_name: What the model is called, for errors.
            batch_size: Pictures at once.
            progress: Show a progress bar with the time that is left.
            on_error: Is told of each picture that cannot be used.

        Raises:
            ValueError: If there is no picture, none can be used, or `path` holds an index of another model or of other
                pictures.
        """
        where, model = absolute(places), model or fingerprint(encoder)
        made = IndexFile(model, _root(where), where, model_name=model_name)
        if path is not None and Path(path).exists():
            made = IndexFile.read(path)
            others = [place for place in made.places if place not in where and Path(place).exists()]
            if others:  # what has moved is gone on with, but nothing is thrown away for a slip
                raise ValueError(f"{path} is an index of {others[0]}: name it too, or another file, or delete this one")
        index = cls(encoder, made, path, model=model)
        index.update(where, batch_size=batch_size, progress=progress, on_error=on_error)
        return index

    @classmethod
    def load(cls, path: str | Path, encoder: Encoder, *, model: str | None = None) -> Self:
        """An index as it lies in its file; `update` looks for what has changed.

        Raises:
            ValueError: If it is no such file, damaged, or made by another model.
        """
        return cls(encoder, IndexFile.read(path), path, model=model)

    def save(self, path: str | Path | None = None) -> Path:
        """Writes the index to a file, its own unless told; whole or not at all.

        Raises:
            ValueError: If it has no file.
        """
        where = path or self.path
        if where is None:
            raise ValueError("this index is in memory alone: name a file to save it in")
        self.path = Path(where)
        return self.contents.write(where)

    def update(
        self,
        places: str | Path | Sequence[str | Path] | None = None,
        *,
        batch_size: int = 32,
        progress: bool = False,
        save_every: float = 10.0,
        on_error: OnError | None = None,
    ) -> Changes:
        """Looks at the pictures and computes those that are new or have changed.

        A file is looked into if its size or time is another one; its vector is computed if its bytes are (so a file
        that was moved or touched is only read). While it computes it saves: what is stopped is gone on with.

        Args:
            places: What is indexed from now on; None = the same as before.
            batch_size: Pictures at once.
            progress: Show a progress bar with the time that is left.
            save_every: Seconds between savings, at the least; where one takes long, 20 times that.
            on_error: Is told of each picture that cannot be used; None = a warning counts them.

        Returns:
            What was found (also in `changes`).

        Raises:
            ValueError: If there is no picture, or none can be used.
        """
        where = list(self.contents.places) if places is None else absolute(places)
        images = ImageFiles(where)
        if not len(images):
            raise ValueError("there is no picture to index: name files, a folder, a pattern or an archive")
        root = _root(where)
        names = [below(root, images.name(i)) for i in range(len(images))]
        old = dataclasses.replace(self.contents, root=root, places=where)
        update = Update(self.encoder, old, images, names)
        shown = bool(progress and len(update.todo) > batch_size)

        with tqdm(total=len(update.todo), unit=" pictures", disable=not shown, dynamic_ncols=True) as bar:

            def step(name: str, error: ImageError | None) -> None:
                if error is not None and on_error is not None:
                    on_error(name, error)
                bar.update()

            contents, self.changes = update.run(
                batch_size=batch_size,
                save=lambda part: None if self.path is None else part.write(self.path),
                save_every=save_every,
                step=step,
            )
        if not contents.names:
            if on_error is not None and self.changes.tried:  # it was told why
                raise ValueError(f"not one of {counted(len(names), 'picture')} can be used")
            first, more = next(iter(self.changes.bad.values())), len(self.changes.bad) - 1
            raise ValueError(first + (f"; nor can {counted(more, 'other picture')} be used" if more else ""))
        if on_error is None and (tried := self.changes.tried):
            first = self.changes.bad[next(iter(tried))]
            warnings.warn(
                f"{counted(len(tried), 'picture')} cannot be used and {'is' if len(tried) == 1 else 'are'} left out "
                f"(changes.bad names all): {first}",
                stacklevel=2,
            )
        if update.needed or (root, where) != (self.contents.root, self.contents.places):
            self.contents = contents
            if self.path is not None:
                contents.write(self.path)
        return self.changes

    # ------------------------------------------------------------------------------------------------ searched

    def search(
        self,
        texts: str | Sequence[str] = (),
        *,
        like: ImageLike | Sequence[ImageLike] = (),
        without: str | Sequence[str] = (),
        top_k: int = 20,
    ) -> list[Match]:
        """The pictures that fit a query best: texts and pictures added up, less what is not wanted.

        Args:
            texts: What to look for, in any language that the model knows.
            like: Pictures to look for others like them; a file that is in the index itself is not found again.
            without: Texts that are taken off.
            top_k: How many.

        Returns:
            Best first.

        Raises:
            ValueError: If nothing is looked for, a text is empty, or `top_k` is no number of things.
            ImageError: If a picture of `like` cannot be used.
        """
        check_count("top_k", top_k)
        pictures, _ = listed(like)
        itself = {os.path.realpath(x) for x in pictures if isinstance(x, (str, Path))}
        query = self.query(texts, like=like, without=without)
        try:
            scores, places = nearest(query[None], self.contents.embeddings, top_k + len(itself))
        except ValueError as error:
            raise self._damaged(error) from error
        found = [self._match(i, score) for i, score in zip(places[0].tolist(), scores[0].tolist(), strict=True)]
        return [match for match in found if not itself or os.path.realpath(match.path) not in itself][:top_k]

    def search_like(
        self, images: ImageLike | Sequence[ImageLike], *, without: str | Sequence[str] = (), top_k: int = 20
    ) -> list[Match]:
        """The pictures most like one, or like several together; see `search`."""
        return self.search(like=images, without=without, top_k=top_k)

    def query(
        self,
        texts: str | Sequence[str] = (),
        *,
        like: ImageLike | Sequence[ImageLike] = (),
        without: str | Sequence[str] = (),
    ) -> Tensor:
        """The unit vector (d) of a query: the sum of its texts' and pictures' vectors, less those of `without`."""
        words = [texts] if isinstance(texts, str) else list(texts)
        unwanted = [without] if isinstance(without, str) else list(without)
        pictures, names = listed(like)
        if not words and not pictures:
            raise ValueError("there is nothing to look for: give a text, or a picture to look for others like it")
        if any(not text.strip() for text in (*words, *unwanted)):
            raise ValueError("a text is empty, and would fit every picture: leave it out")
        parts = torch.zeros(self.contents.embeddings.shape[1])
        if pictures:
            loaded = [load(x, name=name) for x, name in zip(pictures, names, strict=True)]
            parts += self.encoder.encode_images(loaded).sum(0)
        if words or unwanted:
            vectors = self.encoder.encode_texts([*words, *unwanted])
            parts += vectors[: len(words)].sum(0) - vectors[len(words) :].sum(0)
        if parts.norm() < 1e-4:
            raise ValueError("what is looked for and what is not are the same: nothing is left of the query")
        return F.normalize(parts, dim=0)

    def duplicates(self, threshold: float = ALIKE, *, progress: bool = False) -> list[list[Duplicate]]:
        """Groups of pictures that are the same or nearly so.

        Same are files of the same bytes. Near are vectors whose cosine is at least the threshold; who is near one of a
        group belongs to it. Each pair is compared once, a block at a time: 100,000 pictures of width 512 are 2.6e12
        multiplications, and memory stays the same.

        Args:
            threshold: From 0 to 1; at 1 only same bytes count.
            progress: Show a progress bar.

        Returns:
            Groups in the order of the index, and so the pictures of each.

        Raises:
            ValueError: If the threshold is out of range.
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, not {threshold}")
        raw = np.ascontiguousarray(self.contents.hashes.numpy())
        _, first, which = np.unique(raw.view(f"V{raw.shape[1]}").ravel(), return_index=True, return_inverse=True)
        same = first[which]
        count = len(first) if threshold < 1 else 0
        with tqdm(total=count, unit=" pictures", disable=not (progress and count > 4096), dynamic_ncols=True) as bar:
            try:
                vectors = self.contents.embeddings
                groups = groups_alike(vectors, threshold if count else None, same, step=bar.update)
            except ValueError as error:
                raise self._damaged(error) from error
        return [self._group(group, same) for group in groups]

    def images(self, matches: Sequence[Match]) -> ImageFiles:
        """The pictures that were found, to be looked at: `index.images(found).image(0)`."""
        return ImageFiles([match.path for match in matches])

    # ------------------------------------------------------------------------------------------------- inside

    def _match(self, i: int, score: float) -> Match:
        name = self.contents.names[i]
        # Vectors are kept in half precision, so that one and itself may come to a little more than 1.
        return Match(name, f"{self.contents.root.rstrip('/')}/{name}", max(-1.0, min(score, 1.0)))

    def _group(self, group: list[int], same: np.ndarray) -> list[Duplicate]:
        vectors = F.normalize(self.contents.embeddings[group].float(), dim=-1)
        found, seen = [], set()
        for i, score in zip(group, (vectors @ vectors[0]).tolist(), strict=True):
            match = self._match(i, score)
            found.append(Duplicate(match.name, match.path, match.score, int(same[i]) in seen))
            seen.add(int(same[i]))
        return found

    def _damaged(self, error: ValueError) -> ValueError:
        return ValueError(f"{self.path or 'the index'}: {error}; {ANEW}")


def absolute(places: str | Path | Sequence[str | Path]) -> list[str]:
    """Places by their whole paths, so that they are the same from any folder."""
    many = [places] if isinstance(places, (str, Path)) else list(places)
    return [Path(os.path.abspath(Path(place).expanduser())).as_posix() for place in many]  # noqa: PTH100 (links stay)


def _root(places: Sequence[str]) -> str:
    """The folder or archive below which all places lie."""
    tops = []
    for place in places:
        path = Path(place)
        while glob.has_magic(path.as_posix()) and not path.exists():
            path = path.parent
        whole = path.is_dir() or (path.as_posix() == place and place.lower().endswith((".zip", ".tar")))
        tops.append(path.as_posix() if whole else path.parent.as_posix())
    return Path(os.path.commonpath(tops)).as_posix() if tops else ""


def below(root: str, path: str) -> str:
    """A picture's path below the root."""
    return path.removeprefix(root.rstrip("/") + "/")


def cached_path(places: Sequence[str | Path], model: str) -> Path:
    """Where the index of these places by a model of this `fingerprint` lies if no file is named: in the user's cache.

    The cache is `$XDG_CACHE_HOME/mmtransformer/search`, or `~/.cache/mmtransformer/search`.
    """
    where = absolute(places)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mmtransformer", "search")
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = hashlib.sha256("\0".join([*sorted(where), model]).encode("utf-8", "surrogatepass")).hexdigest()
    name = "".join(c if c.isalnum() else "_" for c in Path(_root(where)).stem)[:40] or "pictures"
    return cache / f"{name}-{key[:16]}{SUFFIX}"
