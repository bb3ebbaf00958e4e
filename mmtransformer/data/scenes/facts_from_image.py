"""Reading a picture of a scene back: which groups it shows, and how they lie. Classical image processing, no network.

It knows the world's own drawing rules: the palette, the outlines, three ranges of diameters and three tilts. Each
colour's silhouettes are explained one object at a time by the outline that fits best, then each object's fill by the
rendering that leaves the least error. So what a model draws can be judged by facts (`facts.judge_facts`).

Shapes: h side of the square picture, px; t templates.
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmtransformer.data.scenes.meaning import Facts, GroupFacts
from mmtransformer.data.scenes.palette import COLORS
from mmtransformer.data.scenes.rendering import sprite
from mmtransformer.data.scenes.world import FILLS, Relation, SceneWorld

Mask = NDArray[np.bool_]
Pixels = NDArray[np.floating]

_FOREGROUND = 0.5  # least contrast to the background of what is no background
_OWN = 0.5  # most contrast of an object's pixel to its colour in the palette
_ANGLES = (-8, 0, 8)
_DIAMETERS = (0.22, 0.235, 0.25, 0.36, 0.375, 0.39, 0.41, 0.60, 0.62, 0.64, 0.66)
_LARGE = 0.305  # diameters above are those of large objects
_FITS = 0.62  # least fit of an outline that explains something; 1 = exactly
_TRIED = 8  # outlines whose renderings are compared
_MOST = 12  # objects of a colour


class Found(NamedTuple):
    """One object: what it is, and where its middle lies (px) with which diameter (px)."""

    shape: str
    color: str
    fill: str
    x: float
    y: float
    diameter: int


def read(image: Image.Image, world: SceneWorld = SceneWorld()) -> Facts:  # noqa: B008 (frozen)
    """What a picture shows, in the form in which captions are judged.

    Every relation of two groups that can be seen is said, also those that follow from others.

    Args:
        image: square, in the style of `rendering.render`; 64 px or so.
        world: the words that are to be expected.
    """
    groups: dict[tuple[str, str, bool, str], list[Found]] = {}
    for found in find_objects(image, world):
        large = found.diameter > _LARGE * image.width
        groups.setdefault((found.shape, found.color, large, found.fill), []).append(found)
    members = _merge(groups)
    facts = tuple(
        GroupFacts(m[0].shape, m[0].color, _size_of(m, image.width), _most([f.fill for f in m]), len(m))
        for m in members
    )
    pairs = product(range(len(members)), repeat=2)
    relations = (_relation(i, members[i], j, members[j]) for i, j in pairs if i != j)
    return Facts(facts, frozenset(relation for relation in relations if relation is not None))


def find_objects(image: Image.Image, world: SceneWorld = SceneWorld()) -> list[Found]:  # noqa: B008 (frozen)
    """The objects of a picture, whatever groups they form; see `read`."""
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    ground = _background(pixels)
    foreground = _contrast(pixels, ground) > _FOREGROUND
    names = list(world.colors)
    distances = np.stack([_contrast(pixels, np.array(COLORS[name], np.float32)) for name in names])
    nearest = distances.argmin(0)
    found = []
    for k, name in enumerate(names):
        own = foreground & (nearest == k) & (distances[k] < _OWN)
        if own.sum() >= 12:
            found += _explain(pixels, ground, _filled(own), own, name, world)
    return found


def _contrast(a: Pixels, b: Pixels) -> Pixels:
    """`palette.contrast` of many pixels."""
    red = (a[..., 0] + b[..., 0]) / 2
    d = (a - b) ** 2
    return np.sqrt((2 + red) * d[..., 0] + 4 * d[..., 1] + (3 - red) * d[..., 2])


def _background(pixels: Pixels) -> Pixels:
    """The background under the objects: a quadratic through the pixels that can be background, fitted four times."""
    side = pixels.shape[0]
    line = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    x, y = np.broadcast_to(line[None], (side, side)), np.broadcast_to(line[:, None], (side, side))
    terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], -1).reshape(-1, 6)
    rim = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3),
                          pixels[:, -2:].reshape(-1, 3)])  # fmt: skip
    ground = np.broadcast_to(np.median(rim, 0), pixels.shape).astype(np.float32)
    for limit in (0.6, 0.5, 0.4, 0.4):
        likely = (_contrast(pixels, ground) < limit).reshape(-1)
        if likely.sum() < 60:
            break
        weights, *_ = np.linalg.lstsq(terms[likely], pixels.reshape(-1, 3)[likely], rcond=None)
        ground = (terms @ weights).reshape(pixels.shape).astype(np.float32)
    return ground


def _filled(mask: Mask) -> Mask:
    """The mask with its holes: what cannot be reached from the edge without crossing it (bars bridged by one px)."""
    padded = np.pad(_grown(mask), 2)
    outside = np.zeros_like(padded)
    outside[0] = outside[-1] = outside[:, 0] = outside[:, -1] = True
    while True:
        more = outside.copy()
        more[1:] |= outside[:-1]
        more[:-1] |= outside[1:]
        more[:, 1:] |= outside[:, :-1]
        more[:, :-1] |= outside[:, 1:]
        more &= ~padded
        if (more == outside).all():
            break
        outside = more
    inside = ~outside[2:-2, 2:-2]
    return mask | (_shrunk(inside) & ~_grown(~inside))


def _grown(mask: Mask) -> Mask:
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _shrunk(mask: Mask) -> Mask:
    return ~_grown(~mask)


class _Templates(NamedTuple):
    """Outlines, each with the Fourier transform of what it rewards inside and punishes around."""

    kinds: list[tuple[str, int, int]]  # shape, side in px, angle
    transforms: NDArray[np.complex64]


@lru_cache(maxsize=8)
def _templates(shapes: tuple[str, ...], side: int) -> _Templates:
    kinds, kernels = [], []
    for shape, diameter, angle in product(shapes, _DIAMETERS, _ANGLES):
        small = max(round(diameter * side), 3)
        body = sprite(shape, "solid", small, angle)[0][..., 0] > 0.5
        canvas = np.zeros((2 * side, 2 * side), np.float32)
        pad = np.pad(body, 3)
        ring = _grown(_grown(pad)) & ~_grown(pad)
        kernel = pad / pad.sum() - 0.9 * ring / ring.sum() * min(1.0, 14 / small)
        canvas[: pad.shape[0], : pad.shape[1]] = kernel
        kinds.append((shape, small, angle))
        kernels.append(np.fft.rfft2(canvas))
    return _Templates(kinds, np.stack(kernels).astype(np.complex64))


def _explain(pixels: Pixels, ground: Pixels, silhouette: Mask, own: Mask, color: str, world: SceneWorld) -> list[Found]:
    """The objects of one colour, the clearest first, until what is left is no object."""
    side = pixels.shape[0]
    templates = _templates(tuple(world.shapes), side)
    left, found = silhouette.astype(np.float32), []
    while left.sum() > 30 and len(found) < _MOST:
        canvas = np.zeros((2 * side, 2 * side), np.float32)
        canvas[3 : side + 3, 3 : side + 3] = left
        fits = np.fft.irfft2(np.fft.rfft2(canvas) * templates.transforms.conj(), s=canvas.shape)[:, :side, :side]
        best = fits.reshape(len(fits), -1).max(1)
        order = np.argsort(-best)[:_TRIED]
        if best[order[0]] < _FITS:
            break
        tried = []
        for t in order:
            shape, small, angle = templates.kinds[t]
            top, start = np.unravel_index(int(fits[t].argmax()), (side, side))
            if best[t] < best[order[0]] - 0.12:
                continue
            for fill in world.fills:
                error = _error(pixels, ground, left > 0, own, color, (shape, fill, small, angle), int(top), int(start))
                tried.append((error, shape, fill, small, angle, int(top), int(start)))
        _, shape, fill, small, angle, top, start = min(tried)
        body = sprite(shape, "solid", small, angle)[0][..., 0] > 0.3
        cover = np.zeros_like(left, bool)
        part = body[: side - top, : side - start]
        cover[top : top + part.shape[0], start : start + part.shape[1]] = part
        left[_grown(cover)] = 0
        found.append(Found(shape, color, fill, start + small / 2, top + small / 2, small))
    return found


def _error(
    pixels: Pixels,
    ground: Pixels,
    left: Mask,
    own: Mask,
    color: str,
    kind: tuple[str, str, int, int],
    top: int,
    start: int,
) -> float:
    """How far a rendering is from the picture, a pixel, around one object; other objects' pixels do not count."""
    side = pixels.shape[0]
    body, pattern = sprite(*kind)
    rows, columns = slice(top, min(top + kind[2], side)), slice(start, min(start + kind[2], side))
    cut = (slice(0, rows.stop - top), slice(0, columns.stop - start))
    mine = own[rows, columns] & (body[cut][..., 0] > 0.9)
    region, below = pixels[rows, columns], ground[rows, columns]
    seen = region[mine]
    paint: Pixels = (np.median(seen, 0) if len(seen) > 5 else np.array(COLORS[color])).astype(np.float32)
    solid = sprite(kind[0], "solid", kind[2], kind[3])[0][cut][..., 0] > 0.5
    counts = solid | left[rows, columns] | (_contrast(region, below) < _FOREGROUND)
    if not counts.any():
        return 9.0
    paints = [np.broadcast_to(paint, region.shape)]
    if pattern is not None:  # A colour near the middle may be drawn with a darker or a lighter one.
        shade = [paint + 0.72 * (end - paint) for end in (0.0, 1.0)]
        paints = [paint + pattern[cut] * (other.astype(np.float32) - paint) for other in shade]
    drawn = (below + body[cut] * (picture - below) for picture in paints)
    return min(float(np.minimum(_contrast(region, each), 0.8)[counts].mean()) for each in drawn)


