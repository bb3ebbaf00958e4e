"""How true drawings are: pictures drawn from the texts of known scenes, read back, and judged fact by fact."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmtransformer.data.scenes.facts import Judgement, Rates, judge_facts
from mmtransformer.data.scenes.reader import read
from mmtransformer.data.scenes.scenes import SceneSplit
from mmtransformer.pipelines.text_to_image import TextToImage

SEED = 1000
"""Seed of the first drawing of an evaluation; the i-th has SEED + i."""


@dataclass(frozen=True)
class DrawnFacts:
    """What some drawings show of the scenes whose texts they were drawn from.

    Attributes:
        judgements: each drawing against its scene, in the split's order.
    """

    judgements: Sequence[Judgement]

    @property
    def right(self) -> Rates:
        """Facts of the scenes that the drawings show, and how many there are."""
        return sum((judged.objects + judged.attributes + judged.relations for judged in self.judgements), Rates())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a JSON file: drawings are "exact" that show all facts and nothing false."""
        kinds = dict.fromkeys(name for judged in self.judgements for name in judged.parts)
        parts = {name: (judged.parts.get(name, Rates()) for judged in self.judgements) for name in kinds}
        return {
            "facts": self.right.recall,
            "precision": self.right.precision,
            "exact": sum(judged.exact for judged in self.judgements) / max(len(self.judgements), 1),
            "images": len(self.judgements),
            "parts": {name: sum(rates, Rates()).recall for name, rates in parts.items()},
        }


def judge_drawings(split: SceneSplit, drawings: Iterable[Image.Image]) -> DrawnFacts:
    """Each drawing against the scene whose text it was drawn from, in the split's order."""
    return DrawnFacts([judge_facts(read(image, split.world), split.scene(i)) for i, image in enumerate(drawings)])


def reader_accuracy(split: SceneSplit, count: int) -> DrawnFacts:
    """What the reader gets right of the true pictures: the most that any drawing could be given."""
    return judge_drawings(split, (split.image(i) for i in range(min(count, len(split)))))


def texts_of(split: SceneSplit, language: str, count: int) -> list[str]:
    """The first caption of each of the first scenes, in a language."""
    rows = (split.captions(i) for i in range(min(count, len(split))))
    return [next(c.text for c in captions if c.language == language) for captions in rows]


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
    seeds = range(SEED, SEED + len(texts))
    drawn = painter.draw(texts, language=language, seed=seeds, config=config, truncate=True)
    drawings = [image for (image,) in drawn]
    return judge_drawings(split, drawings), drawings


def table(scores: dict[str, dict[str, Any]], scales: Sequence[float] = ()) -> str:
    """The scores as lines."""
    lines = []
    for split, languages in scores.items():
        for language, found in languages.items():
            parts = ", ".join(f"{name} {share:.0%}" for name, share in found["parts"].items())
            lines.append(f"{split} {language}: facts {found['facts']:.1%}, all right {found['exact']:.1%} ({parts})")
    return "\n".join(lines + ([f"guidance scales {list(scales)}"] if scales else []))
