"""Chart of the INT8 sensitivity of each layer."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from yolov7_deploy._charts import write_chart
from yolov7_deploy.workflows.quantize import Quantized, float_layers

DPI = 110
WIDTH, ROW, MARGIN = 9.0, 0.17, 1.5  # inches
# Wong's palette (Nature Methods 8, 441, 2011), which colour-blind readers can tell apart.
INT8_COLOR, FLOAT_COLOR = "#0072B2", "#D55E00"


def write_sensitivity_chart(result: Quantized, path: Path, *, title: str) -> None:
    """Write a PNG with one bar per layer, in execution order: the change of the head maps if only this layer is INT8.

    Layers that are float in the file have another color. The same result gives the same bytes; the file is written
    completely or not at all.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    write_chart(lambda: _figure(result, title), path, dpi=DPI)


def _figure(result: Quantized, title: str) -> Figure:
    order = {convolution.name: index for index, convolution in enumerate(result.summary.convolutions)}
    entries = sorted(result.sensitivities, key=lambda entry: order.get(entry.layer, -1))
    floats = float_layers(result)
    figure = Figure(figsize=(WIDTH, MARGIN + ROW * len(entries)))
    FigureCanvasAgg(figure)
    axes: Axes = figure.add_axes((0.2, 0.75 / figure.get_figheight(), 0.76, 1 - MARGIN / figure.get_figheight()))
    colors = [FLOAT_COLOR if entry.layer in floats else INT8_COLOR for entry in entries]
    axes.barh(range(len(entries)), [entry.error for entry in entries], color=colors, height=0.75)
    axes.set_yticks(range(len(entries)), [entry.layer for entry in entries], fontsize=7)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.set_xlabel("root mean squared change of the head maps (logits, weighted with objectness)", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(f"{title}: INT8 sensitivity of each layer", fontsize=10, loc="left")
    if floats.intersection(entry.layer for entry in entries):
        handles = [Patch(color=INT8_COLOR, label="INT8"), Patch(color=FLOAT_COLOR, label="float")]
        axes.legend(handles=handles, fontsize=8, loc="lower right")
    return figure
