"""Charts of a training run: they can be drawn for any run and dataset, and show the values they are given."""

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.support.figures import figure_of, is_all_inside, line_of
from yolov7_deploy.datasets.coco import COCO_NAMES
from yolov7_deploy.errors import ImageError, UsageError
from yolov7_deploy.evaluation.plots import GAP, MAX_PIXELS
from yolov7_deploy.training import plots
from yolov7_deploy.training.loggers import EpochRecord
from yolov7_deploy.training.plots import draw_batch, draw_labels, draw_results
from yolov7_deploy.training.sample import Batch
from yolov7_deploy.visualize import class_colour

HALF_PIXEL = 0.51  # lines are at integer pixels


def record(epoch, ap=None, **changes):
    values = {
        "epoch": epoch,
        "box": 0.07 / (1 + epoch),
        "obj": 0.03 / (1 + epoch),
        "cls": 0.05 / (1 + epoch),
        "total": 0.15 / (1 + epoch),
        "positives": 100.0,
        "size": 640,
        "ap": ap,
        "ap50": None if ap is None else 1.3 * ap,
        "precision": None if ap is None else 0.9 * ap,
        "recall": None if ap is None else 0.6 * ap,
        "lr_norm": 0.01,
        "lr_weight": 0.01,
        "lr_bias": 0.1 - 0.01 * min(epoch, 9),
        "momentum": 0.937,
        "images_per_s": 140.0,
        "seconds": 800.0,
    }
    return EpochRecord(**(values | changes))


def some_labels(classes, count=200, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0.01, 0.9, (count, 2))
    return rng.integers(0, classes, count), np.concatenate([rng.uniform(0.1, 0.9, (count, 2)), sizes], axis=1)


RUNS = {
    "long": [record(e, 0.5 * (1 - math.exp(-e / 60)), ap_small=0.2, ap_large=0.6) for e in range(300)],
    "one epoch": [record(0, 0.01)],
    "never validated": [record(e) for e in range(5)],
    "validated sometimes": [record(e, 0.01 * e if e % 5 == 4 else None) for e in range(12)],
    "nothing found": [record(e, 0.0, lr_norm=0.0, lr_weight=0.0, lr_bias=0.0) for e in range(3)],
    "diverged": [record(e, box=math.nan, cls=math.inf if e > 2 else 0.1) for e in range(6)],
    "resumed": [record(e, 0.3 + 0.01 * e) for e in range(7, 12)],
    "empty": [],
}


@pytest.mark.parametrize("name", RUNS)
def test_every_run_has_a_chart_with_integer_epochs_and_nothing_is_clipped(name):
    figure = figure_of(plots._results_figure, RUNS[name])
    assert is_all_inside(figure)
    ticks = [label.get_text() for axes in figure.axes for label in axes.get_xticklabels()]
    assert ticks and all(tick.lstrip("−-").isdigit() for tick in ticks)


def test_a_chart_is_an_image_in_a_new_folder(tmp_path):
    draw_results(RUNS["resumed"], tmp_path / "new" / "results.png")
    image = cv2.imread(str(tmp_path / "new" / "results.png"))
    assert image.shape[1] == 16.5 * plots.DPI and image.std() > 5


def test_a_line_shows_the_values_of_its_column():
    figure = figure_of(plots._results_figure, RUNS["validated sometimes"])
    box, _, _, rates, ap, _, best, speed = figure.axes
    assert box.get_lines()[0].get_ydata().tolist() == [0.07 / (1 + e) for e in range(12)]
    assert line_of(ap, "IoU 0.50:0.95").get_xdata().tolist() == [4, 9]
    assert line_of(ap, "IoU 0.50").get_ydata().tolist() == pytest.approx([0.052, 0.117])
    assert line_of(best, "recall").get_ydata().tolist() == pytest.approx([0.024, 0.054])
    assert line_of(best, "precision").get_ydata().tolist() == pytest.approx([0.036, 0.081])
    assert speed.get_lines()[0].get_ydata().tolist() == [140.0] * 12
    assert line_of(rates, "biases").get_ydata()[0] == 0.1 and rates.get_yscale() == "log"


def test_the_highest_ap_is_marked_at_its_first_epoch():
    ap = figure_of(plots._results_figure, [record(e, v) for e, v in enumerate([0.1, 0.4, 0.4, 0.2])]).axes[4]
    assert [text.get_text() for text in ap.texts] == ["best 0.400\nepoch 1"]


