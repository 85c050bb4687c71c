"""Some classes of a dataset, or all as one: which boxes stay, and what number they get."""

from pathlib import Path

import numpy as np
import pytest

from yolov7_deploy.datasets.class_filter import as_single_class, with_classes
from yolov7_deploy.datasets.samples import Dataset, Labels, Record
from yolov7_deploy.errors import DatasetError


def record(index, class_ids, *, areas=None):
    count = len(class_ids)
    boxes = np.array([[0.1, 0.1, 0.2 + 0.1 * i, 0.3] for i in range(count)]).reshape(-1, 4)
    return Record(
        path=Path(f"{index}.png"),
        image_id=index + 100,
        image_hw=(50, 100),
        labels=Labels(
            boxes=boxes,
            class_ids=np.array(class_ids, dtype=np.int64),
            crowd=np.arange(count) == 1,
            polygons=tuple(np.full((3, 2), i / 10) for i in range(count)),
        ),
        areas=areas,
    )


@pytest.fixture
def dataset():
    records = [record(0, [0, 2, 1, 2], areas=np.array([10.0, 20, 30, 40])), record(1, [0]), record(2, [])]
    names = ("cat", "dog", "7")
    return Dataset(records, source="data.yaml", class_names=names, category_ids=(3, 5, 9), problems=("one line",))


def test_only_boxes_of_the_chosen_classes_stay_numbered_in_the_order_given(dataset):
    chosen = with_classes(dataset, ["7", "cat"])
    assert chosen.class_names == ("7", "cat") and chosen.category_ids == (9, 3)
    first = chosen[0]
    assert first.class_ids.tolist() == [1, 0, 0] and first.crowd.tolist() == [False, True, False]
    np.testing.assert_array_equal(first.boxes, dataset[0].boxes[[0, 1, 3]])
    assert [polygon[0, 0] for polygon in first.polygons] == [
        polygon[0, 0] for polygon in np.array(dataset[0].polygons)[[0, 1, 3]]
    ]
    assert chosen.record(0).areas.tolist() == [10, 20, 40]


def test_images_without_a_chosen_class_stay_as_background(dataset):
    chosen = with_classes(dataset, ["dog"])
    assert [len(sample.boxes) for sample in chosen] == [1, 0, 0]
    assert [sample.image_id for sample in chosen] == [100, 101, 102]
    assert (chosen.source, chosen.problems) == ("data.yaml", ("one line",))


@pytest.mark.parametrize(("chosen", "name"), [(1, "dog"), ("1", "dog"), (" 0 ", "cat"), ("7", "7"), (2, "7")])
def test_a_class_is_named_or_numbered(dataset, chosen, name):
    assert with_classes(dataset, [chosen]).class_names == (name,)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ([], "No class"),
        (["cat", 0], "'cat' is chosen more than once"),
        (["cow"], "no class 'cow'; it has 'cat', 'dog', '7'"),
        ([3], "no class 3"),
        ([-1], "no class -1"),
        (["¹"], "no class"),
    ],
)
def test_what_is_no_class_is_refused(dataset, chosen, words):
    with pytest.raises(DatasetError, match=words):
        with_classes(dataset, chosen)


def test_a_single_class_keeps_every_box(dataset):
    single = as_single_class(dataset)
    assert single.class_names == ("object",) and single.category_ids == (3,)
    assert [sample.class_ids.tolist() for sample in single] == [[0] * 4, [0], []]
    assert single.record(0).areas.tolist() == [10, 20, 30, 40]
    assert as_single_class(with_classes(dataset, ["dog"])).class_names == ("dog",)


def test_the_dataset_given_is_not_changed(dataset):
    with_classes(dataset, ["dog"])
    as_single_class(dataset)
    assert dataset[0].class_ids.tolist() == [0, 2, 1, 2] and dataset.class_names == ("cat", "dog", "7")


def test_ground_truth_of_chosen_classes_has_their_categories(dataset):
    document = with_classes(dataset, ["7"]).ground_truth([0])
    assert document["categories"] == [{"id": 9, "name": "7"}]
    assert [(a["category_id"], a["area"]) for a in document["annotations"]] == [(9, 20.0), (9, 40.0)]
