"""What INT8 costs in each layer, as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from yolov7_deploy.measure.chart_file import write_chart
from yolov7_deploy.quantization.quantize import Quantized

DPI = 110
WIDTH, ROW, MARGIN = 9.0, 0.17, 1.5  # inches
# Wong's palette (Nature Methods 8, 441, 2011), which colour-blind readers can tell apart.
INT8_COLOUR, SPARED_COLOUR = "#0072B2", "#D55E00"


def cost_chart(result: Quantized, path: Path, *, title: str) -> None:
    """A PNG with a bar for each layer in the order they run: how far it moves the head maps when it alone is INT8.

    Layers that stayed float in the file have another colour. Same result, same bytes; the file appears complete or not
    at all.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    write_chart(lambda: _figure(result, title), path, dpi=DPI)


def _figure(result: Quantized, title: str) -> Figure:
    order = {cost.name: place for place, cost in enumerate(result.account.convolutions)}
    costs = sorted(result.costs, key=lambda cost: order.get(cost.layer, -1))
    int8 = result.model.info.int8
    spared = {layer for layer, _ in int8.kept} if int8 else set()
    figure = Figure(figsize=(WIDTH, MARGIN + ROW * len(costs)))
    FigureCanvasAgg(figure)
    axes: Axes = figure.add_axes((0.2, 0.75 / figure.get_figheight(), 0.76, 1 - MARGIN / figure.get_figheight()))
    colours = [SPARED_COLOUR if cost.layer in spared else INT8_COLOUR for cost in costs]
    axes.barh(range(len(costs)), [cost.error for cost in costs], color=colours, height=0.75)
    axes.set_yticks(range(len(costs)), [cost.layer for cost in costs], fontsize=7)
    axes.set_ylim(len(costs) - 0.4, -0.6)
    axes.set_xlabel("root mean squared change of the head maps (logits, weighted with objectness)", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(f"{title}: what INT8 costs in each layer alone", fontsize=10, loc="left")
    if spared.intersection(cost.layer for cost in costs):
        handles = [Patch(color=INT8_COLOUR, label="INT8"), Patch(color=SPARED_COLOUR, label="stays float")]
        axes.legend(handles=handles, fontsize=8, loc="lower right")
    return figure
