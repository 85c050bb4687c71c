"""Charts of a training run: labels, a batch, and losses, AP and speed over the epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from yolov7_deploy._charts import write_chart
from yolov7_deploy.datasets.samples import DoubleArray, IntArray
from yolov7_deploy.evaluation.plots import (
    BLUE,
    DPI,
    GREEN,
    ORANGE,
    arrange_grid,
    draw_cell,
    grid_cell_hw,
    shorten,
    write_in_centre,
)
from yolov7_deploy.image import FloatArray, Image
from yolov7_deploy.training.loggers import EpochRecord
from yolov7_deploy.visualize import class_colour, write_image

if TYPE_CHECKING:
    from yolov7_deploy.training.sample import Batch

RESULTS_SIZE, LABELS_SIZE = (16.5, 6.8), (13.0, 8.2)  # inches
GRID = "#E6E6E6"
MAX_MARKERS = 30  # epochs up to which each one has a marker
MAX_NAMED_CLASSES = 100  # classes up to which bars have names
MAX_COUNTED_CLASSES = 30  # classes up to which bars show their count
LOG_SCALE_RATIO = 50  # the count axis is logarithmic if the most frequent class has this many times as many boxes
BINS = 60
MIN_BOX_SIZE = 1 / 512  # start of the axes for width and height; one or two pixels of the image
MAX_OVERLAID = 400  # boxes drawn over each other

# Panels: title, and lines as (column, name, colour, width).
Lines = tuple[tuple[str, str, str, float], ...]
LOSSES: tuple[tuple[str, Lines], ...] = (
    ("box loss", (("box", "", BLUE, 1.6),)),
    ("objectness loss", (("obj", "", BLUE, 1.6),)),
    ("class loss", (("cls", "", BLUE, 1.6),)),
)
# Norms and weights usually have the same learning rate: the wider line is visible on both sides of the other.
RATES: Lines = (
    ("lr_bias", "biases", ORANGE, 1.6),
    ("lr_norm", "norms", "#9ECAE1", 4.5),
    ("lr_weight", "weights", BLUE, 1.6),
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
    ("at the best F1", (("precision", "precision", ORANGE, 1.6), ("recall", "recall", BLUE, 1.6))),
    ("images per second", (("images_per_s", "", BLUE, 1.6),)),
)


def draw_results(records: Sequence[EpochRecord], path: Path) -> None:
    """Write a PNG with losses, learning rates, AP, precision, recall and speed over the epochs, one panel each.

    Values that are `None` or not finite leave gaps. The same records give the same bytes. The file is written
    atomically, and missing folders are created.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    write_chart(lambda: _results_figure(records), path, dpi=DPI)


