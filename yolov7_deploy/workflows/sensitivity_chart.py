"""Chart of the INT8 sensitivity of each layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from yolov7_deploy._charts import replace_missing_glyphs, write_chart
from yolov7_deploy.precision.sensitivity import LayerSensitivity
from yolov7_deploy.workflows.quantize import Quantized, float_layers

DPI = 110
WIDTH, ROW, MARGIN = 9.0, 0.17, 1.5  # inches
# Wong's palette (Nature Methods 8, 441, 2011), which colour-blind readers can tell apart.
INT8_COLOR, FLOAT_COLOR = "#0072B2", "#D55E00"


def write_sensitivity_chart(result: Quantized, path: Path, *, title: str) -> None:
    """Write a PNG with one bar per layer, in execution order; see `draw_sensitivities`.

    The same result gives the same bytes; the file is written completely or not at all.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    order = {convolution.name: index for index, convolution in enumerate(result.summary.convolutions)}
    entries = sorted(result.sensitivities, key=lambda entry: order.get(entry.layer, -1))
    write_chart(lambda: draw_sensitivities(entries, float_layers(result), title=title), path, dpi=DPI)


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
