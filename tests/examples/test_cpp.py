"""The C++ program compiles with the line in its head comment and finds the boxes of a Detector."""

import os
import re
import subprocess
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest

from tests.support.example_scripts import EXAMPLES, head_comment
from yolov7_deploy import Detector
from yolov7_deploy.datasets.synthetic import generate_image
from yolov7_deploy.image import read_image
from yolov7_deploy.visualize import write_image

pytestmark = pytest.mark.slow
HEADER = "onnxruntime_cxx_api.h"
ROOT_VARIABLE = "ONNXRUNTIME_ROOT"
# A release archive, the package libonnxruntime-dev of Debian 13, and an installation from source.
FOLDERS = ("include", "include/onnxruntime", "include/onnxruntime/core/session")
# The program's bilinear interpolation is exact; that of OpenCV has weights of 11 bits, so pixels differ by 1.
BOX_TOLERANCE = 0.5
SCORE_TOLERANCE = 0.02
EXACT_TOLERANCE = 0.02  # it prints two decimals


def header_folder() -> Path:
    """Return the folder with the C++ headers of ONNX Runtime, or skip the test."""
    roots = [Path(root) for root in (os.environ.get(ROOT_VARIABLE), "/usr", "/usr/local") if root]
    for folder in (root / name for root in roots for name in FOLDERS):
        if (folder / HEADER).is_file():
            return folder
    pytest.skip(
        f"{HEADER} is missing: set ${ROOT_VARIABLE} to an unpacked release of ONNX Runtime, "
        "or install Debian's libonnxruntime-dev"
    )


def release_folder(folder: Path) -> Path:
    """Create the folders of a release: these headers, and the library of the Python package."""
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    (folder / "lib").mkdir(parents=True)
    (folder / "include").symlink_to(header_folder())
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / "lib" / name).symlink_to(library)
    return folder


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Path of the program, compiled by the line in its head comment, with warnings as errors."""
    (line,) = re.findall(r"^//\s+(g\+\+ .*)$", head_comment("cpp/detect.cpp"), flags=re.MULTILINE)
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "detect.cpp").symlink_to(EXAMPLES / "cpp" / "detect.cpp")
    release = release_folder(folder / "onnxruntime")
    command = f"{line} -Wall -Wextra -Werror"
    environment = {**os.environ, "ORT": str(release)}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "detect"


def run(program, *arguments):
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, check=False)


def found_by(program, *arguments):
    """Return rows of class id, score and box."""
    done = run(program, *arguments)
    assert done.returncode == 0, done.stderr
    return np.array([line.split() for line in done.stdout.splitlines()], dtype=np.float64).reshape(-1, 6)


@pytest.fixture(scope="module")
def detector(shapes_onnx):
    with Detector(shapes_onnx, device="cpu", runtime="onnxruntime") as opened:
        yield opened


def assert_equal_rows(rows, detections, *, box_tolerance, score_tolerance):
    assert len(detections) > 2
    np.testing.assert_array_equal(rows[:, 0], detections.class_ids)
    np.testing.assert_allclose(rows[:, 1], detections.scores, atol=score_tolerance)
    np.testing.assert_allclose(rows[:, 2:], detections.boxes, atol=box_tolerance)


def test_an_image_of_the_network_size_gives_the_boxes_of_the_detector(program, detector, shapes_images, tmp_path):
    for path in sorted(shapes_images.iterdir()):
        image = read_image(path)
        write_image(tmp_path / "image.ppm", image)
        detections = detector(image)
        if len(detections) > 2:
            rows = found_by(program, detector.path, tmp_path / "image.ppm")
            assert_equal_rows(rows, detections, box_tolerance=EXACT_TOLERANCE, score_tolerance=1e-4)


@pytest.mark.parametrize("hw", [(640, 640), (500, 333), (251, 320), (160, 200)])
def test_a_resized_image_gives_nearly_the_boxes_of_the_detector(program, detector, tmp_path, hw):
    """The program is compared on images that shrink, grow, and have an odd number of rows of padding."""
    large, _ = generate_image(1, split="val", size=640, seed=5)
    image = np.asarray(cv2.resize(large, hw[::-1], interpolation=cv2.INTER_AREA), dtype=np.uint8)
    write_image(tmp_path / "image.ppm", image)
    rows = found_by(program, detector.path, tmp_path / "image.ppm", 0.25)
    assert_equal_rows(rows, detector(image), box_tolerance=BOX_TOLERANCE, score_tolerance=SCORE_TOLERANCE)


def test_a_threshold_is_an_argument(program, detector, shapes_images, tmp_path):
    write_image(tmp_path / "image.ppm", read_image(shapes_images / "1.png"))
    low, high = (found_by(program, detector.path, tmp_path / "image.ppm", conf) for conf in (0.01, 0.6))
    assert len(low) > len(high)
    assert (high[:, 1] > 0.6).all()


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"", "not a binary PPM"), (b"P5\n2 2\n255\n1234", "not a binary PPM"), (b"P6\n9 9\n255\n12", "is truncated")],
)
def test_a_damaged_image_is_an_error(program, detector, tmp_path, content, text):
    (tmp_path / "image.ppm").write_bytes(content)
    done = run(program, detector.path, tmp_path / "image.ppm")
    assert done.returncode == 1 and text in done.stderr and done.stdout == ""


def test_other_arguments_are_errors(program, detector, files, shapes_images, tmp_path):
    image = tmp_path / "image.ppm"
    write_image(image, read_image(shapes_images / "1.png"))
    for arguments, text in (
        ((), "usage"),
        ((detector.path, image, "high"), "CONF"),
        ((tmp_path / "missing.onnx", image), "missing.onnx"),
        ((files("none"), image), "y7 export"),
    ):
        done = run(program, *arguments)
        assert done.returncode == 1 and text in done.stderr
