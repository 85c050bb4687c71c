"""Running a detector on a source: which files are written, their names, and what remains after an interruption."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.sample_images import find_two, grey
from yolov7_deploy._output_folder import MARKER
from yolov7_deploy._process import Interrupted, raise_interrupted
from yolov7_deploy.detections import Speed
from yolov7_deploy.errors import SourceError, UsageError
from yolov7_deploy.image import read_image
from yolov7_deploy.sources import open_source
from yolov7_deploy.sources.video import VideoFile, VideoWriter
from yolov7_deploy.visualize import write_image
from yolov7_deploy.workflows.predict import AnnotateOptions, PredictionReport, Window, _UniqueNames, annotate

HW = (48, 64)


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
    """Return the results in a folder, without the files that mark it as a folder of results."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return sorted(str(path.relative_to(folder)) for path in paths)


def test_annotated_images_of_formats_that_few_programs_write_are_jpeg(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.jfif", "b.mpo", "c.PNG", "d.pgm"):
        cv2.imencode(".jpg", grey())[1].tofile(tmp_path / "in" / name)
    annotate(find_two, open_source(tmp_path / "in"), options=AnnotateOptions(save_dir=tmp_path / "out"))
    assert files(tmp_path / "out") == ["a.jpg", "b.jpg", "c.PNG", "d.jpg"]


def test_images_keep_their_names_and_never_overwrite_each_other(inputs, tmp_path):
    out = tmp_path / "out"
    report = annotate(find_two, open_source(f"{inputs}/**/*"), options=AnnotateOptions(save_dir=out))
    assert files(out) == ["a.png", "a_2.png", "b.jpg", "b.png"]
    assert sorted(report.files) == sorted(out / name for name in files(out))
    assert (report.frames, report.detections) == (4, 8)
    assert report.speed == Speed(preprocess_ms=1, inference_ms=2, postprocess_ms=3)
    assert (read_image(out / "a.png") != 50).any()


def test_label_files_pair_with_their_images(inputs, tmp_path):
    out = tmp_path / "out"
    annotate(find_two, open_source(f"{inputs}/**/*"), options=AnnotateOptions(save_dir=out, save_txt=True))
    images = {Path(name).stem for name in files(out) if "/" not in name}
    assert images == {path.stem for path in (out / "labels").glob("*.txt")} == {"a", "a_2", "b", "b_2"}
    assert (out / "labels" / "a.txt").read_text() == find_two(grey()).to_yolo()


def test_an_empty_label_file_replaces_an_old_one(inputs, tmp_path):
    out = tmp_path / "out"
    options = AnnotateOptions(save_dir=out, save_txt=True, save_conf=True, save_drawn=False)
    annotate(find_two, open_source(inputs / "a.png"), options=options)
    assert len((out / "labels" / "a.txt").read_text().split()) == 12
    annotate(lambda image: find_two(image)[[]], open_source(inputs / "a.png"), options=options)
    assert (out / "labels" / "a.txt").read_text() == ""
    assert files(out) == ["labels/a.txt"]


STEMS = st.sampled_from(["a", "A", "a_2", "a_2_3", "b", "\u00e9", "e\u0301"])


@given(st.lists(st.tuples(STEMS, st.sampled_from([".jpg", ".png"])), max_size=12))
def test_reserved_names_are_unique_whatever_their_case_and_accents(wanted):
    for pair in (False, True):
        names = _UniqueNames(pair_with_labels=pair)
        given_ = [names.reserve_image(*item) for item in wanted]
        stems = [Path(name).stem if pair else name for name in given_]
        keys = [unicodedata.normalize("NFD", stem).casefold() for stem in stems]
        assert len(set(keys)) == len(keys)


@given(st.lists(st.tuples(STEMS, st.sampled_from([".jpg", ".png", ".mp4"])), max_size=12))
def test_images_and_video_frames_never_share_a_label_file(wanted):
    names, labels = _UniqueNames(pair_with_labels=True), []
    for stem, suffix in wanted:
        if suffix == ".mp4":
            video = names.reserve_video(stem)
            labels += [f"{video}_{number}" for number in range(1, 9)]
        else:
            labels.append(Path(names.reserve_image(stem, suffix)).stem)
    keys = [unicodedata.normalize("NFD", label).casefold() for label in labels]
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


def stop_at_third(error):
    """Return a detector that raises an exception for the third image."""
    calls = []

    def detect(image):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return find_two(image)

    return detect


def test_an_error_in_a_video_leaves_no_file(tmp_path):
    make_video(tmp_path / "clip.mp4")
    detector = stop_at_third(SourceError("broken"))
    with pytest.raises(SourceError):
        annotate(detector, open_source(tmp_path / "clip.mp4"), options=AnnotateOptions(save_dir=tmp_path / "out"))
    assert files(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("error", "number"), [(KeyboardInterrupt(), signal.SIGINT), (Interrupted(signal.SIGTERM), signal.SIGTERM)]
)
def test_an_interrupted_video_ends_at_its_last_frame(tmp_path, error, number):
    make_video(tmp_path / "clip.mp4")
    report = PredictionReport()
    options = AnnotateOptions(save_dir=tmp_path / "out", keep_records=True)
    with pytest.raises(KeyboardInterrupt):
        annotate(stop_at_third(error), open_source(tmp_path / "clip.mp4"), options=options, report=report)
    with VideoFile(str(tmp_path / "out" / "clip.mp4")) as video:
        assert video.info.frames == 2
    assert (report.frames, report.stopped, report.stopped_by) == (2, True, number)
    assert report.to_dict()["stopped"] and len(report.to_dict()["images"]) == 2


class Camera:
    """A fake capture with a number of frames, which it delivers at a steady pace."""

    def __init__(self, frames: int, *, pace_s: float = 0.0, fps: float = 0.0):
        self.left, self.pace_s, self.fps = frames, pace_s, fps

    def isOpened(self):  # noqa: N802
        return self.left > 0

    def read(self):
        if self.left == 0:
            return False, None
        self.left -= 1
        time.sleep(self.pace_s)
        return True, grey()

    def get(self, what):
        return self.fps if what == cv2.CAP_PROP_FPS else 0.0

    def release(self):
        pass


def annotate_live(camera, tmp_path, *, frames, delay_s=0.0, signal_number=None):
    """Annotate a number of frames of a fake camera with a slow detector, and return the report and the video."""

    def stop(frame, found):
        time.sleep(delay_s)
        if frame.index == frames - 1:
            if signal_number is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal_number)

    options = AnnotateOptions(save_dir=tmp_path / "out", keep_records=True)
    report = annotate(find_two, open_source(0, opener=lambda _: camera), options=options, on_frame=stop)
    with VideoFile(str(tmp_path / "out" / "camera_0.mp4")) as video:
        return report, video.info


