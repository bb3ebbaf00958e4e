"""The world of the embedded data: which scenes there are, and how one is drawn by lot.

A scene holds one to three groups of equal objects ("three small red striped stars") and the relations between
neighbours among them ("left of", "above", "inside"). Everything a caption may say about a scene is in its groups
and relations; where exactly the objects lie is in its spots, in fractions of the picture's side, so that one scene
can be drawn at any size (`rendering.render`).

Groups stand in a chain. In a row the chain runs from left to right, in a column from top to bottom; where objects
lie inside another, the chain is inner group, container, and then what stands beside the container. The relations
of a scene are those of the chain's neighbours.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from mmtransformer.data.scenes.palette import COLORS, contrast

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "crescent", "pentagon", "arrow")
SIZES = ("small", "large")
FILLS = ("solid", "striped", "dotted", "outlined")
KINDS = ("left", "above", "inside")  # the canonical relations; right, below and around are the same facts turned

_ROOMY = {"circle": 2, "square": 2, "heart": 1, "diamond": 1, "pentagon": 1}  # container -> objects it has room for
_DIAMETERS = {"small": (0.22, 0.25), "large": (0.36, 0.41), "container": (0.60, 0.66)}
_ANGLE = 8  # degrees, the largest tilt: a square must not become a diamond
_INSIDE = 1.1  # least contrast between a solid container and what lies inside


@dataclass(frozen=True)
class Group:
    """Equal objects, the thing a noun phrase names: "three small red striped stars"."""

    shape: str
    color: str
    size: str
    fill: str
    count: int


class Relation(NamedTuple):
    """A relation between two groups, by their indices; `kind` is one of `KINDS`."""

    subject: int
    kind: str
    object: int


class Spot(NamedTuple):
    """Where one object lies: centre and diameter in fractions of the picture's side, tilt in degrees."""

    x: float
    y: float
    diameter: float
    angle: int


@dataclass(frozen=True)
class Scene:
    """All there is to know about one picture.

    Attributes:
        groups: the groups, in the order of the chain.
        relations: one relation for each two neighbours in the chain.
        spots: for each group, one spot for each object.
        look: seed of what no caption speaks of: background, noise, occluding bars.
    """

    groups: tuple[Group, ...]
    relations: tuple[Relation, ...]
    spots: tuple[tuple[Spot, ...], ...]
    look: int

    def boxes(self, image_size: int) -> list[list[tuple[float, float, float, float]]]:
        """For each group the pixel boxes (left, top, right, bottom) of its objects, cut at the picture's edge."""

        def clip(value: float) -> float:
            return min(max(value, 0.0), 1.0) * image_size

        return [
            [
                (
                    clip(s.x - s.diameter / 2),
                    clip(s.y - s.diameter / 2),
                    clip(s.x + s.diameter / 2),
                    clip(s.y + s.diameter / 2),
                )
                for s in spots
            ]
            for spots in self.spots
        ]

    @cached_property
    def truths(self) -> frozenset[Relation]:
        """Every relation that holds, also those that follow: what is left of a container is left of its content."""
        truths = set(self.relations)
        while True:
            more = set()
            for a, kind, b in truths:
                for c, other, d in truths:
                    if b == c and a != d and (kind == other or kind == "inside"):  # a in b, b left of d
                        more.add(Relation(a, other, d))
                    if b == d and c != a and other == "inside" and kind != "inside":  # a left of b, c in b
                        more.add(Relation(a, kind, c))
            if more <= truths:
                return frozenset(truths)
            truths |= more


