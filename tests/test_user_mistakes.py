"""Mistakes that users make in Python: each message says what is wrong and what to write, and writing that works."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import PIL.Image
import pytest
import torch

from tests.support.trt_kit import environment  # noqa: F401 - a fixture
from yolov7_deploy import (
    Detector,
    Thresholds,
    Y7Error,
    build_model,
    export,
    export_onnx,
    load_checkpoint,
    open_calibration,
    train,
    validate,
)
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.errors import DeviceError, ImageError, LoadError, MissingLibraryError, UsageError
from yolov7_deploy.hub import bundled_weights
from yolov7_deploy.options import ExportOptions

SIZE = 64
STREET = "street.png"


@dataclass(frozen=True)
class Mistake:
    """Code with a mistake, as a function of a Detector and of an image, uint8 BGR.

    Attributes:
        code: The code.
        error: The error it raises.
        says: Words of the message.
        fix: Words of the line that says what to write.
        then: The code with the fix, which works.
    """

    code: Callable[[Detector, np.ndarray], object]
    error: type[Y7Error]
    says: str
    fix: str
    then: Callable[[Detector, np.ndarray], object] | None = None


def rgb_tensor(image: np.ndarray) -> torch.Tensor:
    """Return an image as torchvision reads it: float32 RGB [3, H, W], 0 to 1."""
    return torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1).float() / 255


MISTAKES = {
    # images
    "a tensor": Mistake(
        lambda detect, image: detect(rgb_tensor(image)),
        ImageError,
        "a Tensor (3, 96, 96)",
        ".permute(1, 2, 0)",
        lambda detect, image: detect((rgb_tensor(image) * 255).byte().permute(1, 2, 0).numpy()[..., ::-1]),
    ),
    "channels first": Mistake(
        lambda detect, image: detect(np.transpose(image, (2, 0, 1))),
        ImageError,
        "[H, W, 3] (BGR)",
        "transpose",
        lambda detect, image: detect(np.transpose(np.transpose(image, (2, 0, 1)), (1, 2, 0))),
    ),
    "floats from 0 to 1": Mistake(
        lambda detect, image: detect(image / 255),
        ImageError,
        "must be uint8",
        "255",
        lambda detect, image: detect((image / 255 * 255).round().astype("uint8")),
    ),
    "a batch as one image": Mistake(
        lambda detect, image: detect(np.stack([image, image])),
        ImageError,
        "this one is",
        "detector.batch(",
        lambda detect, image: detect.batch(np.stack([image, image])),
    ),
    "one image as a batch": Mistake(
        lambda detect, image: detect.batch(image),
        UsageError,
        "batch needs several images",
        "detector.batch([image])",
        lambda detect, image: detect.batch([image]),
    ),
    "a path as a batch": Mistake(
        lambda detect, image: detect.batch(STREET),
        UsageError,
        "batch needs several images",
        "detector(image)",
        lambda detect, image: detect(STREET),
    ),
    "a path with a typing error": Mistake(
        lambda detect, image: detect("stret.png"),
        ImageError,
        "stret.png",
        "Did you mean street.png?",
        lambda detect, image: detect(STREET),
    ),
    "a folder as an image": Mistake(
        lambda detect, image: detect("images"),
        ImageError,
        "images is a folder",
        "detector.stream('images')",
        lambda detect, image: list(detect.stream("images")),
    ),
    "text bytes": Mistake(
        lambda detect, image: detect(b"not an image"),
        ImageError,
        "not an image OpenCV can decode",
        ".jpg",
    ),
    "nothing": Mistake(lambda detect, image: detect(None), ImageError, "NoneType", "cv2.imread"),
    "a file object": Mistake(
        lambda detect, image: detect(io.BytesIO(Path(STREET).read_bytes())),
        ImageError,
        "BytesIO",
        ".read()",
        lambda detect, image: detect(Path(STREET).read_bytes()),
    ),
    # weights
    "weights with a typing error": Mistake(
        lambda detect, image: Detector("bst.onnx"),
        LoadError,
        "bst.onnx does not exist",
        "Did you mean best.onnx?",
        lambda detect, image: Detector("best.onnx").close(),
    ),
    "an official name with a typing error": Mistake(
        lambda detect, image: Detector("yolov7-tinny"), LoadError, "neither a file", "Did you mean yolov7-tiny?"
    ),
    "a model as weights": Mistake(
        lambda detect, image: Detector(torch.nn.Conv2d(3, 8, 3)),
        UsageError,
        "not a Conv2d",
        "Detector('yolov7.onnx')",
    ),
    "an image as weights": Mistake(
        lambda detect, image: Detector(STREET), LoadError, "is an image, not a model file", 'source="street.png"'
    ),
    "an exported file as a checkpoint": Mistake(
        lambda detect, image: load_checkpoint("best.onnx"),
        LoadError,
        "is an ONNX graph, not a checkpoint",
        'weights="best.safetensors"',
        lambda detect, image: load_checkpoint("best.safetensors"),
    ),
    "training from an exported file": Mistake(
        lambda detect, image: train("shapes/shapes.yaml", "best.onnx"),
        LoadError,
        "is an ONNX graph",
        'weights="best.safetensors"',
    ),
    "exporting an exported file": Mistake(
        lambda detect, image: export("best.onnx"),
        LoadError,
        "is an ONNX graph",
        'weights="best.safetensors"',
        lambda detect, image: export("best.safetensors", "new.onnx", img=SIZE, verify=False),
    ),
    "exporting a model that is not fused": Mistake(
        lambda detect, image: export_onnx(
            build_model(load_checkpoint("best.safetensors")), detect.metadata, ExportOptions(input_hw=(SIZE, SIZE))
        ),
        Y7Error,
        "Only a fused model",
        "fuse(",
    ),
    # options
    "a size as text": Mistake(
        lambda detect, image: Detector("best.safetensors", img="640"),
        UsageError,
        "img must be a number of pixels",
        "img=640",
        lambda detect, image: Detector("best.safetensors", img=64).close(),
    ),
    "another size than that of the file": Mistake(
        lambda detect, image: Detector("best.onnx", img=128),
        UsageError,
        "fixed input of 64x64, not 128x128",
        'export("best.safetensors", img=128)',
        lambda detect, image: export("best.safetensors", "new.onnx", img=128, verify=False),
    ),
    "a size that is not a multiple of the stride": Mistake(
        lambda detect, image: Detector("best.safetensors", img=100),
        UsageError,
        "stride 32",
        "img=128",
        lambda detect, image: Detector("best.safetensors", img=128).close(),
    ),
    "percent": Mistake(
        lambda detect, image: detect(image, conf=25),
        UsageError,
        "conf must be between 0 and 1, not 25",
        "conf=0.25",
        lambda detect, image: detect(image, conf=0.25),
    ),
    "a threshold as text": Mistake(
        lambda detect, image: Thresholds(conf="0.5"), UsageError, "conf must be a number", "conf=0.25"
    ),
    "a class with a typing error": Mistake(
        lambda detect, image: detect(image, classes=["circel"]),
        UsageError,
        "no class 'circel'",
        "circle",
        lambda detect, image: detect(image, classes=["circle"]),
    ),
    "a class id that the model does not have": Mistake(
        lambda detect, image: detect(image, classes=[80]), UsageError, "80", "0 to 5"
    ),
    "a skipped error with a wrong word": Mistake(
        lambda detect, image: detect.batch([image], on_error="ignore"),
        UsageError,
        "on_error",
        "skip",
        lambda detect, image: detect.batch([image], on_error="skip"),
    ),
    "half precision on a CPU": Mistake(
        lambda detect, image: Detector("best.safetensors", half=True, device="cpu"),
        Y7Error,
        "FP16 needs a GPU",
        "half=False",
        lambda detect, image: Detector("best.safetensors", half=False, device="cpu").close(),
    ),
    "an INT8 export without images": Mistake(
        lambda detect, image: export("best.safetensors", precision="int8"),
        UsageError,
        "INT8 requires calibration images",
        'calib="FOLDER"',
    ),
    "calibration images that do not exist": Mistake(
        lambda detect, image: open_calibration("imges"), Y7Error, "imges does not exist", "Did you mean images?"
    ),
    # data
    "a dataset with a typing error": Mistake(
        lambda detect, image: validate("best.onnx", "shapes/shape.yaml"),
        Y7Error,
        "does not exist",
        "Did you mean shapes/shapes.yaml?",
        lambda detect, image: validate("best.onnx", "shapes/shapes.yaml"),
    ),
    "weights as a dataset": Mistake(
        lambda detect, image: validate("shapes/shapes.yaml", "best.onnx"),
        Y7Error,
        "best.onnx is a model file, not a dataset",
        'weights="best.onnx"',
        lambda detect, image: validate("best.onnx", "shapes/shapes.yaml"),
    ),
    "a folder as a dataset": Mistake(
        lambda detect, image: train("shapes", "best.safetensors"),
        Y7Error,
        "shapes is a folder",
        'data="shapes/shapes.yaml"',
    ),
    # devices
    "no GPU": Mistake(lambda detect, image: Detector("best.onnx", device=7), DeviceError, "CUDA", 'device="cpu"'),
    "training without a GPU": Mistake(
        lambda detect, image: train("shapes/shapes.yaml", "best.safetensors", img=SIZE, device=7),
        DeviceError,
        "GPU 7 is needed",
        'device="cpu"',
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with weights, an exported file, images and a dataset."""
    folder = tmp_path_factory.mktemp("mistakes")
    data = write_shapes(folder / "shapes", train=8, val=4, size=96, seed=5)
    shutil.copy(bundled_weights(), folder / "best.safetensors")
    export(folder / "best.safetensors", folder / "best.onnx", img=SIZE, verify=False)
    shutil.copytree(data.parent / "images" / "train", folder / "images")
    image = sorted((folder / "images").iterdir())[0]
    cv2.imwrite(str(folder / STREET), cv2.imread(str(image)))
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def detector(folder):
    with Detector(folder / "best.onnx", device="cpu") as opened:
        yield opened


