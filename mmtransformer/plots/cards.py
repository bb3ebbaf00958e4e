"""What a gallery shows: one card a picture, with one caption or several."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

MOST_WRONG = 8
"""Wrong facts that a caption shows; the others are counted (a drawing of blots makes fifty)."""


@dataclass(frozen=True)
class CardCaption:
    """One caption of a card and what is known about it.

    Args:
        text: the caption that the model wrote.
        language: its language code, such as "ko".
        references: what people (or the embedded data) say of the picture.
        score: the mean log-probability of its tokens.
        facts: facts that the caption states, each with whether it is true of the picture.
        right: whether it is right as a whole, such as the name of a class; None where that is not known.
        words: the words of the caption, for the heat maps.
        heat: (words gh gw), where in the picture the model looked at each word.
        box: left, top, right and bottom of the heat's grid as fractions of the picture.
    """

    text: str
    language: str | None = None
    references: Sequence[str] = ()
    score: float | None = None
    facts: Sequence[tuple[str, bool]] = ()
    right: bool | None = None
    words: Sequence[str] = ()
    heat: Tensor | None = field(default=None, compare=False)
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if isinstance(self.references, str):
            raise ValueError(f"references must be a list of texts, not the text {self.references[:40]!r}")
        if self.heat is not None and (self.heat.ndim != 3 or self.heat.shape[0] != len(self.words)):
            raise ValueError(
                f"heat of shape {tuple(self.heat.shape)} does not fit {len(self.words)} words; "
                f"expected ({len(self.words)}, rows, columns)"
            )

    @property
    def correct(self) -> bool | None:
        """Whether all stated facts are true, or the whole is right; None if neither is known."""
        return all(ok for _, ok in self.facts) if self.facts else self.right

    @property
    def rank(self) -> float | None:
        """What cards are sorted by: the share of true facts, else whether it is right, else the score, if known."""
        whole = self.score if self.right is None else float(self.right)
        return sum(ok for _, ok in self.facts) / len(self.facts) if self.facts else whole

    def marks(self) -> list[tuple[str, str]]:
        """What stands below the caption: texts, each "language", "good", "bad" or ""."""
        marks = [(self.language, "language")] if self.language else []
        if self.facts:
            right, sign = sum(ok for _, ok in self.facts), "✓" if self.correct else "✗"
            marks.append((f"{sign} {right}/{len(self.facts)} facts", "good" if self.correct else "bad"))
            wrong = [fact for fact, ok in self.facts if not ok]
            marks += [(f"✗ {fact}", "bad") for fact in wrong[:MOST_WRONG]]
            if (more := len(wrong) - MOST_WRONG) > 0:
                marks.append((f"+ {more} more", "bad"))
        elif self.right is not None:
            marks.append(("✓ right", "good") if self.right else ("✗ wrong", "bad"))
        return marks if self.score is None else [*marks, (f"log p {self.score:.2f} a token", "")]


@dataclass(frozen=True)
class Card:
    """One picture with its captions.

    Args:
        image: the picture.
        captions: what was said of it, one or more.
        heading: a short line above, such as the picture's name.
    """

    image: Image.Image
    captions: Sequence[CardCaption]
    heading: str = ""

    @property
    def rank(self) -> float | None:
        """The mean of its captions' ranks; None if none is known."""
        known = [rank for caption in self.captions if (rank := caption.rank) is not None]
        return sum(known) / len(known) if known else None


def show_number(value: float) -> str:
    """Write a number as people read it: four digits, thousands apart, "-" for what is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if math.isnan(value):
        return "-"
    if isinstance(value, int) or (abs(value) >= 1000 and math.isfinite(value)):
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
