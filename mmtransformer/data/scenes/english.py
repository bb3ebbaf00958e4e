"""English captions of scenes: written, and read back."""

import random
import re
from itertools import pairwise
from typing import Any

from mmtransformer.data.scenes.meaning import (
    Facts,
    GroupFacts,
    Phrase,
    between_sides,
    canonical,
    reading_order,
    said_group,
    word_between,
)
from mmtransformer.data.scenes.palette import COLORS
from mmtransformer.data.scenes.world import FILLS, SHAPES, SIZES, Group, Relation, Scene

NUMBERS = ("", "one", "two", "three", "four")
_TO = {"left": "to the left of", "right": "to the right of"}  # the other words stand for themselves
_SIDES = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
_ROWS = {
    "left": "from left to right",
    "right": "from right to left",
    "above": "from top to bottom",
    "below": "from bottom to top",
}


def article(word: str) -> str:
    """The article before a word, by its first letter: "a" or "an"."""
    return "an" if word[:1].lower() in "aeiou" else "a"


def plural(noun: str) -> str:
    """The plural of a regular noun: crosses, stars, berries."""
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"


# Writing


def noun_phrase(group: Group, rng: random.Random) -> str:
    """Like "three small red striped stars"."""
    words = [group.size, group.color]
    if group.fill != "solid":
        words.insert(rng.choice((1, 2)), group.fill)
    words.append(group.shape if group.count == 1 else plural(group.shape))
    return " ".join([article(words[0]) if group.count == 1 else NUMBERS[group.count], *words])


def _is(group: Group) -> str:
    return "is" if group.count == 1 else "are"


def _back(word: str, group: Group) -> str:
    """The relation to a group already named: "to its left", "above them"."""
    if word in _TO:
        return f"to {'its' if group.count == 1 else 'their'} {word}"
    return f"{word} {'it' if group.count == 1 else 'them'}"


def phrases(scene: Scene) -> list[Phrase]:
    """All sentence patterns that fit a scene; each writes one caption."""
    if len(scene.groups) == 1:
        return [_bare, _there, _shows, _image]
    patterns: list[Phrase] = [_states, _there_states, _walks]
    kinds = {kind for _, kind, _ in scene.relations}
    if len(scene.groups) == 2:
        patterns += [_fronted, _with]
        patterns += [] if "inside" in kinds else [_sides]
    if len(kinds) == 1 and "inside" not in kinds:
        patterns.append(_row)
    return patterns


def _bare(scene: Scene, rng: random.Random) -> str:
    return noun_phrase(scene.groups[0], rng)


def _there(scene: Scene, rng: random.Random) -> str:
    return f"there {_is(scene.groups[0])} {_bare(scene, rng)}"


def _shows(scene: Scene, rng: random.Random) -> str:
    return f"the picture shows {_bare(scene, rng)}"


def _image(scene: Scene, rng: random.Random) -> str:
    return f"a picture of {_bare(scene, rng)}"


def _tail(scene: Scene, order: tuple[int, ...], rng: random.Random, verb: bool) -> str:
    """Like "A (is) left of B, which is above C"."""
    text = noun_phrase(scene.groups[order[0]], rng)
    for k, (a, b) in enumerate(pairwise(order)):
        word = word_between(scene, a, b)
        text += ", which" if k else ""
        text += f" {_is(scene.groups[a])}" if word != "around" and (k or verb) else ""
        if word == "around":
            link = "contains" if k or verb else "around"
        else:
            link = _TO.get(word, word)
        text += f" {link} {noun_phrase(scene.groups[b], rng)}"
    return text


def _states(scene: Scene, rng: random.Random) -> str:
    return _tail(scene, reading_order(scene, rng), rng, verb=True)


def _there_states(scene: Scene, rng: random.Random) -> str:
    order = reading_order(scene, rng)
    return f"there {_is(scene.groups[order[0]])} {_tail(scene, order, rng, verb=False)}"


def _walks(scene: Scene, rng: random.Random) -> str:
    """Like "there is A; to its right is B; below it is C"."""
    order = reading_order(scene, rng)
    text = f"there {_is(scene.groups[order[0]])} {noun_phrase(scene.groups[order[0]], rng)}"
    for a, b in pairwise(order):
        group = scene.groups[b]
        text += f"; {_back(word_between(scene, b, a), scene.groups[a])} {_is(group)} {noun_phrase(group, rng)}"
    return text


def _fronted(scene: Scene, rng: random.Random) -> str:
    """Like "to the right of B is A"."""
    b, a = reading_order(scene, rng)
    word, group = word_between(scene, a, b), scene.groups[a]
    return f"{_TO.get(word, word)} {noun_phrase(scene.groups[b], rng)} {_is(group)} {noun_phrase(group, rng)}"


def _with(scene: Scene, rng: random.Random) -> str:
    """Like "A with B to its right"."""
    a, b = reading_order(scene, rng)
    first, second = noun_phrase(scene.groups[a], rng), noun_phrase(scene.groups[b], rng)
    return f"{first} with {second} {_back(word_between(scene, b, a), scene.groups[a])}"


