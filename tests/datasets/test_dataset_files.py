"""No label and no image is lost in silence: where labels are found, which files are images, and what is reported."""

import codecs
import os
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.datasets.yolo_labels import LabelFinder
from yolov7_deploy.image import IMAGE_SUFFIXES, read_image
from yolov7_deploy.sources import open_source

LABEL = "0 0.5 0.5 0.5 0.25\n"


def write_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((40, 60, 3), value, np.uint8))
    return path


def write_label(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(LABEL)


def write_yaml(folder, val="images"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.yaml").write_text(f"val: {val}\nnames: [cat, dog]\n")
    return folder / "data.yaml"


def boxes(dataset):
    return int(dataset.box_counts().sum())


def file_names(dataset):
    return [dataset.path(i).name for i in range(len(dataset))]


@pytest.fixture
def labelled(tmp_path):
    """Two images in images/val with labels in labels/val, and a YAML."""
    for number in (1, 2):
        write_image(tmp_path / f"d/images/val/{number}.png")
        write_label(tmp_path / f"d/labels/val/{number}.txt")
    write_yaml(tmp_path / "d", "images/val")
    return tmp_path / "d"


# --- where labels are found -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "yaml", "val"),
    [
        (".", "data.yaml", "images/val"),
        ("images", "../data.yaml", "images/val"),
        ("images", "own.yaml", "val"),
        ("images/val", "own.yaml", "."),
        ("images/val", "own.yaml", "../val"),
        ("labels", "../data.yaml", "images/val"),
    ],
)
@pytest.mark.parametrize("cache", [False, True])
def test_labels_are_found_from_every_working_folder(labelled, monkeypatch, folder, yaml, val, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(labelled.parent / "cache"))
    monkeypatch.chdir(labelled / folder)
    if yaml == "own.yaml":
        (labelled / folder / yaml).write_text(f"val: {val}\nnames: [cat, dog]\n")
    dataset = open_dataset(yaml, cache=cache)
    assert (len(dataset), boxes(dataset)) == (2, 2)
    assert dataset.notes[0] == "0 of 2 images have no label file"


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/1.png", "labels/1.txt"),
        ("images/a/b/1.png", "labels/a/b/1.txt"),
        ("train/images/1.png", "train/labels/1.txt"),
        ("images/set/images/1.png", "images/set/labels/1.txt"),
        ("images/set/images/1.png", "labels/set/images/1.txt"),
        ("images/set/images/1.png", "images/set/images/1.txt"),
        ("images/1.png", "images/1.txt"),
        ("photos/1.png", "photos/1.txt"),
        ("my images/1.png", "my images/1.txt"),
        ("images/1.2.png", "labels/1.2.txt"),
        ("images/1.png", "labels/1.TXT"),
    ],
)
def test_a_label_file_is_beside_the_image_or_in_the_labels_folder_of_any_images_folder(tmp_path, image, label):
    write_label(tmp_path / label)
    assert LabelFinder().find(tmp_path / image) == tmp_path / label


def test_the_labels_folder_is_preferred_to_the_folder_of_the_image(tmp_path):
    write_label(tmp_path / "labels/1.txt")
    write_label(tmp_path / "images/1.txt")
    assert LabelFinder().find(tmp_path / "images/1.png") == tmp_path / "labels/1.txt"


def test_folders_with_different_layouts_can_be_mixed(tmp_path):
    for image, label in (("flat/1.png", "flat/1.txt"), ("other/images/2.png", "other/images/2.txt")):
        write_image(tmp_path / image)
        write_label(tmp_path / label)
    write_image(tmp_path / "other/images/3.png")
    write_label(tmp_path / "other/labels/3.txt")
    dataset = open_dataset(write_yaml(tmp_path, "[flat, other]"))
    assert (len(dataset), boxes(dataset), dataset.problems) == (3, 3, ())


def test_missing_label_files_are_counted_and_the_first_is_named(labelled):
    (labelled / "labels/val/2.txt").unlink()
    dataset = open_dataset(labelled / "data.yaml")
    (problem,) = dataset.problems
    assert problem.startswith("1 of 2 images have no label file; the first is ")
    assert "images/val/2.png" in problem and "labels/val/2.txt" in problem
    assert dataset.notes == dataset.problems


@pytest.mark.parametrize("cache", [False, True])
def test_label_files_without_image_are_reported(labelled, monkeypatch, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(labelled.parent / "cache"))
    for name in ("8", "9", "classes"):
        write_label(labelled / f"labels/val/{name}.txt")
    problem = f"2 label files have no image; the first is {labelled}/labels/val/8.txt"
    assert open_dataset(labelled / "data.yaml", cache=cache).problems == (problem,)
    assert open_dataset(labelled / "data.yaml", cache=cache, limit=1).problems == ()
    (labelled / "val.txt").write_text("images/val/1.png\n")
    assert open_dataset(write_yaml(labelled, "val.txt"), cache=cache).problems == ()


