"""Selecting or merging the classes of a dataset: which boxes remain, and their class ids."""

from pathlib import Path

import numpy as np
import pytest

from yolov7_deploy.datasets.samples import Dataset, Labels, Record, as_single_class, select_classes
from yolov7_deploy.errors import DatasetError

NOTES = ("one image", "one line")


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
    notes = {"problems": NOTES, "left_out": NOTES[:1]}
    return Dataset(records, source="data.yaml", class_names=names, category_ids=(3, 5, 9), **notes)


def test_only_boxes_of_the_selected_classes_remain_numbered_in_the_given_order(dataset):
    selected = select_classes(dataset, ["7", "cat"])
    assert selected.class_names == ("7", "cat") and selected.category_ids == (9, 3)
    first = selected[0]
    assert first.class_ids.tolist() == [1, 0, 0] and first.crowd.tolist() == [False, True, False]
    np.testing.assert_array_equal(first.boxes, dataset[0].boxes[[0, 1, 3]])
    assert [polygon[0, 0] for polygon in first.polygons] == [
        polygon[0, 0] for polygon in np.array(dataset[0].polygons)[[0, 1, 3]]
    ]
    assert selected.record(0).areas.tolist() == [10, 20, 40]


def test_images_without_a_selected_class_remain_as_background(dataset):
    selected = select_classes(dataset, ["dog"])
    assert [len(sample.boxes) for sample in selected] == [1, 0, 0]
    assert [sample.image_id for sample in selected] == [100, 101, 102]
    assert (selected.source, selected.problems, selected.left_out) == ("data.yaml", NOTES, NOTES[:1])


@pytest.mark.parametrize(("selection", "name"), [(1, "dog"), ("1", "dog"), (" 0 ", "cat"), ("7", "7"), (2, "7")])
def test_a_class_is_selected_by_name_or_number(dataset, selection, name):
    assert select_classes(dataset, [selection]).class_names == (name,)


@pytest.mark.parametrize("selection", [["dog,7"], ["1 7"], ["dog", " 7"], ["Dog, 7"]])
def test_a_text_may_name_several_classes(dataset, selection):
    assert select_classes(dataset, selection).class_names == ("dog", "7")


def test_a_class_with_a_comma_in_its_name_can_be_selected(dataset):
    renamed = Dataset(
        [dataset.record(i) for i in range(len(dataset))],
        source="data.yaml",
        class_names=("cat, small", "dog", "7"),
        category_ids=dataset.category_ids,
    )
    assert select_classes(renamed, ["cat, small,dog"]).class_names == ("cat, small", "dog")


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ([], "No class"),
        (["cat", 0], "'cat' is selected more than once"),
        (["cow"], "does not have class 'cow'; it has 'cat', 'dog', '7'"),
        ([3], "does not have class 3"),
        ([-1], "does not have class -1"),
        (["¹"], "does not have class"),
    ],
)
def test_an_unknown_or_repeated_class_is_refused(dataset, selection, message):
    with pytest.raises(DatasetError, match=message):
        select_classes(dataset, selection)


def test_a_single_class_keeps_every_box(dataset):
    single = as_single_class(dataset)
    assert single.class_names == ("object",) and single.category_ids == (3,)
    assert [sample.class_ids.tolist() for sample in single] == [[0] * 4, [0], []]
    assert single.record(0).areas.tolist() == [10, 20, 30, 40]
    assert as_single_class(select_classes(dataset, ["dog"])).class_names == ("dog",)


def test_the_original_dataset_is_not_changed(dataset):
    select_classes(dataset, ["dog"])
    as_single_class(dataset)
    assert dataset[0].class_ids.tolist() == [0, 2, 1, 2] and dataset.class_names == ("cat", "dog", "7")


def test_ground_truth_of_selected_classes_has_their_categories(dataset):
    document = select_classes(dataset, ["7"]).ground_truth([0])
    assert document["categories"] == [{"id": 9, "name": "7"}]
    assert [(a["category_id"], a["area"]) for a in document["annotations"]] == [(9, 20.0), (9, 40.0)]
