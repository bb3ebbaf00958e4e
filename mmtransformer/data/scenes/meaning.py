"""What a caption means: the groups it names and the relations it states, the same in every language."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmtransformer.data.scenes.world import Group, Relation, Scene

_OPPOSITE = {"left": "right", "above": "below", "inside": "around"}
_IN_ORDER = 0.8  # share of captions that name the groups in reading order; the others keep "right of" and "below" alive
_INVERSE = _OPPOSITE | {back: kind for kind, back in _OPPOSITE.items()}


@dataclass(frozen=True)
class GroupFacts:
    """What a caption says about one group; None where it says nothing."""

    shape: str
    color: str | None = None
    size: str | None = None
    fill: str | None = None
    count: int | None = None

    @classmethod
    def of(cls, group: Group) -> "GroupFacts":
        """All there is to say about a group."""
        return cls(group.shape, group.color, group.size, group.fill, group.count)


@dataclass(frozen=True)
class Facts:
    """What a caption says: its groups, and the relations between them by index, in canonical form."""

    groups: tuple[GroupFacts, ...] = ()
    relations: frozenset[Relation] = frozenset()

    @classmethod
    def of(cls, scene: Scene) -> "Facts":
        """All that a caption of the scene has to say."""
        return cls(tuple(GroupFacts.of(group) for group in scene.groups), frozenset(scene.relations))


def canonical(subject: int, word: str, object: int) -> Relation:
    """The one form of a relation: "b right of a" is "a left of b"."""
    if word in _OPPOSITE:
        return Relation(subject, word, object)
    return Relation(object, _INVERSE[word], subject)


def said_group(shape: str, words: Mapping[str, Any], count: int | None) -> GroupFacts:
    """The group that a noun and the adjectives before it name; a fill that is not named means "solid"."""
    return GroupFacts(shape, words.get("color"), words.get("size"), words.get("fill", "solid"), count)


def between_sides(sides: Mapping[int, str]) -> set[Relation]:
    """The relations of groups of which it is said at which side of the picture they are."""
    return {
        canonical(a, side, b)
        for a, side in sides.items()
        for b, other in sides.items()
        if (side, other) in (("left", "right"), ("above", "below"))
    }


def word_between(scene: Scene, a: int, b: int) -> str:
    """The word w of "group a is w group b" for two neighbours: left, right, above, below, inside or around."""
    for subject, kind, object in scene.relations:
        if (subject, object) == (a, b):
            return kind
        if (subject, object) == (b, a):
            return _INVERSE[kind]
    raise ValueError(f"groups {a} and {b} have no relation in this scene; it has {list(scene.relations)}")


def chains(scene: Scene) -> list[tuple[int, ...]]:
    """The orders in which a caption can name the groups so that each is related to the next."""
    forward = tuple(range(len(scene.groups)))
    return [forward, forward[::-1]] if len(forward) > 1 else [forward]


def reading_order(scene: Scene, rng: random.Random) -> tuple[int, ...]:
    """An order to name the groups in: mostly from left to right or from top to bottom, as people do; else turned."""
    orders = chains(scene)
    if any(kind == "inside" for _, kind, _ in scene.relations):
        return rng.choice(orders)
    return orders[0] if rng.random() < _IN_ORDER else orders[-1]


Phrase = Callable[[Scene, random.Random], str]  # one sentence pattern: writes a caption of a scene