@pytest.fixture
def image(folder):
    return cv2.imread(str(folder / STREET))


@pytest.mark.parametrize("name", MISTAKES)
def test_the_message_says_what_is_wrong_and_what_to_write(name, detector, image):
    mistake = MISTAKES[name]
    with pytest.raises(mistake.error) as raised:
        mistake.code(detector, image)
    text = str(raised.value)
    assert mistake.says in text
    assert mistake.fix in text
    assert " --" not in f" {text}", "options of the command line in Python"


@pytest.mark.parametrize("name", [name for name, mistake in MISTAKES.items() if mistake.then])
def test_the_fix_is_right(name, detector, image):
    then = MISTAKES[name].then
    assert then is not None
    then(detector, image)


def test_colours_of_pil_and_of_arrays_are_not_confused(detector, image):
    """PIL images are RGB and arrays BGR: both give the same boxes, and only an array in RGB gives others."""
    expected = detector(image, conf=0.05)
    assert len(expected) > 0
    assert np.array_equal(detector(PIL.Image.fromarray(image[..., ::-1]), conf=0.05).boxes, expected.boxes)
    assert np.array_equal(detector(STREET, conf=0.05).boxes, expected.boxes)
    assert np.array_equal(detector(Path(STREET).read_bytes(), conf=0.05).boxes, expected.boxes)
    assert not np.array_equal(detector(image[..., ::-1].copy(), conf=0.05).scores, expected.scores)


