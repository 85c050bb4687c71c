"""Opening datasets: what is accepted, what is repaired, and what is refused with which message."""

import json
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.datasets.coco import COCO_CATEGORY_IDS
from yolov7_deploy.datasets.yolo_labels import read_label_files
from yolov7_deploy.errors import DatasetError, ImageError
from yolov7_deploy.evaluation.accuracy import compute_coco_metrics
from yolov7_deploy.image import read_image, read_image_hw

ROUNDING_PX = 1e-3  # float32 for coordinates below 1000


def write_image(path, hw=(40, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.zeros((*hw, 3), np.uint8))
    return path


@pytest.fixture
def yolo(tmp_path):
    """A YAML with two images: one with a box, one without a label file."""
    write_image(tmp_path / "images/val/7.png")
    write_image(tmp_path / "images/val/12.jpg", (30, 20))
    labels = tmp_path / "labels/val"
    labels.mkdir(parents=True)
    (labels / "7.txt").write_text("1 0.5 0.5 0.5 0.25\n")
    (tmp_path / "data.yaml").write_text("val: images/val\nnc: 2\nnames: [cat, dog]\n")
    return tmp_path


def coco_document():
    return {
        "images": [{"id": 9, "file_name": "a.png", "width": 60, "height": 40}],
        "annotations": [
            {"id": 0, "image_id": 9, "category_id": 5, "bbox": [10, 5, 20, 10], "area": 150, "iscrowd": 0},
            {"id": 1, "image_id": 9, "category_id": 3, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        ],
        "categories": [{"id": 5, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


@pytest.fixture
def coco(tmp_path):
    write_image(tmp_path / "images/val/a.png")
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations/instances_val.json"
    path.write_text(json.dumps(coco_document()))
    return path


def test_a_yaml_gives_boxes_in_pixels_ordered_by_path(yolo):
    dataset = open_dataset(yolo / "data.yaml")
    assert [sample.path.name for sample in dataset] == ["12.jpg", "7.png"]
    np.testing.assert_allclose(dataset[1].boxes, [[15, 15, 45, 25]], atol=ROUNDING_PX)
    assert dataset[1].class_ids.tolist() == [1]
    assert dataset.class_names == ("cat", "dog")


def test_a_missing_label_file_is_a_background_image(yolo):
    sample = open_dataset(yolo / "data.yaml")[0]
    assert sample.boxes.shape == (0, 4) and sample.boxes.dtype == np.float32


def test_image_ids_are_the_numbers_in_the_file_names(yolo):
    dataset = open_dataset(yolo / "data.yaml")
    assert [dataset.image_id(i) for i in range(2)] == [12, 7]


def test_image_ids_are_indices_if_a_name_is_not_a_number(yolo):
    write_image(yolo / "images/val/x.png")
    assert [s.image_id for s in open_dataset(yolo / "data.yaml")] == [0, 1, 2]


def test_polygon_lines_and_box_lines_can_be_mixed(yolo):
    (yolo / "labels/val/7.txt").write_text("0 0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.4\n1 0.5 0.5 0.5 0.25\n")
    sample = open_dataset(yolo / "data.yaml")[1]
    np.testing.assert_allclose(sample.boxes, [[6, 8, 30, 24], [15, 15, 45, 25]], atol=ROUNDING_PX)
    assert [len(polygon) for polygon in sample.polygons] == [4, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", "class 2 is not one of 0..1"),
        ("-1 0.5 0.5 0.1 0.1", "class -1"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5"),
        ("inf 0.5 0.5 0.1 0.1", "class inf"),
        ("0 0.5 1.5 0.1 0.1", "coordinates outside 0..1"),
        ("0 0.5 nan 0.1 0.1", "coordinates outside 0..1"),
        ("0 0.5 0.5 0.1", "4 columns"),
        ("0,0.5,0.5,0.1,0.1", "1 column; a box has 5"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 columns"),
        ("dog 0.5 0.5 0.1 0.1", "could not convert"),
    ],
)
def test_an_invalid_label_line_is_named(yolo, line, message):
    (yolo / "labels/val/7.txt").write_text(f"1 0.5 0.5 0.2 0.2\n{line}\n")
    with pytest.raises(DatasetError, match="line 2") as caught:
        open_dataset(yolo / "data.yaml")
    assert message in caught.value.message and "7.txt" in caught.value.message


@pytest.mark.parametrize(("other", "fix"), [("", "to `names`"), ("0 0.5 1.5 0.1 0.1", "A line is")])
def test_labels_of_more_classes_than_names_say_where_names_are_added(yolo, other, fix):
    (yolo / "labels/val/7.txt").write_text(f"2 0.5 0.5 0.1 0.1\n5 0.5 0.5 0.1 0.1\n{other}\n")
    with pytest.raises(DatasetError, match="class 5 is not one of") as caught:
        open_dataset(yolo / "data.yaml")
    assert fix in caught.value.fix


def test_duplicate_and_empty_boxes_are_dropped_and_reported(yolo):
    (yolo / "labels/val/7.txt").write_text("1 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2\n0 0.5 0.5 0 0.2\n")
    dataset = open_dataset(yolo / "data.yaml")
    assert len(dataset[1].boxes) == 1
    repairs = [problem for problem in dataset.problems if "dropped" in problem]
    assert [repair.split(": ")[1].split(" ")[1] for repair in repairs] == ["2", "3"]


def test_a_dataset_without_any_label_file_reports_the_first_path_tried(yolo):
    (yolo / "labels/val/7.txt").unlink()
    assert "12.txt" in open_dataset(yolo / "data.yaml").problems[0]


@given(st.lists(st.tuples(st.integers(0, 79), *[st.floats(0.05, 0.45)] * 4), max_size=8, unique=True))
def test_boxes_written_as_labels_are_read_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("labels")
    (folder / "a.txt").write_text("".join(f"{c} {x!r} {y!r} {w!r} {h!r}\n" for c, x, y, w, h in rows))
    found = read_label_files([folder / "a.png"], classes=80)
    expected = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for _, x, y, w, h in rows]
    (labels,) = found.labels
    assert (found.problems, found.missing) == ((), 0)
    np.testing.assert_allclose(labels.boxes, np.array(expected).reshape(-1, 4), atol=1e-12)
    assert labels.class_ids.tolist() == [row[0] for row in rows]


@pytest.mark.parametrize("entry", ["./images/val/7.png", "images/val/7.png"])
def test_entries_of_a_text_list_are_relative_to_the_list(yolo, entry):
    (yolo / "val.txt").write_text(f"{entry}\n\n")
    (yolo / "data.yaml").write_text("val: [val.txt]\nnames: {0: cat, 1: dog}\n")
    assert len(open_dataset(yolo / "data.yaml")) == 1


def test_yaml_entries_may_be_relative_to_the_working_folder(yolo, monkeypatch):
    (yolo / "config").mkdir()
    (yolo / "config/data.yaml").write_text("val: ./images/val\nnames: [cat, dog]\n")
    monkeypatch.chdir(yolo)
    assert len(open_dataset("config/data.yaml")) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("val: images/val\nnames: [cat]\nnc: 2", "nc: 2 but 1 names"),
        ("val: images/val", "no names"),
        ("val: images/val\nnames: {0: cat, 2: dog}", "names are numbered '0', '2', and not from 0 to 1"),
        ("val: images/val\nnames: [cat, dog, cat]", "names has 'cat' more than once"),
        ("val: images/val\nnames: {0: 1, 1: '1'}", "names has '1' more than once"),
        ("path: elsewhere\nval: photos\nnames: [cat]", "looked for .*elsewhere/photos"),
        ("names: [cat]", "no val images"),
        ("train: images/val\nnames: [cat]", r"it has train"),
        ("val: nowhere\nnames: [cat]", "nowhere, which does not exist"),
        ("val: [", "cannot be read as YAML"),
        ("val: images/val\nnames: [cat, '']", "'' in names is not a name"),
        ("val: images/val\nnames: [cat, [dog]]", "is not a name"),
        ("val: images/val\nnames: missing.txt", "names missing.txt, which does not exist"),
        ("val: images/val\nnames: {1: cat, 2: dog}", "names are numbered '1', '2', and not from 0 to 1"),
        ("val: images/val\nnc: many\nnames: [cat]", "has nc: 'many'"),
        ("val: images/val\nnc: true\nnames: [cat]", "has nc: True"),
        ("valid: images/val\nnames: [cat]", "no val images(.|\n)*Rename `valid` to `val`"),
        ('val: "..\\images\\val"\nnames: [cat]', "(.|\n)*Write paths with / or in single quotes"),
        ('val: "images\\val"\nnames: [cat]', "(.|\n)*Write paths with / or in single quotes"),
        ("- 1", "not a dataset YAML"),
        ("val: labels\nnames: [cat]", "none of the 0 images"),
    ],
)
def test_an_invalid_yaml_names_the_problem(yolo, text, message):
    (yolo / "data.yaml").write_text(text)
    with pytest.raises(DatasetError, match=message):
        open_dataset(yolo / "data.yaml")


NAMES = ("cat", "dog")


@pytest.mark.parametrize(
    "text",
    [
        "names: [cat, dog]",
        "nc: 2\nnames:\n- cat\n- dog",
        "nc: '2'\nnames: {0: cat, 1: dog}",
        "nc: 2.0\nnames: {'1': dog, '0': cat}",
        "names: {dog: 1, cat: 0}",
        "names: cat, dog",
        "names: |\n  cat\n  dog",
        "names: [' cat', 'dog ']",
        "names: classes.txt",
        "path: .\nnames: classes.txt",
    ],
)
def test_class_names_may_have_every_usual_form(yolo, text):
    (yolo / "classes.txt").write_text("\ufeffcat\n\ndog\n")
    (yolo / "data.yaml").write_text(f"val: images/val\n{text}\n")
    assert open_dataset(yolo / "data.yaml").class_names == NAMES


@pytest.mark.parametrize(
    "names", [("yes", "no"), ("on", "off"), ("007", "7"), ("1_000", "1e3"), ("null", "~"), ("12:30", "2024-01-01")]
)
@pytest.mark.parametrize("form", ["names: [{}, {}]", "names: {{0: {}, 1: {}}}"])
def test_class_names_are_texts_as_they_are_written(yolo, form, names):
    (yolo / "data.yaml").write_text(f"val: images/val\n{form.format(*names)}\n")
    assert open_dataset(yolo / "data.yaml").class_names == names


def test_a_single_class_may_have_commas_in_its_name(yolo):
    (yolo / "labels/val/7.txt").write_text("")
    (yolo / "data.yaml").write_text("val: images/val\nnc: 1\nnames: cat, small\n")
    assert open_dataset(yolo / "data.yaml").class_names == ("cat, small",)


@pytest.mark.parametrize(
    ("entry", "fix"),
    [
        ("/content/project-1/images/val", "images/val exists: write  images/val  in the YAML."),
        ("C:\\photos\\images\\val", "images/val exists: write  images/val  in the YAML."),
        ("../../images/val", "images/val exists: write  images/val  in the YAML."),
        ("nowhere", "Correct the entry, or `path` in the YAML."),
    ],
)
def test_the_fix_for_a_moved_dataset_is_the_path_beside_the_yaml(yolo, entry, fix):
    (yolo / "data.yaml").write_text(f"val: {entry}\nnames: [cat, dog]\n")
    with pytest.raises(DatasetError, match="does not exist") as caught:
        open_dataset(yolo / "data.yaml")
    assert caught.value.fix.endswith(fix)
    if "exists" in fix:
        (yolo / "data.yaml").write_text("val: images/val\nnames: [cat, dog]\n")
        assert len(open_dataset(yolo / "data.yaml")) == 2


def test_paths_of_roboflow_that_begin_with_the_name_of_the_folder_are_found(yolo):
    (yolo / "data.yaml").write_text(f"val: {yolo.name}/images/val\nnames: [cat, dog]\n")
    assert len(open_dataset(yolo / "data.yaml")) == 2


def test_limit_takes_the_first_images(yolo):
    assert len(open_dataset(yolo / "data.yaml", limit=1)) == 1
    with pytest.raises(DatasetError, match="limit must be"):
        open_dataset(yolo / "data.yaml", limit=0)


def test_a_coco_file_finds_its_images_and_classes(coco):
    dataset = open_dataset(coco)
    assert dataset.class_names == ("cat", "dog") and dataset.category_ids == (3, 5)
    sample = dataset[0]
    assert (sample.image_id, sample.image_hw) == (9, (40, 60))
    np.testing.assert_allclose(sample.boxes, [[10, 5, 30, 15], [0, 0, 60, 40]], atol=ROUNDING_PX)
    assert sample.class_ids.tolist() == [1, 0] and sample.crowd.tolist() == [False, True]
    assert dataset.box_counts().tolist() == [0, 1]


def test_ground_truth_keeps_areas_and_numbers_annotations_from_one(coco):
    annotations = open_dataset(coco).ground_truth([0])["annotations"]
    assert [(a["id"], a["area"], a["category_id"]) for a in annotations] == [(1, 150.0, 5), (2, 2400.0, 3)]


def test_the_error_for_missing_images_lists_the_folders_tried(coco):
    (coco.parent.parent / "images/val").rename(coco.parent.parent / "elsewhere")
    with pytest.raises(DatasetError, match="looked in") as caught:
        open_dataset(coco)
    assert "--images" in caught.value.fix and str(coco.parent.parent / "images" / "val") in caught.value.message
    assert len(open_dataset(coco, images=coco.parent.parent / "elsewhere")) == 1


def test_an_image_folder_for_a_yaml_is_refused(tmp_path):
    (tmp_path / "d.yaml").write_text("val: images\nnames: [a]\n")
    with pytest.raises(DatasetError, match="names its image folders"):
        open_dataset(tmp_path / "d.yaml", images=tmp_path)


def test_a_wrong_image_folder_is_an_error(coco, tmp_path):
    with pytest.raises(DatasetError, match=r"None of the 1 images of .* was found; looked in"):
        open_dataset(coco, images=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("categories"), "no list of categories"),
        (lambda d: d["images"][0].update(width=-1), "width and height must be"),
        (lambda d: d["annotations"].append(None), "it is not an object"),
        (lambda d: d["annotations"][0].update(bbox="1234"), "bbox and area must be numbers"),
        (lambda d: d["annotations"][0].update(category_id=4), "category_id 4"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), "malformed"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, -3, 4]), "bbox is not"),
        (lambda d: d["annotations"][0].pop("image_id"), "image_id"),
        (lambda d: d["categories"].append({"id": 3, "name": "cow"}), "two categories"),
        (lambda d: d["images"].clear(), "lists no images"),
        (
            lambda d: d["images"].append(d["images"][0] | {"file_name": "b.png"}),
            "two images with the id 9: 'a.png' and",
        ),
        (
            lambda d: d["images"].append(d["images"][0] | {"id": "9", "file_name": "b.png"}),
            "two images with the id '9'",
        ),
        (lambda d: d["images"].append(d["images"][0] | {"id": 10}), "has 'a.png' twice, with the ids 9 and 10"),
        (lambda d: d["images"].append(d["images"][0] | {"id": 10, "file_name": "./a.png"}), "has 'a.png' twice"),
        (lambda d: d["images"][0].update(id=9.5), "id 9.5 is neither a whole number nor text"),
        (lambda d: d["images"][0].update(id=True), "id True is neither a whole number nor text"),
        (lambda d: d["annotations"][0].update(image_id=[9]), "is neither a whole number nor text"),
    ],
)
def test_a_malformed_coco_file_names_the_problem(coco, change, message):
    document = coco_document()
    change(document)
    coco.write_text(json.dumps(document))
    with pytest.raises(DatasetError, match=message):
        open_dataset(coco)


