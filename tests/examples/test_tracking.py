"""The tracking script keeps the number of each object while the camera moves, and writes a video."""

import re
from collections import Counter

import pytest

from yolov7_deploy import Detector
from yolov7_deploy.datasets.synthetic import generate_image
from yolov7_deploy.sources.video import VideoFile, VideoWriter

pytestmark = pytest.mark.slow
SCRIPT = "tracking.py"
WINDOW = 320
FRAMES = 60
STEP = 2  # pixels of camera movement between frames


@pytest.fixture(scope="module")
def environment(install):
    return install(SCRIPT)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A video in which the camera moves over an image of shapes and back."""
    image, _ = generate_image(1, split="val", size=WINDOW + 64, seed=5)
    writer = VideoWriter(tmp_path_factory.mktemp("video") / "shapes.mp4", fps=20, hw=(WINDOW, WINDOW))
    for k in range(FRAMES):
        at = 32 + STEP * min(k % 30, 30 - k % 30)
        writer.write(image[at // 2 : at // 2 + WINDOW, at : at + WINDOW])
    return writer.finish()


def test_an_object_keeps_its_number(environment, video, shapes_onnx, tmp_path):
    arguments = ("--weights", shapes_onnx, "--source", video, "--output", "tracked.mp4")
    printed = environment.run(SCRIPT, *arguments, cwd=tmp_path)
    tracked = {name: int(count) for name, count in re.findall(r"^(\w+): (\d+)$", printed, flags=re.MULTILINE)}
    with Detector(shapes_onnx, device="cpu", runtime="onnxruntime") as detector:
        per_frame = [Counter(detections.names) for _, detections in detector.stream(video, conf=0.7)]
    typical = {name for counts in per_frame for name in counts if sum(name in c for c in per_frame) > FRAMES / 2}
    assert len(typical) >= 2
    for name in typical:  # one number for each object; an object that leaves the image and returns may get another
        assert max(c[name] for c in per_frame) <= tracked[name] <= max(c[name] for c in per_frame) + 1


def test_the_video_has_all_frames_at_the_same_rate(environment, video, shapes_onnx, tmp_path):
    arguments = ("--weights", shapes_onnx, "--source", video, "--output", "tracked.mp4")
    environment.run(SCRIPT, *arguments, cwd=tmp_path)
    with VideoFile(str(tmp_path / "tracked.mp4")) as written:
        assert sum(1 for _ in written.read()) == FRAMES
        assert written.info.fps == pytest.approx(20)


def test_a_missing_video_ends_with_a_message(environment, shapes_onnx, tmp_path):
    arguments = ("--weights", shapes_onnx, "--source", "missing.mp4", "--output", "tracked.mp4")
    code, _, errors = environment.finish(SCRIPT, *arguments, cwd=tmp_path)
    assert code == 1 and "missing.mp4" in errors and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_ends_with_a_message(environment, video, shapes_onnx, tmp_path):
    arguments = ("--weights", shapes_onnx, "--source", video, "--output", "missing/tracked.mp4")
    code, _, errors = environment.finish(SCRIPT, *arguments, cwd=tmp_path)
    assert code == 1 and "missing/tracked.mp4" in errors and "Traceback" not in errors
