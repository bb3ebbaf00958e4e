"""How true a caption of a scene is, exactly: which facts it gets right, and what it makes up.

The facts of a scene are, for each group, its object (shape and colour together), its count, its size and its fill,
and each relation of the scene. A group that a caption names is compared with one true group, the one that makes the
most facts right over all groups; only a group of the same shape or of the same colour comes into question, so a
"large striped blue circle" earns nothing in a picture of a large striped red star.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product

from mmtransformer.data.scenes.grammar import parse
from mmtransformer.data.scenes.meaning import Facts, GroupFacts
from mmtransformer.data.scenes.world import Group, Relation, Scene

__all__ = ["FactScores", "Judgement", "Rates", "judge", "parse", "score"]

_ATTRIBUTES = ("count", "size", "fill")
_MOST = 6  # said groups that are tried for each true one, the likeliest first


@dataclass(frozen=True)
class Rates:
    """How many were right of those said and of those there are.

    Attributes:
        right: said and true.
        said: said by the captions.
        true: in the scenes.
    """

    right: int = 0
    said: int = 0
    true: int = 0

    def __add__(self, other: "Rates") -> "Rates":
        return Rates(self.right + other.right, self.said + other.said, self.true + other.true)

    @property
    def precision(self) -> float:
        """Right of those said; 1 where nothing was to be said and nothing was, 0 where nothing was but should."""
        return self.right / self.said if self.said else float(self.true == 0)

    @property
    def recall(self) -> float:
        """Right of those there are; 1 where there are none."""
        return self.right / self.true if self.true else 1.0

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


@dataclass(frozen=True)
class Judgement:
    """One caption against its scene.

    Attributes:
        objects: shape-colour pairs, one a group; those said but not right are hallucinated.
        attributes: counts, sizes and fills, also those said of a group that is not there.
        relations: relations by the groups they join. One that is true but that the scene's captions leave out
            (C left of A where A is left of B and B left of C) is counted neither for nor against the caption.
        parts: for each kind of fact (shape, color, count, size, fill, left, above, inside) right and true ones.
        claims: what the caption states, in English words, each with whether it is true; then what it left out.
    """

    objects: Rates
    attributes: Rates
    relations: Rates
    parts: dict[str, Rates]
    claims: tuple[tuple[str, bool], ...]

    @property
    def facts(self) -> float:
        """The fraction of the scene's facts that the caption gets right."""
        rates = (self.objects, self.attributes, self.relations)
        return sum(r.right for r in rates) / sum(r.true for r in rates)

    @property
    def exact(self) -> bool:
        """Whether the caption says all facts of the scene, and nothing that is false."""
        return all(r.right == r.said == r.true for r in (self.objects, self.attributes, self.relations))


@dataclass(frozen=True)
class FactScores:
    """Captions against their scenes.

    Attributes:
        facts: fraction of all facts of all scenes that are right.
        exact: fraction of captions that say all facts of their scene, and nothing that is false.
        captions: how many captions there were.
        objects: shape-colour pairs, one a group.
        attributes: counts, sizes and fills.
        relations: relations.
        parts: for each kind of fact the fraction of the true ones that is right.
    """

    facts: float
    exact: float
    captions: int
    objects: Rates
    attributes: Rates
    relations: Rates
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def hallucinated(self) -> int:
        """How many objects the captions name that are not in their pictures."""
        return self.objects.said - self.objects.right

    def to_dict(self) -> dict:
        """Plain numbers, for a JSON file."""
        plain: dict = {"facts": self.facts, "exact": self.exact, "captions": self.captions}
        for name in ("objects", "attributes", "relations"):
            rates: Rates = getattr(self, name)
            plain[name] = {"precision": rates.precision, "recall": rates.recall, "f1": rates.f1} | asdict(rates)
        return plain | {"hallucinated": self.hallucinated, "parts": dict(self.parts)}


def score(captions: Sequence[str], scenes: Sequence[Scene], language: str) -> FactScores:
    """The scores of captions, one a scene.

    Args:
        captions: what was said, any texts.
        scenes: what is true, in the same order.
        language: the language of the captions, "en" or "ko".

    Raises:
        ValueError: no captions, not as many captions as scenes, or an unknown language.
    """
    if len(captions) != len(scenes) or not captions:
        raise ValueError(f"{len(captions)} captions for {len(scenes)} scenes; there must be one for each, and any")
    judgements = [judge(caption, scene, language) for caption, scene in zip(captions, scenes, strict=True)]
    sums = {
        name: sum((getattr(judgement, name) for judgement in judgements), Rates())
        for name in ("objects", "attributes", "relations")
    }
    parts: dict[str, Rates] = {}
    for judgement in judgements:
        for name, rates in judgement.parts.items():
            parts[name] = parts.get(name, Rates()) + rates
    return FactScores(
        facts=sum(r.right for r in sums.values()) / sum(r.true for r in sums.values()),
        exact=sum(judgement.exact for judgement in judgements) / len(judgements),
        captions=len(judgements),
        **sums,
        parts={name: rates.recall for name, rates in parts.items()},
    )