def test_nan_is_a_gap_and_missing_values_are_labelled():
    figure = figure_of(plots._results_figure, RUNS["diverged"])
    box, objectness, classes, _, ap, *_ = figure.axes
    assert [text.get_text() for text in box.texts + ap.texts] == ["not measured"] * 2
    assert np.isnan(classes.get_lines()[0].get_ydata()).tolist() == [False] * 3 + [True] * 3
    assert not objectness.texts


def test_a_legend_has_no_line_that_is_not_drawn():
    records = [record(e, 0.3, ap_small=None, ap_medium=0.2, ap_large=0.6) for e in range(3)]
    sizes = figure_of(plots._results_figure, records).axes[5]
    assert {text.get_text() for text in sizes.get_legend().get_texts()} == {"medium", "large"}


DATASETS = {
    "none": (np.zeros(0, np.int64), np.zeros((0, 4)), ("cat", "猫")),
    "one": (*some_labels(1, 1), ("cat",)),
    "three": (*some_labels(3), ("ripe strawberry", "unripe strawberry", "leaf")),
    "twenty with long names": (*some_labels(19), [f"a very long name of class no. {i}" for i in range(20)]),
    "eighty": (*some_labels(77, 5000), COCO_NAMES),
    "hundreds": (*some_labels(1203, 5000), [f"class {i}" for i in range(1203)]),
    "no classes": (np.zeros(0, np.int64), np.zeros((0, 4)), ()),
    "points": (np.zeros(3, np.int64), np.tile([0.5, 0.5, 0.0, 0.0], (3, 1)), ("point",)),
    "one frequent class": (np.repeat([0, 1, 2], [1, 500, 3]), some_labels(1, 504)[1], ("a", "b", "c")),
}


@pytest.mark.parametrize("name", DATASETS)
def test_all_labels_have_a_chart_without_clipped_or_touching_names(name):
    figure = figure_of(plots._labels_figure, *DATASETS[name])
    assert is_all_inside(figure)
    labels = figure.axes[0].get_xticklabels()
    extents = [label.get_window_extent() for label in labels]
    assert all(left.x1 <= right.x0 + 1 for left, right in pairwise(extents))
    assert len({label.get_text() for label in labels}) == len(labels), "shortened names must be different"


def test_bars_show_the_box_counts_and_empty_classes_are_orange():
    class_ids, boxes, names = DATASETS["eighty"]
    axes = figure_of(plots._labels_figure, class_ids, boxes, names).axes[0]
    counts = np.bincount(class_ids, minlength=80)
    assert [bar.get_height() for bar in axes.patches] == counts.tolist()
    orange = [label.get_text() for label in axes.get_xticklabels() if label.get_color() == plots.ORANGE]
    assert orange == [name for name, count in zip(names, counts, strict=True) if count == 0] and len(orange) >= 3
    assert axes._left_title.get_text().startswith("5,000 boxes in 77 of 80 classes")


@pytest.mark.parametrize("name, scale", [("three", "linear"), ("one frequent class", "log")])
def test_the_axis_is_logarithmic_if_counts_differ_much(name, scale):
    assert figure_of(plots._labels_figure, *DATASETS[name]).axes[0].get_yscale() == scale


