"""A scene as a picture: masks drawn once with Pillow, laid on the background with numpy.

Shapes: d side of a sprite, h height, w width.
"""

import math
import random
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mmtransformer.data.scenes.palette import COLORS, RGB, blend, contrast, luma
from mmtransformer.data.scenes.world import Scene

_SUPER = 4  # supersampling of the masks, in each direction
_APART = 0.95  # least contrast of the background against every object


def render(scene: Scene, image_size: int, clutter: float = 1.0) -> Image.Image:
    """The picture of a scene, the same for the same arguments.

    Args:
        scene: what to draw.
        image_size: side of the square picture, px.
        clutter: strength of the noise and number of bars and specks, as in `SceneWorld`.
    """
    rng = random.Random(scene.look)
    colors = [_jitter(rng, COLORS[group.color]) for group in scene.groups]
    base = _background_color(rng, colors)
    canvas = _background(rng, base, image_size)
    for _ in range(round(rng.random() * 5 * clutter)):
        _speck(rng, canvas, base)
    order = sorted(range(len(scene.groups)), key=lambda i: -scene.spots[i][0].diameter)  # containers first
    for i in order:
        group, color = scene.groups[i], colors[i]
        other = blend(color, (0.0, 0.0, 0.0) if luma(color) > 0.62 else (1.0, 1.0, 1.0), 0.72)
        for spot in scene.spots[i]:
            side = max(round(spot.diameter * image_size), 3)
            body, pattern = sprite(group.shape, group.fill, side, spot.angle)
            _lay(canvas, body, pattern, spot.x * image_size, spot.y * image_size, color, other)
    for _ in range(round(rng.random() * 2 * clutter)):
        _bar(rng, canvas, base)
    if clutter:
        strength = clutter * rng.uniform(3, 15)  # uniform noise, +- this many of 255 steps
        noise = np.frombuffer(rng.randbytes(canvas.size), np.uint8).reshape(canvas.shape)
        canvas += noise * np.float32(2 * strength / 255)
        canvas -= np.float32(strength)
    np.clip(canvas, 0, 255, out=canvas)
    return Image.fromarray(canvas.astype(np.uint8))


def _jitter(rng: random.Random, color: RGB, amount: float = 0.05) -> RGB:
    r, g, b = (min(max(c + rng.uniform(-amount, amount), 0.0), 1.0) for c in color)
    return (r, g, b)


def _background_color(rng: random.Random, colors: list[RGB]) -> RGB:
    """A muted colour far from all the objects'; the farthest of the tries where none is far enough."""
    best, best_distance = (0.5, 0.5, 0.5), -1.0
    for _ in range(24):
        grey, tint = rng.uniform(0.12, 0.95), rng.uniform(0.0, 0.18)
        candidate = _jitter(rng, (grey, grey, grey), tint)
        distance = min(contrast(candidate, color) for color in colors)
        if distance > best_distance:
            best, best_distance = candidate, distance
        if distance > _APART:
            break
    return best


