"""Several runs side by side in one picture: bars of their scores, and the curves of their validation losses."""

import io
from collections.abc import Mapping
from pathlib import Path

from mmtransformer.plots.curves import COLOURS, NATS, read_log
from mmtransformer.plots.files import write_whole


def comparison(
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    from mmtransformer.plots import fonts

    colours = dict(zip(logs, COLOURS * (1 + len(logs) // len(COLOURS)), strict=False))
    height = max(3.6, 0.5 + 0.22 * len(bars) * (len(logs) + 1))
    figure = Figure(figsize=(12, height + 0.6), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    heading = fonts.spelt(title or "Runs compared")
    face = fonts.font(14, heading).path
    figure.suptitle(heading.replace("$", r"\$"), fontproperties=FontProperties(fname=str(face), size=14))
    left, right = figure.subplots(1, 2)

    for turn, (run, colour) in enumerate(colours.items()):
        found = [(row, by[run]) for row, by in enumerate(bars.values()) if run in by]
        places = [row + 0.8 * (turn + 0.5) / len(logs) - 0.4 for row, _ in found]
        drawn = left.barh(places, [value for _, value in found], 0.75 / len(logs), color=colour, label=run)
        left.bar_label(drawn, fmt="%.1f", fontsize=8, padding=2)
    left.set_yticks(range(len(bars)), list(bars), fontsize=9)
    left.invert_yaxis()
    left.set_title("scores", fontsize=11, fontweight="bold", loc="left")

    found_series = {run: read_log(path)[0] for run, path in logs.items()}
    if any(len(series.get(loss, [])) < 3 for series in found_series.values()):
        loss = "train/loss"
    for run, series in found_series.items():
        points = series.get(loss, [])
        x, y = [p[0] for p in points], [p[1] for p in points]
        right.plot(x, y, color=colours[run], label=run, marker="o" if len(x) <= 30 else None, markersize=4)
    right.set_title(loss, fontsize=11, fontweight="bold", loc="left")
    right.set_xlabel("optimizer step")
    right.set_ylabel(NATS)
    right.legend(fontsize=9, frameon=False)
    for axes in (left, right):
        axes.grid(True, color="#e3e6eb", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return write_whole(png_path, file.getvalue())