def test_images_with_one_label_file_are_reported(labelled):
    write_image(labelled / "images/val/1.jpg")
    (problem,) = open_dataset(labelled / "data.yaml").problems
    assert problem == f"1 images have the label file of another image; {labelled}/images/val/1.png and 1.jpg share one"


def test_an_empty_label_file_is_not_missing(labelled):
    (labelled / "labels/val/2.txt").write_text("")
    assert open_dataset(labelled / "data.yaml").notes == ("0 of 2 images have no label file",)


def test_a_broken_link_as_label_file_is_missing(labelled):
    (labelled / "labels/val/2.txt").unlink()
    (labelled / "labels/val/2.txt").symlink_to("nowhere.txt")
    assert open_dataset(labelled / "data.yaml").notes[0].startswith("1 of 2 images have no label file")


@pytest.mark.parametrize("mark", [codecs.BOM_UTF8, b""])
def test_a_label_file_may_have_a_byte_order_mark(labelled, mark):
    (labelled / "labels/val/1.txt").write_bytes(mark + LABEL.encode())
    (labelled / "labels/val/2.txt").write_bytes(("\ufeff" + LABEL).encode("utf-16-le"))
    assert boxes(open_dataset(labelled / "data.yaml")) == 2


# --- links ------------------------------------------------------------------------------------------------------------


def test_linked_folders_are_followed_and_have_their_labels(labelled, tmp_path):
    other = tmp_path / "other"
    write_image(other / "images/val/9.png")
    write_label(other / "labels/val/9.txt")
    (other / "images/val/part").symlink_to(labelled / "images/val")
    shutil.copytree(labelled / "labels/val", other / "labels/val/part")
    dataset = open_dataset(write_yaml(other, "images/val"))
    assert (len(dataset), boxes(dataset), dataset.problems) == (3, 3, ())


@pytest.mark.parametrize("link", ["images", "images/val", "images/val/1.png"])
def test_labels_are_found_beside_the_target_of_a_link(labelled, tmp_path, link):
    linked = tmp_path / "linked"
    (linked / link).parent.mkdir(parents=True)
    (linked / link).symlink_to(labelled / link)
    dataset = open_dataset(write_yaml(linked, "images"))
    assert boxes(dataset) == len(dataset) > 0


def test_a_loop_of_links_ends_and_repeats_no_image(labelled):
    (labelled / "images/val/again").symlink_to(labelled / "images")
    (labelled / "images/self").symlink_to("self")
    write_yaml(labelled, "images")
    dataset = open_dataset(labelled / "data.yaml")
    assert len(dataset) == 2
    assert "link to a folder that is already included" in dataset.problems[0]


def test_a_link_beside_its_folder_does_not_replace_it(labelled):
    (labelled / "images/a").symlink_to("val")
    dataset = open_dataset(write_yaml(labelled, "images"))
    assert (len(dataset), boxes(dataset)) == (2, 2) and {dataset.path(i).parent.name for i in range(2)} == {"val"}


# --- which files are images -------------------------------------------------------------------------------------------


def test_every_format_that_can_be_read_is_in_datasets_and_in_folders(tmp_path):
    image = Image.new("RGB", (60, 40))
    formats = {".avif": "AVIF", ".dib": "BMP", ".jfif": "JPEG", ".jp2": "JPEG2000", ".jpe": "JPEG", ".mpo": "MPO"}
    (tmp_path / "images").mkdir()
    for suffix, name in {**formats, ".JPG": "JPEG", ".ppm": "PPM", ".tiff": "TIFF", ".webp": "WEBP"}.items():
        image.save(tmp_path / f"images/x{suffix}", format=name)
    paths = sorted((tmp_path / "images").iterdir())
    readable = [path for path in paths if read_image(path) is not None]
    dataset = open_dataset(write_yaml(tmp_path))
    assert file_names(dataset) == [path.name for path in readable] and len(readable) == 10
    assert open_source(tmp_path / "images").paths == tuple(map(str, readable))


@pytest.mark.parametrize("name", ["._3.png", ".3.png", ".ipynb_checkpoints/3-checkpoint.png", ".thumbs/a/3.png"])
def test_hidden_files_and_folders_are_left_out_and_reported(labelled, name):
    write_image(labelled / "images/val" / name)
    dataset = open_dataset(labelled / "data.yaml")
    assert file_names(dataset) == ["1.png", "2.png"]
    assert dataset.problems == (f"left out of {labelled}/images/val: 1 x hidden ({name.split('/')[0]})",)


def test_a_dataset_may_be_below_a_hidden_folder(labelled):
    hidden = labelled.parent / ".cache/d"
    shutil.copytree(labelled, hidden)
    assert boxes(open_dataset(hidden / "data.yaml")) == 2