def changed(coco, change):
    document = coco_document()
    change(document)
    coco.write_text(json.dumps(document))
    return open_dataset(coco)


@pytest.mark.parametrize("key", ["id", "image_id"])
def test_coco_ids_may_be_text(coco, key):
    rows = "images" if key == "id" else "annotations"
    dataset = changed(coco, lambda d: [row.update({key: "9"}) for row in d[rows]])
    assert dataset.image_id(0) == 9 and len(dataset[0].boxes) == 2 and dataset.problems == ()


def test_ids_of_images_and_categories_may_be_names(coco):
    def rename(document):
        for row in document["images"] + document["categories"]:
            row["id"] = f"id-{row['id']}"
        for row in document["annotations"]:
            row.update(image_id=f"id-{row['image_id']}", category_id=f"id-{row['category_id']}")

    dataset = changed(coco, rename)
    assert dataset.image_id(0) == "id-9" and dataset.category_ids == ("id-3", "id-5")
    assert dataset[0].class_ids.tolist() == [1, 0]
    predictions = [{"image_id": "id-9", "category_id": "id-5", "bbox": [10, 5, 20, 10], "score": 0.9}]
    summary, classes, _ = compute_coco_metrics(dataset, [0], predictions)
    assert summary["ap"] == 1 and [row.ap for row in classes] == [None, 1]