@pytest.mark.parametrize(
    "library,code,fix",
    [
        (
            "onnxruntime",
            lambda: Detector("best.onnx", device="cpu", runtime="onnxruntime"),
            "pip install 'yolov7-deploy[cpu]'",
        ),
        ("yaml", lambda: validate("best.onnx", "shapes/shapes.yaml"), "pip install 'yolov7-deploy[val]'"),
    ],
)
def test_a_missing_library_names_the_extra(library, code, fix, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    for name in (
        "yolov7_deploy.runtimes.onnxruntime",
        "yolov7_deploy.datasets.yolo",
        "yolov7_deploy.datasets.yaml_file",
    ):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingLibraryError, match=f"{library} is needed") as raised:
        code()
    assert fix in str(raised.value)


def test_an_engine_of_another_gpu_says_how_to_build_it_here(environment):  # noqa: F811 - a fixture
    with pytest.raises(LoadError, match=r"compute capability 8\.6") as raised:
        environment.open(compute_capability="8.6")
    assert "build_engine(OnnxModel.load(" in str(raised.value)
    assert "y7 build --weights" in raised.value.fix


def test_there_are_at_least_thirty_mistakes():
    assert len(MISTAKES) >= 30


def test_a_closed_detector_says_so(folder):
    detector = Detector(folder / "best.onnx", device="cpu")
    detector.close()
    with pytest.raises(UsageError, match="closed"):
        detector(STREET)


def test_an_object_that_looks_like_an_array_is_named():
    with Detector("best.onnx", device="cpu") as detector, pytest.raises(ImageError, match="SimpleNamespace"):
        detector(SimpleNamespace(shape=(4, 4, 3)))  # type: ignore[call-overload]


def test_no_mistake_leaves_a_file(folder):
    assert {"runs", "yolov7-tiny-shapes.onnx"} & {path.name for path in folder.iterdir()} == set()
