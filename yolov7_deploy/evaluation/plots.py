"""Charts of an evaluation: precision-recall curves, the confusion matrix, and images with labels and predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from yolov7_deploy._charts import GREY, replace_missing_glyphs, write_chart
from yolov7_deploy._text import get_logger
from yolov7_deploy.datasets import Dataset, Sample
from yolov7_deploy.errors import ImageError
from yolov7_deploy.evaluation.confusion import CONF, ConfusionMatrix, best_of_each_box
from yolov7_deploy.evaluation.precision_recall import PrecisionRecall
from yolov7_deploy.image import FloatArray, Image, fit_letterbox, read_image
from yolov7_deploy.visualize import class_colour, draw_boxes, write_image

if TYPE_CHECKING:
    from yolov7_deploy.evaluation.accuracy import AccuracyReport

logger = get_logger(__name__)

DPI = 110
CURVES_SIZE = (9.5, 6.2)  # inches
# Wong's palette (Nature Methods 8, 441, 2011), which is safe for colour-blind readers.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
MAX_CURVES = 20  # classes up to which each one has a curve
NAME_LENGTH = 22  # characters of a class name
DASHES = ("-", "--", ":")  # colours repeat after 8 classes
EQUAL_F1 = (0.2, 0.4, 0.6, 0.8)
MAX_NUMBERED = 25  # classes up to which the cells of the confusion matrix have numbers
MAX_NAMED = 100  # classes up to which its rows and columns have names
MAX_PIXELS = 1920  # longer side of an image of a grid
GAP = 4  # pixels between the images of a grid
EXAMPLES = 8  # images that are drawn with labels and predictions
EXAMPLE_COLUMNS = 4

CURVES_NAME, CONFUSION_NAME, EXAMPLES_NAME = "precision_recall.png", "confusion_matrix.png", "val_examples.jpg"


def draw_evaluation(report: AccuracyReport, dataset: Dataset, folder: Path) -> tuple[Path, ...]:
    """Write the charts of an evaluation into a folder, and return their paths.

    Raises:
        UsageError: A file cannot be written.
        ImageError: The image of the examples cannot be written.
    """
    assert report.curves is not None and report.confusion is not None, "evaluate sets both"
    draw_precision_recall(report.curves, dataset.class_names, folder / CURVES_NAME)
    draw_confusion_matrix(report.confusion, folder / CONFUSION_NAME)
    draw_examples(dataset, report.predictions, folder / EXAMPLES_NAME)
    return tuple(folder / name for name in (CURVES_NAME, CONFUSION_NAME, EXAMPLES_NAME))


def draw_precision_recall(curves: PrecisionRecall, class_names: Sequence[str], path: Path) -> None:
    """Write a PNG of the precision-recall curve at IoU 0.50: the mean, up to 20 classes, and the best F1.

    With more classes it shows the band between the quartiles. Classes without boxes do not have a curve.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    write_chart(lambda: _curves_figure(curves, class_names), path, dpi=DPI)


def draw_confusion_matrix(confusion: ConfusionMatrix, path: Path) -> None:
    """Write a PNG of the confusion matrix: fractions of the objects of each true class, with their counts.

    Raises:
        UsageError: The name does not end in .png, or the file cannot be written.
    """
    write_chart(lambda: _confusion_figure(confusion), path, dpi=DPI)


