"""Charts of an evaluation: they can be drawn for any dataset, and show the values they are given."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from matplotlib.colors import to_hex

from tests.support.figures import figure_of, is_all_inside, line_of
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.datasets.coco import COCO_NAMES
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.errors import UsageError
from yolov7_deploy.evaluation import plots
from yolov7_deploy.evaluation.confusion import ConfusionMatrix
from yolov7_deploy.evaluation.plots import draw_confusion_matrix, draw_examples, draw_precision_recall
from yolov7_deploy.evaluation.precision_recall import RECALL, OperatingPoint, PrecisionRecall
from yolov7_deploy.visualize import class_colour


def curves_of(classes, missing=(), best=None):
    precision = np.clip(1.2 - RECALL ** np.linspace(1, 5, classes)[:, None], 0, 1)
    precision[list(missing)] = np.nan
    return PrecisionRecall(recall=RECALL, precision=precision, best=best)


BEST = OperatingPoint(confidence=0.342, precision=0.81, recall=0.72, f1=0.761)
CURVES = {
    "one": curves_of(1, best=BEST),
    "twenty": curves_of(20, best=BEST),
    "eighty": curves_of(80, missing=range(5), best=BEST),
    "nothing found": PrecisionRecall(recall=RECALL, precision=np.zeros((3, 101)), best=None),
    "nothing to find": curves_of(2, missing=(0, 1)),
}


@pytest.mark.parametrize("name", CURVES)
def test_all_curves_have_a_chart_and_nothing_is_clipped(name):
    names = (*COCO_NAMES[:18], "a class with a very very long name", "猫 $x$", *COCO_NAMES[20:])
    assert is_all_inside(figure_of(plots._curves_figure, CURVES[name], names))


def legend_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_up_to_twenty_classes_have_a_curve_in_the_colour_of_their_boxes():
    curves = curves_of(20, missing=(0,), best=BEST)
    figure = figure_of(plots._curves_figure, curves, COCO_NAMES[:20])
    texts = legend_of(figure)
    assert texts[0] == f"mean of 19 classes: AP50 {curves.mean_precision.mean():.3f}"
    assert texts[1] == "best F1 0.761, at confidence 0.342:\nprecision 0.810, recall 0.720"
    assert texts[2] == f"bicycle {curves.ap50[1]:.3f}" and len(texts) == 2 + 19
    line = line_of(figure.axes[0], texts[2])
    assert to_hex(line.get_color()) == "#{2:02x}{1:02x}{0:02x}".format(*class_colour(1))
    np.testing.assert_array_equal(line.get_ydata(), curves.precision[1])


def test_more_classes_are_shown_as_a_band():
    figure = figure_of(plots._curves_figure, CURVES["eighty"], COCO_NAMES)
    assert legend_of(figure)[2:] == ["classes between the quartiles"]
    assert legend_of(figure)[0].startswith("mean of 75 classes")


def test_a_single_class_is_shown_as_the_mean():
    assert [text.partition(":")[0] for text in legend_of(figure_of(plots._curves_figure, CURVES["one"], ["cat"]))] == [
        "cat",
        "best F1 0.761, at confidence 0.342",
    ]


def test_curves_of_equal_f1_have_that_f1():
    (line, *_) = figure_of(plots._curves_figure, CURVES["one"], ["cat"]).axes[0].get_lines()
    recall, precision = line.get_data()
    np.testing.assert_allclose(2 * precision * recall / (precision + recall), plots.EQUAL_F1[0])


def confusion_of(classes, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.3, (classes + 1, classes + 1)) + np.diag(rng.integers(0, 90, classes + 1))
    counts[-1, -1] = 0
    return ConfusionMatrix(counts=counts, class_names=tuple(f"class number {i}" for i in range(classes)))


CONFUSIONS = {
    "one": confusion_of(1),
    "three": confusion_of(3),
    "twenty": confusion_of(20),
    "eighty": confusion_of(80),
    "hundreds": confusion_of(300),
    "nothing": ConfusionMatrix(counts=np.zeros((3, 3), np.int64), class_names=("cat", "猫 $x$")),
}


@pytest.mark.parametrize("name", CONFUSIONS)
def test_every_confusion_matrix_has_a_chart_and_nothing_is_clipped(name):
    figure = figure_of(plots._confusion_figure, CONFUSIONS[name])
    assert is_all_inside(figure)
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ("background" in names) == (name != "hundreds")


def test_cells_of_a_confusion_matrix_have_fraction_and_count():
    counts = np.array([[6, 1, 2], [2, 3, 0], [0, 0, 0]])
    axes = figure_of(plots._confusion_figure, ConfusionMatrix(counts=counts, class_names=("cat", "dog"))).axes[0]
    texts = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert texts == {
        (0, 0): "0.75\n6",
        (1, 0): "0.25\n2",
        (0, 1): "0.25\n1",
        (1, 1): "0.75\n3",
        (0, 2): "2",
    }


@pytest.mark.parametrize("draw", ["curves", "confusion"])
def test_charts_are_deterministic(tmp_path, draw):
    def write(path):
        if draw == "curves":
            draw_precision_recall(CURVES["one"], COCO_NAMES, path)
        else:
            draw_confusion_matrix(CONFUSIONS["three"], path)
        return path.read_bytes()

    assert write(tmp_path / "a.png") == write(tmp_path / "b.png")


def test_a_chart_that_cannot_be_written_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="is a PNG"):
        draw_confusion_matrix(CONFUSIONS["one"], tmp_path / "a.jpg")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, train=1, val=12, size=96, seed=3)
    return open_dataset(folder / "shapes.yaml")


def perfect(dataset):
    """Return the objects of a dataset as detections."""
    annotations = dataset.ground_truth(range(len(dataset)))["annotations"]
    return [{name: row[name] for name in ("image_id", "category_id", "bbox")} | {"score": 0.8} for row in annotations]


def test_examples_have_labels_at_the_left_and_predictions_at_the_right(shapes, tmp_path):
    draw_examples(shapes, [], tmp_path / "none.png")
    draw_examples(shapes, perfect(shapes), tmp_path / "all.png")
    none, full = (cv2.imread(str(tmp_path / name)) for name in ("none.png", "all.png"))
    assert none.shape == full.shape and none.shape[0] == none.shape[1] <= plots.MAX_PIXELS
    step = (none.shape[1] + plots.GAP) // plots.EXAMPLE_COLUMNS
    for column in range(plots.EXAMPLE_COLUMNS):
        cell = np.s_[:, column * step : (column + 1) * step - plots.GAP]
        assert (none[cell] != full[cell]).any() == (column % 2 == 1)


def test_examples_leave_out_images_that_cannot_be_read(tmp_path):
    write_shapes(tmp_path, train=1, val=3, size=96, seed=3)
    (tmp_path / "images/val/000001.png").write_text("no image")
    dataset = open_dataset(tmp_path / "shapes.yaml")
    draw_examples(dataset, [], tmp_path / "examples.png")
    assert cv2.imread(str(tmp_path / "examples.png")) is not None


def test_weak_detections_are_not_drawn(shapes, tmp_path):
    weak = [row | {"score": 0.25} for row in perfect(shapes)]
    draw_examples(shapes, [], tmp_path / "a.png")
    draw_examples(shapes, weak, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
