"""Running a detector on a source: which files are written, their names, and what remains after an interruption."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolov7_deploy.detections import Detections, Speed
from yolov7_deploy.errors import SourceError, UsageError
from yolov7_deploy.image import read_image
from yolov7_deploy.sources import open_source
from yolov7_deploy.sources.display import Window
from yolov7_deploy.sources.video import VideoFile, VideoWriter
from yolov7_deploy.visualize import write_image
from yolov7_deploy.workflows.predict import AnnotateOptions, PredictionReport, _UniqueNames, annotate, next_run_folder

NAMES = ("person", "dog")
HW = (48, 64)


def find_two(image: np.ndarray) -> Detections:
    """A detector that returns a person and a dog for every image."""
    return Detections(
        boxes=[[5, 5, 40, 40], [10, 10, 30, 30]],
        scores=[0.9, 0.5],
        class_ids=[0, 1],
        class_names=NAMES,
        image_hw=image.shape[:2],
        speed=Speed(preprocess_ms=1, inference_ms=2, postprocess_ms=3),
    )


def grey(value: int = 50) -> np.ndarray:
    return np.full((*HW, 3), value, dtype=np.uint8)


@pytest.fixture
def inputs(tmp_path) -> Path:
    folder = tmp_path / "in"
    for name in ("a.png", "b.jpg", "deep/a.png", "deep/b.png"):
        write_image(folder / name, grey())
    return folder


def make_video(path: Path, frames: int = 5) -> Path:
    video_writer = VideoWriter(path, fps=10, hw=HW)
    for number in range(frames):
        video_writer.write(grey(number * 20))
    return video_writer.finish()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_images_keep_their_names_and_never_overwrite_each_other(inputs, tmp_path):
    out = tmp_path / "out"
    report = annotate(find_two, open_source(f"{inputs}/**/*"), options=AnnotateOptions(save_dir=out))
    assert files(out) == ["a.png", "a_2.png", "b.jpg", "b.png"]
    assert sorted(report.files) == sorted(path for path in out.iterdir())
    assert (report.frames, report.detections) == (4, 8)
    assert report.speed == Speed(preprocess_ms=1, inference_ms=2, postprocess_ms=3)
    assert (read_image(out / "a.png") != 50).any()


def test_label_files_pair_with_their_images(inputs, tmp_path):
    out = tmp_path / "out"
    annotate(find_two, open_source(f"{inputs}/**/*"), options=AnnotateOptions(save_dir=out, save_txt=True))
    images = {path.stem for path in out.iterdir() if path.is_file()}
    assert images == {path.stem for path in (out / "labels").iterdir()} == {"a", "a_2", "b", "b_2"}
    assert (out / "labels" / "a.txt").read_text() == find_two(grey()).to_yolo()


def test_an_empty_label_file_replaces_an_old_one(inputs, tmp_path):
    out = tmp_path / "out"
    options = AnnotateOptions(save_dir=out, save_txt=True, save_conf=True, save_drawn=False)
    annotate(find_two, open_source(inputs / "a.png"), options=options)
    assert len((out / "labels" / "a.txt").read_text().split()) == 12
    annotate(lambda image: find_two(image)[[]], open_source(inputs / "a.png"), options=options)
    assert (out / "labels" / "a.txt").read_text() == ""
    assert files(out) == ["labels/a.txt"]


@given(st.lists(st.tuples(st.sampled_from(["a", "A", "a_2", "b"]), st.sampled_from([".jpg", ".png"])), max_size=12))
def test_reserved_names_are_unique_whatever_their_case(wanted):
    for pair in (False, True):
        names = _UniqueNames(pair_with_labels=pair)
        given_ = [names.reserve(*item) for item in wanted]
        keys = [(Path(name).stem if pair else name).casefold() for name in given_]
        assert len(set(keys)) == len(keys)


def test_results_never_overwrite_their_inputs(inputs):
    before = (inputs / "a.png").read_bytes()
    with pytest.raises(UsageError, match="would overwrite"):
        annotate(find_two, open_source(inputs), options=AnnotateOptions(save_dir=inputs / "deep" / ".."))
    assert (inputs / "a.png").read_bytes() == before


def test_an_annotated_video_has_the_same_rate_size_and_length(tmp_path):
    make_video(tmp_path / "clip.mp4")
    out = tmp_path / "out"
    seen = []
    annotate(
        find_two,
        open_source(tmp_path / "clip.mp4"),
        options=AnnotateOptions(save_dir=out, save_txt=True),
        on_frame=lambda frame, detections: seen.append((frame.number, detections.path)),
    )
    with VideoFile(str(out / "clip.mp4")) as video:
        assert (video.info.fps, video.info.frames, video.info.hw) == (10, 5, HW)
    assert files(out) == ["clip.mp4", *(f"labels/clip_{n}.txt" for n in range(1, 6))]
    assert seen == [(n, str(tmp_path / "clip.mp4")) for n in range(5)]


def test_videos_of_the_same_stem_do_not_overwrite_each_other(tmp_path):
    for name in ("x/clip.mp4", "y/clip.mp4", "clip.m4v"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make_video(tmp_path / "source.mp4", frames=2).rename(tmp_path / name)
    sources = [tmp_path / "x/clip.mp4", tmp_path / "y/clip.mp4", tmp_path / "clip.m4v"]
    annotate(find_two, open_source(sources), options=AnnotateOptions(save_dir=tmp_path / "out"))
    assert files(tmp_path / "out") == ["clip.mp4", "clip_2.mp4", "clip_3.mp4"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SourceError("broken")])
def test_an_interrupted_video_leaves_no_file(tmp_path, error):
    make_video(tmp_path / "clip.mp4")
    calls = []

    def stop_at_third(image):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return find_two(image)

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        annotate(stop_at_third, open_source(tmp_path / "clip.mp4"), options=AnnotateOptions(save_dir=tmp_path / "out"))
    assert files(tmp_path / "out") == []


class Camera:
    """A fake capture with a number of frames."""

    def __init__(self, frames: int):
        self.left = frames

    def isOpened(self):  # noqa: N802
        return self.left > 0

    def read(self):
        if self.left == 0:
            return False, None
        self.left -= 1
        return True, grey()

    def get(self, what):
        return 0.0

    def release(self):
        pass


def test_ctrl_c_ends_a_live_stream_normally(tmp_path):
    def stop(frame, found):
        if frame.index == 2:
            raise KeyboardInterrupt

    camera = Camera(1 << 30)
    options = AnnotateOptions(save_dir=tmp_path / "out", keep_records=True)
    report = annotate(find_two, open_source(0, opener=lambda _: camera), options=options, on_frame=stop)
    assert report.stopped
    assert report.frames == len(report.records) == 3
    with VideoFile(str(tmp_path / "out" / "camera_0.mp4")) as video:
        assert video.info.frames == 3


def test_a_lost_live_stream_is_an_error_that_keeps_the_recording(tmp_path):
    report = PredictionReport()
    camera = Camera(1)
    source = open_source("rtsp://me:secret@host:8554/live/1", opener=lambda _: camera, reconnects=0)
    with pytest.raises(SourceError, match="lost after 1 frames"):
        annotate(find_two, source, options=AnnotateOptions(save_dir=tmp_path / "out"), report=report)
    assert report.frames == 1
    assert files(tmp_path / "out") == ["host_8554_live_1.mp4"]


def test_a_stream_whose_size_changes_continues_in_a_second_file(tmp_path):
    frames = [grey(), grey(), np.zeros((32, 32, 3), dtype=np.uint8)]
    taken = iter(frames)

    class OneByOne(Camera):
        def read(self):
            image = next(taken, None)
            return image is not None, image

    path = tmp_path / "clip.mp4"
    path.write_bytes(b"read by the fake capture")
    source = open_source(path, opener=lambda _: OneByOne(1))
    report = annotate(find_two, source, options=AnnotateOptions(save_dir=tmp_path / "out"))
    assert files(tmp_path / "out") == ["clip.mp4", "clip_2.mp4"]
    assert len(report.files) == 2


def test_without_a_folder_nothing_is_written(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    annotate(find_two, open_source(inputs), options=AnnotateOptions())
    assert files(tmp_path) == before


def test_records_have_the_path_and_frame_number_of_each_detection(inputs, tmp_path):
    make_video(inputs / "c.mp4", frames=2)
    (inputs / "bad.png").write_bytes(b"")
    report = annotate(
        find_two, open_source(inputs, on_error="skip"), options=AnnotateOptions(keep_records=True)
    ).to_dict()
    json.dumps(report)
    assert [Path(item["path"]).name for item in report["images"]] == ["a.png", "b.jpg", "c.mp4", "c.mp4"]
    assert [item.get("frame") for item in report["images"]] == [None, None, 0, 1]
    assert [Path(item["path"]).name for item in report["skipped"]] == ["bad.png"]
    assert report["speed_ms"] == {"preprocess": 1, "inference": 2, "postprocess": 3}


def test_annotated_arrays_are_named_by_their_index(tmp_path):
    annotate(find_two, open_source([grey(), grey()]), options=AnnotateOptions(save_dir=tmp_path))
    assert files(tmp_path) == ["image_000000.jpg", "image_000001.jpg"]


@pytest.mark.parametrize("wrong", [{"save_txt": True}, {"save_conf": True}])
def test_options_that_contradict_each_other_are_a_usage_error(wrong):
    with pytest.raises(UsageError):
        AnnotateOptions(**wrong)


def test_run_folders_are_numbered_after_the_highest(tmp_path):
    assert next_run_folder(tmp_path / "runs").name == "exp"
    for name in ("exp", "exp2", "exp9", "export", "exp_old"):
        (tmp_path / name).mkdir()
    assert next_run_folder(tmp_path).name == "exp10"


def test_a_window_without_a_display_is_a_usage_error(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(UsageError, match="no display"):
        Window("x")


def test_an_opencv_without_gui_support_is_an_error_that_names_the_package(monkeypatch):
    monkeypatch.setenv("DISPLAY", ":99")

    def not_implemented(*args):
        raise cv2.error("The function is not implemented")

    monkeypatch.setattr(cv2, "namedWindow", not_implemented)
    with pytest.raises(UsageError, match="pip install opencv-python "):
        Window("x")


def test_a_real_detector_annotates_images(tmp_path, inputs):
    """The weights are random, so only the files and the number of detections are checked."""
    pytest.importorskip("torch", reason="torch is not installed")
    module = pytest.importorskip("yolov7_deploy.detector", reason="there is no detector to run")
    from yolov7_deploy.checkpoint import Checkpoint, save_checkpoint
    from yolov7_deploy.datasets.coco import COCO_NAMES
    from yolov7_deploy.model.yolov7 import new_model

    model = new_model("yolov7-tiny")
    checkpoint = Checkpoint(
        tensors=dict(model.state_dict()),
        variant="yolov7-tiny",
        training=False,
        class_names=COCO_NAMES,
        anchors=model.anchors,
        source="random",
        source_sha256="",
    )
    save_checkpoint(checkpoint, tmp_path / "random.safetensors")
    with module.Detector(tmp_path / "random.safetensors", device="cpu", img=64, conf=0.0, max_det=5) as detector:
        report = annotate(
            detector,
            open_source(inputs),
            options=AnnotateOptions(save_dir=tmp_path / "out", save_txt=True, keep_records=True),
        )
    assert files(tmp_path / "out") == ["a.png", "b.jpg", "labels/a.txt", "labels/b.txt"]
    assert all(len(record["detections"]) <= 5 for record in report.records)
    assert report.speed.total_ms > 0
