"""Calibration images: which ones are selected and skipped, and the notes about them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.support.sample_images import noise
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.errors import DatasetError, MissingLibraryError, SourceError, UsageError
from yolov7_deploy.image import read_image
from yolov7_deploy.precision.calibration_images import LIMIT, SINGLE_COLOR, count_overlap, open_calibration
from yolov7_deploy.sources import open_source
from yolov7_deploy.sources.video import VideoWriter

HW = (24, 32)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


def write_many(folder, count, first=0):
    """Write `count` images that differ in the blue value of their corner."""
    paths = []
    for number in range(first, first + count):
        image = noise(*HW, seed=number)
        image[0, 0, 0] = number % 256
        paths.append(write(folder / f"{number:04d}.png", image))
    return paths


def corners(images):
    return [int(image[0, 0, 0]) for image in images]


def video(path, frames):
    writer = VideoWriter(path, fps=10, hw=(48, 64))
    for number in range(frames):
        writer.write(noise(48, 64, number))
    return writer.finish()


@pytest.fixture
def folder(tmp_path):
    write_many(tmp_path / "shots", 5)
    return tmp_path / "shots"


@pytest.fixture
def yolo(tmp_path):
    """A YAML with three training and two validation images."""
    write_many(tmp_path / "images/train", 3)
    write_many(tmp_path / "images/val", 2, first=100)
    path = tmp_path / "data.yaml"
    path.write_text("train: images/train\nval: images/val\nnc: 1\nnames: [thing]\n")
    return path


# --- which images -----------------------------------------------------------------------------------------------------


def test_every_iteration_gives_all_images_of_a_folder_in_order(folder):
    images = open_calibration(folder)
    assert len(images) == 5
    assert corners(images) == corners(images) == [0, 1, 2, 3, 4]
    assert images.skipped == ()
    assert [path.name for path in images.files] == [f"{n:04d}.png" for n in range(5)]
    assert images.source == str(folder)


def test_two_simultaneous_iterations_give_the_images_of_read_image(folder):
    images = open_calibration(folder)
    for path, image, again in zip(images.files, images, images, strict=True):
        np.testing.assert_array_equal(image, read_image(path))
        np.testing.assert_array_equal(image, again)


@pytest.mark.parametrize("kind", ["image", "pattern", "list"])
def test_an_image_a_pattern_and_a_list_are_read_like_a_folder(folder, kind):
    (folder / "list.txt").write_text("0003.png\n# not this one\n0001.png\n0003.png\n")
    data = {"image": folder / "0002.png", "pattern": f"{folder}/000[24].png", "list": folder / "list.txt"}[kind]
    assert corners(open_calibration(data)) == {"image": [2], "pattern": [2, 4], "list": [3, 1]}[kind]


def test_a_yaml_gives_train_images_or_else_val_images_and_notes_which(yolo):
    images = open_calibration(yolo)
    assert corners(images) == [0, 1, 2]
    assert images.notes[0] == "Calibrated on train of data.yaml."
    yolo.write_text("val: images/val\nnc: 1\nnames: [thing]\n")
    images = open_calibration(yolo)
    assert corners(images) == [100, 101]
    why = "because it has no train images: AP measured on these images is too high"
    assert images.notes[0] == f"Calibrated on val of data.yaml, {why}."


def test_what_a_yaml_names_and_is_not_used_is_noted(yolo):
    (yolo.parent / "images/val/._0100.png").write_bytes(b"x")
    (yolo.parent / "train.txt").write_text("images/train/0000.png\ngone.png\n")
    yolo.write_text("train: [train.txt, images/val]\nnc: 1\nnames: [thing]\n")
    images = open_calibration(yolo)
    assert corners(images) == [0, 100, 101]
    assert images.notes[1:4] == (
        "1 images of train.txt do not exist; the first is gone.png.",
        f"Left out of {yolo.parent}/images/val: 1 x hidden (._0100.png).",
        "Skipped, because they cannot be read: gone.png.",
    )


def test_a_yaml_whose_train_list_is_missing_is_refused_and_not_replaced_by_val(yolo):
    yolo.write_text("train: train.txt\nval: images/val\nnc: 1\nnames: [thing]\n")
    with pytest.raises(DatasetError, match=r"train\.txt, which does not exist") as caught:
        open_calibration(yolo)
    assert "--calib FOLDER" in caught.value.fix


def test_a_coco_json_gives_its_images_or_an_error_with_the_folders_that_were_searched(tmp_path):
    paths = write_many(tmp_path / "images/some", 3)
    entries = [{"id": i, "file_name": path.name, "width": 32, "height": 24} for i, path in enumerate(paths)]
    document = {"images": entries, "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    target = tmp_path / "annotations/instances_some.json"
    target.parent.mkdir()
    target.write_text(json.dumps(document))
    images = open_calibration(target)
    assert corners(images) == [0, 1, 2]
    assert images.notes[0] == "Calibrated on instances_some.json."
    for path in paths:
        path.unlink()
    with pytest.raises(DatasetError, match="was found; looked in") as caught:
        open_calibration(target)
    assert "--calib FOLDER" in caught.value.fix


def test_hidden_files_and_other_formats_of_a_folder_are_noted(tmp_path):
    write_many(tmp_path, 2)
    for name in ("._0000.png", "notes.md"):
        (tmp_path / name).write_bytes(b"x")
    images = open_calibration(tmp_path)
    assert len(images) == 2
    assert images.notes[0] == f"Left out: 1 x hidden ({tmp_path}/._0000.png), 1 x .md ({tmp_path}/notes.md)."


def test_a_folder_named_like_a_dataset_file_is_a_folder(tmp_path):
    write_many(tmp_path / "shots.json", 2)
    assert len(open_calibration(tmp_path / "shots.json")) == 2


def test_only_a_yaml_needs_pyyaml_and_the_error_names_the_extra_to_install(yolo, monkeypatch):
    for module in ("yolo", "yaml_file"):
        monkeypatch.delitem(sys.modules, f"yolov7_deploy.datasets.{module}", raising=False)
        monkeypatch.delattr(f"yolov7_deploy.datasets.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert len(open_calibration(yolo.parent / "images/train")) == 3
    with pytest.raises(MissingLibraryError, match="yaml is needed to read") as caught:
        open_calibration(yolo)
    assert caught.value.fix == "pip install 'yolov7-deploy[val]'"


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "limit"), [(10, 4), (7, 7), (7, 6), (5, 100), (9, 1), (13, 5)])
def test_images_above_the_limit_are_evenly_spaced(tmp_path, count, limit):
    write_many(tmp_path, count)
    images = open_calibration(tmp_path, limit=limit)
    expected = min(count, limit)
    assert len(images) == expected
    assert corners(images) == [i * count // expected for i in range(expected)]
    assert (f"{expected} of {count} images were selected, evenly spaced." in images.notes) == (expected < count)


def test_there_is_a_default_limit(tmp_path):
    for number in range(LIMIT + 1):
        (tmp_path / f"{number}.png").touch()
    assert len(open_calibration(tmp_path)) == LIMIT


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(folder, limit):
    with pytest.raises(UsageError, match=f"at least 1 image, not {limit}") as caught:
        open_calibration(folder, limit=limit)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("count", "word"), [(1, "Far too few"), (7, "Far too few"), (8, "Few"), (99, "Few"), (100, "")]
)
def test_too_few_images_are_noted_with_the_reason(tmp_path, count, word):
    write_many(tmp_path, count)
    why = (
        "activation ranges are measured on these images, and larger values on other images are clipped. "
        "Use 100 to 500 images that are representative of the application, and not those on which AP is measured."
    )
    assert open_calibration(tmp_path).notes == ((f"{word} images ({count}): {why}",) if word else ())


def test_skipped_images_do_not_count(tmp_path):
    write_many(tmp_path, 8)
    write(tmp_path / "0003.png", np.zeros((*HW, 3), np.uint8))
    images = open_calibration(tmp_path)
    assert images.notes[-1].startswith("Few images (8)")
    assert len(list(images)) == 7
    assert images.notes[-1].startswith("Far too few images (7)")


# --- skipped images ---------------------------------------------------------------------------------------------------


def test_unreadable_images_are_skipped_and_named(folder):
    for number in range(4):
        (folder / f"empty{number}.png").touch()
    (folder / "0001.png").write_bytes(b"no image")
    images = open_calibration(folder)
    assert images.skipped == ()
    for _ in range(2):  # every iteration counts again
        assert corners(images) == [0, 2, 3, 4]
        assert [Path(entry.path).name for entry in images.skipped] == [
            "0001.png",
            *(f"empty{number}.png" for number in range(4)),
        ]
    assert "is empty (0 bytes)" in images.skipped[1].reason
    assert "Skipped, because they cannot be read: 0001.png, empty0.png, empty1.png and 2 more." in images.notes


@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (10, 200, 30)])
def test_images_of_a_single_color_are_skipped_with_the_reason(folder, color):
    write(folder / "plain.png", np.full((*HW, 3), color, np.uint8))
    images = open_calibration(folder)
    assert len(list(images)) == 5
    assert [(entry.path, entry.reason) for entry in images.skipped] == [(f"{folder}/plain.png", SINGLE_COLOR)]
    assert "Skipped, because a single color says nothing about activation ranges: plain.png." in images.notes


@pytest.mark.parametrize("pixel", [(0, 1), (23, 31), (12, 0)])
def test_one_pixel_of_another_color_is_enough(tmp_path, pixel):
    image = np.zeros((*HW, 3), np.uint8)
    image[pixel] = (0, 0, 1)
    write(tmp_path / "a.png", image)
    write(tmp_path / "b.png", np.zeros((*HW, 3), np.uint8))
    images = open_calibration(tmp_path)
    assert next(iter(images)).any()  # stopping early is not an error
    assert len(list(images)) == 1


def test_missing_files_of_a_list_are_skipped_and_named(folder):
    (folder / "list.txt").write_text("0001.png\ngone.png\n")
    images = open_calibration(folder / "list.txt")
    assert corners(images) == [1]
    assert [entry.path for entry in images.skipped] == ["gone.png"]
    assert "Skipped, because they cannot be read: gone.png." in images.notes
    (folder / "list.txt").write_text("gone.png\n")
    with pytest.raises(SourceError, match=r"line 1: gone\.png does not exist"):
        open_calibration(folder / "list.txt")


def test_characters_of_a_name_that_cannot_be_printed_are_escaped(folder):
    (folder / "a\nb.png").touch()
    images = open_calibration(folder)
    assert len(list(images)) == 5
    assert any(r"a\nb.png" in note for note in images.notes)


# --- other kinds of images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "kind"),
    [("grey.png", 1, np.uint8), ("rgba.png", 4, np.uint8), ("deep.png", 3, np.uint16), ("grey16.tiff", 1, np.uint16)],
)
def test_grey_rgba_and_16_bit_images_become_bgr(tmp_path, name, channels, kind):
    image = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (*HW, channels), kind)
    write(tmp_path / name, image)
    (found,) = open_calibration(tmp_path)
    assert (found.shape, found.dtype) == ((*HW, 3), np.uint8)
    expected = (image.astype(np.float64) * 255 / np.iinfo(kind).max)[..., :3]
    # 16 bits are cut to 8 by division or by shifting, which differ by one level.
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1)


def test_a_video_gives_evenly_spaced_frames(tmp_path):
    path = video(tmp_path / "shots.mp4", 10)
    frames = [frame.image for frame in open_source(path)]
    images = open_calibration(path, limit=4)
    assert len(images) == 4
    for _ in range(2):
        for image, number in zip(images, (0, 2, 5, 7), strict=True):
            np.testing.assert_array_equal(image, frames[number])
    assert images.notes[:2] == (
        "4 of 10 images were selected, evenly spaced.",
        "4 are frames of videos. Successive frames are similar; images of many scenes are better.",
    )


def test_videos_count_by_their_frames(folder):
    path = video(folder / "0002a.mp4", 5)
    frames = [frame.image for frame in open_source(path)]
    images = open_calibration(folder, limit=5)
    assert [path.name for path in images.files] == ["0000.png", "0002.png", "0002a.mp4", "0003.png"]
    expected = [*map(read_image, images.files[:2]), frames[1], frames[3], read_image(images.files[3])]
    for image, other in zip(images, expected, strict=True):
        np.testing.assert_array_equal(image, other)


def test_a_truncated_video_gives_the_frames_that_it_has(folder):
    path = folder / "cut.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for number in range(20):
        writer.write(noise(48, 64, number))
    writer.release()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    whole = len(list(open_source(path)))
    assert 0 < whole < 20
    images = open_calibration(folder)
    assert len(list(images)) == 5 + whole
    assert len(images) == 25
    assert [entry.reason for entry in images.skipped] == [
        f"{path} ended after {whole} of the 20 frames that its header declares."
    ]


def test_the_frames_of_a_video_without_a_length_are_counted(tmp_path):
    path = tmp_path / "raw.mjpeg"
    path.write_bytes(b"".join(cv2.imencode(".jpg", noise(48, 64, n))[1].tobytes() for n in range(12)))
    images = open_calibration(path, limit=3)
    assert len(list(images)) == 3
    assert images.notes[0] == "3 of 12 images were selected, evenly spaced."


def test_a_broken_video_is_skipped_among_images_and_refused_alone(folder):
    (folder / "broken.mp4").write_bytes(b"no video")
    images = open_calibration(folder)
    assert len(list(images)) == 5
    assert "Skipped, because they cannot be read: broken.mp4." in images.notes
    with pytest.raises(SourceError, match="not a video that OpenCV can open"):
        open_calibration(folder / "broken.mp4")


# --- no images --------------------------------------------------------------------------------------------------------


def test_the_errors_for_a_missing_path_and_an_empty_folder_state_what_was_searched(tmp_path):
    with pytest.raises(SourceError, match=r"gone does not exist \(looked for "):
        open_calibration(tmp_path / "gone")
    with pytest.raises(SourceError, match="has no image and no video in it"):
        open_calibration(tmp_path)


@pytest.mark.parametrize("name", ["gone.yaml", "gone.json"])
def test_a_missing_dataset_is_an_error(tmp_path, name):
    with pytest.raises(DatasetError, match=f"{name} does not exist"):
        open_calibration(tmp_path / name)


def test_the_error_for_a_folder_with_images_in_subfolders_suggests_a_pattern(tmp_path):
    write_many(tmp_path / "deeper", 1)
    with pytest.raises(SourceError) as caught:
        open_calibration(tmp_path)
    assert caught.value.fix == f"To include subfolders:  --calib '{tmp_path}/**/*'"
    assert len(open_calibration(f"{tmp_path}/**/*")) == 1


def test_the_error_for_a_folder_of_unusable_images_lists_the_reasons(tmp_path):
    for number in range(3):
        write(tmp_path / f"black{number}.png", np.zeros((*HW, 3), np.uint8))
    (tmp_path / "a.png").touch()
    images = open_calibration(tmp_path)
    with pytest.raises(SourceError) as caught:
        list(images)
    assert caught.value.message == (
        f"{tmp_path} has no image to calibrate on. {tmp_path}/a.png is empty (0 bytes). "
        f"{tmp_path}/black0.png {SINGLE_COLOR}. {tmp_path}/black1.png {SINGLE_COLOR}. And 1 more."
    )
    assert caught.value.fix == "Use 100 to 500 images that are representative of the application:  --calib FOLDER"
    assert len(images.skipped) == 4


@pytest.mark.parametrize("data", ["0", "rtsp://user:secret@camera/1", "http://host/a.jpg", "http://host/data.yaml"])
def test_cameras_streams_and_urls_are_refused_with_advice(folder, data):
    with pytest.raises(UsageError, match="is not a file: calibration reads the same images several times") as caught:
        open_calibration(data)
    assert "secret" not in caught.value.message
    assert "Record a video first" in caught.value.fix
    (folder / "list.txt").write_text(f"0001.png\n{data}\n")
    with pytest.raises(UsageError, match="is not a file"):
        open_calibration(folder / "list.txt")


# --- overlap with other files -----------------------------------------------------------------------------------------


def test_overlap_counts_the_common_files(folder, yolo):
    paths = sorted(folder.iterdir())
    images = open_calibration(folder)
    assert count_overlap(images, paths) == 5
    assert count_overlap(images, [*paths[:2], paths[0], folder / "other.png"]) == 2
    assert count_overlap(images, []) == 0
    val = open_dataset(yolo, split="val")
    assert count_overlap(open_calibration(yolo), map(val.path, range(len(val)))) == 0
    assert count_overlap(open_calibration(yolo.parent / "images/val"), map(val.path, range(len(val)))) == 2


def test_overlap_resolves_links_and_relative_paths(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    images = open_calibration("link")
    assert count_overlap(images, [folder / "0001.png", folder / ".." / folder.name / "0002.png"]) == 2


def test_overlap_accepts_invalid_paths(folder):
    (folder / "loop.png").symlink_to(folder / "loop.png")
    strange = [folder / "loop.png", folder / ("x" * 5000), folder / "a\0b.png", folder / "0001.png"]
    assert count_overlap(open_calibration(folder), strange) == 1