@pytest.mark.parametrize("size", [{}, {"width": None, "height": None}, {"width": 0, "height": 0}, {"width": 60}])
def test_a_size_that_the_coco_file_does_not_have_is_read_from_the_image(coco, size):
    def change(document):
        del document["images"][0]["width"], document["images"][0]["height"]
        document["images"][0].update(size)

    sample = changed(coco, change)[0]
    assert sample.image_hw == (40, 60)
    np.testing.assert_allclose(sample.boxes, [[10, 5, 30, 15], [0, 0, 60, 40]], atol=ROUNDING_PX)


def test_an_image_without_size_that_cannot_be_read_is_an_image_error_when_it_is_used(coco):
    def change(document):
        document["images"].append({"id": 10, "file_name": "b.png"})
        document["annotations"].append({"image_id": 10, "category_id": 3, "bbox": [1, 2, 3, 4]})

    dataset = changed(coco, change)
    assert len(dataset[0].boxes) == 2
    with pytest.raises(ImageError, match=r"b\.png"):
        _ = dataset[1]


@pytest.mark.parametrize("field", ["area", "iscrowd", "segmentation", "id", "attributes"])
def test_optional_fields_of_an_annotation_may_be_null(coco, field):
    dataset = changed(coco, lambda d: d["annotations"][0].update({field: None}))
    areas = dataset.record(0).areas
    assert areas is not None and areas[0] == (200 if field == "area" else 150)
    assert len(dataset[0].boxes) == 2 and dataset.problems == ()


