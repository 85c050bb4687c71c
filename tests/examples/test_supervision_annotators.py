"""The supervision script draws the detections and counts those in its zone."""

import re

import numpy as np
import pytest

from yolov7_deploy import Detector
from yolov7_deploy.image import read_image

pytestmark = pytest.mark.slow
SCRIPT = "supervision_annotators.py"


@pytest.fixture(scope="module")
def environment(install):
    return install(SCRIPT)


def test_it_draws_near_the_boxes_and_counts_the_left_half(environment, shapes_onnx, shapes_images, tmp_path):
    source = shapes_images / "1.png"
    printed = environment.run(
        SCRIPT, "--weights", shapes_onnx, "--source", source, "--output", "annotated.png", cwd=tmp_path
    )
    with Detector(shapes_onnx, device="cpu", runtime="onnxruntime") as detector:
        detections = detector(source)
    centres_x = (detections.boxes[:, 0] + detections.boxes[:, 2]) / 2
    assert len(detections) > 2
    assert re.search(rf"; {(centres_x < detections.image_hw[1] / 2).sum()} in the left half", printed)
    before, after = read_image(source), read_image(tmp_path / "annotated.png")
    changed = (before != after).any(axis=2)
    assert after.shape == before.shape
    for x1, y1, _, _ in detections.boxes.round().astype(int):
        assert changed[max(0, y1 - 4) : y1 + 5, max(0, x1 - 4) : x1 + 5].any()
    assert not np.all(changed)


@pytest.mark.parametrize(
    ("source", "output", "text"),
    [("missing.jpg", "a.png", "missing.jpg cannot be read"), (None, "a.unknown", "a.unknown")],
)
def test_bad_arguments_end_with_a_message(environment, shapes_onnx, shapes_images, tmp_path, source, output, text):
    arguments = ("--weights", shapes_onnx, "--source", source or shapes_images / "1.png", "--output", output)
    code, _, errors = environment.finish(SCRIPT, *arguments, cwd=tmp_path)
    assert code == 1 and text in errors and "Traceback" not in errors