def draw_examples(dataset: Dataset, predictions: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write an image with samples of the dataset: labels at the left, predictions with their scores at the right.

    The samples are evenly spaced among those with objects or predictions. Unreadable images are left out.

    Args:
        dataset: The dataset.
        predictions: Detections in COCO results format; those above `CONF` are drawn.
        path: The suffix determines the format.

    Raises:
        ImageError: OpenCV cannot write the format, or the file cannot be written.
    """
    by_image = best_of_each_box(predictions)
    class_of = {category: class_id for class_id, category in enumerate(dataset.category_ids)}
    every = list(range(len(dataset)))
    indices = [i for i in every if len(dataset.record(i).labels.boxes) or dataset.image_id(i) in by_image] or every
    chosen = np.unique(np.linspace(0, len(indices) - 1, min(EXAMPLES, len(indices))).astype(int))
    cell_hw = _cell_hw(math.ceil(2 * len(chosen) / EXAMPLE_COLUMNS), EXAMPLE_COLUMNS, (MAX_PIXELS, MAX_PIXELS))
    cells: list[Image] = []
    for index in (indices[number] for number in chosen.tolist()):
        try:
            image, sample = read_image(dataset.path(index)), dataset[index]
        except ImageError as error:
            logger.info("not drawn: %s", error.message)
            continue
        cells.append(_labels_cell(image, sample, dataset.class_names, cell_hw))
        rows = by_image.get(dataset.image_id(index), [])
        cells.append(_predictions_cell(image, rows, class_of, dataset.class_names, cell_hw))
    if cells:
        write_image(path, arrange_grid(cells, columns=EXAMPLE_COLUMNS))


def grid_cell_hw(count: int, image_hw: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Return height and width of the cells of a grid that is about square, and its number of columns."""
    columns = math.ceil(math.sqrt(count))
    return _cell_hw(math.ceil(count / columns), columns, image_hw), columns


def _cell_hw(rows: int, columns: int, image_hw: tuple[int, int]) -> tuple[int, int]:
    """Return the size of cells that are not larger than the image, in a grid of at most `MAX_PIXELS` per side."""
    max_h, max_w = ((MAX_PIXELS + GAP) / number - GAP for number in (rows, columns))
    scale = min(1.0, max_h / image_hw[0], max_w / image_hw[1])
    return max(1, int(image_hw[0] * scale)), max(1, int(image_hw[1] * scale))


def arrange_grid(cells: Sequence[Image], *, columns: int) -> Image:
    """Return one image with cells of equal size, row by row, on white."""
    height, width = cells[0].shape[:2]
    rows, columns = math.ceil(len(cells) / columns), min(columns, len(cells))
    step_y, step_x = height + GAP, width + GAP
    sheet: Image = np.full((rows * step_y - GAP, columns * step_x - GAP, 3), 255, dtype=np.uint8)
    for index, cell in enumerate(cells):
        top, left = index // columns * step_y, index % columns * step_x
        sheet[top : top + height, left : left + width] = cell
    return sheet


def draw_cell(
    image: Image, boxes_xyxy: FloatArray, labels: Sequence[str], class_ids: Sequence[int], cell_hw: tuple[int, int]
) -> Image:
    """Return an image with boxes, in a cell; they are drawn after resizing so that lines and names remain readable."""
    letterbox = replace(fit_letterbox((image.shape[0], image.shape[1]), cell_hw), shrink_by_area=True)
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4) * letterbox.gain + np.tile(letterbox.offset_xy, 2)
    return draw_boxes(letterbox.apply(image), boxes.astype(np.float32), labels=labels, class_ids=class_ids)


def _labels_cell(image: Image, sample: Sample, class_names: Sequence[str], cell_hw: tuple[int, int]) -> Image:
    class_ids = sample.class_ids.tolist()
    names = [class_names[i] + " (crowd)" * crowd for i, crowd in zip(class_ids, sample.crowd.tolist(), strict=True)]
    return draw_cell(image, sample.boxes, names, class_ids, cell_hw)


