"""The colours of the embedded data, and how far apart two of them look."""

RGB = tuple[float, float, float]  # red, green, blue, each 0 to 1

COLORS: dict[str, RGB] = {
    "red": (0.86, 0.11, 0.12),
    "orange": (0.98, 0.55, 0.06),
    "yellow": (0.98, 0.91, 0.16),
    "green": (0.12, 0.60, 0.20),
    "blue": (0.12, 0.30, 0.88),
    "purple": (0.56, 0.18, 0.72),
    "white": (0.97, 0.97, 0.97),
    "black": (0.06, 0.06, 0.07),
    "pink": (0.98, 0.58, 0.76),
    "brown": (0.45, 0.26, 0.11),
}


def contrast(a: RGB, b: RGB) -> float:
    """How different two colours look, 0 to 3 (black and white): the "redmean" weighting of an RGB distance."""
    red = (a[0] + b[0]) / 2
    dr, dg, db = a[0] - b[0], a[1] - b[1], a[2] - b[2]
    return ((2 + red) * dr * dr + 4 * dg * dg + (3 - red) * db * db) ** 0.5


def blend(a: RGB, b: RGB, share: float) -> RGB:
    """The colour `share` of the way from a to b."""
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share)


def luma(color: RGB) -> float:
    """How light a colour looks, 0 to 1."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
