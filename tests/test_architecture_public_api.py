"""The public names of the package: one list, and each name is typed and documented."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

import yolov7_deploy

SOURCE = Path(yolov7_deploy.__file__)
CLASSES = [name for name in yolov7_deploy.__all__ if name[0].isupper()]
FUNCTIONS = [name for name in yolov7_deploy.__all__ if name[0].islower()]


def members(kind: type) -> list[tuple[str, object]]:
    """Return the public methods and properties that a class defines, with `__init__` and `__call__`."""
    special = {"__call__", "__init__"} if not dataclasses.is_dataclass(kind) else set()
    return [(name, value) for name, value in vars(kind).items() if not name.startswith("_") or name in special]


def function_of(member: object) -> object:
    """Return the function of a property, a class method or a method; other members are returned unchanged."""
    if isinstance(member, property):
        return member.fget
    return getattr(member, "__func__", member)


def untyped(function: object) -> list[str]:
    """Return the parameters without an annotation, and `return` if it has none."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    missing = [
        name for name, parameter in signature.parameters.items() if parameter.annotation is inspect.Parameter.empty
    ]
    missing = [name for name in missing if name not in {"self", "cls"}]
    return missing + (["return"] if signature.return_annotation is inspect.Signature.empty else [])


def typed_names() -> dict[str, str]:
    """Return name and module of every import that only type checkers see."""
    (block,) = (node for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: node.module or "" for node in imports for alias in node.names}


def test_type_checkers_see_exactly_the_public_names():
    assert typed_names() == {name: f"yolov7_deploy.{module}" for name, module in yolov7_deploy._MODULES.items()}


def test_dir_lists_exactly_the_public_names():
    assert {"Detector", "Detections", "__version__"} < set(yolov7_deploy.__all__)
    assert dir(yolov7_deploy) == yolov7_deploy.__all__


def test_a_star_import_gives_every_name():
    names: dict[str, object] = {}
    exec("from yolov7_deploy import *", names)
    assert set(yolov7_deploy.__all__) <= set(names)


def test_no_public_name_is_also_the_name_of_a_submodule():
    """Importing a submodule sets an attribute of its name on the package, which would replace the public name."""
    submodules = {path.stem for path in SOURCE.parent.iterdir()}
    assert set(yolov7_deploy.__all__) & submodules == set()


def test_any_other_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = yolov7_deploy.Nothing


def test_the_package_is_marked_as_typed():
    assert SOURCE.with_name("py.typed").is_file()


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
def test_every_dataclass_is_frozen(name):
    assert getattr(yolov7_deploy, name).__dataclass_params__.frozen
