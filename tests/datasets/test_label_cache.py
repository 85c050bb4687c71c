"""The label cache: it avoids reading files, never hides a change of them, and is rebuilt if it is damaged."""

import json
import logging
import os
import pickle

import cv2
import numpy as np
import pytest

from yolov7_deploy.datasets import label_cache, open_dataset
from yolov7_deploy.datasets.label_cache import read_labels_cached
from yolov7_deploy.errors import DatasetError

POLYGON = "0 0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.4\n"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """Use a separate cache folder, and treat files as settled immediately."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(label_cache, "SETTLED_NS", -(10**18))
    return tmp_path / "cache/yolov7_deploy/labels"


@pytest.fixture
def data(tmp_path):
    """Three images: one with a box and its duplicate, one with a polygon, one without a label file."""
    for name, hw in (("1.png", (40, 60)), ("2.png", (30, 20)), ("3.png", (50, 50))):
        (tmp_path / "images").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "images" / name), np.zeros((*hw, 3), np.uint8))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/1.txt").write_text("1 0.5 0.5 0.5 0.25\n" * 2)
    (tmp_path / "labels/2.txt").write_text(f"{POLYGON}1 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("val: images\nnames: [cat, dog]\n")
    return tmp_path


def contents(dataset):
    return [
        (
            sample.path,
            sample.image_id,
            sample.image_hw,
            sample.boxes.tolist(),
            sample.class_ids.tolist(),
            sample.crowd.tolist(),
            [polygon.tolist() for polygon in sample.polygons],
        )
        for sample in dataset
    ], dataset.problems


def open_cached(data, **options):
    return open_dataset(data / "data.yaml", cache=True, **options)


@pytest.fixture
def read(monkeypatch):
    """Record the names of the label files and images that are read."""
    names = []

    def recorded(function):
        def call(path, **options):
            names.append(path.name)
            return function(path, **options)

        return call

    for function in ("read_label_file", "read_image_hw"):
        monkeypatch.setattr(label_cache, function, recorded(getattr(label_cache, function)))
    return names


def test_the_cache_returns_what_the_files_contain(data, read):
    plain = contents(open_dataset(data / "data.yaml"))
    assert contents(open_cached(data)) == plain and len(read) == 6
    read.clear()
    assert contents(open_cached(data)) == plain and read == []
    assert len(plain[1]) == 2  # the missing label file and the duplicate box are reported each time


def test_nothing_is_written_without_a_request(data, cache_folder):
    open_dataset(data / "data.yaml")
    assert not cache_folder.exists()


def test_only_an_edited_label_file_is_read_again(data, read):
    open_cached(data)
    read.clear()
    (data / "labels/1.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    assert open_cached(data)[0].class_ids.tolist() == [0]
    assert read == ["1.txt", "1.png"]
    assert contents(open_cached(data)) == contents(open_dataset(data / "data.yaml"))


def test_an_edit_of_the_same_length_with_mtime_set_back_is_noticed(data):
    path = data / "labels/2.txt"
    before = path.stat()
    open_cached(data)
    path.write_text(path.read_text().replace("0.6", "0.8"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert open_cached(data)[1].polygons[0].max() == pytest.approx(24)


def test_a_file_that_changed_a_moment_ago_is_not_cached_yet(data, read, monkeypatch):
    """Its next change can fall into the same clock tick."""
    monkeypatch.setattr(label_cache, "SETTLED_NS", 60 * 10**9)
    open_cached(data)
    read.clear()
    open_cached(data)
    assert len(read) == 6


def test_new_and_deleted_label_files_are_noticed(data):
    open_cached(data)
    (data / "labels/3.txt").write_text(POLYGON)
    (data / "labels/1.txt").unlink()
    assert [len(sample.boxes) for sample in open_cached(data)] == [0, 2, 1]
    assert [len(sample.boxes) for sample in open_cached(data)] == [0, 2, 1]


def test_a_changed_image_size_is_noticed(data):
    open_cached(data)
    cv2.imwrite(str(data / "images/2.png"), np.zeros((70, 80, 3), np.uint8))
    assert open_cached(data)[1].image_hw == (70, 80)


def test_other_images_and_other_classes_use_a_separate_cache_file(data, cache_folder, read):
    open_cached(data)
    open_cached(data, limit=2)
    (data / "data.yaml").write_text("val: images\nnames: [cat, dog, cow]\n")
    open_cached(data)
    assert len(list(cache_folder.iterdir())) == 3 and len(read) == 6 + 4 + 6


def test_labels_with_too_few_classes_are_not_taken_from_the_cache(data):
    open_cached(data)
    (data / "data.yaml").write_text("val: images\nnames: [cat]\n")
    with pytest.raises(DatasetError, match="class 1 is not one of"):
        open_cached(data)


def test_invalid_lines_are_reported_each_time_and_the_other_files_cached(data, read):
    (data / "labels/3.txt").write_text("7 0.5 0.5 0.1 0.1\n")
    for names in (6, 2):
        read.clear()
        with pytest.raises(DatasetError, match=r"3\.txt: line 1: class 7"):
            open_cached(data)
        assert len(read) == names


def test_an_unreadable_image_is_tried_again(data):
    (data / "images/3.png").write_bytes(b"\x89PNG")
    assert len(open_cached(data)) == 3
    cv2.imwrite(str(data / "images/3.png"), np.zeros((9, 8, 3), np.uint8))
    assert open_cached(data)[2].image_hw == (9, 8)


def only_file(folder):
    (path,) = folder.iterdir()
    return path


def test_a_truncated_cache_is_rebuilt(data, cache_folder):
    plain = contents(open_cached(data))
    content = only_file(cache_folder).read_bytes()
    for length in (0, 1, 10, len(content) // 2, len(content) - 1):
        only_file(cache_folder).write_bytes(content[:length])
        assert contents(open_cached(data)) == plain
        assert len(only_file(cache_folder).read_bytes()) == len(content)


def test_a_cache_with_flipped_bytes_is_rebuilt_or_correct(data, cache_folder):
    plain = contents(open_cached(data))
    content = only_file(cache_folder).read_bytes()
    for at in np.random.default_rng(0).integers(0, len(content), 60):
        only_file(cache_folder).write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        assert contents(open_cached(data)) == plain


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("points"),
        lambda arrays: arrays.update(hw=arrays["hw"][:2]),
        lambda arrays: arrays.update(hw=arrays["hw"].astype(np.float32)),
        lambda arrays: arrays.update(hw=-arrays["hw"]),
        lambda arrays: arrays.update(box_counts=arrays["box_counts"] * 2),
        lambda arrays: arrays.update(point_counts=arrays["point_counts"] - 1),
        lambda arrays: arrays.update(class_ids=arrays["class_ids"] + 1),
        lambda arrays: arrays.update(boxes=arrays["boxes"] * np.nan),
        lambda arrays: arrays.update(points=arrays["points"] + 5),
        lambda arrays: arrays.update(boxes=np.array(["a", None], dtype=object)),
        lambda arrays: arrays.update(repairs=np.frombuffer(b'{"0": [1]}', dtype=np.uint8)),
        lambda arrays: arrays.update(repairs=np.frombuffer(b"[" * 100_000, dtype=np.uint8)),
    ],
)
def test_an_inconsistent_cache_is_rebuilt(data, cache_folder, change):
    plain = contents(open_cached(data))
    with np.load(only_file(cache_folder)) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(only_file(cache_folder), **arrays)
    assert contents(open_cached(data)) == plain


class _Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle ran",)


def test_a_pickle_in_place_of_the_cache_is_never_executed(data, cache_folder):
    plain = contents(open_cached(data))
    only_file(cache_folder).write_bytes(pickle.dumps(_Bomb()))
    assert contents(open_cached(data)) == plain


def test_a_single_array_in_place_of_the_cache_is_replaced(data, cache_folder):
    plain = contents(open_cached(data))
    with only_file(cache_folder).open("wb") as file:
        np.save(file, np.zeros(3))
    assert contents(open_cached(data)) == plain and contents(open_cached(data)) == plain


def test_a_folder_that_cannot_be_written_is_a_warning(data, caplog):
    (data / "cache").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        assert contents(open_cached(data)) == contents(open_dataset(data / "data.yaml"))
    assert "cannot be written" in caplog.text and "again next time" in caplog.text


def test_no_partial_file_remains(data, cache_folder, monkeypatch):
    def fail(file, **_):
        file.write(b"partial")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    open_cached(data)
    assert list(cache_folder.iterdir()) == []


def test_no_images_give_no_labels():
    found, sizes = read_labels_cached([], classes=1)
    assert (found.labels, found.problems, sizes) == ((), (), [])


def test_a_coco_file_is_not_cached(data, cache_folder):
    document = {
        "images": [{"id": 9, "file_name": "1.png", "width": 60, "height": 40}],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (data / "instances_val.json").write_text(json.dumps(document))
    assert len(open_dataset(data / "instances_val.json", images=data / "images", cache=True)) == 1
    assert not cache_folder.exists()
