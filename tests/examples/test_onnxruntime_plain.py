"""The script for plain ONNX Runtime finds the boxes of a Detector, and names what to export for files it cannot run."""

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

from tests.support.example_scripts import EXAMPLES, load_example
from tests.support.sample_images import IMAGES, assert_same
from yolov7_deploy.detections import Detections
from yolov7_deploy.visualize import write_image

SCRIPT = "onnxruntime_plain.py"


@pytest.fixture(scope="module")
def plain():
    return load_example(SCRIPT)


@pytest.fixture(scope="module")
def session(files):
    return onnxruntime.InferenceSession(files("plugin"), providers=["CPUExecutionProvider"])


def run(*arguments):
    command = [sys.executable, str(EXAMPLES / SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("index", range(len(IMAGES)))
def test_its_boxes_are_those_of_the_detector(plain, session, detectors, index):
    boxes, scores, class_ids = plain.detect(session, IMAGES[index])
    expected = detectors("plugin")(IMAGES[index])
    assert len(expected) > 5
    ours = Detections(
        boxes=boxes,
        scores=scores,
        class_ids=class_ids,
        class_names=expected.class_names,
        image_hw=IMAGES[index].shape[:2],
    )
    assert_same(ours, expected)


def test_an_image_that_shrinks_to_less_than_a_pixel_keeps_one(plain, session):
    boxes, _, _ = plain.detect(session, np.zeros((1, 900, 3), np.uint8))
    assert boxes.shape[1] == 4


def test_the_script_prints_a_line_for_each_object(files, detectors, tmp_path):
    image = tmp_path / "image.png"
    write_image(image, IMAGES[0])
    done = run(files("plugin"), image)
    assert done.returncode == 0, done.stderr
    expected = detectors("plugin")(IMAGES[0])
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(expected)
    assert all(len(line) == 6 for line in lines)
    assert float(lines[0][1]) == pytest.approx(float(expected.scores[0]), abs=1e-3)


@pytest.mark.parametrize("options", [{"kind": "none"}, {"kind": "plugin", "input_kind": "uint8"}])
def test_other_files_are_refused_with_the_command_that_exports_the_right_one(plain, files, options):
    other = onnxruntime.InferenceSession(files(**options), providers=["CPUExecutionProvider"])
    with pytest.raises(SystemExit, match="y7 export --weights"):
        plain.check(other)


def test_a_file_that_is_not_an_image_is_named(files, tmp_path):
    path = tmp_path / "text.jpg"
    path.write_text("not an image")
    done = run(files("plugin"), path)
    assert done.returncode == 1 and "text.jpg cannot be read" in done.stderr and "Traceback" not in done.stderr