def test_ctrl_c_ends_a_live_stream_normally(tmp_path):
    report, video = annotate_live(Camera(1 << 30, pace_s=0.05), tmp_path, frames=3)
    assert (report.stopped, report.stopped_by) == (True, signal.SIGINT)
    assert report.frames == len(report.records) == 3
    assert video.frames >= 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_sighup_end_a_live_stream_like_ctrl_c(tmp_path, number):
    with raise_interrupted():
        report, video = annotate_live(Camera(1 << 30, pace_s=0.05), tmp_path, frames=2, signal_number=number)
    assert (report.frames, report.stopped_by) == (2, number)
    assert video.frames >= 2


@pytest.mark.parametrize(("fps", "written_fps"), [(25.0, 25.0), (0.0, 25.0), (90_000.0, 25.0), (10.0, 10.0)])
def test_a_saved_stream_plays_at_its_true_speed_whatever_its_nominal_rate(tmp_path, fps, written_fps):
    camera = Camera(1 << 30, pace_s=0.02, fps=fps)
    report, video = annotate_live(camera, tmp_path, frames=5, delay_s=0.1)  # at most 10 frames per second
    times = [record["timestamp_s"] for record in report.records]
    assert video.fps == written_fps
    # The last frame is shown for one period, and each time is rounded to the period.
    assert video.frames / video.fps == pytest.approx(times[-1] - times[0] + 1 / video.fps, abs=0.51 / video.fps)


def test_a_long_pause_of_a_stream_starts_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr("yolov7_deploy.workflows.predict.MAX_PAUSE_S", 0.2)
    camera = Camera(3, pace_s=0.3)
    with pytest.raises(SourceError, match="lost after 3 frames"):
        annotate(
            find_two,
            open_source(0, opener=lambda _: camera, reconnects=0),
            options=AnnotateOptions(save_dir=tmp_path / "out"),
        )
    assert files(tmp_path / "out") == ["camera_0.mp4", "camera_0_2.mp4", "camera_0_3.mp4"]


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