def _predictions_cell(
    image: Image,
    rows: Sequence[Mapping[str, Any]],
    class_of: Mapping[int | str, int],
    class_names: Sequence[str],
    cell_hw: tuple[int, int],
) -> Image:
    class_ids = [class_of[row["category_id"]] for row in rows]
    labels = [f"{class_names[i]} {row['score']:.2f}" for i, row in zip(class_ids, rows, strict=True)]
    boxes = np.array([row["bbox"] for row in rows], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return draw_cell(image, boxes, labels, class_ids, cell_hw)


def _confusion_figure(confusion: ConfusionMatrix) -> Figure:
    names = [shorten(name) for name in confusion.labels]
    side = min(4.5 + 0.42 * len(names), 15.0)
    figure = Figure(figsize=(side + 1.0, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = confusion.normalized
    colours = LinearSegmentedColormap.from_list("blue", ("#FFFFFF", BLUE))
    # Square root, so that rare confusions are visible.
    drawn = axes.pcolormesh(np.sqrt(np.nan_to_num(shares)), cmap=colours, vmin=0.0, vmax=1.0)
    axes.set(xlim=(0, len(names)), ylim=(len(names), 0), xlabel="true class", ylabel="predicted class")
    axes.set_aspect("equal")
    axes.set_title(f"Confusion matrix at conf {CONF:g}, in fractions of each true class", loc="left", fontsize=10)
    positions = np.arange(len(names)) + 0.5
    if len(names) <= MAX_NAMED + 1:
        size = 8 if len(names) <= MAX_NUMBERED + 1 else 5
        axes.set_xticks(positions, names, rotation=90, fontsize=size)
        axes.set_yticks(positions, names, fontsize=size)
    if len(names) <= MAX_NUMBERED + 1:
        _write_numbers(axes, confusion, shares)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.6, ticks=np.sqrt((0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)))
    bar.ax.set_yticklabels(["0", "1 %", "5 %", "10 %", "25 %", "50 %", "100 %"], fontsize=8)
    background = len(names) - 1
    axes.axhline(background, color=GREY, linewidth=0.8)
    axes.axvline(background, color=GREY, linewidth=0.8)
    return figure


def _write_numbers(axes: Axes, confusion: ConfusionMatrix, shares: np.ndarray[Any, Any]) -> None:
    """Write fraction and count into each cell; detections without an object are not a fraction of objects."""
    has_space = len(shares) <= MAX_NUMBERED // 2
    for row, column in np.argwhere(confusion.counts > 0).tolist():
        share, count = shares[row, column], f"{confusion.counts[row, column]:,}"
        is_extra = column == len(shares) - 1
        axes.text(
            column + 0.5,
            row + 0.5,
            count if is_extra else f"{share:.2f}\n{count}" if has_space else f"{share:.2f}",
            ha="center",
            va="center",
            fontsize=8 if has_space else 6.5,
            color="white" if share > 0.35 else "black",
        )


def _curves_figure(curves: PrecisionRecall, class_names: Sequence[str]) -> Figure:
    figure = Figure(figsize=CURVES_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_equal_f1(axes)
    measured = np.flatnonzero(curves.measured)
    if not measured.size:
        write_in_centre(axes, "no class has boxes")
    elif measured.size <= MAX_CURVES:
        _draw_classes(axes, curves, class_names, measured.tolist())
    else:
        low, high = np.quantile(curves.precision[measured], (0.25, 0.75), axis=0)
        label = "classes between the quartiles"
        axes.fill_between(curves.recall, low, high, color="#CFE3F0", linewidth=0.0, zorder=0.5, label=label)
    if measured.size:
        mean = curves.mean_precision
        name = f"mean of {measured.size} classes" if measured.size > 1 else shorten(class_names[measured[0]])
        label = f"{name}: AP50 {mean.mean():.3f}"
        axes.plot(curves.recall, mean, color=BLUE, linewidth=3.2, zorder=4, label=label)
    if curves.best is not None:
        best = curves.best
        label = f"best F1 {best.f1:.3f}, at confidence {best.confidence:.3f}:"
        label += f"\nprecision {best.precision:.3f}, recall {best.recall:.3f}"
        axes.plot([best.recall], [best.precision], "o", color=ORANGE, markersize=9, zorder=5, label=label)
    axes.set(xlim=(0.0, 1.0), ylim=(0.0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title("Precision and recall at IoU 0.50", loc="left", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    if handles:  # mean and best point were added last; list them first
        first = 1 + (curves.best is not None)
        order = [*handles[-first:], *handles[:-first]], [*labels[-first:], *labels[:-first]]
        figure.legend(*order, loc="outside right upper", borderaxespad=1.0)
    return figure


def _draw_equal_f1(axes: Axes) -> None:
    """Draw the curves of equal F1: P = F R / (2 R - F)."""
    for f1 in EQUAL_F1:
        recall = np.linspace(f1 / 2 + 1e-3, 1.0, 400)
        axes.plot(recall, f1 * recall / (2 * recall - f1), color="#C8C8C8", linewidth=0.7, zorder=1)
        axes.text(1.01, f1 / (2 - f1), f"F1 {f1:g}", fontsize=7, color="#888888", ha="left", va="center")


def _draw_classes(axes: Axes, curves: PrecisionRecall, class_names: Sequence[str], measured: Sequence[int]) -> None:
    for class_id in measured if len(measured) > 1 else ():  # a single class is the mean
        blue, green, red = class_colour(class_id)
        name = shorten(class_names[class_id])
        axes.plot(
            curves.recall,
            curves.precision[class_id],
            color=(red / 255, green / 255, blue / 255),
            linewidth=1.2,
            linestyle=DASHES[class_id // 8 % len(DASHES)],
            zorder=3,
            label=f"{name} {curves.ap50[class_id]:.3f}",
        )


def shorten(name: str) -> str:
    """Return a class name that fits next to a chart; the end is kept, because similar names often differ there."""
    text = replace_missing_glyphs(name)
    return text if len(text) <= NAME_LENGTH else f"{text[: NAME_LENGTH - 9]}…{text[-8:]}"


def write_in_centre(axes: Axes, text: str) -> None:
    """Write a text in the centre of an empty chart."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
