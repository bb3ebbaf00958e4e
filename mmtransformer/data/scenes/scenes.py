"""The embedded data: pictures of simple scenes with captions in English and Korean, drawn when they are asked for.

There are no files: picture, captions and scene follow from (seed, split, index) alone, in any process and order.
Because the scene behind a picture is known, captions can be judged exactly (`facts.score`).
"""

import random
from collections.abc import Sequence

from PIL import Image

from mmtransformer.data.loading.source import Caption
from mmtransformer.data.scenes.drawing import draw
from mmtransformer.data.scenes.grammar import LANGUAGES, MAX_PHRASINGS, describe
from mmtransformer.data.scenes.world import Scene, World

_SMALLEST = 32  # px; below, small shapes are blots


class SceneSplit:
    """One split of `Scenes`: a `Pairs` that knows what its pictures show.

    Args:
        name: the split's name, part of the key of all chance.
        size: number of pictures.
        image_size: side of the square pictures, px.
        seed: part of the key of all chance.
        world: what there is to see.
        held_out: True: every scene has a colour-shape pair that is held out; False: none has.
        languages: the captions' languages, in this order.
        phrasings: captions of each picture in each language.
    """

    def __init__(
        self,
        name: str,
        size: int,
        *,
        image_size: int,
        seed: int,
        world: World,
        held_out: bool,
        languages: Sequence[str],
        phrasings: int,
    ):
        self.split_name, self.size, self.image_size, self.seed = name, size, image_size, seed
        self.world, self.held_out, self.languages, self.phrasings = (world, held_out, tuple(languages), phrasings)

    def __len__(self) -> int:
        """The number of pictures."""
        return self.size

    def name(self, i: int) -> str:
        """The name of picture i."""
        return f"scenes-{self.seed}-{self.split_name}-{self._check(i):06d}"

    def scene(self, i: int) -> Scene:
        """What picture i shows."""
        return self.world.sample(self._chance(i, "scene"), held_out=self.held_out)

    def image(self, i: int) -> Image.Image:
        """Picture i as RGB."""
        return draw(self.scene(i), self.image_size, self.world.clutter)

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
        return self.scene(i).boxes(self.image_size)

    def _check(self, i: int) -> int:
        if not 0 <= i < self.size:
            raise IndexError(f"picture {i} of split {self.split_name!r}, which has {self.size}")
        return i

    def _chance(self, i: int, what: str) -> random.Random:
        return random.Random(f"scenes/{self.seed}/{self.split_name}/{self._check(i)}/{what}")


class Scenes:
    """The embedded data, a `PairSource` with the splits train, val and compositional.

    Pictures of val are drawn like those of train. Every picture of compositional shows a colour-shape pair that
    train and val never show together (`World.held_out`), though each of the two is shown with others.

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
        world: World = World(),  # noqa: B008 - frozen
    ):
        if image_size < _SMALLEST:
            raise ValueError(f"image_size must be at least {_SMALLEST} px, got {image_size}")
        sizes = {"train": train_size, "val": val_size, "compositional": compositional_size}
        for split, size in sizes.items():
            if size < 1:
                raise ValueError(f"{split}_size must be at least 1, got {size}")
        for field, number in (("phrasings", phrasings), ("references", references)):
            if not 1 <= number <= MAX_PHRASINGS:
                raise ValueError(f"{field} must be 1 to {MAX_PHRASINGS}, got {number}")
        unknown = [language for language in languages if language not in LANGUAGES]
        if unknown or not languages or len(set(languages)) < len(languages):
            raise ValueError(f"languages must be different ones of {', '.join(LANGUAGES)}, got {list(languages)}")
        self.image_size, self.seed, self.world = image_size, seed, world
        self.train_size, self.val_size, self.compositional_size = train_size, val_size, compositional_size
        self.languages: tuple[str, ...] = tuple(languages)
        self.phrasings, self.references = phrasings, references
        self._sizes = sizes

    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self._sizes)

    def split(self, name: str) -> SceneSplit:
        """One split.

        Raises:
            ValueError: there is no such split.
        """
        if name not in self._sizes:
            raise ValueError(f"scenes have no split {name!r}; there are {', '.join(self._sizes)}")
        return SceneSplit(
            name,
            self._sizes[name],
            image_size=self.image_size,
            seed=self.seed,
            world=self.world,
            held_out=name == "compositional",
            languages=self.languages,
            phrasings=self.phrasings if name == "train" else self.references,
        )
