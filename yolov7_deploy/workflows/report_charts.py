"""Charts of the deployment report, as SVG elements of its page."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from yolov7_deploy._charts import GREY, chart_svg, replace_missing_glyphs
from yolov7_deploy.benchmarking.chart import draw_chart
from yolov7_deploy.benchmarking.report import SpeedReport
from yolov7_deploy.evaluation.accuracy_drop import AccuracyDrop
from yolov7_deploy.precision.sensitivity import LayerSensitivity
from yolov7_deploy.workflows.sensitivity_chart import draw_sensitivities

WIDTH, ROW, MARGIN = 9.0, 0.34, 1.0  # inches
# Wong's palette (Nature Methods 8, 441, 2011), which colour-blind readers can distinguish; the shapes differ, too.
VERDICTS = {"within": ("#009E73", "o"), "inconclusive": ("#E69F00", "s"), "above": ("#D55E00", "X")}
LABELS = {"within": "less than allowed", "inconclusive": "undecided", "above": "more than allowed"}
NAME_CHARACTERS = 44


def speed_accuracy_svg(reports: Sequence[SpeedReport]) -> str:
    """Return the chart of AP against time at batch 1, with the detectors of the paper; see `draw_chart`.

    All reports are of one model, so the points have the names of their runtimes and precisions.
    """
    labels = [f"{report.runtime} {report.precision}" for report in reports]
    label = f"AP against time per image of {len(reports)} artifacts beside the paper's; the numbers are in the tables"
    return chart_svg(lambda: draw_chart(reports, labels=labels), name="speed", label=label)


def sensitivity_svg(entries: Sequence[LayerSensitivity], floats: Collection[str], *, name: str, path: Path) -> str:
    """Return the chart of the INT8 sensitivity of each layer; see `draw_sensitivities`."""
    label = f"INT8 sensitivity of the {len(entries)} layers of {path.name}; the largest are in the table"
    return chart_svg(lambda: draw_sensitivities(entries, floats, title=path.stem), name=name, label=label)


def drop_svg(drops: Sequence[tuple[str, AccuracyDrop]], *, max_drop: float) -> str:
    """Return the chart of the AP points that each artifact loses, with the 95 % intervals and the allowed loss.

    Args:
        drops: Name and drop of each artifact, from top to bottom.
        max_drop: Largest allowed loss in AP points.
    """
    label = "AP points lost against the reference with 95 % intervals; the numbers are in the table above"
    return chart_svg(lambda: _drop_figure(drops, max_drop), name="drop", label=label)


def _drop_figure(drops: Sequence[tuple[str, AccuracyDrop]], max_drop: float) -> Figure:
    height = MARGIN + ROW * len(drops)
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.3, 0.55 / height, 0.67, (height - MARGIN + 0.1) / height))
    axes.axvspan(min(0.0, -max_drop), max_drop, color="#009E73", alpha=0.12, linewidth=0)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.axvline(max_drop, color=GREY, linewidth=1.0, linestyle="--")
    for row, (_, drop) in enumerate(drops):
        colour, marker = VERDICTS[drop.verdict(max_drop)]
        if drop.low is not None and drop.high is not None:
            axes.plot([drop.low, drop.high], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot([drop.points], [row], marker=marker, color=colour, markersize=8, linestyle="none")
    axes.set_yticks(np.arange(len(drops)), [_shorten(name) for name, _ in drops])
    axes.set_ylim(len(drops) - 0.4, -0.6)
    axes.set_xlabel(f"AP points lost (dashed: the allowed {max_drop:g}; left of 0 is better than the reference)")
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    marks = {verdict: axes.plot([], [], marker=m, color=c, linestyle="none")[0] for verdict, (c, m) in VERDICTS.items()}
    used = [name for name in VERDICTS if any(drop.verdict(max_drop) == name for _, drop in drops)]
    figure.legend(
        [marks[name] for name in used],
        [LABELS[name] for name in used],
        ncols=3,
        loc="upper right",
        bbox_to_anchor=(0.97, 0.995),
    )
    return figure


def _shorten(name: str) -> str:
    text = replace_missing_glyphs(name)
    return text if len(text) <= NAME_CHARACTERS else f"{text[: NAME_CHARACTERS - 17]}…{text[-16:]}"