@pytest.mark.parametrize("value", [None, []])
@pytest.mark.parametrize("field", ["bbox", "category_id"])
def test_an_annotation_without_box_or_category_is_dropped_and_reported(coco, field, value):
    if (field, value) == ("category_id", []):
        value = ""
    dataset = changed(coco, lambda d: d["annotations"][0].update({field: value}))
    assert len(dataset[0].boxes) == 1
    assert dataset.problems == ("1 annotations of instances_val.json have no bbox or no category; dropped",)


def test_numbers_of_an_annotation_may_be_text(coco):
    dataset = changed(coco, lambda d: d["annotations"][1].update(bbox=["0", "0", "60", "40.0"], area="9", iscrowd="1"))
    np.testing.assert_allclose(dataset[0].boxes[1], [0, 0, 60, 40])
    assert dataset[0].crowd.tolist() == [False, True]
    dataset = changed(coco, lambda d: d["annotations"][1].update(iscrowd="0"))
    assert dataset[0].crowd.tolist() == [False, False]


@pytest.mark.parametrize("name", ["val\\a.png", "C:\\photos\\a.png", "/home/me/a.png", "photos/2024/a.png"])
def test_images_of_a_coco_file_from_another_machine_are_found(coco, name):
    dataset = changed(coco, lambda d: d["images"][0].update(file_name=name))
    assert dataset.path(0).is_file() and len(dataset[0].boxes) == 2
    root = coco.parent.parent
    (root / "data.yaml").write_text("val: images/val\nnames: [dog, cat]\nannotations: annotations/instances_val.json\n")
    assert len(open_dataset(root / "data.yaml")[0].boxes) == 2


