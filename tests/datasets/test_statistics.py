"""What is said about the labels of a dataset, against counting by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from yolov7_deploy.datasets.samples import Dataset, Labels, Record
from yolov7_deploy.datasets.statistics import SMALL_PX, describe_labels, label_sizes

FLOAT = 1e-9


def record(path, image_hw, rows, crowd=()):
    """Rows are (class, width, height) in fractions."""
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
    return Dataset(records, source="data.yaml", class_names=names, category_ids=(0, 1, 2, 3), problems=("one line",))


def test_sizes_are_in_pixels_of_images_with_this_longer_side(dataset):
    sizes, unreadable = label_sizes(dataset, size=640)
    expected = [[320, 240], [6.4, 4.8], [64, 96], [6.4, 4.48]]
    np.testing.assert_allclose(sizes, expected, rtol=FLOAT)
    assert unreadable == 1


def test_images_and_boxes_are_counted_per_class(dataset):
    found = describe_labels(dataset, size=640)
    assert [(one.name, one.images, one.boxes) for one in found.classes] == [
        ("cat", 2, 3),
        ("dog", 2, 2),
        ("cow", 0, 0),
        ("owl", 0, 0),
    ]
    assert (found.images, found.background_images, found.boxes, found.crowd_boxes) == (4, 1, 5, 1)
    assert found.empty_classes == ("cow", "owl") and found.unreadable == 1 and found.problems == ("one line",)


@pytest.mark.parametrize(("size", "small"), [(640, 2), (1280, 0), (48, 3)])
def test_small_boxes_are_those_below_a_cell_at_this_size(dataset, size, small):
    assert SMALL_PX == 8
    assert describe_labels(dataset, size=size).small_boxes == small


def test_sides_go_from_the_smallest_to_the_largest_box(dataset):
    sides = describe_labels(dataset).sides
    assert sides[0] == pytest.approx(np.sqrt(6.4 * 4.48) / 640) and sides[-1] == pytest.approx(np.sqrt(320 * 240) / 640)
    assert list(sides) == sorted(sides)


def test_the_words_hold_what_people_look_for(dataset):
    words = describe_labels(dataset).words()
    assert "4 images (1 without a box), 5 boxes of 4 classes, 1 crowd boxes" in words
    assert "2 (40.0%) smaller than 8 pixels at 640" in words
    assert "most frequent: cat 3, dog 2\n" in words
    assert "classes without a box: 'cow', 'owl'" in words and "1 images cannot be read" in words


def test_the_rarest_classes_are_named_where_there_are_many():
    rows = [(i, 0.1, 0.1) for i in range(5) for _ in range(9 - i)]
    many = Dataset(
        [record("a.png", (99, 99), rows)], source="x", class_names=tuple("abcdef"), category_ids=tuple(range(6))
    )
    assert "most frequent: a 9, b 8, c 7; rarest: d 6, e 5\n" in describe_labels(many).words()


def test_a_dataset_without_boxes_is_described_too():
    empty = Dataset([record("a.png", (9, 9), [])], source="x", class_names=("cat",), category_ids=(0,))
    found = describe_labels(empty)
    assert found.sides == () and "1 images (1 without a box), 0 boxes of 1 classes" in found.words()


def test_the_record_is_json(dataset):
    record = json.loads(json.dumps(describe_labels(dataset).to_dict()))
    assert record["classes"][0] == {"name": "cat", "images": 2, "boxes": 3}
    assert record["sides"]["1"] > record["sides"]["0.5"] and record["empty_classes"] == ["cow", "owl"]