@pytest.mark.parametrize("order", [1, -1])
def test_an_image_and_a_video_frame_never_share_a_label_file(tmp_path, order):
    make_video(tmp_path / "clip.mp4", frames=2)
    write_image(tmp_path / "clip_2.png", grey())
    sources = [tmp_path / "clip.mp4", tmp_path / "clip_2.png"][::order]
    annotate(find_two, open_source(sources), options=AnnotateOptions(save_dir=tmp_path / "out", save_txt=True))
    labels = [name for name in files(tmp_path / "out") if name.endswith(".txt")]
    assert len(labels) == 3
    images = {Path(name).stem for name in files(tmp_path / "out") if name.endswith(".png")}
    assert images <= {Path(name).stem for name in labels}


def test_one_file_that_is_given_twice_has_two_results(tmp_path):
    make_video(tmp_path / "clip.mp4", frames=2)
    sources = [tmp_path / "clip.mp4", tmp_path / "clip.mp4"]
    annotate(find_two, open_source(sources), options=AnnotateOptions(save_dir=tmp_path / "out", save_txt=True))
    assert [name for name in files(tmp_path / "out") if name.endswith(".mp4")] == ["clip.mp4", "clip_2.mp4"]
    assert len(files(tmp_path / "out")) == 6


def test_streams_that_differ_only_in_their_password_have_two_videos(tmp_path):
    report = PredictionReport()
    sources = ["rtsp://cam/live?token=one", "rtsp://cam/live?token=two"]
    opened = open_source(sources, opener=lambda _: Camera(2), reconnects=0, on_error="skip")
    assert opened.paths == ("rtsp://cam/live?token=***",) * 2
    with pytest.raises(SourceError):
        annotate(find_two, opened, options=AnnotateOptions(save_dir=tmp_path / "out"), report=report)
    assert files(tmp_path / "out") == ["cam_live.mp4", "cam_live_2.mp4"]


# --- files that must not be replaced ----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["labels/a.txt", "labels/other.txt", "labels/train/a.txt"])
def test_the_labels_of_a_dataset_are_never_replaced(inputs, tmp_path, label):
    truth = tmp_path / "dataset" / label
    truth.parent.mkdir(parents=True)
    truth.write_text("0 0.5 0.5 0.1 0.1\n")
    options = AnnotateOptions(save_dir=tmp_path / "dataset", save_txt=True, save_drawn=False)
    with pytest.raises(UsageError, match="did not write") as caught:
        annotate(find_two, open_source(inputs), options=options)
    assert "--save-dir" in caught.value.fix
    assert files(tmp_path / "dataset") == [label] and truth.read_text() == "0 0.5 0.5 0.1 0.1\n"


@pytest.mark.parametrize("name", ["a.png", "clip.mp4"])
def test_an_image_or_video_that_detect_did_not_write_is_never_replaced(inputs, tmp_path, name):
    make_video(tmp_path / "clip.mp4")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / name).write_bytes(b"a photo")
    source = inputs / "a.png" if name == "a.png" else tmp_path / "clip.mp4"
    with pytest.raises(UsageError, match=f"{name} exists, and y7 detect did not write it"):
        annotate(find_two, open_source(source), options=AnnotateOptions(save_dir=tmp_path / "photos"))
    assert (tmp_path / "photos" / name).read_bytes() == b"a photo"


def test_results_of_an_earlier_run_and_other_files_may_stay_in_the_folder(inputs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.md").write_text("mine")
    for _ in range(2):
        annotate(find_two, open_source(inputs), options=AnnotateOptions(save_dir=out, save_txt=True))
    assert files(out) == ["a.png", "b.jpg", "labels/a.txt", "labels/b.txt", "notes.md"]


def test_a_file_system_without_attributes_gets_a_marker_file(inputs, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    for name in ("setxattr", "getxattr"):
        monkeypatch.setattr(os, name, unsupported)
    for _ in range(2):
        options = AnnotateOptions(save_dir=tmp_path / "out", save_txt=True, save_drawn=False)
        annotate(find_two, open_source(inputs), options=options)
    assert (tmp_path / "out" / "labels" / MARKER).exists()


def test_values_that_are_not_finite_end_the_run_and_write_no_label(inputs, tmp_path):
    def broken(image):
        return replace(find_two(image), boxes=np.full((2, 4), np.nan))

    options = AnnotateOptions(save_dir=tmp_path / "out", save_txt=True)
    with pytest.raises(UsageError, match="NaN or infinite"):
        annotate(broken, open_source(inputs), options=options)
    assert not (tmp_path / "out").exists()


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
