"""Label statistics of a dataset, compared with known counts."""

from pathlib import Path

import numpy as np
import pytest

from yolov7_deploy.datasets.samples import Dataset, Labels, Record
from yolov7_deploy.datasets.statistics import SMALL_PX, box_sizes, describe_labels

FLOAT64 = 1e-9


def record(path, image_hw, rows, crowd=()):
    """Return a record with boxes of rows (class, width, height), in fractions of the image."""
    sizes = np.array([row[1:] for row in rows], dtype=np.float64).reshape(-1, 2)
    return Record(
        path=Path(path),
        image_id=0,
        image_hw=image_hw,
        labels=Labels(
            boxes=np.concatenate([0.5 - sizes / 2, 0.5 + sizes / 2], axis=1),
            class_ids=np.array([row[0] for row in rows], dtype=np.int64),
            crowd=np.isin(np.arange(len(rows)), crowd),
            polygons=(np.zeros((0, 2)),) * len(rows),
        ),
    )


@pytest.fixture
def dataset():
    records = [
        record("a.png", (480, 640), [(0, 0.5, 0.5), (0, 0.01, 0.01), (1, 0.1, 0.2)]),
        record("b.png", (1000, 500), [(0, 0.02, 0.007), (2, 0.9, 0.9)], crowd=(1,)),
        record("c.png", (100, 100), []),
        record("nowhere.png", None, [(1, 0.3, 0.3)]),
    ]
    names = ("cat", "dog", "cow", "owl")
    return Dataset(records, source="data.yaml", class_names=names, category_ids=(0, 1, 2, 3))


def test_box_sizes_are_in_pixels_at_the_image_size(dataset):
    sizes, unreadable = box_sizes(dataset, image_size=640)
    expected = [[320, 240], [6.4, 4.8], [64, 96], [6.4, 4.48]]
    np.testing.assert_allclose(sizes, expected, rtol=FLOAT64)
    assert unreadable == 1


def test_images_and_boxes_are_counted_per_class(dataset):
    found = describe_labels(dataset, image_size=640)
    assert [(count.name, count.images, count.boxes) for count in found.classes] == [
        ("cat", 2, 3),
        ("dog", 2, 2),
        ("cow", 0, 0),
        ("owl", 0, 0),
    ]
    assert (found.images, found.background_images, found.boxes, found.crowd_boxes) == (4, 1, 5, 1)
    assert found.empty_classes == ("cow", "owl") and found.unreadable_images == 1


@pytest.mark.parametrize(("image_size", "small"), [(640, 2), (1280, 0), (48, 3)])
def test_small_boxes_are_smaller_than_a_cell_at_the_image_size(dataset, image_size, small):
    assert SMALL_PX == 8
    assert describe_labels(dataset, image_size=image_size).small_boxes == small


def test_relative_sizes_go_from_the_smallest_to_the_largest_box(dataset):
    sizes = describe_labels(dataset).relative_sizes
    assert sizes[0] == pytest.approx(np.sqrt(6.4 * 4.48) / 640) and sizes[-1] == pytest.approx(np.sqrt(320 * 240) / 640)
    assert list(sizes) == sorted(sizes)


def test_the_summary_has_counts_small_boxes_frequent_classes_and_unreadable_images(dataset):
    text = describe_labels(dataset).summary()
    assert "4 images (1 without a box), 5 boxes of 4 classes, 1 crowd box" in text
    assert "2 boxes (40.0%) smaller than 8 pixels at image size 640" in text
    assert "most frequent: cat 3, dog 2\n" in text
    assert "classes without a box: 'cow', 'owl'" in text and "1 image cannot be read" in text


def test_the_rarest_classes_are_listed_if_there_are_many():
    rows = [(i, 0.1, 0.1) for i in range(5) for _ in range(9 - i)]
    many = Dataset(
        [record("a.png", (99, 99), rows)], source="x", class_names=tuple("abcdef"), category_ids=tuple(range(6))
    )
    assert "most frequent: a 9, b 8, c 7; rarest: d 6, e 5\n" in describe_labels(many).summary()


def test_a_dataset_without_boxes_has_statistics():
    empty = Dataset([record("a.png", (9, 9), [])], source="x", class_names=("cat",), category_ids=(0,))
    found = describe_labels(empty)
    assert found.relative_sizes == () and "1 image (1 without a box), 0 boxes of 1 class" in found.summary()
