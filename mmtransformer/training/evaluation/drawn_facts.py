"""How true drawings are: pictures drawn from the texts of known scenes, read back, and judged fact by fact."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from PIL import Image

from mmtransformer.data.scenes.facts import Judgement, Rates, judge_facts
from mmtransformer.data.scenes.reader import read
from mmtransformer.data.scenes.scenes import SceneSplit
from mmtransformer.pipelines.text_to_image import TextToImage

SEED = 1000
"""Seed of the first drawing of an evaluation; the i-th has SEED + i."""


@dataclass
class DrawnFacts:
    """Facts right over some drawings.

    Attributes:
        right: facts of the scenes that the drawings show, and how many there are.
        exact: drawings that show all facts, and nothing that is false.
        count: drawings.
        parts: the same by kind of fact.
    """

    right: Rates = field(default_factory=Rates)
    exact: int = 0
    count: int = 0
    parts: dict[str, Rates] = field(default_factory=dict)

    def add(self, judged: Judgement) -> None:
        """Adds one drawing."""
        self.right += judged.objects + judged.attributes + judged.relations
        self.exact += judged.exact
        self.count += 1
        for name, rates in judged.parts.items():
            self.parts[name] = self.parts.get(name, Rates()) + rates

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a JSON file."""
        return {
            "facts": self.right.recall,
            "precision": self.right.precision,
            "exact": self.exact / max(self.count, 1),
            "images": self.count,
            "parts": {name: rates.recall for name, rates in self.parts.items()},
        }


def reader_accuracy(split: SceneSplit, count: int) -> DrawnFacts:
    """What the reader gets right of the true pictures: the most that any drawing could be given."""
    found = DrawnFacts()
    for i in range(min(count, len(split))):
        found.add(judge_facts(read(split.image(i), split.world), split.scene(i)))
    return found


def texts_of(split: SceneSplit, language: str, count: int) -> list[str]:
    """The first caption of each of the first scenes, in a language."""
    rows = (split.captions(i) for i in range(min(count, len(split))))
    return [next(c.text for c in captions if c.language == language) for captions in rows]


def judge_drawings(split: SceneSplit, drawings: Iterable[Image.Image]) -> Iterator[Judgement]:
    """Each drawing against the scene whose text it was drawn from, in the split's order."""
    for i, drawing in enumerate(islice(drawings, len(split))):
        yield judge_facts(read(drawing, split.world), split.scene(i))


def score_drawings(
    painter: TextToImage, split: SceneSplit, language: str, count: int, *, guidance_scale: float | None = None
) -> tuple[DrawnFacts, list[Image.Image]]:
    """Draws the texts of a split's first scenes, one picture each, and reads them back.

    Args:
        painter: the model.
        split: known scenes.
        language: of the texts.
        count: how many.
        guidance_scale: in place of the model's own.

    Returns:
        The scores and the drawings.
    """
    config = painter.config if guidance_scale is None else painter.with_config(guidance_scale=guidance_scale)
    texts = texts_of(split, language, count)
    drawings = [
        image
        for (image,) in painter.draw(
            texts, language=language, seed=range(SEED, SEED + len(texts)), config=config, truncate=True
        )
    ]
    found = DrawnFacts()
    for judged in judge_drawings(split, drawings):
        found.add(judged)
    return found, drawings


def table(scores: dict[str, dict[str, Any]], scales: Sequence[float] = ()) -> str:
    """The scores as lines."""
    lines = []
    for split, languages in scores.items():
        for language, found in languages.items():
            parts = ", ".join(f"{name} {share:.0%}" for name, share in found["parts"].items())
            lines.append(f"{split} {language}: facts {found['facts']:.1%}, all right {found['exact']:.1%} ({parts})")
    return "\n".join(lines + ([f"guidance scales {list(scales)}"] if scales else []))
