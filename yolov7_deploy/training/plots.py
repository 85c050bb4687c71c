"""Images of a training run: its labels, a batch, its epochs, and precision against recall at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from yolov7_deploy._charts import GREY, drawable, write_chart
from yolov7_deploy.datasets.samples import DoubleArray, IntArray
from yolov7_deploy.evaluation.precision_recall import PrecisionRecall
from yolov7_deploy.image import FloatArray, Image, fit_letterbox
from yolov7_deploy.training.loggers import EpochRecord
from yolov7_deploy.visualize import class_colour, draw_boxes, write_image

if TYPE_CHECKING:
    from yolov7_deploy.training.sample import Batch

DPI = 110
RESULTS_SIZE, CURVES_SIZE, LABELS_SIZE = (13.0, 6.8), (9.5, 6.2), (13.0, 8.2)  # inches
# Wong's palette (Nature Methods 8, 441, 2011), which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
GRID = "#E6E6E6"
MOST_DOTS = 30  # epochs that are marked one by one
MOST_CURVES = 20  # classes with a curve of their own
NAME_LENGTH = 22  # characters of a class name
DASHES = ("-", "--", ":")  # colours come close again after 8 classes
EQUAL_F1 = (0.2, 0.4, 0.6, 0.8)
MOST_NAMES = 100  # classes that are named below their bars
MOST_COUNTS = 30  # classes whose bars have their number written on top
FAR_APART = 50  # the most frequent class has so many times the boxes of the rarest: the axis is logarithmic
BINS = 60
SMALLEST = 1 / 512  # of the axes of widths and heights; a pixel or two of the image
OVERLAID = 400  # boxes laid over each other
MOST_PIXELS = 1920  # of the longer side of a batch's image
GAP = 4  # pixels between its images

# Per panel: title, and its lines as (column, name, colour, width).
Lines = tuple[tuple[str, str, str, float], ...]
LOSSES: tuple[tuple[str, Lines], ...] = (
    ("box loss", (("box", "", BLUE, 1.6),)),
    ("objectness loss", (("obj", "", BLUE, 1.6),)),
    ("class loss", (("cls", "", BLUE, 1.6),)),
)
PRECISION: tuple[tuple[str, Lines], ...] = (
    ("AP", (("ap50", "IoU 0.50", ORANGE, 1.6), ("ap", "IoU 0.50:0.95", BLUE, 1.6))),
    (
        "AP by size",
        (
            ("ap_large", "large", GREEN, 1.6),
            ("ap_medium", "medium", ORANGE, 1.6),
            ("ap_small", "small", BLUE, 1.6),
        ),
    ),
)
# Norms and weights mostly have the same rate: the wider line shows on both sides of the other.
RATES: Lines = (
    ("lr_bias", "biases", ORANGE, 1.6),
    ("lr_norm", "norms", "#9ECAE1", 4.5),
    ("lr_weight", "weights", BLUE, 1.6),
)


def draw_results(records: Sequence[EpochRecord], path: Path) -> None:
    """Writes a PNG with losses, AP and learning rates over the epochs, a panel each.

    What is `None` or no number is left out of a line. Same records, same bytes; the file appears complete or not at
    all, and folders are made.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    write_chart(lambda: _results_figure(records), path, dpi=DPI)


def draw_precision_recall(curves: PrecisionRecall, class_names: Sequence[str], path: Path) -> None:
    """Writes a PNG with precision against recall at IoU 0.50: the mean, up to 20 classes, and the best F1.

    Of more classes it shows the band that holds half of them. Classes without boxes have no curve.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    write_chart(lambda: _curves_figure(curves, class_names), path, dpi=DPI)


def draw_labels(class_ids: IntArray, boxes: FloatArray | DoubleArray, class_names: Sequence[str], path: Path) -> None:
    """Writes a PNG of how many boxes each class has, where they lie, how large they are, and some of them.

    Args:
        class_ids: int64 [N].
        boxes: [N, 4], centre x, centre y, width, height in fractions of the image.
        class_names: In class-id order; those without boxes are told apart by colour.
        path: The chart; folders are made, and the file appears complete or not at all.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    write_chart(lambda: _labels_figure(class_ids, boxes, class_names), path, dpi=DPI)