def judge(caption: str, scene: Scene, language: str) -> Judgement:
    """One caption against its scene.

    Raises:
        ValueError: an unknown language.
    """
    return judge_facts(parse(caption, language), scene)


def judge_facts(said: Facts, scene: Scene) -> Judgement:
    """What was said, or read off a picture, against a scene."""
    match = _match(said, scene)
    true_of = {s: t for t, s in enumerate(match) if s is not None}
    relations, false_relations = _relations(said, true_of, scene)
    objects = attributes = Rates()
    parts: dict[str, Rates] = {}
    claims: list[tuple[str, bool]] = []
    for s, group in enumerate(said.groups):
        true = scene.groups[true_of[s]] if s in true_of else None
        right = true is not None and (group.shape, group.color) == (true.shape, true.color)
        objects += Rates(right, 1, 0)
        claims.append((_name(group), right))
        for name in _ATTRIBUTES:
            value = getattr(group, name)
            if value is not None:
                right = true is not None and value == getattr(true, name)
                attributes += Rates(right, 1, 0)
                claims.append((f"{_name(group)}: {value}", right))
    for t, s in enumerate(match):
        true, group = scene.groups[t], None if s is None else said.groups[s]
        objects += Rates(0, 0, 1)
        attributes += Rates(0, 0, len(_ATTRIBUTES))
        for name in ("shape", "color", *_ATTRIBUTES):
            right = group is not None and getattr(group, name) == getattr(true, name)
            parts[name] = parts.get(name, Rates()) + Rates(right, 0, 1)
        if group is None:
            claims.append((f"{_name(true)} is missing", False))
    for relation in sorted(said.relations):
        known = relation.subject in true_of and relation.object in true_of
        ok = known and Relation(true_of[relation.subject], relation.kind, true_of[relation.object]) in scene.truths
        claims.append((_relation_text(relation, said.groups), ok))
    for relation in scene.relations:
        parts[relation.kind] = parts.get(relation.kind, Rates()) + Rates(relation in relations, 0, 1)
        if relation not in relations:
            claims.append((f"{_relation_text(relation, scene.groups)} is missing", False))
    found = Rates(len(relations), len(relations) + false_relations, len(scene.relations))
    return Judgement(objects, attributes, found, parts, tuple(claims))


def _match(said: Facts, scene: Scene) -> tuple[int | None, ...]:
    """For each true group the said one that it is compared with, or None; the choice with the most facts right."""
    options: list[list[int | None]] = []
    for true in scene.groups:
        likely = [s for s, g in enumerate(said.groups) if g.shape == true.shape or g.color == true.color]
        likely.sort(key=lambda s: (-_agreement(said.groups[s], true), s))
        options.append([*likely[:_MOST], None])
    best, best_score = (None,) * len(scene.groups), (-1, -1)
    for choice in product(*options):
        chosen = [s for s in choice if s is not None]
        if len(set(chosen)) < len(chosen):
            continue
        pairs = [(said.groups[s], scene.groups[t]) for t, s in enumerate(choice) if s is not None]
        right = sum(_agreement(group, true) for group, true in pairs)
        right += len(_relations(said, {s: t for t, s in enumerate(choice) if s is not None}, scene)[0])
        same = sum((g.shape == t.shape) + (g.color == t.color) for g, t in pairs)
        if (right, same) > best_score:
            best, best_score = choice, (right, same)
    return best


def _agreement(group: GroupFacts, true: Group) -> int:
    """How many of a group's four facts are right."""
    same_object = (group.shape, group.color) == (true.shape, true.color)
    return same_object + sum(getattr(group, name) == getattr(true, name) for name in _ATTRIBUTES)


def _relations(said: Facts, true_of: dict[int, int], scene: Scene) -> tuple[set[Relation], int]:
    """The scene's relations that were said, and how many false ones were."""
    right: set[Relation] = set()
    false = 0
    for subject, kind, object in said.relations:
        if subject in true_of and object in true_of:
            relation = Relation(true_of[subject], kind, true_of[object])
            if relation in scene.relations:
                right.add(relation)
            elif relation not in scene.truths:
                false += 1
        else:
            false += 1
    return right, false


def _name(group: Group | GroupFacts) -> str:
    return f"{group.color} {group.shape}" if group.color else group.shape


def _relation_text(relation: Relation, groups: Sequence[Group] | Sequence[GroupFacts]) -> str:
    kind = "left of" if relation.kind == "left" else relation.kind
    return f"{_name(groups[relation.subject])} {kind} {_name(groups[relation.object])}"
