"""Draws the library's packages and their imports, for docs/architecture.md: python tests/draw_packages.py.

Everything comes from the imports: a package stands a level below the lowest one that uses it, and on its level where
the fewest arrows cross.
"""

import itertools
import re
from pathlib import Path

from support.packages import PACKAGE, ROOT, arrows, purpose

PAGE, PICTURE = ROOT / "docs/architecture.md", ROOT / "assets/packages.svg"
MARKS = "<!-- packages: written by tests/draw_packages.py -->", "<!-- end of packages -->"

Arrow = tuple[str, str]
INK, BAND, QUIET, STRONG, FAINT = "#1f2937", "#f5f3ee", "#6b7280", "#3b6ea5", "#c9d1db"


def levels(below: dict[str, list[str]]) -> dict[str, int]:
    """Package -> its level, from 0: above all that it imports, and right below the lowest package that imports it."""
    lowest: dict[str, int] = {}
    for package, imported in below.items():  # from the ground up
        lowest[package] = 1 + max((lowest[other] for other in imported), default=-1)
    level_of = dict(lowest)
    for package in reversed(below):
        users = [level_of[other] for other, imported in below.items() if package in imported]
        level_of[package] = min(users) - 1 if users else lowest[package]
    return level_of


def direct(below: dict[str, list[str]]) -> list[Arrow]:
    """The arrows that no other arrows imply."""
    reached: dict[str, set[str]] = {}
    for package, imported in below.items():
        reached[package] = set(imported).union(*(reached[other] for other in imported))
    return [
        (package, other)
        for package, imported in below.items()
        for other in imported
        if not any(other in reached[between] for between in imported)
    ]


def places(level_of: dict[str, int], strong: list[Arrow]) -> tuple[dict[str, float], dict[Arrow, list[str]]]:
    """Package -> its place on its level; arrow -> the points that it passes, named after the levels between."""
    paths = {(a, b): [a, *(f"{a} {b} {n}" for n in range(level_of[a] - 1, level_of[b], -1)), b] for a, b in strong}
    level = dict(level_of) | {p: int(p.split()[2]) for path in paths.values() for p in path if " " in p}
    rows = [[p for p in level if level[p] == n] for n in range(max(level.values()) + 1)]
    segments = [s for path in paths.values() for s in itertools.pairwise(path)]

    def spread(row: list[str]) -> dict[str, float]:
        widths = [0.35 if " " in p else 1.0 for p in row]
        left = -sum(widths) / 2
        return {p: left + sum(widths[:i]) + widths[i] / 2 for i, p in enumerate(row)}

    def cost() -> float:
        x = {p: place for row in rows for p, place in spread(row).items()}
        crossings = sum(
            (x[a] - x[c]) * (x[b] - x[d]) < 0
            for (a, b), (c, d) in itertools.combinations(segments, 2)
            if level[a] == level[c] and a != c and b != d
        )
        return crossings + 0.1 * sum(abs(x[a] - x[b]) ** 2 for a, b in segments)

    best, better = cost(), True
    while better:
        better = False
        for row in rows:
            for i, j in itertools.combinations(range(len(row)), 2):
                row[i], row[j] = row[j], row[i]
                if (new := cost()) < best - 1e-9:
                    best, better = new, True
                else:
                    row[i], row[j] = row[j], row[i]
    x = {p: place for row in rows for p, place in spread(row).items()}
    for _ in range(60):  # an arrow's way is straightened as far as the packages beside it let it
        for row in rows:
            for i, p in enumerate(row):
                if " " in p:
                    tied = [x[b if p == a else a] for a, b in segments if p in (a, b)]
                    low = max([x[q] + (0.15 if " " in q else 0.48) for q in row[:i]], default=-9)
                    high = min([x[q] - (0.15 if " " in q else 0.48) for q in row[i + 1 :]], default=9)
                    x[p] = min(max(sum(tied) / 2, low), high)
    return x, paths