def draw_batch(batch: Batch, class_names: Sequence[str], path: Path, *, most: int = 16) -> None:
    """Writes an image with the first images of a batch side by side, and what the network is told of them.

    It has up to 1920 pixels a side; the suffix chooses the format.

    Raises:
        ImageError: OpenCV has no writer for the suffix, or the file cannot be written.
    """
    images = batch.images[:most].cpu().numpy()[..., ::-1]
    targets = batch.targets.cpu().numpy()
    count, height, width = images.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    room_y, room_x = ((MOST_PIXELS + GAP) / number - GAP for number in (rows, columns))
    scale = min(1.0, room_y / height, room_x / width)
    cell_hw = max(1, int(height * scale)), max(1, int(width * scale))
    step_y, step_x = cell_hw[0] + GAP, cell_hw[1] + GAP
    sheet: Image = np.full((rows * step_y - GAP, columns * step_x - GAP, 3), 255, dtype=np.uint8)
    for place, image in enumerate(images):
        top, left = place // columns * step_y, place % columns * step_x
        cell = _batch_cell(image, targets[targets[:, 0] == place], class_names, cell_hw)
        sheet[top : top + cell_hw[0], left : left + cell_hw[1]] = cell
    write_image(path, sheet)


def _results_figure(records: Sequence[EpochRecord]) -> Figure:
    figure = Figure(figsize=RESULTS_SIZE, layout="constrained")
    FigureCanvasAgg(figure)  # joins itself to the figure
    panels: list[Axes] = figure.subplots(2, 3).ravel().tolist()
    for axes, (title, lines) in zip(panels, (*LOSSES, *PRECISION, ("learning rate", RATES)), strict=True):
        _draw_panel(axes, records, title, lines)
    _mark_best(panels[3], records)
    for axes in panels[3:5]:
        axes.set_ylim(bottom=0.0)
    if any(getattr(record, name) > 0 for record in records for name, *_ in RATES):
        panels[5].set_yscale("log", nonpositive="mask")  # biases begin ten times higher
        panels[5].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panels[5].yaxis.set_minor_locator(NullLocator())
        panels[5].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in panels[3:]:
        axes.set_xlabel("epoch")
    return figure


def _mark_best(axes: Axes, records: Sequence[EpochRecord]) -> None:
    """Marks the highest AP, with words on the side of it that has more room."""
    known = [(record.ap, record.epoch) for record in records if record.ap is not None]
    if not known:
        return
    ap, epoch = max(known, key=lambda pair: (pair[0], -pair[1]))
    axes.plot([epoch], [ap], "o", color=BLUE, markersize=7, markerfacecolor="white", zorder=4)
    late, low = 2 * epoch > records[0].epoch + records[-1].epoch, ap < 0.25 * axes.get_ylim()[1]
    text = axes.annotate(
        f"best {ap:.3f}\nepoch {epoch}",
        (epoch, ap),
        xytext=(-2 if late else 2, 8 if low else -8),
        textcoords="offset points",
        ha="right" if late else "left",
        va="bottom" if low else "top",
        color=BLUE,
        fontsize=8,
    )
    text.set_path_effects([withStroke(linewidth=2.0, foreground="white")])


def _draw_panel(axes: Axes, records: Sequence[EpochRecord], title: str, lines: Lines) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    if records:
        axes.set_xlim(records[0].epoch - 0.5, records[-1].epoch + 0.5)
    drawn = False
    for column, name, colour, width in lines:
        epochs, values = _points(records, column)
        marker = "o" if len(epochs) <= MOST_DOTS else ""
        axes.plot(epochs, values, color=colour, linewidth=width, marker=marker, markersize=2 + width, label=name)
        drawn = drawn or bool(np.isfinite(values).any())
    if not drawn:
        _say(axes, "nothing measured")
        axes.set_yticks([])
    elif len(lines) > 1:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.0, 1.02), ncols=len(lines), columnspacing=1.2, handlelength=1.4
        )