def _sides(scene: Scene, rng: random.Random) -> str:
    """Like "A on the left and B on the right"."""
    a, b = reading_order(scene, rng)
    first, second = noun_phrase(scene.groups[a], rng), noun_phrase(scene.groups[b], rng)
    return f"{first} {_SIDES[word_between(scene, a, b)]} and {second} {_SIDES[word_between(scene, b, a)]}"


def _row(scene: Scene, rng: random.Random) -> str:
    """Like "from left to right: A, B and C"."""
    *first, last = (noun_phrase(group, rng) for group in scene.groups)
    return f"{_ROWS[word_between(scene, 0, 1)]}: {', '.join(first)} and {last}"


# Reading

_MEANINGS: dict[str, dict[str, Any]] = {
    "count": {word: n for n, word in enumerate((*NUMBERS, "five", "six", "seven", "eight", "nine")) if word}
    | {str(n): n for n in range(1, 10)}
    | {"a": 1, "an": 1},
    "size": {word: word for word in SIZES} | {"little": "small", "tiny": "small", "big": "large", "huge": "large"},
    "fill": {word: word for word in FILLS} | {"filled": "solid", "spotted": "dotted", "hollow": "outlined"},
    "color": {word: word for word in COLORS} | {"violet": "purple"},
}
_ATTRIBUTES = {word: (kind, value) for kind, words in _MEANINGS.items() for word, value in words.items()}
_SINGULARS: dict[str, str] = {shape: shape for shape in SHAPES} | {"moon": "crescent"}
_PLURALS = {plural(word): shape for word, shape in _SINGULARS.items()}
_WORDS = {"under": "below", "beneath": "below", "over": "above", "within": "inside", "in": "inside"}
_WORDS |= {"top": "above", "bottom": "below", "contains": "around", "containing": "around", "contain": "around"}
_PLACE = r"above|below|under|beneath|over|inside|within|around"
_TOKEN = re.compile(
    rf"(?P<row>from left to right|from right to left|from top to bottom|from bottom to top)\b"
    rf"|\b(?:on|at) the (?P<side>left|right|top|bottom)\b(?! of)"
    rf"|\bto (?:its|their|the) (?P<back>left|right)\b(?! of)"
    rf"|\b(?P<back2>{_PLACE}) (?:it|them|that|those)\b"
    rf"|\b(?:(?:to|on) the )?(?P<of>left|right) of\b"
    rf"|\b(?P<word>{_PLACE}|contains|containing|contain)\b"
    rf"|(?P<end>[;.!?])|(?P<other>[^\W_]+|[,:])"
)
_ROW_WORDS = {text: word for word, text in _ROWS.items()}


def parse(caption: str) -> Facts:
    """What an English caption says; groups are the noun phrases that end in a known shape."""
    groups: list[GroupFacts] = []
    relations: set[Relation] = set()
    sides: dict[int, str] = {}
    adjectives: dict[str, Any] = {}
    clause: list[int] = []  # groups named since the last full stop or semicolon
    waiting_object: tuple[int | None, str] | None = None  # (subject, word): the next group is the object
    waiting_subject: tuple[str, int] | None = None  # (word, object): the next group is the subject
    waiting_side: str | None = None
    row: str | None = None

    for match in _TOKEN.finditer(" ".join(caption.lower().split())):
        kind, text = match.lastgroup, match.group(match.lastgroup or 0)
        word = _WORDS.get(text, text)
        if kind == "other" and (shape := _SINGULARS.get(text) or _PLURALS.get(text)):
            count = adjectives.get("count", 1 if text in _SINGULARS else None)
            groups.append(said_group(shape, adjectives, count))
            adjectives = {}
            new = len(groups) - 1
            if row is not None and clause:
                relations.add(canonical(clause[-1], row, new))
            clause.append(new)
            if waiting_subject is not None:
                relations.add(canonical(new, *waiting_subject))
                waiting_subject = None
            if waiting_object is not None:
                subject, relation = waiting_object
                waiting_object = None
                if subject is None:
                    waiting_subject = (relation, new)
                else:
                    relations.add(canonical(subject, relation, new))
            if waiting_side is not None:
                sides[new], waiting_side = waiting_side, None
        elif kind == "other" and text in _ATTRIBUTES:
            name, value = _ATTRIBUTES[text]
            if name == "count":
                adjectives = {}
            adjectives[name] = value
        elif kind == "other":
            if text not in (",", "and"):
                adjectives = {}
        else:
            adjectives = {}
            if kind == "end":
                clause, row = [], None
            elif kind == "row":
                row, clause = _ROW_WORDS[text], []
            elif kind == "side":
                if clause and clause[-1] not in sides:
                    sides[clause[-1]] = word
                else:
                    waiting_side = word
            elif kind in ("back", "back2"):
                if len(clause) > 1:
                    relations.add(canonical(clause[-1], word, clause[-2]))
                elif groups:
                    waiting_subject = (word, len(groups) - 1)
            else:
                waiting_object = (clause[-1] if clause else None, word)
    return Facts(tuple(groups), frozenset(relations | between_sides(sides)))
