"""Fixtures of the tests of examples/: the project's wheel, a model that knows the shapes, and images of shapes."""

from __future__ import annotations

import pytest

from tests.support.example_scripts import SHAPES_SIZE, build_wheel, install_example
from yolov7_deploy import export
from yolov7_deploy.datasets.synthetic import generate_image
from yolov7_deploy.visualize import write_image


@pytest.fixture(scope="session")
def project_wheel(tmp_path_factory):
    """Path of the wheel of this project."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def install(project_wheel, tmp_path_factory):
    """Return a function that creates the environment of a script, and more packages, once per module."""
    environments = {}

    def get(name, *more):
        if name not in environments:
            folder = tmp_path_factory.mktemp("environment")
            environments[name] = install_example(name, wheel=project_wheel, folder=folder, more=more)
        return environments[name]

    return get


@pytest.fixture(scope="session")
def shapes_onnx(tmp_path_factory):
    """Path of the included weights, exported at 320x320."""
    path = tmp_path_factory.mktemp("shapes") / "shapes.onnx"
    export("yolov7-tiny-shapes", path, img=SHAPES_SIZE, verify=False)
    return path


@pytest.fixture(scope="session")
def shapes_images(tmp_path_factory):
    """Folder of eight images of shapes, 320x320."""
    folder = tmp_path_factory.mktemp("images")
    for k in range(1, 9):
        write_image(folder / f"{k}.png", generate_image(k, split="val", size=SHAPES_SIZE, seed=5)[0])
    return folder