def _merge(groups: dict[tuple[str, str, bool, str], list[Found]]) -> list[list[Found]]:
    """One group a shape and colour: a scene has no two of these; odd sizes and fills among them are reading errors."""
    merged: dict[tuple[str, str], list[Found]] = {}
    for (shape, color, _, _), found in groups.items():
        merged.setdefault((shape, color), []).extend(found)
    return list(merged.values())


def _size_of(members: list[Found], side: int) -> str:
    return "large" if np.median([f.diameter for f in members]) > _LARGE * side else "small"


def _most(words: list[str]) -> str:
    return max(FILLS, key=words.count)


def _relation(i: int, a: list[Found], j: int, b: list[Found]) -> Relation | None:
    """How group a lies to group b: inside, left of or above, if any of these can be seen."""
    if len(b) == 1 and all(np.hypot(f.x - b[0].x, f.y - b[0].y) < 0.3 * b[0].diameter for f in a):
        return Relation(i, "inside", j) if a[0].diameter < b[0].diameter else None
    if len(a) == 1 and all(np.hypot(f.x - a[0].x, f.y - a[0].y) < 0.3 * a[0].diameter for f in b):
        return None

    def gap(of: str) -> float:
        right = max(getattr(f, of) + f.diameter / 2 for f in a)
        return min(getattr(f, of) - f.diameter / 2 for f in b) - right

    across, down = gap("x"), gap("y")
    if max(across, down) < -4:  # they overlap both ways, more than the drawing lets neighbours
        return None
    return Relation(i, "left" if across >= down else "above", j)
