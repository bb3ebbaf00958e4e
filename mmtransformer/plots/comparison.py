"""Several runs side by side in one picture: bars of their scores, and the curves of their validation losses."""

from collections.abc import Mapping
from pathlib import Path

from mmtransformer.plots.curves import COLOURS, NATS, new_figure, read_log, style_axes
from mmtransformer.plots.files import save_figure


def save_comparison(
    bars: Mapping[str, Mapping[str, float]],
    logs: Mapping[str, str | Path],
    png_path: str | Path,
    *,
    title: str = "",
    loss: str = "val/loss",
) -> Path:
    """Draws scores and losses of runs, a colour a run.

    Args:
        bars: score -> run -> value.
        logs: run -> its metrics.csv.
        png_path: the picture to write.
        title: a line above.
        loss: the column of the curves; where a log has no curve of it (three points), the training loss is drawn.

    Returns:
        The picture's path.
    """
    colours = dict(zip(logs, COLOURS * (1 + len(logs) // len(COLOURS)), strict=False))
    height = max(3.6, 0.5 + 0.22 * len(bars) * (len(logs) + 1))
    figure = new_figure(12, height + 0.6, title or "Runs compared")
    left, right = figure.subplots(1, 2)

    for turn, (run, colour) in enumerate(colours.items()):
        found = [(row, by[run]) for row, by in enumerate(bars.values()) if run in by]
        places = [row + 0.8 * (turn + 0.5) / len(logs) - 0.4 for row, _ in found]
        drawn = left.barh(places, [value for _, value in found], 0.75 / len(logs), color=colour, label=run)
        left.bar_label(drawn, fmt="%.1f", fontsize=8, padding=2)
    left.set_yticks(range(len(bars)), list(bars), fontsize=9)
    left.invert_yaxis()
    style_axes(left, "scores")

    found_series = {run: read_log(path)[0] for run, path in logs.items()}
    if any(len(series.get(loss, [])) < 3 for series in found_series.values()):
        loss = "train/loss"
    for run, series in found_series.items():
        points = series.get(loss, [])
        x, y = [p[0] for p in points], [p[1] for p in points]
        right.plot(x, y, color=colours[run], label=run, marker="o" if len(x) <= 30 else None, markersize=4)
    style_axes(right, loss)
    right.set_xlabel("optimizer step")
    right.set_ylabel(NATS)
    right.legend(fontsize=9, frameon=False)
    return save_figure(figure, png_path)
