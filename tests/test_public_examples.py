"""Every public name has an example in its docstring, and the examples run on the included weights."""

from __future__ import annotations

import doctest
import importlib.util
import re
import shutil
from pathlib import Path

import pytest

import yolov7_deploy
from yolov7_deploy import export
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.hub import bundled_weights

NAMES = [name for name in yolov7_deploy.__all__ if name != "__version__"]
NEED_TENSORRT = {"Engine", "build_engine"}
SIZE = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the examples name: an image, images, a dataset, weights and an exported file."""
    folder = tmp_path_factory.mktemp("examples")
    data = write_shapes(folder / "shapes", train=8, val=4, size=SIZE, seed=2)
    images = sorted((data.parent / "images" / "train").iterdir())
    shutil.copy(images[0], folder / "street.jpg")
    shutil.copytree(data.parent / "images" / "train", folder / "images")
    (folder / "data.yaml").write_text(f"path: shapes\n{re.sub('^path:.*$', '', data.read_text(), flags=re.MULTILINE)}")
    shutil.copy(bundled_weights(), folder / "best.safetensors")
    export("yolov7-tiny-shapes", folder / "shapes.onnx", img=SIZE)
    return folder


def examples(name: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(getattr(yolov7_deploy, name).__doc__ or "")


def test_the_version_is_that_of_the_installed_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", yolov7_deploy.__version__)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_an_example(name):
    used = " ".join(example.source for example in examples(name))
    assert re.search(rf"\b{name}\b", used) or name in {"Detections", "ModelMetadata", "Yolov7", "Checkpoint"}
    assert used


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs(name, folder, tmp_path, monkeypatch):
    if name in NEED_TENSORRT and importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("pip install 'yolov7-deploy[tensorrt-rtx]' to run this example")
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    known = {public: getattr(yolov7_deploy, public) for public in NAMES}
    test = doctest.DocTest(examples(name), known, name, None, None, None)
    report: list[str] = []
    result = doctest.DocTestRunner().run(test, out=report.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(report)


def test_the_examples_change_no_file_of_their_input(folder):
    """Outputs of examples are new files, so that a reader's weights stay as they are."""
    assert (folder / "best.safetensors").read_bytes() == Path(bundled_weights()).read_bytes()