def contents(package: str) -> str:
    """The first files or folders of a package, as many as fit into its box."""
    names = sorted(p.stem for p in (PACKAGE / package).glob("*") if p.suffix == ".py" or (p / "__init__.py").exists())
    names = [name for name in names if name[0] != "_"]
    line = ""
    for name in names:
        if len(line) + len(name) > 29:
            return f"{line} …"
        line += f"{' · ' if line else ''}{name}"
    return line


def draw(path: Path) -> None:
    """Writes the picture, as SVG or PNG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Curve

    below = arrows()
    level_of, strong = levels(below), direct(below)
    x, paths = places(level_of, strong)
    x = {p: 2.9 * place for p, place in x.items()}
    y = {p: 1.45 * (level_of[p] if p in level_of else int(p.split()[2])) for p in x}
    half_width, half_height = 1.12, 0.34
    mpl.rcParams.update({"svg.hashsalt": "packages", "font.family": "DejaVu Sans"})
    left, right = min(x.values()) - 1.6, max(x.values()) + 1.6
    top = max(y.values()) + 0.9
    figure = Figure(figsize=((right - left) * 0.92, (top + 0.8) * 0.92), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(left, right), ylim=(-0.8, top))
    axes.axis("off")
    for level in sorted(set(level_of.values())):
        axes.axhspan(1.45 * level - 0.6, 1.45 * level + 0.6, color=BAND, lw=0, zorder=0)

    def arrow(points: list[tuple[float, float]], color: str, width: float, zorder: int) -> None:
        vertices, codes = [points[0]], [Curve.MOVETO]
        for (ax, ay), (bx, by) in itertools.pairwise(points):
            vertices += [(ax, (ay + by) / 2), (bx, (ay + by) / 2), (bx, by)]
            codes += [Curve.CURVE4] * 3
        style = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
        axes.add_patch(FancyArrowPatch(path=Curve(vertices, codes), color=color, lw=width, zorder=zorder, **style))

    for package, imported in below.items():
        for other in imported:
            way = paths.get((package, other), [package, other])
            points = [(x[p], y[p] + side * half_height) for p in way for side in (1, -1)][1:-1]
            arrow(points, *((STRONG, 1.6, 2) if (package, other) in paths else (FAINT, 0.8, 1)))
    for package in below:
        corner = x[package] - half_width, y[package] - half_height
        box = FancyBboxPatch(corner, 2 * half_width, 2 * half_height, boxstyle="round,pad=0,rounding_size=0.12")
        box.set(facecolor="white", edgecolor=INK, linewidth=1.2, zorder=3)
        axes.add_patch(box)
        middle = {"ha": "center", "va": "center", "zorder": 4}
        inside = contents(package)
        axes.text(x[package], y[package] + 0.1 * bool(inside), package, size=13, weight="bold", color=INK, **middle)
        axes.text(x[package], y[package] - 0.17, inside, size=7.5, color=QUIET, **middle)
    svg = {"Date": None, "Description": description()} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=svg, dpi=110)


def description() -> str:
    """The arrows in words, which the picture carries along: a test compares them."""
    return "; ".join(f"{package}: {', '.join(imported)}" for package, imported in arrows().items())


def page() -> str:
    """What the page says of the packages: a line each."""
    between = arrows()
    lines = [
        MARKS[0],
        "",
        f"{sum(map(len, between.values()))} imports between {len(between)} folders:",
        "",
        "| folder | what it is for | imports |",
        "|---|---|---|",
    ]
    within = arrows(nested=True)
    for package in between:
        lines.append(f"| **{package}** | {purpose(package)} | {', '.join(between[package])} |")
        for part in within:
            if part.startswith(f"{package}/"):
                near = [other.removeprefix(f"{package}/") for other in within[part] if other.startswith(f"{package}/")]
                lines.append(f"| {part} | {purpose(part)} | {', '.join(near)} |")
    return "\n".join([*lines, "", MARKS[1]])


def with_packages(text: str) -> str:
    """A page's text with its part about the packages written anew."""
    return re.sub(f"{MARKS[0]}.*{MARKS[1]}", lambda _: page(), text, flags=re.DOTALL)


if __name__ == "__main__":
    draw(PICTURE)
    PAGE.write_text(with_packages(PAGE.read_text("utf-8")), "utf-8")
