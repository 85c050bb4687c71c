"""Charts of a quantization: the INT8 sensitivity of each layer, and AP against the share of MACs in INT8."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from yolov7_deploy._charts import GREY, replace_missing_glyphs, write_chart
from yolov7_deploy.precision.sensitivity import LayerSensitivity
from yolov7_deploy.workflows.quantize import Measurement, Quantized, float_layers

DPI = 110
WIDTH, ROW, MARGIN, PANEL = 9.0, 0.17, 1.5, 4.0  # inches
# Wong's palette (Nature Methods 8, 441, 2011), which colour-blind readers can tell apart.
INT8_COLOR, FLOAT_COLOR = "#0072B2", "#D55E00"


def write_sensitivity_chart(result: Quantized, path: Path, *, title: str) -> None:
    """Write a PNG with one bar per layer, in execution order; see `draw_sensitivities`.

    If layers were excluded to keep AP, a panel below shows the trials of that search; see `_draw_frontier`.

    The same result gives the same bytes; the file is written completely or not at all.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    order = {convolution.name: index for index, convolution in enumerate(result.summary.convolutions)}
    entries = sorted(result.sensitivities, key=lambda entry: order.get(entry.layer, -1))
    trials = [one for one in result.measurements if one.share is not None]

    def draw() -> Figure:
        figure = draw_sensitivities(entries, float_layers(result), title=title)
        if len(trials) > 1:
            _draw_frontier(_add_panel(figure), trials, float_layers(result))
        return figure

    write_chart(draw, path, dpi=DPI)


def draw_sensitivities(entries: Sequence[LayerSensitivity], floats: Collection[str], *, title: str) -> Figure:
    """Return a figure with one bar per layer: the change of the head maps if only this layer is INT8.

    Args:
        entries: The layers, from top to bottom.
        floats: Names of those that are float in the file; they have another color and hatching.
        title: Name of the file.
    """
    figure = Figure(figsize=(WIDTH, MARGIN + ROW * len(entries)))
    FigureCanvasAgg(figure)
    axes: Axes = figure.add_axes((0.2, 0.75 / figure.get_figheight(), 0.76, 1 - MARGIN / figure.get_figheight()))
    are_float = [entry.layer in floats for entry in entries]
    bars = axes.barh(
        range(len(entries)),
        [entry.error for entry in entries],
        color=[FLOAT_COLOR if is_float else INT8_COLOR for is_float in are_float],
        edgecolor="white",
        linewidth=0.0,
        height=0.75,
    )
    for bar, is_float in zip(bars, are_float, strict=True):
        bar.set_hatch("///" if is_float else "")
    names = [replace_missing_glyphs(entry.layer) for entry in entries]
    axes.set_yticks(range(len(entries)), names, fontsize=7)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.set_xlabel("root mean squared change of the head maps (logits, weighted with objectness)", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(f"{replace_missing_glyphs(title)}: INT8 sensitivity of each layer", fontsize=10, loc="left")
    if any(are_float):
        handles = [
            Patch(facecolor=INT8_COLOR, label="INT8"),
            Patch(facecolor=FLOAT_COLOR, edgecolor="white", linewidth=0.0, hatch="///", label="float"),
        ]
        axes.legend(handles=handles, fontsize=8, loc="lower right")
    return figure


def _add_panel(figure: Figure) -> Axes:
    """Make the figure higher by `PANEL` inches, and return axes there; the other axes keep their size in inches."""
    before = figure.get_figheight()
    after = before + PANEL
    figure.set_figheight(after)
    for axes in figure.axes:
        left, bottom, width, height = axes.get_position().bounds
        axes.set_position((left, (bottom * before + PANEL) / after, width, height * before / after))
    return figure.add_axes((0.2, 0.75 / after, 0.76, (PANEL - 1.25) / after))


def _draw_frontier(axes: Axes, trials: Sequence[Measurement], floats: Collection[str]) -> None:
    """Draw the AP points lost against the share of MACs in INT8, with 95 % intervals, for each trial of a search.

    The line connects the frontier: trials of which no other one has more in INT8 and loses less.

    Args:
        axes: Where to draw.
        trials: Measurements with a share.
        floats: Names of the layers that are float in the file, which is one of the trials.
    """
    chosen = max((one for one in trials if set(floats).issuperset(one.excluded)), key=lambda one: len(one.excluded))
    for one in trials:
        x = 100 * (one.share or 0)
        color, marker, size = (FLOAT_COLOR, "D", 7) if one is chosen else (INT8_COLOR, "o", 5)
        if one.low is not None and one.high is not None:
            axes.plot([x, x], [one.low, one.high], color=color, linewidth=0.8, alpha=0.5)
        axes.plot([x], [one.points], marker=marker, color=color, markersize=size, linestyle="", zorder=3)
        axes.annotate(f"{len(one.excluded)}", (x, one.points), (6, 4), textcoords="offset points", fontsize=7)
    frontier = find_frontier(trials)
    axes.plot([100 * (one.share or 0) for one in frontier], [one.points for one in frontier], color=GREY, linewidth=0.8)
    axes.set_xlabel("multiply-accumulates in INT8 (%)", fontsize=8)
    axes.set_ylabel("AP points lost", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title("AP against INT8: each trial, with the number of layers it excludes", fontsize=10, loc="left")


def find_frontier(trials: Sequence[Measurement]) -> list[Measurement]:
    """Return the trials of which no other one has as much in INT8 and loses less, by ascending share."""
    found: list[Measurement] = []
    for one in sorted(trials, key=lambda one: (-(one.share or 0), one.points)):
        if not found or one.points < found[-1].points:
            found.append(one)
    return found[::-1]
