"""How true drawings are: pictures drawn from the texts of known scenes, read back, and judged fact by fact."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from mmtransformer.data.scenes.facts import Judgement, Rates, judge_facts
from mmtransformer.data.scenes.facts_from_image import read
from mmtransformer.data.scenes.scenes import SceneSplit
from mmtransformer.pipelines.image_generator import ImageGenerator

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
        parts = {name: [judged.parts.get(name, Rates()) for judged in self.judgements] for name in kinds}
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
    painter: ImageGenerator,
    split: SceneSplit,
    language: str,
    count: int,
    *,
    guidance_scale: float | None = None,
    first_seed: int = SEED,
) -> tuple[DrawnFacts, list[Image.Image]]:
    """Draws the texts of a split's first scenes, one picture each, and reads them back.

    Args:
        painter: the model.
        split: known scenes.
        language: of the texts.
        count: how many.
        guidance_scale: in place of the model's own.
        first_seed: seed of the first drawing; the next ones follow.

    Returns:
        The scores and the drawings.
    """
    generation = painter.generation
    if guidance_scale is not None:
        generation = replace(generation, guidance_scale=guidance_scale)
    texts = texts_of(split, language, count)
    seeds = range(first_seed, first_seed + len(texts))
    drawn = painter(texts, language=language, seed=seeds, generation=generation, truncate=True)
    drawings = [image for (image,) in drawn]
    return judge_drawings(split, drawings), drawings


def compare_seeds(
    painter: ImageGenerator, split: SceneSplit, language: str, drawings: Sequence[Image.Image]
) -> dict[str, float]:
    """Draws the texts of some drawings with other seeds: whether they say the same, and how far apart they look.

    Args:
        painter: the model.
        split: known scenes.
        language: of the texts.
        drawings: of the first texts, as `score_drawings` gave them.

    Returns:
        "facts" and "other_facts", the share of right facts with one seed and with another; "same", the share of texts
        whose two drawings are read alike, whether right or wrong; "pixels", how far the colours of the two are apart
        on average, in [0, 1]; "texts", the same between drawings of different texts, to compare with.
    """
    first = judge_drawings(split, drawings)
    second, others = score_drawings(painter, split, language, len(drawings), first_seed=SEED + 10_000)
    same = [
        set(read(a, split.world).groups) == set(read(b, split.world).groups)
        for a, b in zip(drawings, others, strict=True)
    ]
    ones, twos = (np.stack([np.asarray(image, np.float32) / 255 for image in images]) for images in (drawings, others))
    return {
        "facts": first.right.recall,
        "other_facts": second.right.recall,
        "same": sum(same) / len(same),
        "pixels": float(np.abs(ones - twos).mean()),
        "texts": float(np.abs(ones - np.roll(twos, 1, 0)).mean()),
    }


def table(scores: dict[str, dict[str, Any]], scales: Sequence[float] = ()) -> str:
    """The scores as lines."""
    lines = []
    for split, languages in scores.items():
        for language, found in languages.items():
            parts = ", ".join(f"{name} {share:.0%}" for name, share in found["parts"].items())
            lines.append(
                f"{split} {language}: facts {found['facts']:.1%}, {found['precision']:.1%} of those drawn are true, "
                f"all right {found['exact']:.1%} ({parts})"
            )
    return "\n".join(lines + ([f"guidance scales {list(scales)}"] if scales else []))
