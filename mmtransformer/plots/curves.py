"""The course of a training run as one picture: losses, metrics and learning rate over the steps."""

import csv
import itertools
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from mmtransformer.plots import fonts
from mmtransformer.plots.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = dict[str, list[tuple[float, float]]]
"""Column name -> (step, value) pairs in the order of the steps."""

COLOURS = ("#2c52a0", "#d1622b", "#2a8a57", "#9141ac", "#b8860b", "#00838f", "#c2185b", "#5d4037")
SPLITS = ("train", "val", "compositional", "test")
NOT_METRICS = ("step", "epoch")
LOSS, CHECK, RATE = "loss", "is the picture used?", "learning rate"
NATS = "cross-entropy (nats a token)"
AXES = {LOSS: NATS, CHECK: NATS, "grad_norm": "gradient norm", "seconds": "time (s)"}
"""Panel -> name and unit of its y axis, where its own name does not say it."""


def save_loss_curves(csv_path: str | Path, png_path: str | Path, *, title: str = "") -> Path:
    """Draw the curves of a run's `metrics.csv`.

    Losses share one panel, so do learning rates, and so do the columns of one metric (val/facts/en with
    val/facts/ko). Rows may be ragged, cells empty or NaN.

    Args:
        csv_path: the file that Lightning's CSVLogger wrote.
        png_path: the picture to write.
        title: a line above; the file's folder if empty.

    Returns:
        The picture's path.

    Raises:
        ValueError: if the file has no step column or no number in it.
    """
    series, epochs = read_log(csv_path)
    panels = group(series)
    columns = min(len(panels), 1 if len(panels) == 1 else 2 if len(panels) <= 4 else 3)
    rows = math.ceil(len(panels) / columns)
    heading = title or f"Training run {Path(csv_path).resolve().parent.name}"
    figure = new_figure(5.6 * columns + 0.4, 3.5 * rows + 0.5, heading)
    steps = [step for points in series.values() for step, _ in points]
    edge = max(0.02 * (max(steps) - min(steps)), 0.5)
    for i, (name, members) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        _panel(axes, name, {key: series[key] for key in members})
        axes.set_xlim(min(steps) - edge, max(steps) + edge)
        if i < columns and epochs:
            _epoch_axis(axes, epochs)
    return save_figure(figure, png_path)


def new_figure(width: float, height: float, title: str) -> "Figure":
    """Give an empty figure of so many inches with a title in any language."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    title = fonts.spelt(title)
    face = FontProperties(fname=str(fonts.font(14, title).path), size=14)
    figure.suptitle(title.replace("$", r"\$"), fontproperties=face)
    return figure


def style_axes(axes: "Axes", title: str) -> None:
    """Give axes a title, a pale grid behind, and no frame above and on the right."""
    axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
    axes.grid(True, color="#e3e6eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def read_log(csv_path: str | Path) -> tuple[Series, list[tuple[float, float]]]:
    """Read a CSVLogger file.

    Returns:
        The finite values of every column, and (step, epoch) pairs.
    """
    csv_path = Path(csv_path)
    if not csv_path.is_file():
        raise ValueError(f"{csv_path}: no such file; a run writes metrics.csv into its log folder")
    series: Series = defaultdict(list)
    epochs: list[tuple[float, float]] = []
    with csv_path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file, restkey="", restval="")
        if "step" not in (reader.fieldnames or ()):
            raise ValueError(f"{csv_path}: no column 'step' among {reader.fieldnames or []}")
        for row in reader:
            step = _number(row.get("step"))
            if step is None:
                continue
            if (epoch := _number(row.get("epoch"))) is not None:
                epochs.append((step, epoch))
            for name, cell in row.items():
                if name and name not in NOT_METRICS and (value := _number(cell)) is not None:
                    series[name].append((step, value))
    if not series:
        raise ValueError(f"{csv_path}: no number to draw")
    return {name: sorted(points, key=lambda p: p[0]) for name, points in series.items()}, sorted(epochs)


def group(series: Series) -> dict[str, list[str]]:
    """Sort the columns (`split/metric` or `split/metric/language`) into panels: losses first, rates last."""
    panels: dict[str, list[str]] = defaultdict(list)
    for name in series:
        bare = name.removesuffix("_step").removesuffix("_epoch")
        if bare.startswith(("train_", "val_", "test_")):
            bare = bare.replace("_", "/", 1)
        parts = bare.split("/")
        metric = parts[1] if len(parts) > 1 else parts[0]
        if name.startswith(("lr-", "lr_")) or metric in ("lr", "learning_rate"):
            panels[RATE].append(name)
        elif metric.startswith("loss_"):
            panels[CHECK].append(name)
        else:
            panels[metric].append(name)
    order = [LOSS, CHECK, *sorted(panels.keys() - {LOSS, CHECK, RATE}), RATE]
    return {name: sorted(panels[name]) for name in order if name in panels}


def _panel(axes: "Axes", name: str, members: Series) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    style_axes(axes, name.replace("_", " "))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(AXES.get(name, name.replace("_", " ")))
    splits = [key.replace("_", "/").split("/")[0] for key in members]
    by_split = len(set(splits)) == len(splits) and set(splits) <= set(SPLITS)
    for i, (key, points) in enumerate(members.items()):
        colour = COLOURS[(SPLITS.index(splits[i]) if by_split else i) % len(COLOURS)]
        x, y = [p[0] for p in points], [p[1] for p in points]
        if len(points) > 60 and name == LOSS:
            axes.plot(x, y, color=colour, alpha=0.22, linewidth=0.8)
            axes.plot(x, _smooth(y), color=colour, linewidth=1.8, label=f"{_plain(key)} (smoothed)")
        else:
            marker = "o" if len(points) <= 30 and name != RATE else None
            axes.plot(x, y, color=colour, linewidth=1.8, marker=marker, markersize=4, label=_plain(key))
    values = [v for points in members.values() for _, v in points]
    if name == LOSS and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=8, frameon=False)


def _epoch_axis(axes: "Axes", epochs: list[tuple[float, float]]) -> None:
    """Mark the ends of epochs above a panel."""
    last: dict[int, float] = {}
    for step, epoch in epochs:
        last[int(epoch)] = max(step, last.get(int(epoch), 0.0))
    if len(last) < 2:
        return
    every = max(1, math.ceil(len(last) / 8))
    chosen = [(epoch + 1, step) for epoch, step in sorted(last.items()) if (epoch + 1) % every == 0]
    above = axes.secondary_xaxis("top")
    above.set_xticks([step for _, step in chosen], [str(epoch) for epoch, _ in chosen], fontsize=8, color="#68707c")
    above.set_xlabel("epochs done", fontsize=8, color="#68707c")
    above.spines["top"].set_visible(False)
    above.tick_params(length=3, color="#b9bec8")


def _smooth(values: list[float]) -> list[float]:
    """The mean over a window of about a fortieth of the run."""
    half = max(1, len(values) // 80)
    sums = [0.0, *itertools.accumulate(values)]
    spans = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]


def _plain(name: str) -> str:
    """A column's name as a label: no math mode, no hiding underscore."""
    return name.replace("$", r"\$").lstrip("_")


def _number(cell: object) -> float | None:
    try:
        value = float(str(cell))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
