"""Pictures with a class each: a folder of folders, or the shapes of the embedded scenes."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from mmtransformer.data.files.endings import ARCHIVES, IMAGES, unpack_hint
from mmtransformer.data.files.names import is_hidden
from mmtransformer.data.files.normalize import normalize_splits
from mmtransformer.data.files.read_options import check_share
from mmtransformer.data.files.text import split_word
from mmtransformer.data.scenes.scenes import Scenes, SceneSplit
from mmtransformer.images import load
from mmtransformer.serialization.printable import counted


class Classified(Protocol):
    """One split of pictures with a class each."""

    def __len__(self) -> int:
        """The number of pictures."""
        ...

    def name(self, i: int) -> str:
        """The name of picture i."""
        ...

    def image(self, i: int) -> Image.Image:
        """Picture i as RGB."""
        ...

    def label(self, i: int) -> int:
        """The number of its class."""
        ...


class ClassSource(Protocol):
    """Pictures with classes in named splits."""

    classes: tuple[str, ...]

    def splits(self) -> tuple[str, ...]:
        """The names of the splits there are."""
        ...

    def split(self, name: str) -> Classified:
        """One split.

        Raises:
            ValueError: there is no such split; the message lists those there are.
        """
        ...


class _File(NamedTuple):
    name: str
    path: Path
    label: int


class FileSplit:
    """Picture files with their classes."""

    def __init__(self, files: Sequence[_File]) -> None:
        self.files = list(files)

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.files)

    def name(self, i: int) -> str:
        """The path below the root."""
        return self.files[i].name

    def image(self, i: int) -> Image.Image:
        """Picture i as RGB.

        Raises:
            ImageError: If it cannot be used; names the file, the fault and the remedy.
        """
        return self.scaled_image(i)

    def scaled_image(self, i: int, *, at_least: tuple[float, float] | None = None) -> Image.Image:
        """Picture i, which may be decoded smaller; see `at_least` of `mmtransformer.images.load`."""
        return load(self.files[i].path, name=self.files[i].name, at_least=at_least)

    def label(self, i: int) -> int:
        """The number of its class."""
        return self.files[i].label

    def fingerprint(self, i: int) -> str:
        """What changes when the file does: its size and time."""
        try:
            found = self.files[i].path.stat()
        except OSError:
            return "unreadable"
        return f"{found.st_size} {found.st_mtime_ns}"


class ImageFolder:
    """A folder with a folder for each class: ROOT/cat/1.jpg, or ROOT/train/cat/1.jpg and ROOT/val/cat/2.jpg.

    Without splits of its own, a share of the pictures is held out, one at least, chosen by a hash of the file's path.

    Args:
        root: The folder.
        val_fraction: Share of the pictures for validation where the folder has no split for it.

    Attributes:
        ignored: files in folders of classes that are no pictures by their ending.
        named_splits: whether folders name the splits.
        left_out: what is not used, in words: pictures outside of the classes' folders, archives, folders without any.

    Raises:
        ValueError: If the folder is missing, holds fewer than two classes, or a split would be empty.
    """

    def __init__(self, root: str, *, val_fraction: float = 0.1) -> None:
        check_share("val_fraction", val_fraction)
        top = Path(root)
        if not top.is_dir():
            raise ValueError(f"{root}: no such folder")
        inner = _folders(top)
        named = {path: split_word(path.name) for path in inner}
        if inner and all(named.values()):
            above = [top, *inner]
            places = [(folder, split) for path, split in named.items() for folder in _folders(path)]
        else:
            above, places = [top], [(folder, None) for folder in inner]
        found = [(path, folder, split) for folder, split in places for path in _inside(folder)]
        loose = [path for folder in above for path in folder.iterdir() if path.is_file() and not is_hidden(path.name)]
        taken = [item for item in found if _ends(item[0], IMAGES)]
        self.classes: tuple[str, ...] = tuple(sorted({folder.name for _, folder, _ in taken}))
        empty = sorted({folder.name for folder, _ in places}.difference(self.classes))
        others = [path for path, _, _ in found if not _ends(path, IMAGES)]
        archives = sum(map(_is_archive, (*loose, *others)))
        unknown = sum(not _is_archive(path) for path in others)
        outside = sum(_ends(path, IMAGES) for path in loose)
        self.ignored = len(others)
        self.left_out = _left_out(outside, archives, unknown, empty)
        if len(self.classes) < 2:
            why = f"there are {len(self.classes)}" + f" ({self.left_out})" * bool(self.left_out)
            raise ValueError(f"{root}: a folder for each class is needed, two at least; {why}")
        files = [_File(p.relative_to(top).as_posix(), p, self.classes.index(f.name)) for p, f, _ in taken]
        said = [split for _, _, split in taken]
        self.named_splits = any(said)
        members, _ = normalize_splits([file.name for file in files], said, val_fraction)
        self._splits = {name: [files[i] for i in some] for name, some in members.items()}
        if not self._splits.get("train") or not self._splits.get("val"):
            counts = ", ".join(f"{name} {len(some)}" for name, some in self._splits.items()) or "no pictures"
            raise ValueError(
                f"{root}: train and val both need pictures, there are: {counts}; put more there, or set "
                "val_fraction above 0"
            )

    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self._splits)

    def split(self, name: str) -> Classified:  # as the protocol says it: recipes are checked against that
        """One split."""
        if name not in self._splits:
            raise ValueError(f"the pictures have no split {name!r}; there are {', '.join(self._splits)}")
        return FileSplit(self._splits[name])


def _folders(path: Path) -> list[Path]:
    return sorted(inner for inner in path.iterdir() if inner.is_dir() and not is_hidden(inner.name))


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir() and not is_hidden(path.name))


def _ends(path: Path, endings: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(endings)


def _is_archive(path: Path) -> bool:
    return _ends(path, ARCHIVES) or unpack_hint(path.name) is not None


def _left_out(outside: int, archives: int, unknown: int, empty: Sequence[str]) -> str:
    """What of a folder is not used, in words; nothing where all is."""
    counts = [
        f"{counted(outside, 'picture')} outside class folders" * bool(outside),
        counted(archives, "archive") * bool(archives),
        counted(unknown, "file that is no picture", "files that are no pictures") * bool(unknown),
    ]
    names = ", ".join(empty[:8]) + " ..." * (len(empty) > 8)
    without = f"{names} {'has' if len(empty) == 1 else 'have'} no pictures" * bool(empty)
    left = ", ".join(filter(None, counts))
    return "; ".join(filter(None, (f"left out: {left}" * bool(left), without)))


class _ShapeSplit:
    def __init__(self, pairs: SceneSplit, classes: tuple[str, ...]) -> None:
        self.pairs, self.classes = pairs, classes

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, i: int) -> str:
        return self.pairs.name(i)

    def image(self, i: int) -> Image.Image:
        return self.pairs.image(i)

    def label(self, i: int) -> int:
        return self.classes.index(self.pairs.scene(i).groups[0].shape)


class SceneShapes:
    """The embedded scenes, classified by the shape that they show; scenes of one group have just one.

    The split "compositional" shows shapes in colours that they never have in train.

    Args:
        scenes: The scenes; their world must have scenes of one group only (`group_shares: [1]`).

    Raises:
        ValueError: If its scenes may have more groups.
    """

    def __init__(self, scenes: Scenes) -> None:
        shares = scenes.world.group_shares
        if any(shares[1:]):
            raise ValueError(f"classes need scenes of one group: set world.group_shares to [1], not {list(shares)}")
        self.scenes = scenes
        self.classes: tuple[str, ...] = tuple(scenes.world.shapes)

    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return self.scenes.splits()

    def split(self, name: str) -> Classified:
        """One split."""
        return _ShapeSplit(self.scenes.split(name), self.classes)
