"""The names offered to applications: a list, each typed and documented."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

import yolov7_deploy

NAMES = [
    "Checkpoint",
    "Detections",
    "Detector",
    "Engine",
    "EngineOptions",
    "ExportOptions",
    "Int8Options",
    "ModelMetadata",
    "OnnxModel",
    "Thresholds",
    "Y7Error",
    "Yolov7",
    "__version__",
    "build_engine",
    "build_model",
    "calibrate",
    "export_onnx",
    "fuse",
    "load_checkpoint",
    "new_model",
    "open_calibration",
    "save_checkpoint",
    "to_fp16",
    "to_int8",
]
CLASSES = [name for name in NAMES if name[0].isupper()]
FUNCTIONS = [name for name in NAMES if name[0].islower()]


def members(kind: type) -> list[tuple[str, object]]:
    """The public methods and properties that a class defines itself, and how it is made and called."""
    made = {"__call__", "__init__"} if not dataclasses.is_dataclass(kind) else set()
    return [(name, value) for name, value in vars(kind).items() if not name.startswith("_") or name in made]


def function_of(member: object) -> object:
    """The function behind a property, a class method or a method; anything else is itself."""
    if isinstance(member, property):
        return member.fget
    return getattr(member, "__func__", member)


def untyped(function: object) -> list[str]:
    """Parameters without an annotation, and `return`."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    missing = [
        name for name, parameter in signature.parameters.items() if parameter.annotation is inspect.Parameter.empty
    ]
    missing = [name for name in missing if name not in {"self", "cls"}]
    return missing + (["return"] if signature.return_annotation is inspect.Signature.empty else [])


def test_the_names_offered_are_these():
    assert yolov7_deploy.__all__ == NAMES
    assert dir(yolov7_deploy) == NAMES


def test_a_star_import_gives_every_name():
    names: dict[str, object] = {}
    exec("from yolov7_deploy import *", names)
    assert set(NAMES) <= set(names)


def test_no_name_offered_is_also_the_name_of_a_room():
    """Python puts an imported room in the same place as a name, so the name would turn into the room."""
    rooms = {path.stem for path in Path(yolov7_deploy.__file__).parent.iterdir()}
    assert set(NAMES) & rooms == set()


def test_a_name_that_is_not_offered_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = yolov7_deploy.Nothing


def test_the_package_says_that_it_is_typed():
    assert Path(yolov7_deploy.__file__).with_name("py.typed").is_file()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_typed_and_documented(name):
    function = getattr(yolov7_deploy, name)
    assert untyped(function) == []
    assert inspect.getdoc(function)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_documented(name):
    doc = getattr(yolov7_deploy, name).__doc__
    # A dataclass without a docstring gets its signature as one.
    assert doc and not doc.startswith(f"{name}(")


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_method_is_typed_and_documented(name):
    wrong = {}
    for label, member in members(getattr(yolov7_deploy, name)):
        function = function_of(member)
        if inspect.isfunction(function):
            faults = untyped(function) + ([] if label == "__init__" or function.__doc__ else ["docstring"])
            if faults:
                wrong[label] = faults
    assert wrong == {}


@pytest.mark.parametrize("name", [name for name in CLASSES if dataclasses.is_dataclass(getattr(yolov7_deploy, name))])
def test_data_is_frozen(name):
    assert getattr(yolov7_deploy, name).__dataclass_params__.frozen