def test_files_are_not_looked_for_by_name_alone_if_two_have_the_same(coco):
    def change(document):
        document["images"] = [
            {"id": number, "file_name": f"{folder}/a.png", "width": 60, "height": 40}
            for number, folder in enumerate(("one", "two"))
        ]

    with pytest.raises(DatasetError, match="was found; looked in"):
        changed(coco, change)


def test_a_category_that_only_groups_others_is_not_a_class(coco):
    def change(document):
        document["categories"] = [{**row, "supercategory": "animals"} for row in document["categories"]]
        document["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})

    dataset = changed(coco, change)
    assert dataset.class_names == ("cat", "dog") and dataset.category_ids == (3, 5)
    assert dataset.problems == ("category 'animals' has no boxes, only other categories; not a class",)


def test_a_category_with_boxes_is_a_class_even_if_it_groups_others(coco):
    def change(document):
        document["categories"][0].update(name="animal", supercategory="none")
        document["categories"][1].update(supercategory="animal")

    assert changed(coco, change).class_names == ("cat", "animal")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_coco_file_may_have_a_byte_order_mark(coco, encoding):
    coco.write_text(json.dumps(coco_document()), encoding=encoding)
    assert len(open_dataset(coco)[0].boxes) == 2


def test_an_annotation_that_repeats_another_one_with_its_id_is_dropped_and_reported(coco):
    dataset = changed(coco, lambda d: d["annotations"].extend(d["annotations"][:1]))
    assert len(dataset[0].boxes) == 2
    assert dataset.problems == ("1 annotations of instances_val.json repeat another one with the same id; dropped",)


def test_different_annotations_with_one_id_are_kept(coco):
    dataset = changed(coco, lambda d: d["annotations"].append(d["annotations"][0] | {"bbox": [1, 2, 3, 4]}))
    assert len(dataset[0].boxes) == 3 and dataset.problems == ()


def test_annotations_of_unknown_images_are_reported(coco):
    dataset = changed(coco, lambda d: d["annotations"].append(d["annotations"][0] | {"id": 7, "image_id": 8}))
    assert dataset.problems == (
        "1 annotations of instances_val.json refer to an image that is not in the file; the first has image_id 8",
    )


@pytest.mark.parametrize("image_id", ["\ud800", "a\x1b[31m\nb", "x" * 100_000])
def test_the_id_of_an_unknown_image_is_printable_and_short(coco, image_id):
    dataset = changed(coco, lambda d: d["annotations"].append(d["annotations"][0] | {"id": 7, "image_id": image_id}))
    (problem,) = dataset.problems
    assert problem.encode().isascii() and problem.isprintable() and len(problem) < 300


def test_images_of_a_coco_file_without_annotation_or_file_are_reported(coco):
    dataset = changed(coco, lambda d: d["images"].append(d["images"][0] | {"id": 10, "file_name": "b.png"}))
    assert dataset.notes[0] == "1 of 2 images have no annotation"
    assert dataset.notes[1].startswith("1 images of instances_val.json do not exist; the first is ")
    assert dataset.left_out == dataset.problems


def test_images_of_the_annotations_that_a_yaml_does_not_have_are_reported(coco):
    root = coco.parent.parent
    document = coco_document()
    document["images"].append(document["images"][0] | {"id": 10, "file_name": "b.png"})
    coco.write_text(json.dumps(document))
    write_image(root / "images/val/._a.png")
    (root / "data.yaml").write_text("val: images/val\nnames: [dog, cat]\nannotations: annotations/instances_val.json\n")
    assert open_dataset(root / "data.yaml").notes == (
        "0 of 1 images have no annotation",
        "1 of 2 images of instances_val.json are not in val of data.yaml",
        f"left out of {root}/images/val: 1 x hidden (._a.png)",
    )


def test_a_results_file_is_not_a_dataset(coco):
    coco.write_text("[]")
    with pytest.raises(DatasetError, match="not a COCO instances file"):
        open_dataset(coco)


def test_yaml_annotations_match_by_class_name(coco):
    root = coco.parent.parent
    (root / "data.yaml").write_text(
        "val: images/val\nnames: [dog, cat]\nannotations: {val: annotations/instances_val.json}\n"
    )
    dataset = open_dataset(root / "data.yaml")
    assert dataset.category_ids == (5, 3) and dataset[0].class_ids.tolist() == [0, 1]


def test_yaml_names_missing_in_the_annotations_are_an_error(coco):
    root = coco.parent.parent
    (root / "data.yaml").write_text(
        "val: images/val\nnames: [dog, wolf]\nannotations: annotations/instances_val.json\n"
    )
    with pytest.raises(DatasetError, match="no category called 'wolf'"):
        open_dataset(root / "data.yaml")


def test_an_image_missing_in_the_annotations_is_an_error(coco):
    root = coco.parent.parent
    write_image(root / "images/val/b.png")
    (root / "data.yaml").write_text("val: images/val\nnames: [dog, cat]\nannotations: annotations/instances_val.json\n")
    with pytest.raises(DatasetError, match=r"b\.png is not in"):
        open_dataset(root / "data.yaml")


def test_the_coco_category_map_has_eighty_ids_up_to_ninety():
    assert len(COCO_CATEGORY_IDS) == 80 and COCO_CATEGORY_IDS[11] == 13 and COCO_CATEGORY_IDS[-1] == 90


def exif(orientation, order):
    mark = "<" if order == b"II" else ">"
    tiff = order + struct.pack(f"{mark}HI", 42, 8) + struct.pack(f"{mark}H", 1)
    value = struct.pack(f"{mark}HH", orientation, 0)
    tiff += struct.pack(f"{mark}HHI", 0x0112, 3, 1) + value + struct.pack(f"{mark}I", 0)
    body = b"Exif\0\0" + tiff
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp"])
def test_the_header_gives_the_decoded_size(tmp_path, suffix):
    path = write_image(tmp_path / f"a{suffix}", (31, 57))
    assert read_image_hw(path) == read_image(path).shape[:2] == (31, 57)


@pytest.mark.parametrize("order", [b"II", b"MM"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_gives_the_size_after_exif_orientation(tmp_path, orientation, order):
    path = write_image(tmp_path / "a.jpg", (31, 57))
    data = path.read_bytes()
    path.write_bytes(data[:2] + exif(orientation, order) + data[2:])
    assert read_image_hw(path) == read_image(path).shape[:2]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("is_last", [False, True], ids=["before the pixels", "after the pixels"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_size_of_a_png_is_that_after_exif_orientation(tmp_path, orientation, is_last):
    path = write_image(tmp_path / "a.png", (31, 57))
    data = path.read_bytes()
    added = chunk(b"tEXt", b"Comment\0" + b"x" * 9000) + chunk(b"eXIf", exif(orientation, b"II")[10:])
    at = len(data) - 12 if is_last else 33  # before IEND, or after IHDR
    path.write_bytes(data[:at] + added + data[at:])
    assert read_image_hw(path) == read_image(path).shape[:2]


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n1234", b"text"])
def test_the_size_of_a_file_that_is_not_an_image_is_an_image_error(tmp_path, data):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ImageError):
        read_image_hw(tmp_path / "a.jpg")


@pytest.mark.skipif("Y7_SHARED" not in os.environ, reason="Y7_SHARED does not name the folder with coco-mini")
def test_a_yaml_and_its_annotation_file_give_the_same_samples():
    root = Path(os.environ["Y7_SHARED"]) / "coco-mini"
    by_yaml, by_json = open_dataset(root / "coco-mini.yaml"), open_dataset(root / "annotations/instances_val2017.json")
    assert len(by_yaml) == len(by_json) == 82
    assert by_yaml.category_ids == by_json.category_ids == COCO_CATEGORY_IDS
    for one, other in zip(by_yaml, by_json, strict=True):
        assert one.path.name == other.path.name
        assert read_image_hw(one.path) == one.image_hw
        np.testing.assert_array_equal(one.boxes, other.boxes)