@dataclass(frozen=True)
class SceneWorld:
    """How rich the scenes are. Fewer words and groups and less clutter make a world that is learnt sooner.

    Args:
        shapes: names out of `SHAPES`.
        colors: names out of `palette.COLORS`.
        fills: names out of `FILLS`.
        relations: names out of `KINDS`; "right", "below" and "around" come with them.
        group_shares: how often a scene has one, two and three groups; (1, 1) has never more than two.
        max_count: the largest number of equal objects, 1 to 4.
        clutter: strength of noise, number of bars and specks; 0 draws clean pictures, 1 is the default task.

    Raises:
        ValueError: a name that is not in its table, or a number out of range.
    """

    shapes: Sequence[str] = SHAPES[:8]
    colors: Sequence[str] = tuple(COLORS)[:8]
    fills: Sequence[str] = FILLS
    relations: Sequence[str] = KINDS
    group_shares: Sequence[float] = (0.35, 0.45, 0.2)
    max_count: int = 4
    clutter: float = 1.0

    def __post_init__(self):
        tables = {"shapes": SHAPES, "colors": tuple(COLORS), "fills": FILLS, "relations": KINDS}
        for field, table in tables.items():
            names = tuple(getattr(self, field))
            object.__setattr__(self, field, names)
            unknown = [name for name in names if name not in table]
            if unknown:
                raise ValueError(f"{field}: unknown {unknown}; known are {', '.join(table)}")
            least = 2 if field in ("shapes", "colors") else 1
            if len(set(names)) != len(names) or len(names) < least:
                raise ValueError(f"{field} must be at least {least} different names, got {list(names)}")
        object.__setattr__(self, "group_shares", tuple(self.group_shares))
        if not 1 <= len(self.group_shares) <= 3 or min(self.group_shares) < 0 or sum(self.group_shares) <= 0:
            raise ValueError(f"group_shares must be one to three shares >= 0, not all 0, got {self.group_shares}")
        if not 1 <= self.max_count <= 4:
            raise ValueError(f"max_count must be 1 to 4, got {self.max_count}")
        if not 0 <= self.clutter <= 3:
            raise ValueError(f"clutter must be 0 to 3, got {self.clutter}")

    @cached_property
    def held_out(self) -> frozenset[tuple[str, str]]:
        """The (color, shape) pairs that training never shows: color i with shape j where 8 divides i + 3 j.

        That is one pair in eight, spread so that no color and no shape loses more than two of its pairs.
        """
        return frozenset(
            (color, shape)
            for i, color in enumerate(self.colors)
            for j, shape in enumerate(self.shapes)
            if (i + 3 * j) % 8 == 0
        )

    @cached_property
    def _pairs(self) -> tuple[tuple[str, str], ...]:
        return tuple((c, s) for c in self.colors for s in self.shapes if (c, s) not in self.held_out)

    def sample(self, rng: random.Random, held_out: bool = False) -> Scene:
        """One scene, drawn by lot.

        Args:
            rng: the source of all chance; the same state gives the same scene.
            held_out: True puts a held-out colour-shape pair in one group at least; False in none.
        """
        num_groups = rng.choices(range(1, len(self.group_shares) + 1), self.group_shares)[0]
        axes = [kind for kind in self.relations if kind != "inside"]
        inside = num_groups > 1 and "inside" in self.relations and (not axes or rng.random() < 0.3)
        inside = inside and any(shape in _ROOMY for shape in self.shapes)
        if not axes:
            num_groups = min(num_groups, 2 if inside else 1)
        axis = rng.choice(axes) if axes else "left"
        pairs = self._choose_pairs(rng, num_groups, held_out, inside)
        if pairs is None:  # no legal container beside the rest: a row needs none
            return self.sample(rng, held_out)
        room = _ROOMY[pairs[1][1]] if inside else 4
        spare_large = {1: 1, 2: 2, 3: 1}[num_groups]  # how many groups of large objects fit side by side
        groups = []
        for i, (color, shape) in enumerate(pairs):
            fills, most = self.fills, self.max_count
            if inside:
                size = "large" if i == 1 else "small"
                most = min(most, (room, 1, 4)[i])
                fills = tuple(f for f in fills if f in ("solid", "outlined")) or fills if i == 1 else fills
            else:
                size = "large" if spare_large and rng.random() < 0.5 else "small"
                if size == "large":
                    spare_large -= 1
                    most = min(most, 2) if num_groups > 1 else most
            count = rng.choices(range(1, most + 1), (2, 1, 1, 1)[:most])[0]
            groups.append(Group(shape, color, size, rng.choice(fills), count))
        if not inside:
            rng.shuffle(groups)  # the large ones anywhere in the row
        relations, spots = _place(rng, groups, axis, inside)
        return Scene(tuple(groups), relations, spots, rng.getrandbits(63))

    def hard_negatives(self, scene: Scene, rng: random.Random, most: int) -> list[Scene]:
        """Some of the scenes that differ in one word: a group has another shape, colour or fill, all else stays.

        Args:
            scene: The scene; of none of its groups is the colour-shape pair held out.
            rng: All chance comes from it.
            most: How many, if there are as many.
        """
        nested = {group for relation in scene.relations if relation.kind == "inside" for group in relation[::2]}
        taken = {(group.color, group.shape) for group in scene.groups}
        changes: list[tuple[int, dict[str, str]]] = []
        for i, group in enumerate(scene.groups):
            if i in nested:  # what fits into what, and is seen on it, stays
                continue
            pairs = [pair for pair in self._pairs if pair not in taken]
            changes += [(i, {"color": c, "shape": s}) for c, s in pairs if c == group.color or s == group.shape]
            changes += [(i, {"fill": fill}) for fill in self.fills if fill != group.fill]
        rng.shuffle(changes)
        groups = scene.groups
        return [
            replace(scene, groups=(*groups[:i], replace(groups[i], **change), *groups[i + 1 :]))
            for i, change in changes[:most]
        ]

    def _choose_pairs(
        self, rng: random.Random, num_groups: int, held_out: bool, inside: bool
    ) -> list[tuple[str, str]] | None:
        """Different colour-shape pairs, the one at index 1 fit to be a container if `inside`."""
        special = rng.randrange(num_groups) if held_out else -1
        rare = sorted(self.held_out)
        for _ in range(100):
            pairs = [rng.choice(rare if i == special else self._pairs) for i in range(num_groups)]
            if len(set(pairs)) < num_groups:
                continue
            if inside and (pairs[1][1] not in _ROOMY or contrast(COLORS[pairs[0][0]], COLORS[pairs[1][0]]) < _INSIDE):
                continue
            return pairs
        return None