@lru_cache(maxsize=8)
def _axes(image_size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Coordinates x (1 w) and y (h 1), -0.5 to 0.5 across the picture."""
    line = (np.arange(image_size, dtype=np.float32) + 0.5) / np.float32(image_size) - np.float32(0.5)
    return line[None, :], line[:, None]


def _background(rng: random.Random, base: RGB, image_size: int) -> NDArray[np.float32]:
    """(h w 3), 0 to 255: flat, a gradient, a glow, or soft waves around `base`."""
    x, y = _axes(image_size)
    angle = rng.uniform(0, 2 * math.pi)
    kind = rng.randrange(4)
    if kind == 0:
        field = np.zeros((image_size, image_size), np.float32)
    elif kind == 1:
        field = x * math.cos(angle) + y * math.sin(angle)
    elif kind == 2:
        field = 0.5 - ((x - 0.4 * math.cos(angle)) ** 2 + (y - 0.4 * math.sin(angle)) ** 2)
    else:
        field = 0.35 * np.sin((x * math.cos(angle) + y * math.sin(angle)) * np.float32(rng.uniform(12, 30)))
    change = np.array([rng.uniform(-0.16, 0.16) for _ in range(3)], np.float32) * 255
    return field[..., None].astype(np.float32) * change + np.array(base, np.float32) * 255


def _lay(
    canvas: NDArray[np.float32],
    body: NDArray[np.float32],
    pattern: NDArray[np.float32] | None,
    x: float,
    y: float,
    color: RGB,
    other: RGB,
) -> None:
    """One sprite, centred at x, y px, cut at the edges."""
    side, size = body.shape[0], canvas.shape[0]
    left, top = round(x - side / 2), round(y - side / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, size), min(top + side, size)
    if x0 >= x1 or y0 >= y1:
        return
    cut = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    paint = np.array(color, np.float32) * 255
    if pattern is not None:
        paint = paint + pattern[cut] * (np.array(other, np.float32) * 255 - paint)
    region = canvas[y0:y1, x0:x1]
    region += body[cut] * (paint - region)


def _speck(rng: random.Random, canvas: NDArray[np.float32], base: RGB) -> None:
    """A dot of two or three pixels, like dust."""
    size = canvas.shape[0]
    side = max(round(size * rng.uniform(0.03, 0.05)), 1)
    x, y = rng.randrange(size - side), rng.randrange(size - side)
    canvas[y : y + side, x : x + side] = np.array(_jitter(rng, base, 0.3), np.float32) * 255


def _bar(rng: random.Random, canvas: NDArray[np.float32], base: RGB) -> None:
    """A thin bar across the picture, in front of everything, a shade away from the background."""
    x, y = _axes(canvas.shape[0])
    angle, offset = rng.uniform(0, math.pi), rng.uniform(-0.4, 0.4)
    distance = np.abs(x * math.cos(angle) + y * math.sin(angle) - np.float32(offset))
    size = canvas.shape[0]
    cover = np.clip((rng.uniform(0.008, 0.014) - distance) * size + 0.5, 0, 1)[..., None] * np.float32(0.85)
    shade = blend(base, (0.0, 0.0, 0.0) if luma(base) > 0.5 else (1.0, 1.0, 1.0), rng.uniform(0.15, 0.4))
    canvas += cover * (np.array(shade, np.float32) * 255 - canvas)


# Shapes: corners on a circle of radius 1, y pointing down.


def _polar(corners: int, radius: tuple[float, ...] = (1.0,), start: float = -90.0) -> list[tuple[float, float]]:
    points = []
    for k in range(corners):
        angle = math.radians(start + 360 * k / corners)
        r = radius[k % len(radius)]
        points.append((r * math.cos(angle), r * math.sin(angle)))
    return points


def _heart() -> list[tuple[float, float]]:
    points = []
    for k in range(64):
        t = 2 * math.pi * k / 64
        x = math.sin(t) ** 3
        y = (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16
        points.append((x * 0.98, 0.05 - y))
    return points


def _crescent() -> list[tuple[float, float]]:
    outer = [(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in range(50, 311, 6)]
    end_x, end_y = outer[0]
    radius = 0.8  # of the circle that is cut away, through both tips
    center = end_x - math.sqrt(radius**2 - end_y**2) + 2 * math.sqrt(radius**2 - end_y**2)
    tip = math.atan2(end_y, end_x - center)
    inner = []
    for k in range(1, 40):
        a = tip + (2 * math.pi - 2 * tip) * (1 - k / 40)
        inner.append((center + radius * math.cos(a), radius * math.sin(a)))
    return [(x + 0.2, y) for x, y in outer + inner]


def _cross(arm: float = 0.4) -> list[tuple[float, float]]:
    right = [(arm, -0.96), (arm, -arm), (0.96, -arm), (0.96, arm), (arm, arm), (arm, 0.96)]
    return [(-arm, -0.96), *right, (-arm, 0.96), (-arm, arm), (-0.96, arm), (-0.96, -arm), (-arm, -arm)]


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _polar(60, (0.95,)),
    "square": _polar(4, (1.17,), start=-45),
    "triangle": [(x * 1.12, y * 1.12 + 0.2) for x, y in _polar(3)],
    "star": [(x * 1.06, y * 1.06 + 0.06) for x, y in _polar(10, (1.0, 0.47))],
    "heart": _heart(),
    "diamond": [(x * 0.78, y) for x, y in _polar(4)],
    "cross": _cross(),
    "crescent": _crescent(),
    "pentagon": [(x * 1.02, y * 1.02 + 0.05) for x, y in _polar(5)],
    "arrow": [(0.0, -1.0), (0.85, -0.1), (0.34, -0.1), (0.34, 0.95), (-0.34, 0.95), (-0.34, -0.1), (-0.85, -0.1)],
}


@lru_cache(maxsize=8192)
def sprite(shape: str, fill: str, side: int, angle: int) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """The cover of an object and, for a patterned one, of its pattern: (d d 1) each, 0 to 1."""
    big = side * _SUPER
    turn = math.radians(angle)
    cos, sin = math.cos(turn), math.sin(turn)
    points = [((x * cos - y * sin + 1) * big / 2, (x * sin + y * cos + 1) * big / 2) for x, y in _OUTLINES[shape]]
    body = Image.new("L", (big, big))
    ImageDraw.Draw(body).polygon(points, fill=255)
    rim = Image.new("L", (big, big))
    width = max(0.11 * side, 1.7) if fill == "outlined" else max(0.05 * side, 0.7)  # of the rim, px
    pen = ImageDraw.Draw(rim)
    pen.line([*points, points[0], points[1]], fill=255, width=round(2 * width * _SUPER), joint="curve")
    if fill == "outlined":
        body = Image.fromarray(np.minimum(np.asarray(body), np.asarray(rim)))
    pattern = None
    if fill in ("striped", "dotted"):
        axis = (np.arange(big, dtype=np.float32) + 0.5) / big - 0.5
        u = axis[None, :] * cos + axis[:, None] * sin
        v = axis[:, None] * cos - axis[None, :] * sin
        if fill == "striped":
            mask = (u + v) / 1.41421356 / _pitch(side, 0.25) % 1.0 < 0.45
        else:
            pitch = _pitch(side, 0.3)
            mask = np.hypot((u / pitch) % 1.0 - 0.5, (v / pitch) % 1.0 - 0.5) < 0.34
        mask &= np.asarray(rim) == 0  # the rim keeps its colour, so that the shape shows on any background
        pattern = _shrink(Image.fromarray(mask.astype(np.uint8) * 255))
    return _shrink(body), pattern


def _pitch(side: int, share: float) -> float:
    """Distance of stripes or dots as a share of the object: `share`, but never under 3.6 px."""
    return max(share, 3.6 / side)


def _shrink(mask: Image.Image) -> NDArray[np.float32]:
    small = np.asarray(mask.reduce(_SUPER), np.float32)[..., None] / np.float32(255)
    small.flags.writeable = False
    return small