def _points(records: Sequence[EpochRecord], column: str) -> tuple[list[int], DoubleArray]:
    """Epochs and values where there is one; what is no finite number stays a gap."""
    known = [(r.epoch, value) for r in records if (value := getattr(r, column)) is not None]
    values = np.array([value for _, value in known], dtype=np.float64)
    return [epoch for epoch, _ in known], np.where(np.isfinite(values), values, np.nan)


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def _curves_figure(curves: PrecisionRecall, class_names: Sequence[str]) -> Figure:
    figure = Figure(figsize=CURVES_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_equal_f1(axes)
    measured = np.flatnonzero(curves.measured)
    if not measured.size:
        _say(axes, "no class has boxes to find")
    elif measured.size <= MOST_CURVES:
        _draw_classes(axes, curves, class_names, measured.tolist())
    else:
        low, high = np.quantile(curves.precision[measured], (0.25, 0.75), axis=0)
        label = "the middle half of them"
        axes.fill_between(curves.recall, low, high, color="#CFE3F0", linewidth=0.0, zorder=0.5, label=label)
    if measured.size:
        mean = curves.mean_precision
        of = f"mean of {measured.size} classes" if measured.size > 1 else _shortened(class_names[measured[0]])
        label = f"{of}: AP50 {mean.mean():.3f}"
        axes.plot(curves.recall, mean, color=BLUE, linewidth=3.2, zorder=4, label=label)
    if curves.best is not None:
        best = curves.best
        label = f"best F1 {best.f1:.3f}, at confidence {best.confidence:.3f}:"
        label += f"\nprecision {best.precision:.3f}, recall {best.recall:.3f}"
        axes.plot([best.recall], [best.precision], "o", color=ORANGE, markersize=9, zorder=5, label=label)
    axes.set(xlim=(0.0, 1.0), ylim=(0.0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title("Precision and recall at IoU 0.50", loc="left", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    if handles:  # the mean and the best point stand last, and are read first
        first = 1 + (curves.best is not None)
        order = [*handles[-first:], *handles[:-first]], [*labels[-first:], *labels[:-first]]
        figure.legend(*order, loc="outside right upper", borderaxespad=1.0)
    return figure


def _draw_equal_f1(axes: Axes) -> None:
    """Where precision and recall have the same F1: P = F R / (2 R - F)."""
    for f1 in EQUAL_F1:
        recall = np.linspace(f1 / 2 + 1e-3, 1.0, 400)
        axes.plot(recall, f1 * recall / (2 * recall - f1), color="#C8C8C8", linewidth=0.7, zorder=1)
        axes.text(1.01, f1 / (2 - f1), f"F1 {f1:g}", fontsize=7, color="#888888", ha="left", va="center")


def _draw_classes(axes: Axes, curves: PrecisionRecall, class_names: Sequence[str], measured: Sequence[int]) -> None:
    for class_id in measured if len(measured) > 1 else ():  # the only one is the mean
        blue, green, red = class_colour(class_id)
        name = _shortened(class_names[class_id])
        axes.plot(
            curves.recall,
            curves.precision[class_id],
            color=(red / 255, green / 255, blue / 255),
            linewidth=1.2,
            linestyle=DASHES[class_id // 8 % len(DASHES)],
            zorder=3,
            label=f"{name} {curves.ap50[class_id]:.3f}",
        )


def _labels_figure(class_ids: IntArray, boxes: DoubleArray, class_names: Sequence[str]) -> Figure:
    figure = Figure(figsize=LABELS_SIZE, layout="constrained")
    FigureCanvasAgg(figure)  # joins itself to the figure
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.15))
    _draw_counts(figure.add_subplot(grid[0, :]), np.bincount(class_ids, minlength=len(class_names)), class_names)
    _draw_centres(figure.add_subplot(grid[1, 0]), boxes)
    _draw_sizes(figure.add_subplot(grid[1, 1]), boxes)
    _draw_overlaid(figure.add_subplot(grid[1, 2]), class_ids, boxes)
    return figure


def _draw_counts(axes: Axes, counts: IntArray, class_names: Sequence[str]) -> None:
    """A bar for each class; of very many classes the shape of the distribution only."""
    empty = int((counts == 0).sum())
    title = f"{counts.sum():,} boxes in {len(counts) - empty:,} of {len(counts):,} classes"
    named = len(counts) <= MOST_NAMES
    places = np.arange(len(counts))
    if named:
        bars = axes.bar(places, counts, color=BLUE, width=min(0.15 + 0.07 * len(counts), 0.8))
        upright = max(map(len, class_names), default=0) * 0.075 > 0.9 * LABELS_SIZE[0] / max(len(counts), 1)  # inches
        axes.set_xticks(places, [_shortened(n) for n in class_names], rotation=90 if upright else 0, fontsize=8)
        for label, count in zip(axes.get_xticklabels(), counts, strict=True):
            label.set_color("black" if count else ORANGE)
        if empty:
            title += "; those without a box are orange"
        if len(counts) <= MOST_COUNTS:
            axes.bar_label(bars, [f"{count:,}" for count in counts], fontsize=8, padding=2)
    else:
        axes.fill_between(places, -np.sort(-counts), color=BLUE, linewidth=0.0, step="mid")
        axes.set_xlabel("classes, most frequent first")
    if counts.any() and counts.max() > FAR_APART * counts[counts > 0].min():
        axes.set_yscale("log")
        axes.set_ylim(0.5, 2.0 * counts.max())
    else:
        axes.set_ylim(0, 1.12 * max(counts.max(initial=0), 1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlim(-0.7, len(counts) - 0.3)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=10)


def _draw_centres(axes: Axes, boxes: DoubleArray) -> None:
    edges = np.linspace(0.0, 1.0, BINS + 1)
    _draw_heat(axes, boxes[:, 0], boxes[:, 1], edges)
    axes.set(xlim=(0.0, 1.0), ylim=(1.0, 0.0), xlabel="x", ylabel="y")
    axes.set_title("centres, in fractions of the image", loc="left", fontsize=10)


def _draw_sizes(axes: Axes, boxes: DoubleArray) -> None:
    edges = np.geomspace(SMALLEST, 1.0, BINS + 1)
    _draw_heat(axes, boxes[:, 2], boxes[:, 3], edges)
    axes.set(xscale="log", yscale="log", xlim=(SMALLEST, 1.0), ylim=(SMALLEST, 1.0), xlabel="width", ylabel="height")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title("sizes, in fractions of the image", loc="left", fontsize=10)


def _draw_heat(axes: Axes, x: DoubleArray, y: DoubleArray, edges: DoubleArray) -> None:
    """Boxes in each cell of a grid: the root of their number, so that single ones are seen beside thousands."""
    inside = edges[0], edges[-1]
    counts = np.histogram2d(y.clip(*inside), x.clip(*inside), bins=(edges, edges))[0]
    roots = np.sqrt(np.where(counts > 0, counts, np.nan))
    most = math.sqrt(max(counts.max(), 1.0))
    axes.pcolormesh(edges, edges, roots, cmap="Blues", vmin=-0.2 * most, vmax=most)
    axes.set_box_aspect(1.0)


def _draw_overlaid(axes: Axes, class_ids: IntArray, boxes: DoubleArray) -> None:
    chosen = np.unique(np.linspace(0, len(boxes) - 1, min(OVERLAID, len(boxes))).astype(int))
    half_w, half_h = (boxes[chosen, 2:] / 2).T
    corners = np.stack([(-half_w, -half_h), (half_w, -half_h), (half_w, half_h), (-half_w, half_h)]).transpose(2, 0, 1)
    colours = np.array([class_colour(i)[::-1] for i in class_ids[chosen].tolist()]).reshape(-1, 3) / 255
    axes.add_collection(PolyCollection(corners, facecolors="none", edgecolors=colours, linewidths=0.7, alpha=0.6))
    axes.set(xlim=(-0.5, 0.5), ylim=(0.5, -0.5), xticks=[], yticks=[])
    axes.set_box_aspect(1.0)
    axes.spines[["top", "right"]].set_visible(True)
    axes.set_title(f"{len(chosen):,} boxes, centred in the image", loc="left", fontsize=10)


def _batch_cell(image: Image, targets: FloatArray, class_names: Sequence[str], cell_hw: tuple[int, int]) -> Image:
    """One image with its boxes, drawn after shrinking so that lines and names stay readable."""
    placed = replace(fit_letterbox((image.shape[0], image.shape[1]), cell_hw), shrink_by_area=True)
    centres, sizes = targets[:, 2:4], targets[:, 4:6]
    boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1) * np.tile(cell_hw[::-1], 2)
    class_ids = targets[:, 1].astype(int).tolist()
    names = [class_names[class_id] for class_id in class_ids]
    return draw_boxes(placed.apply(np.ascontiguousarray(image)), boxes, labels=names, class_ids=class_ids)


def _shortened(name: str) -> str:
    """A class name that fits beside a chart, in signs that the font has; what tells it from others is often its end."""
    text = drawable(name)
    return text if len(text) <= NAME_LENGTH else f"{text[: NAME_LENGTH - 9]}…{text[-8:]}"