def _place(
    rng: random.Random, groups: list[Group], axis: str, inside: bool
) -> tuple[tuple[Relation, ...], tuple[tuple[Spot, ...], ...]]:
    """Spots for all groups, and the relations that they make true."""
    if len(groups) == 1:
        return (), (_scatter(rng, groups[0]),)
    units = [groups[1:2], *([g] for g in groups[2:])] if inside else [[g] for g in groups]
    owners = [1, 2][: len(units)] if inside else list(range(len(groups)))
    if inside and len(units) == 2 and rng.random() < 0.5:
        units.reverse()
        owners.reverse()
    diameters = [
        rng.uniform(*_DIAMETERS["container" if inside and o == 1 else u[0].size])
        for o, u in zip(owners, units, strict=True)
    ]
    diameters = [min(d, 0.94 / u[0].count) for d, u in zip(diameters, units, strict=True)]  # four in a lane
    cells = [d * (1.02 if inside and o == 1 else 1.1) for o, d in zip(owners, diameters, strict=True)]
    slack = 1.0 - sum(cells)
    lanes = [1] * len(units)
    for k in rng.sample(range(len(units)), len(units)):  # a second lane where there is room for one
        if units[k][0].count > 1 and slack > cells[k] and rng.random() < 0.5:
            lanes[k], slack = 2, slack - cells[k]
    cuts = sorted(rng.random() for _ in units)
    spots: dict[int, tuple[Spot, ...]] = {}
    start = 0.0
    for k, unit in enumerate(units):
        start += slack * (cuts[k] - (cuts[k - 1] if k else 0.0))
        spots[owners[k]] = _block(rng, unit[0].count, diameters[k], cells[k], lanes[k], start, axis)
        start += cells[k] * lanes[k]
    relations = [Relation(a, axis, b) for a, b in pairwise(owners)]
    if inside:
        relations.insert(0, Relation(0, "inside", 1))
        spots[0] = _content(rng, groups[0].count, spots[1][0])
    return tuple(relations), tuple(spots[i] for i in range(len(groups)))


def _spot(rng: random.Random, x: float, y: float, diameter: float, play: float) -> Spot:
    angle = rng.choice((-_ANGLE, 0, _ANGLE))
    return Spot(x + rng.uniform(-play, play), y + rng.uniform(-play, play), diameter, angle)


def _scatter(rng: random.Random, group: Group) -> tuple[Spot, ...]:
    """One group alone: anywhere in the picture."""
    diameter = rng.uniform(*_DIAMETERS[group.size])
    cells = 2 if group.size == "large" else 3
    chosen = rng.sample(range(cells * cells), group.count)
    play = 0.45 * (1 / cells - diameter)
    return tuple(_spot(rng, (c % cells + 0.5) / cells, (c // cells + 0.5) / cells, diameter, play) for c in chosen)


def _block(
    rng: random.Random, count: int, diameter: float, cell: float, lanes: int, start: float, axis: str
) -> tuple[Spot, ...]:
    """A group in a row or column: `lanes` along the axis from `start`, centred across it, so that nobody who reads
    "left of" can as well read "above".
    """
    rows = -(-count // lanes)
    pitch = min(cell * rng.uniform(1.0, 1.25), 1.0 / rows)
    free = (1.0 - rows * pitch) / 2
    top = free + rng.uniform(-1, 1) * min(free, 0.1)
    spots = []
    for k in range(count):
        along = start + (k % lanes + 0.5) * cell
        across = top + (k // lanes + 0.5) * pitch
        x, y = (along, across) if axis == "left" else (across, along)
        spots.append(_spot(rng, x, y, diameter, (cell - diameter) / 2))
    return tuple(spots)


def _content(rng: random.Random, count: int, container: Spot) -> tuple[Spot, ...]:
    """One or two small objects around the middle of a container."""
    diameter = _DIAMETERS["small"][0] if count > 1 else rng.uniform(*_DIAMETERS["small"])
    if count == 1:
        return (_spot(rng, container.x, container.y, diameter, 0.02),)
    shift = diameter * 0.56
    dx, dy = (shift, 0.0) if rng.random() < 0.5 else (0.0, shift)
    return tuple(_spot(rng, container.x + s * dx, container.y + s * dy, diameter, 0.005) for s in (-1, 1))