def draw_labels(class_ids: IntArray, boxes: FloatArray | DoubleArray, class_names: Sequence[str], path: Path) -> None:
    """Write a PNG with the number of boxes per class, and positions, sizes and a sample of the boxes.

    Args:
        class_ids: int64 [N].
        boxes: [N, 4], centre x, centre y, width, height as fractions of the image.
        class_names: In class-id order; classes without boxes have another colour.
        path: The chart; it is written atomically, and missing folders are created.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    write_chart(lambda: _labels_figure(class_ids, boxes, class_names), path, dpi=DPI)


def draw_batch(batch: Batch, class_names: Sequence[str], path: Path, *, max_images: int = 16) -> None:
    """Write an image with the first images of a batch in a grid, with their targets.

    It has up to 1920 pixels per side; the suffix determines the format.

    Raises:
        ImageError: OpenCV cannot write the format, or the file cannot be written.
    """
    images = batch.images[:max_images].cpu().numpy()[..., ::-1]
    targets = batch.targets.cpu().numpy()
    height, width = images.shape[1:3]
    cell_hw, columns = grid_cell_hw(len(images), (height, width))
    cells = [
        _batch_cell(image, targets[targets[:, 0] == index], class_names, cell_hw) for index, image in enumerate(images)
    ]
    write_image(path, arrange_grid(cells, columns=columns))


def _results_figure(records: Sequence[EpochRecord]) -> Figure:
    figure = Figure(figsize=RESULTS_SIZE, layout="constrained")
    FigureCanvasAgg(figure)  # attaches itself to the figure
    panels: list[Axes] = figure.subplots(2, 4).ravel().tolist()
    for axes, (title, lines) in zip(panels, (*LOSSES, ("learning rate", RATES), *PRECISION), strict=True):
        _draw_panel(axes, records, title, lines)
    rates, below = panels[3], panels[4:]
    _mark_best(below[0], records)
    for axes in below:
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel("epoch")
    if any(getattr(record, name) > 0 for record in records for name, *_ in RATES):
        rates.set_yscale("log", nonpositive="mask")  # biases start ten times higher
        rates.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        rates.yaxis.set_minor_locator(NullLocator())
        rates.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def _mark_best(axes: Axes, records: Sequence[EpochRecord]) -> None:
    """Mark the highest AP, with a label on the side that has more space."""
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
        marker = "o" if len(epochs) <= MAX_MARKERS else ""
        has_values = bool(np.isfinite(values).any())
        label = name if has_values else "_nolegend_"  # such as the AP of small objects where there are none
        axes.plot(epochs, values, color=colour, linewidth=width, marker=marker, markersize=2 + width, label=label)
        drawn = drawn or has_values
    if not drawn:
        write_in_centre(axes, "not measured")
        axes.set_yticks([])
    elif len(lines) > 1:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.0, 1.02), ncols=len(lines), columnspacing=1.2, handlelength=1.4
        )


def _points(records: Sequence[EpochRecord], column: str) -> tuple[list[int], DoubleArray]:
    """Return epochs and values that are not `None`; values that are not finite become NaN, a gap."""
    known = [(r.epoch, value) for r in records if (value := getattr(r, column)) is not None]
    values = np.array([value for _, value in known], dtype=np.float64)
    return [epoch for epoch, _ in known], np.where(np.isfinite(values), values, np.nan)


def _labels_figure(class_ids: IntArray, boxes: DoubleArray, class_names: Sequence[str]) -> Figure:
    figure = Figure(figsize=LABELS_SIZE, layout="constrained")
    FigureCanvasAgg(figure)  # attaches itself to the figure
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.15))
    _draw_counts(figure.add_subplot(grid[0, :]), np.bincount(class_ids, minlength=len(class_names)), class_names)
    _draw_centres(figure.add_subplot(grid[1, 0]), boxes)
    _draw_sizes(figure.add_subplot(grid[1, 1]), boxes)
    _draw_overlaid(figure.add_subplot(grid[1, 2]), class_ids, boxes)
    return figure


def _draw_counts(axes: Axes, counts: IntArray, class_names: Sequence[str]) -> None:
    """Draw a bar for each class, or only the sorted distribution if there are too many."""
    empty = int((counts == 0).sum())
    title = f"{counts.sum():,} boxes in {len(counts) - empty:,} of {len(counts):,} classes"
    is_named = len(counts) <= MAX_NAMED_CLASSES
    positions = np.arange(len(counts))
    if is_named:
        bars = axes.bar(positions, counts, color=BLUE, width=min(0.15 + 0.07 * len(counts), 0.8))
        upright = max(map(len, class_names), default=0) * 0.075 > 0.9 * LABELS_SIZE[0] / max(len(counts), 1)  # inches
        axes.set_xticks(positions, [shorten(n) for n in class_names], rotation=90 if upright else 0, fontsize=8)
        for label, count in zip(axes.get_xticklabels(), counts, strict=True):
            label.set_color("black" if count else ORANGE)
        if empty:
            title += "; those without a box are orange"
        if len(counts) <= MAX_COUNTED_CLASSES:
            axes.bar_label(bars, [f"{count:,}" for count in counts], fontsize=8, padding=2)
    else:
        axes.fill_between(positions, -np.sort(-counts), color=BLUE, linewidth=0.0, step="mid")
        axes.set_xlabel("classes, most frequent first")
    if counts.any() and counts.max() > LOG_SCALE_RATIO * counts[counts > 0].min():
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
    edges = np.geomspace(MIN_BOX_SIZE, 1.0, BINS + 1)
    _draw_heat(axes, boxes[:, 2], boxes[:, 3], edges)
    limits = MIN_BOX_SIZE, 1.0
    axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits, xlabel="width", ylabel="height")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title("sizes, in fractions of the image", loc="left", fontsize=10)


def _draw_heat(axes: Axes, x: DoubleArray, y: DoubleArray, edges: DoubleArray) -> None:
    """Draw a 2-D histogram; colours show the square root of the counts, so that single boxes are visible."""
    inside = edges[0], edges[-1]
    counts = np.histogram2d(y.clip(*inside), x.clip(*inside), bins=(edges, edges))[0]
    roots = np.sqrt(np.where(counts > 0, counts, np.nan))
    highest = math.sqrt(max(counts.max(), 1.0))
    axes.pcolormesh(edges, edges, roots, cmap="Blues", vmin=-0.2 * highest, vmax=highest)
    axes.set_box_aspect(1.0)


def _draw_overlaid(axes: Axes, class_ids: IntArray, boxes: DoubleArray) -> None:
    chosen = np.unique(np.linspace(0, len(boxes) - 1, min(MAX_OVERLAID, len(boxes))).astype(int))
    half_w, half_h = (boxes[chosen, 2:] / 2).T
    corners = np.stack([(-half_w, -half_h), (half_w, -half_h), (half_w, half_h), (-half_w, half_h)]).transpose(2, 0, 1)
    colours = np.array([class_colour(i)[::-1] for i in class_ids[chosen].tolist()]).reshape(-1, 3) / 255
    axes.add_collection(PolyCollection(corners, facecolors="none", edgecolors=colours, linewidths=0.7, alpha=0.6))
    axes.set(xlim=(-0.5, 0.5), ylim=(0.5, -0.5), xticks=[], yticks=[])
    axes.set_box_aspect(1.0)
    axes.spines[["top", "right"]].set_visible(True)
    axes.set_title(f"{len(chosen):,} boxes, centred in the image", loc="left", fontsize=10)


def _batch_cell(image: Image, targets: FloatArray, class_names: Sequence[str], cell_hw: tuple[int, int]) -> Image:
    centres, sizes = targets[:, 2:4], targets[:, 4:6]
    boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1) * np.tile(image.shape[1::-1], 2)
    class_ids = targets[:, 1].astype(int).tolist()
    names = [class_names[class_id] for class_id in class_ids]
    return draw_cell(np.ascontiguousarray(image), boxes, names, class_ids, cell_hw)
