"""Interleaved documents of drawn scenes, without any file: pictures, and one and the same aspect told of each.

All texts of a document tell the same aspect of their pictures (`ASPECTS`): a whole description, the colour alone, the
number alone, ... Nothing but the texts before tells a picture which aspect it is, so a model that writes the last text
right has learnt from the examples before it: that is what few-shot prompting is measured by (`SceneDocumentSplit.pairs`
are the examples, `answer` the truth).
"""

import random
from collections.abc import Sequence
from typing import Literal, get_args

from PIL import Image

from mmtransformer.data.documents.documents import Document
from mmtransformer.data.loading.source import Caption
from mmtransformer.data.scenes.grammar import LANGUAGES, describe
from mmtransformer.data.scenes.rendering import render
from mmtransformer.data.scenes.scenes import check_index
from mmtransformer.data.scenes.words import say
from mmtransformer.data.scenes.world import Scene, SceneWorld

Aspect = Literal["description", "color", "shape", "count", "size", "fill"]
ASPECTS: tuple[Aspect, ...] = get_args(Aspect)
_SMALLEST = 32  # px
_OPENINGS = {
    "en": ("pictures:", "some pictures", "look at these", "an album"),
    "ko": ("그림들:", "그림 몇 장", "이것들을 보세요", "앨범"),
}


class SceneDocumentSplit:
    """One split of `SceneDocuments`: documents by index, drawn when they are asked for.

    Args:
        source: the documents' settings.
        name: the split's name, part of the key of all chance.
    """

    def __init__(self, source: "SceneDocuments", name: str):
        self.source, self.split_name = source, name

    def __len__(self) -> int:
        """The number of documents."""
        return self.source.sizes[self.split_name]

    def name(self, i: int) -> str:
        """The name of document i."""
        return f"scene-documents-{self.source.seed}-{self.split_name}-{check_index(i, self, 'document'):06d}"

    def aspect(self, i: int) -> Aspect:
        """The aspect that all texts of document i tell."""
        return self._chance(i, "way").choice(self.source.aspects)

    def language(self, i: int) -> str:
        """The language of document i."""
        return self._chance(i, "language").choice(self.source.languages)

    def scene(self, i: int, k: int) -> Scene:
        """What picture k of document i shows."""
        return self.source.world.sample(self._chance(i, f"scene {k}"))

    def document(self, i: int) -> Document:
        """The texts of document i."""
        language, aspect, chance = self.language(i), self.aspect(i), self._chance(i, "text")
        opening = chance.choice(_OPENINGS[language]) if chance.random() < self.source.openings else ""
        count = chance.randint(*self.source.num_images)
        texts = [answer(self.scene(i, k), aspect, language, chance) for k in range(count)]
        return Document((opening, *texts), language)

    def image_name(self, i: int, k: int) -> str:
        """The name of picture k of document i."""
        return f"{self.name(i)}/{k}"

    def image(self, i: int, k: int) -> Image.Image:
        """Picture k of document i as RGB."""
        return render(self.scene(i, k), self.source.image_size, self.source.world.clutter)

    def _chance(self, i: int, what: str) -> random.Random:
        return random.Random(
            f"scene documents/{self.source.seed}/{self.split_name}/{check_index(i, self, 'document')}/{what}"
        )


class ScenePairs:
    """Drawn scenes with one aspect told of each, in one language: examples and questions of a few-shot test.

    Args:
        source: the settings of the pictures.
        name: the split's name, part of the key of all chance.
        size: number of pictures.
        aspect: what is told.
        language: the language.
    """

    def __init__(self, source: "SceneDocuments", name: str, size: int, aspect: Aspect, language: str):
        self.source, self.split_name, self.size, self.language = source, name, size, language
        self.aspect: Aspect = aspect

    def __len__(self) -> int:
        """The number of pictures."""
        return self.size

    def name(self, i: int) -> str:
        """The name of picture i; the same picture in all aspects and languages."""
        return f"scenes-{self.source.seed}-{self.split_name}-{i:06d}"

    def scene(self, i: int) -> Scene:
        """What picture i shows."""
        return self.source.world.sample(self._chance(i))

    def image(self, i: int) -> Image.Image:
        """Picture i as RGB."""
        return render(self.scene(i), self.source.image_size, self.source.world.clutter)

    def captions(self, i: int) -> list[Caption]:
        """What is said of picture i."""
        return [Caption(answer(self.scene(i), self.aspect, self.language, self._chance(i, "/text")), self.language)]

    def _chance(self, i: int, what: str = "") -> random.Random:
        return random.Random(f"scene pairs/{self.source.seed}/{self.split_name}/{check_index(i, self)}{what}")


class SceneDocuments:
    """Documents of drawn scenes: a `DocumentSource` with the splits train and val.

    Args:
        image_size: side of the square pictures, px.
        seed: another seed is another data set.
        train_size: documents to train on.
        val_size: documents to validate on.
        num_images: the fewest and the most pictures of a document.
        aspects: what may be told, one a document: "description", or one fact of the picture's first group: "color",
            "shape", "count", "size", "fill".
        languages: language codes, "en" and "ko"; one a document.
        openings: share of documents that begin with a few words before the first picture.
        world: what there is to see.

    Raises:
        ValueError: a number out of range, or an unknown aspect or language.
    """

    def __init__(
        self,
        image_size: int = 64,
        seed: int = 0,
        train_size: int = 20000,
        val_size: int = 200,
        num_images: tuple[int, int] = (2, 5),
        aspects: Sequence[Aspect] = ASPECTS,
        languages: Sequence[str] = ("en", "ko"),
        openings: float = 0.2,
        world: SceneWorld = SceneWorld(group_shares=(1.0,)),  # noqa: B008 - frozen
    ):
        if image_size < _SMALLEST:
            raise ValueError(f"image_size must be at least {_SMALLEST} px, got {image_size}")
        self.sizes = {"train": train_size, "val": val_size}
        for split, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"{split}_size must be at least 1, got {size}")
        if not 1 <= num_images[0] <= num_images[1]:
            raise ValueError(f"num_images must be the fewest (at least 1) and the most of a document, got {num_images}")
        if not 0 <= openings <= 1:
            raise ValueError(f"openings is a share, from 0 to 1, got {openings}")
        for field, values, known in (("aspects", aspects, ASPECTS), ("languages", languages, tuple(LANGUAGES))):
            if not values or set(values) - set(known) or len(set(values)) < len(values):
                raise ValueError(f"{field} must be different ones of {', '.join(known)}, got {list(values)}")
        self.image_size, self.seed = image_size, seed
        self.num_images, self.aspects, self.openings, self.world = num_images, tuple(aspects), openings, world
        self.languages: tuple[str, ...] = tuple(languages)

    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.sizes)

    def split(self, name: str) -> SceneDocumentSplit:
        """One split.

        Raises:
            ValueError: there is no such split.
        """
        if name not in self.sizes:
            raise ValueError(f"scene documents have no split {name!r}; there are train, val")
        return SceneDocumentSplit(self, name)

    def pairs(self, name: str, size: int, aspect: Aspect, language: str) -> ScenePairs:
        """Pictures of their own with one aspect told of each: examples ("shots") and questions of a test."""
        return ScenePairs(self, name, size, aspect, language)


def answer(scene: Scene, aspect: Aspect, language: str, rng: random.Random) -> str:
    """One aspect of a scene, told: a description, or one fact of its first group."""
    if aspect == "description":
        return describe(scene, language, 1, rng)[0]
    return say(scene.groups[0], aspect, language)
