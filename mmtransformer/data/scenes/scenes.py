"""The embedded data: pictures of simple scenes with captions in English and Korean, drawn when they are asked for.

There are no files: picture, captions and scene follow from (seed, split, index) alone, in any process and order.
Because the scene behind a picture is known, captions can be judged exactly (`facts.score`).
"""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image

from mmtransformer.data.loading.source import Caption
from mmtransformer.data.scenes.grammar import LANGUAGES, MAX_PHRASINGS, describe
from mmtransformer.data.scenes.rendering import render
from mmtransformer.data.scenes.world import Scene, SceneWorld

_SMALLEST = 32  # px; below, small shapes are blots


class _Split(Protocol):
    split_name: str

    def __len__(self) -> int: ...


def check_index(i: int, split: _Split, what: str = "picture") -> int:
    """An index that a split has.

    Raises:
        IndexError: it has not.
    """
    if not 0 <= i < len(split):
        raise IndexError(f"{what} {i} of split {split.split_name!r}, which has {len(split)}")
    return i


class SceneSplit:
    """One split of `Scenes`: a `Pairs` that knows what its pictures show.

    Args:
        source: the scenes.
        name: the split's name, part of the key of all chance. In "compositional" every scene has a colour-shape pair
            that is held out, elsewhere none has; "train" alone has `phrasings` captions, the others `references`.
    """

    def __init__(self, source: "Scenes", name: str):
        self.source, self.split_name = source, name
        self.world, self.languages = source.world, source.languages
        self.phrasings = source.phrasings if name == "train" else source.references
        self.group_size = source.group_size if name == "train" else 1

    def __len__(self) -> int:
        """The number of pictures."""
        return self.source.sizes[self.split_name]

    def name(self, i: int) -> str:
        """The name of picture i."""
        return f"scenes-{self.source.seed}-{self.split_name}-{check_index(i, self):06d}"

    def scene(self, i: int) -> Scene:
        """What picture i shows."""
        number = check_index(i, self) % self.group_size
        scene = self.world.sample(self._chance(i - number, "scene"), held_out=self.split_name == "compositional")
        if number == 0:
            return scene
        rng = self._chance(i - number, "siblings")  # The word is a part of the seed: another one draws other scenes.
        others = self.world.hard_negatives(scene, rng, self.group_size - 1)
        return others[number - 1] if number <= len(others) else scene

    def image(self, i: int) -> Image.Image:
        """Picture i as RGB."""
        return render(self.scene(i), self.source.image_size, self.world.clutter)

    def captions(self, i: int) -> list[Caption]:
        """The captions of picture i: all of the first language, then all of the next."""
        scene = self.scene(i)
        return [
            Caption(text, language)
            for language in self.languages
            for text in describe(scene, language, self.phrasings, self._chance(i, language))
        ]

    def boxes(self, i: int) -> list[list[tuple[float, float, float, float]]]:
        """For each group of picture i the pixel boxes (left, top, right, bottom) of its objects."""
        return self.scene(i).boxes(self.source.image_size)

    def _chance(self, i: int, what: str) -> random.Random:
        return random.Random(f"scenes/{self.source.seed}/{self.split_name}/{check_index(i, self)}/{what}")


class Scenes:
    """The embedded data, a `PairSource` with the splits train, val and compositional.

    Pictures of val are drawn like those of train. Every picture of compositional shows a colour-shape pair that
    train and val never show together (`SceneWorld.held_out`), though each of the two is shown with others.

    Args:
        image_size: side of the square pictures, px.
        seed: another seed is another data set.
        train_size: pictures to train on.
        val_size: pictures to validate on.
        compositional_size: pictures with held-out colour-shape pairs.
        languages: language codes of the captions, "en" and "ko".
        phrasings: captions of each training picture in each language.
        references: captions of each other picture in each language.
        world: what there is to see; fewer words in it are learnt sooner.
        group_size: so many neighbours of the training split are one scene and others that differ from it in a word:
            hard negatives, if batches keep them together (`LoaderConfig.group_size`). 1 = every scene is of its own.

    Raises:
        ValueError: a number out of range, or an unknown language.
    """

    def __init__(
        self,
        image_size: int = 64,
        seed: int = 0,
        train_size: int = 20000,
        val_size: int = 500,
        compositional_size: int = 500,
        languages: Sequence[str] = ("en", "ko"),
        phrasings: int = 1,
        references: int = 3,
        world: SceneWorld = SceneWorld(),  # noqa: B008 - frozen
        group_size: int = 1,
    ):
        if image_size < _SMALLEST:
            raise ValueError(f"image_size must be at least {_SMALLEST} px, got {image_size}")
        self.sizes = {"train": train_size, "val": val_size, "compositional": compositional_size}
        for split, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"{split}_size must be at least 1, got {size}")
        for field, number in (("phrasings", phrasings), ("references", references)):
            if not 1 <= number <= MAX_PHRASINGS:
                raise ValueError(f"{field} must be 1 to {MAX_PHRASINGS}, got {number}")
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        unknown = [language for language in languages if language not in LANGUAGES]
        if unknown or not languages or len(set(languages)) < len(languages):
            raise ValueError(f"languages must be different ones of {', '.join(LANGUAGES)}, got {list(languages)}")
        self.image_size, self.seed, self.world = image_size, seed, world
        self.languages: tuple[str, ...] = tuple(languages)
        self.phrasings, self.references, self.group_size = phrasings, references, group_size

    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.sizes)

    def split(self, name: str) -> SceneSplit:
        """One split.

        Raises:
            ValueError: there is no such split.
        """
        if name not in self.sizes:
            raise ValueError(f"scenes have no split {name!r}; there are {', '.join(self.sizes)}")
        return SceneSplit(self, name)

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments as plain data."""
        sizes = {f"{split}_size": size for split, size in self.sizes.items()}
        names = ("image_size", "seed", "languages", "phrasings", "references", "group_size")
        return {name: getattr(self, name) for name in names} | sizes | {"world": dataclasses.asdict(self.world)}
