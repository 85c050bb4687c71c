"""The SAHI script finds objects that are too small for the network in the whole image."""

import re

import numpy as np
import pytest

from tests.support.example_scripts import SHAPES_SIZE as SIZE
from yolov7_deploy import Detector
from yolov7_deploy.image import read_image
from yolov7_deploy.visualize import write_image

pytestmark = pytest.mark.slow
SCRIPT = "sahi_slicing.py"
TILES = 4  # 4 x 4 images of shapes


@pytest.fixture(scope="module")
def environment(install):
    return install(SCRIPT)


@pytest.fixture(scope="module")
def mosaic(shapes_images, tmp_path_factory):
    """Image of 4 x 4 images of shapes: in the network input each of them has 80 x 80 pixels."""
    images = [read_image(path) for path in sorted(shapes_images.iterdir())]
    rows = [np.concatenate([images[(TILES * y + x) % 8] for x in range(TILES)], axis=1) for y in range(TILES)]
    path = tmp_path_factory.mktemp("mosaic") / "aerial.png"
    write_image(path, np.concatenate(rows))
    return path


@pytest.fixture(scope="module")
def printed(environment, mosaic, shapes_onnx, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sliced")
    arguments = ("--weights", shapes_onnx, "--source", mosaic, "--slice", SIZE, "--output", "sliced.png")
    return environment.run(SCRIPT, *arguments, cwd=folder), folder


def test_slices_find_about_what_the_tiles_have_and_the_whole_image_does_not(printed, mosaic, shapes_onnx):
    whole, sliced = (int(count) for count in re.findall(r"^(\d+) objects", printed[0], flags=re.MULTILINE))
    image = read_image(mosaic)
    tiles = [image[SIZE * y :, SIZE * x :][:SIZE, :SIZE] for y in range(TILES) for x in range(TILES)]
    with Detector(shapes_onnx, device="cpu", runtime="onnxruntime") as detector:
        expected = sum(map(len, detector.batch(tiles)))
        assert whole == len(detector(image))
    assert expected > 40
    assert sliced == pytest.approx(expected, rel=0.25)  # slices also see parts of objects of two tiles
    assert whole < sliced / 2


def test_the_result_is_drawn(printed, mosaic):
    drawn = read_image(printed[1] / "sliced.png")
    assert drawn.shape == read_image(mosaic).shape
    assert (drawn != read_image(mosaic)).any()


def test_a_missing_image_ends_with_a_message(environment, shapes_onnx, tmp_path):
    arguments = ("--weights", shapes_onnx, "--source", "missing.jpg", "--output", "sliced.png")
    code, _, errors = environment.finish(SCRIPT, *arguments, cwd=tmp_path)
    assert code == 1 and "missing.jpg" in errors and "Traceback" not in errors
