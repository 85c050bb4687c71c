"""Detections: indexing and filtering keep all arrays consistent, and conversions match what other libraries expect."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yolov7_deploy.detections import Detections, find_classes
from yolov7_deploy.errors import ImageError, MissingLibraryError, UsageError
from yolov7_deploy.image import read_image

NAMES = ("person", "bicycle", "traffic light", "dog")
HW = (480, 640)


def make(count: int = 3, *, seed: int = 0) -> Detections:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 200, (count, 2))
    size = rng.uniform(1, 200, (count, 2))
    return Detections(
        boxes=np.hstack([corner, corner + size]).astype(np.float32),
        scores=np.sort(rng.uniform(0.1, 1, count))[::-1].astype(np.float32),
        class_ids=rng.integers(0, len(NAMES), count),
        class_names=NAMES,
        image_hw=HW,
        path="a/b.jpg",
    )


@pytest.mark.parametrize("scores,class_ids", [([0.5], [0, 0]), ([0.5, 0.4], [0]), ([[0.5, 0.4]], [0, 0])])
def test_arrays_of_different_lengths_are_refused(scores, class_ids):
    with pytest.raises(UsageError, match="do not describe the same detections"):
        Detections(boxes=np.zeros((2, 4)), scores=scores, class_ids=class_ids, class_names=NAMES, image_hw=HW)


@pytest.mark.parametrize("class_id", [-1, 4])
def test_a_class_id_without_a_name_is_refused(class_id):
    with pytest.raises(UsageError, match="4 class names"):
        Detections(boxes=[[0, 0, 1, 1]], scores=[0.5], class_ids=[class_id], class_names=NAMES, image_hw=HW)


def test_arrays_are_converted_to_the_documented_types():
    found = Detections(boxes=[[0, 0, 1, 1]], scores=[0.5], class_ids=[1], class_names=NAMES, image_hw=HW)
    assert (found.boxes.dtype, found.scores.dtype, found.class_ids.dtype) == (np.float32, np.float32, np.int64)


@given(count=st.integers(0, 12), data=st.data())
def test_every_index_selects_the_same_rows_of_all_arrays(count, data):
    found = make(count)
    mask = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    numbers = data.draw(st.lists(st.integers(0, count - 1))) if count else []
    part = slice(*sorted(data.draw(st.tuples(st.integers(0, 12), st.integers(0, 12)))))
    for index, rows in (
        (np.array(mask, dtype=bool), np.flatnonzero(mask)),
        (mask, np.flatnonzero(mask)),
        (numbers, numbers),
        (part, range(count)[part]),
    ):
        selection = found[index]
        assert len(selection) == len(rows)
        assert [item.score for item in selection] == [found.scores[row] for row in rows]
        assert [item.class_id for item in selection] == [found.class_ids[row] for row in rows]
        assert [list(item.box) for item in selection] == [found.boxes[row].tolist() for row in rows]
        assert (selection.path, selection.image_hw) == (found.path, found.image_hw)


def test_a_single_index_gives_one_detection():
    assert len(make()[-1]) == 1
    with pytest.raises(IndexError):
        make()[3]


@pytest.mark.parametrize("mask", [[], [True, False], [True] * 4, [[True], [False], [True]], True])
@pytest.mark.parametrize("convert", [np.array, torch.tensor])
def test_a_mask_of_the_wrong_length_is_refused(mask, convert):
    kind = {"dtype": np.bool_ if convert is np.array else torch.bool}
    with pytest.raises(UsageError, match="3 detections") as caught:
        make(3)[convert(mask, **kind)]
    assert "one bool per detection" in caught.value.fix
    with pytest.raises(UsageError, match="3 detections"):
        make(3)[[True, False]]


def test_an_empty_mask_fits_no_detections_and_an_empty_list_selects_none():
    assert len(make(0)[np.array([], bool)]) == len(make(0)[[]]) == len(make(3)[[]]) == len(make(3)[()]) == 0
    assert len(make(3)[np.array([], int)]) == 0


NOT_INDICES = (
    *(1.0, [0.0, 1.0], np.array([]), np.array([1.5]), [[0, 1]], [[0], [1, 2]], [True, 2, 0], 1j),
    *("person", ["person"], np.array([["x"]]), b"a", None, [None], {"a": 1}),
    *(slice(0.5, None), slice("a"), slice(None, None, 0)),
)


@pytest.mark.parametrize("index", NOT_INDICES)
def test_an_index_of_another_type_is_refused(index):
    with pytest.raises(UsageError, match="cannot be indexed") as caught:
        make(3)[index]
    assert "a slice" in caught.value.fix


@pytest.mark.parametrize("index", [np.int64(1), np.uint8(1), np.array(1), torch.tensor(1), torch.tensor([1]), (1,)])
def test_an_int_of_any_library_is_an_index(index):
    assert make(3)[index].scores == make(3).scores[1]


def test_iteration_names_each_object():
    items = list(make(5))
    assert all(item.class_name == NAMES[item.class_id] for item in items)
    assert all(isinstance(value, float) for item in items for value in (*item.box, item.score))


@given(conf=st.floats(0, 1), seed=st.integers(0, 5))
def test_filter_by_score_keeps_what_is_strictly_above(conf, seed):
    found = make(10, seed=seed)
    kept = found.filter(conf=conf)
    assert len(kept) == int((found.scores > conf).sum())
    exact = found.filter(conf=float(found.scores[4]))
    assert len(exact) == 4


def test_filter_accepts_ids_and_names_together():
    found = make(20)
    kept = found.filter(classes=[0, "Dog"])
    assert set(kept.class_ids.tolist()) <= {0, 3}
    assert len(kept) == int(np.isin(found.class_ids, [0, 3]).sum())
    assert len(found.filter(classes=[])) == 0
    assert set(found.filter(classes="traffic light").names) == {"traffic light"}


@pytest.mark.parametrize(
    "wanted,hint", [("persn", "person"), ("trafic light", "traffic light"), (4, "0 to 3"), (-1, "0 to 3"), ("x", "dog")]
)
def test_an_unknown_class_is_refused_with_a_suggestion(wanted, hint):
    with pytest.raises(UsageError) as caught:
        make().filter(classes=[wanted])
    assert hint in caught.value.fix


def test_suggested_classes_are_quoted_and_spelled_as_in_the_model():
    names = ("Dreieck, rot", "Kühlbox", "ball")
    for wanted, fix in (("dreieck", "Did you mean 'Dreieck, rot'?"), ("kuhlbox", "Did you mean 'Kühlbox'?")):
        with pytest.raises(UsageError) as caught:
            find_classes(wanted, names)
        assert caught.value.fix == fix
    with pytest.raises(UsageError) as caught:
        find_classes("x", names)
    assert caught.value.fix == "Its 3 classes: 'Dreieck, rot', 'Kühlbox', 'ball'"


@pytest.mark.parametrize("wanted", [1.0, [1.5], True, [False], None, [None], b"person", [b"person"], [[0]], np.nan])
def test_a_class_that_is_neither_an_int_nor_text_is_refused(wanted):
    with pytest.raises(UsageError, match="an id or a name") as caught:
        find_classes(wanted, NAMES)
    assert "classes=[" in caught.value.fix


@pytest.mark.parametrize("wanted", [3, "dog", np.int32(3), np.array(3), torch.tensor([3]), iter(["dog"])])
def test_classes_are_ids_and_names_of_any_iterable(wanted):
    assert find_classes(wanted, NAMES) == (3,)


@pytest.mark.parametrize("conf", [1.5, -0.1, float("nan"), 50])
def test_filter_refuses_a_score_outside_of_0_to_1(conf):
    with pytest.raises(UsageError, match="conf"):
        make(3).filter(conf=conf)


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        ("person, traffic light", (0, 2)),
        (["person,dog", "1"], (0, 1, 3)),
        ("0 2", (0, 2)),
        ("0, 2 ,dog", (0, 2, 3)),
        (["0", "2"], (0, 2)),
        ("DOG,", (3,)),
    ],
)
def test_a_text_may_have_several_classes(wanted, ids):
    assert find_classes(wanted, ("person", "bicycle", "traffic light", "dog")) == ids


def test_a_class_may_have_commas_or_digits_in_its_name():
    names = ("car", "car, red", "car, red, old", "7", "red")
    assert find_classes("car, red", names) == (1,)
    assert find_classes("car, red, old,car", names) == (0, 2)
    assert find_classes("car,7", names) == (0, 3)
    assert find_classes("red,car", names) == (0, 4)


def test_a_name_shared_by_two_classes_selects_both():
    assert find_classes("cell", ("cell", "dog", "cell")) == (0, 2)


def test_json_is_stable_and_keeps_every_bit():
    found = make(7)
    text = found.to_json()
    assert text == make(7).to_json()
    record = json.loads(text)
    assert list(record) == sorted(record)
    boxes = np.array([item["box"] for item in record["detections"]], dtype=np.float32)
    scores = np.array([item["score"] for item in record["detections"]], dtype=np.float32)
    assert np.array_equal(boxes, found.boxes)
    assert np.array_equal(scores, found.scores)


def test_coco_results_are_rounded_as_the_official_program_does():
    found = Detections(
        boxes=[[10.12345, 20.5, 30.25, 60.98765]],
        scores=[0.123456],
        class_ids=[3],
        class_names=NAMES,
        image_hw=HW,
    )
    assert found.to_coco(42, category_ids=[1, 2, 10, 18]) == [
        {"image_id": 42, "category_id": 18, "bbox": [10.123, 20.5, 20.127, 40.488], "score": 0.12346}
    ]
    assert found.to_coco(42)[0]["category_id"] == 3


def test_coco_results_are_the_numbers_of_python_round():
    rng = np.random.default_rng(5)
    ties = np.concatenate([np.arange(6000) / 16, (2 * np.arange(6000) + 1) / 2000])
    corners = np.concatenate([ties, rng.uniform(0, 1300, 12_000)]).astype(np.float32).reshape(-1, 2)
    boxes = np.hstack([corners, corners + rng.uniform(0, 500, corners.shape).astype(np.float32)])
    scores = (rng.integers(0, 200_001, len(boxes)) / 2e5).astype(np.float32)
    found = Detections(
        boxes=boxes, scores=scores, class_ids=np.zeros(len(boxes), int), class_names=NAMES, image_hw=HW
    ).to_coco(1)
    sides = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]).tolist()
    assert [row["bbox"] for row in found] == [[round(side, 3) for side in box] for box in sides]
    assert [row["score"] for row in found] == [round(score, 5) for score in scores.tolist()]


def test_yolo_lines_convert_back_to_the_boxes():
    found = make(6)
    rows = np.array([[float(value) for value in line.split()] for line in found.to_yolo(save_conf=True).splitlines()])
    centre, size = rows[:, 1:3] * HW[::-1], rows[:, 3:5] * HW[::-1]
    boxes = np.hstack([centre - size / 2, centre + size / 2])
    assert np.allclose(boxes, found.boxes, atol=0.002)  # %g keeps six digits of a fraction of 640
    assert np.allclose(rows[:, 5], found.scores, atol=1e-5)
    assert all(len(line.split()) == 5 for line in found.to_yolo().splitlines())


@pytest.mark.parametrize("convert", ["to_yolo", "to_json", "describe", "as_ultralytics", "to_dict"])
def test_empty_detections_can_be_converted(convert):
    getattr(make(0), convert)()
    assert make(0).to_coco(1) == []
    assert make(0).to_yolo() == ""
    assert make(0).describe() == "no detections"


def test_describe_counts_in_class_order():
    found = Detections(
        boxes=np.zeros((3, 4)), scores=[0.9, 0.8, 0.7], class_ids=[3, 0, 0], class_names=NAMES, image_hw=HW
    )
    assert found.describe() == "person: 2, dog: 1"


def test_plot_does_not_modify_the_image_and_save_writes_the_plot(tmp_path):
    image = np.full((*HW, 3), 90, dtype=np.uint8)
    drawn = make().plot(image)
    assert (image == 90).all()
    assert (drawn != 90).any()
    make().save(tmp_path / "new" / "x.png", image)
    assert np.array_equal(read_image(tmp_path / "new" / "x.png"), drawn)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.png"]


def test_plot_on_an_image_of_another_size_is_refused():
    with pytest.raises(UsageError, match="480x640"):
        make().plot(np.zeros((240, 320, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["x.nonsense", "x"])
def test_saving_with_an_unknown_suffix_is_refused(tmp_path, name):
    with pytest.raises(ImageError, match="cannot write"):
        make().save(tmp_path / name, np.zeros((*HW, 3), dtype=np.uint8))


def test_the_ultralytics_view_has_the_attributes_that_supervision_and_trackers_read():
    found = make(4)
    view = found.as_ultralytics()
    assert np.array_equal(view.boxes.xyxy.cpu().numpy(), found.boxes)
    assert np.array_equal(view.boxes.conf.cpu().numpy(), found.scores)
    assert type(view.boxes.cls.cpu().numpy()) is np.ndarray
    assert [view.names[i] for i in view.boxes.cls.cpu().numpy().astype(int)] == list(found.names)
    assert view.boxes.id is None
    assert view.obb is None
    assert view.masks is None


@pytest.mark.parametrize("library,method", [("supervision", "to_supervision"), ("pandas", "to_pandas")])
def test_a_missing_library_is_reported_with_its_pip_command(monkeypatch, library, method):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingLibraryError, match=f"pip install {library}"):
        getattr(make(), method)()


def test_supervision_gets_float_boxes_and_names(monkeypatch):
    fake_supervision = ModuleType("supervision")
    fake_supervision.Detections = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supervision", fake_supervision)
    found = make(4)
    converted = found.to_supervision()
    assert converted.xyxy.dtype == np.float32
    assert np.array_equal(converted.xyxy, found.boxes)
    assert converted.xyxy is not found.boxes
    assert converted.data["class_name"].tolist() == list(found.names)


@pytest.mark.parametrize("count", [0, 4])
def test_the_real_supervision_reads_both_conversions_alike(count):
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    found = make(count)
    ours = found.to_supervision()
    theirs = supervision.Detections.from_ultralytics(found.as_ultralytics())
    assert np.array_equal(ours.xyxy, theirs.xyxy)
    assert np.array_equal(ours.confidence, theirs.confidence)
    assert np.array_equal(ours.class_id, theirs.class_id)
    assert ours.data["class_name"].tolist() == theirs.data["class_name"].tolist()


@pytest.mark.parametrize("count", [0, 4])
def test_the_real_pandas_gives_the_hub_columns(count):
    pytest.importorskip("pandas", reason="pandas is not installed")
    table = make(count).to_pandas()
    assert list(table.columns) == ["xmin", "ymin", "xmax", "ymax", "confidence", "class", "name"]
    assert len(table) == count


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["boxes", "scores"])
def test_values_that_are_not_finite_are_refused_so_that_no_file_has_them(field, value):
    arrays = {"boxes": np.full((1, 4), 5.0), "scores": np.array([0.5])}
    arrays[field].flat[0] = value
    with pytest.raises(UsageError, match="NaN or infinite"):
        Detections(**arrays, class_ids=[0], class_names=("a",), image_hw=(8, 8))


def test_class_names_with_escape_sequences_are_printed_as_text():
    found = Detections(
        boxes=[[0, 0, 1, 1]], scores=[0.5], class_ids=[0], class_names=("\x1b]0;t\x07\udcff",), image_hw=(8, 8)
    )
    assert found.describe() == r"\x1b]0;t\x07\udcff: 1"
    assert json.loads(found.to_json())["detections"][0]["class_name"] == "\x1b]0;t\x07\udcff"
    found.to_json().encode("utf-8")