def test_heat_maps_count_every_box_in_its_bin():
    boxes = np.array([[0.1, 0.9, 0.3, 0.02], [0.1, 0.9, 0.3, 0.02], [0.9, 0.1, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    figure = figure_of(plots._labels_figure, np.zeros(4, np.int64), boxes, ["cat"])
    centres, sizes = (np.nan_to_num(figure.axes[i].collections[0].get_array()) ** 2 for i in (1, 2))
    centres, sizes = centres.round(9), sizes.round(9)
    bins = plots.BINS
    assert centres.sum() == sizes.sum() == 4
    assert centres[int(0.9 * bins), int(0.1 * bins)] == 2 and centres[-1, -1] == 1
    assert sizes[0, 0] == sizes[-1, -1] == 1
    edges = np.geomspace(plots.MIN_BOX_SIZE, 1, bins + 1)
    assert sizes[np.searchsorted(edges, 0.02) - 1, np.searchsorted(edges, 0.3) - 1] == 2


def test_a_sample_of_many_boxes_is_overlaid():
    boxes = np.linspace([0.5, 0.5, 0.1, 0.1], [0.5, 0.5, 0.9, 0.5], 5000)
    overlaid = figure_of(plots._labels_figure, np.zeros(5000, np.int64), boxes, ["cat"]).axes[3].collections[0]
    sizes = np.array([path.get_extents().size for path in overlaid.get_paths()])
    assert len(sizes) == plots.MAX_OVERLAID
    np.testing.assert_allclose(sizes[[0, -1]], [[0.1, 0.1], [0.9, 0.5]])


@pytest.mark.parametrize("draw", ["results", "labels"])
def test_charts_are_deterministic(tmp_path, draw):
    def write(path):
        if draw == "results":
            draw_results(RUNS["one epoch"], path)
        else:
            class_ids, boxes, names = DATASETS["three"]
            draw_labels(class_ids, boxes.astype(np.float32), names, path)
        return path.read_bytes()

    assert write(tmp_path / "a.png") == write(tmp_path / "b.png")


def test_a_chart_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in [(tmp_path / "a.jpg", "is a PNG"), (tmp_path / "file" / "a.png", "cannot be written")]:
        with pytest.raises(UsageError, match=reason):
            draw_results(RUNS["one epoch"], path)


def batch_of(images, targets=()):
    images = torch.from_numpy(np.stack(images))
    targets = torch.tensor(targets, dtype=torch.float32).reshape(-1, 6)
    return Batch(images=images, targets=targets, paths=tuple(Path(f"{i}.jpg") for i in range(len(images))))


def shades(count, hw=(100, 80)):
    """Return RGB images with one colour each."""
    return [np.full((*hw, 3), (10 * i, 40, 200), np.uint8) for i in range(count)]


def drawn(tmp_path, batch, names=("cat", "dog"), **options):
    draw_batch(batch, names, tmp_path / "batch.png", **options)
    return cv2.imread(str(tmp_path / "batch.png"))


@pytest.mark.parametrize("count, columns, rows", [(1, 1, 1), (2, 2, 1), (3, 2, 2), (5, 3, 2), (16, 4, 4)])
def test_images_of_a_batch_are_in_a_grid_with_their_colours(tmp_path, count, columns, rows):
    grid = drawn(tmp_path, batch_of(shades(count)))
    step_y, step_x = 100 + GAP, 80 + GAP
    assert grid.shape == (rows * step_y - GAP, columns * step_x - GAP, 3)
    for index in range(columns * rows):
        top, left = index // columns * step_y, index % columns * step_x
        expected = (200, 40, 10 * index) if index < count else (255, 255, 255)
        assert (grid[top : top + 100, left : left + 80] == expected).all()


def test_at_most_max_images_are_drawn(tmp_path):
    batch = batch_of(shades(9), [[8, 0, 0.5, 0.5, 0.5, 0.5]])
    assert drawn(tmp_path, batch, max_images=4).shape == (2 * 100 + GAP, 2 * 80 + GAP, 3)
    assert drawn(tmp_path, batch).shape == (3 * 104 - GAP, 3 * 84 - GAP, 3)


def test_large_images_are_reduced_and_keep_their_aspect_ratio(tmp_path):
    grid = drawn(tmp_path, batch_of(shades(9, hw=(1280, 640))))
    assert MAX_PIXELS - 20 < grid.shape[0] <= MAX_PIXELS
    assert grid.shape[1] == pytest.approx(grid.shape[0] / 2, abs=8)
    assert (grid[:600, :310] == (200, 40, 0)).all(), "no border is added"


def test_boxes_are_drawn_at_their_targets_and_on_their_image_only(tmp_path):
    images = [np.zeros((200, 400, 3), np.uint8)] * 2
    grid = drawn(tmp_path, batch_of(images, [[1, 1, 0.5, 0.5, 0.25, 0.6]]), names=("cat", ""))
    first, second = grid[:, :400], grid[:, 400 + GAP :]
    assert not first.any()
    ys, xs = np.nonzero((second == class_colour(1)).all(-1))
    corners = np.array([xs.min(), ys.min(), xs.max(), ys.max()])
    np.testing.assert_allclose(corners, [150, 40, 250, 160], atol=HALF_PIXEL)


def test_a_box_has_the_name_of_its_class(tmp_path):
    batch = batch_of([np.zeros((200, 400, 3), np.uint8)], [[0, 1, 0.5, 0.5, 0.25, 0.5]])
    named, unnamed = drawn(tmp_path, batch), drawn(tmp_path, batch, names=("", ""))
    assert (named != unnamed).any(-1).sum() > 200


def test_a_batch_is_not_changed_by_drawing_it(tmp_path):
    batch = batch_of(shades(2), [[0, 0, 0.5, 0.5, 0.5, 0.5]])
    before = dataclasses.replace(batch, images=batch.images.clone(), targets=batch.targets.clone())
    drawn(tmp_path, batch)
    assert torch.equal(batch.images, before.images) and torch.equal(batch.targets, before.targets)


def test_a_batch_in_an_unknown_format_is_an_image_error(tmp_path):
    with pytest.raises(ImageError, match="cannot write"):
        draw_batch(batch_of(shades(1)), ("cat",), tmp_path / "batch.unknown")
