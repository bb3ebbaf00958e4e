"""Pictures with a class each: a folder of folders, or the shapes of the embedded scenes."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from mmtransformer.data.files.endings import IMAGES
from mmtransformer.data.files.names import is_hidden
from mmtransformer.data.files.normalize import normalize_splits
from mmtransformer.data.files.read_options import check_share
from mmtransformer.data.files.text import split_word
from mmtransformer.data.scenes.scenes import Scenes, SceneSplit
from mmtransformer.images import load


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
        ignored: files that are no pictures by their ending.

    Raises:
        ValueError: If the folder is missing, holds fewer than two classes, or a split would be empty.
    """

    def __init__(self, root: str, *, val_fraction: float = 0.1) -> None:
        check_share("val_fraction", val_fraction)
        top = Path(root)
        if not top.is_dir():
            raise ValueError(f"{root}: no such folder")
        self.ignored = 0
        inner = sorted(path for path in top.iterdir() if path.is_dir() and not path.name.startswith("."))
        named = {path: split_word(path.name) for path in inner}
        if inner and all(named.values()):
            places = [(folder, split) for path, split in named.items() for folder in _folders(path)]
        else:
            places = [(folder, None) for folder in inner]
        self.classes: tuple[str, ...] = tuple(sorted({folder.name for folder, _ in places}))
        if len(self.classes) < 2:
            raise ValueError(f"{root}: a folder for each class is needed, two at least; there are {len(self.classes)}")
        files, said = list[_File](), list[str | None]()
        for folder, split in places:
            for path in sorted(folder.rglob("*")):
                if is_hidden(path.name) or not path.name.lower().endswith(IMAGES):
                    self.ignored += path.is_file()
                    continue
                name = path.relative_to(top).as_posix()
                files.append(_File(name, path, self.classes.index(folder.name)))
                said.append(split)
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
    return sorted(inner for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith("."))


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