def test_everything_else_that_is_left_out_is_reported_by_kind(labelled):
    folder = labelled / "images/val"
    for name in ("a.heic", "b.HEIC", "notes", "1.txt"):
        (folder / name).write_bytes(b"x")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    dataset = open_dataset(labelled / "data.yaml")
    assert file_names(dataset) == ["1.png", "2.png"]
    (problem,) = dataset.problems
    for part in ("2 x .heic", "1 x file without suffix", "1 x broken link", "1 x not a regular file"):
        assert part in problem
    assert ".txt" not in problem


def test_names_with_escape_sequences_are_printable(labelled):
    (labelled / "images/val/\x1b[31m.\x1b[0m").write_bytes(b"x")
    assert "\x1b" not in "".join(open_dataset(labelled / "data.yaml").problems)


def test_an_image_named_twice_is_used_once_and_reported(labelled):
    (labelled / "list.txt").write_text("images/val/1.png\n./images/val/1.png\n")
    dataset = open_dataset(write_yaml(labelled, "[images/val, images/../images/val, list.txt]"))
    assert len(dataset) == 2
    assert dataset.problems == ("4 images of val are named more than once; each is used once",)


# --- lists ------------------------------------------------------------------------------------------------------------


def write_list(folder, text, encoding="utf-8"):
    (folder / "val.txt").write_bytes(text.encode(encoding))
    return write_yaml(folder, "val.txt")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_list_may_have_a_byte_order_mark(labelled, encoding, end):
    lines = ["./images/val/1.png", "./images/val/2.png", ""]
    dataset = open_dataset(write_list(labelled, end.join(lines), encoding))
    assert (len(dataset), boxes(dataset), dataset.problems) == (2, 2, ())
    assert [frame.path for frame in open_source(labelled / "val.txt")] == [str(dataset.path(i)) for i in range(2)]


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_a_list_may_have_comments_and_backslashes(labelled, separator):
    text = "# images\n\nimages/val/1.png\n./images/val/2.png\n".replace("/", separator)
    dataset = open_dataset(write_list(labelled, text))
    assert (len(dataset), boxes(dataset), dataset.problems) == (2, 2, ())
    assert len(list(open_source(labelled / "val.txt"))) == 2


def test_a_yaml_may_have_backslashes(labelled):
    assert boxes(open_dataset(write_yaml(labelled, "images\\val"))) == 2


def test_images_of_a_list_that_do_not_exist_are_reported(labelled):
    dataset = open_dataset(write_list(labelled, "images/val/1.png\nimages/val/7.png\nC:\\data\\8.png\n"))
    assert dataset.problems[0] == "2 images of val.txt do not exist; the first is images/val/7.png"


def test_a_list_may_have_folders(labelled):
    write_image(labelled / "more/3.png")
    write_label(labelled / "more/3.txt")
    dataset = open_dataset(write_list(labelled, "images\nmore/3.png\n"))
    assert (file_names(dataset), boxes(dataset), dataset.problems) == (["1.png", "2.png", "3.png"], 3, ())


def test_entries_of_a_list_may_be_relative_to_the_working_folder(labelled, monkeypatch, tmp_path):
    (tmp_path / "lists").mkdir()
    path = write_list(tmp_path / "lists", "d/images/val/1.png\n")
    monkeypatch.chdir(tmp_path)
    assert boxes(open_dataset(path)) == 1


# --- the layout of Roboflow -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_paths_of_roboflow_that_begin_with_two_dots_are_beside_the_yaml(tmp_path, monkeypatch, inside):
    root = tmp_path / "rf"
    write_image(root / "valid/images/1.png")
    write_label(root / "valid/labels/1.txt")
    path = write_yaml(root, "../valid/images")
    monkeypatch.chdir(root if inside else tmp_path)
    dataset = open_dataset("data.yaml" if inside else path)
    assert (len(dataset), boxes(dataset), dataset.problems) == (1, 1, ())


def test_a_path_that_does_not_exist_is_a_problem_even_if_the_images_are_beside_the_yaml(labelled):
    path = write_yaml(labelled, "images/val")
    path.write_text(f"path: /data/moved\n{path.read_text()}")
    problem, *others = open_dataset(labelled / "data.yaml").problems
    assert "path of data.yaml does not exist (/data/moved); val is in " in problem and not others


def test_two_dots_mean_the_parent_folder_if_it_has_the_path(tmp_path):
    for folder in ("images", "rf/images"):
        write_image(tmp_path / folder / f"{folder.replace('/', '-')}.png")
    assert file_names(open_dataset(write_yaml(tmp_path / "rf", "../images"))) == ["images.png"]


def test_all_suffixes_are_lower_case_and_sorted():
    assert list(IMAGE_SUFFIXES) == sorted(suffix.lower() for suffix in IMAGE_SUFFIXES)
