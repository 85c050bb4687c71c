"""The walls of the house: who imports whom, which library lives where, and how large a file may grow.

Everything is read from the source with `ast`, so imports inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "yolov7_deploy"
NAME = PACKAGE.name

MAX_FILE_LINES = 700
MAX_FUNCTION_LINES = 60
NO_NAMES = {"common", "core", "helper", "helpers", "misc", "util", "utils"}

# From the shelf up to the porch. A file imports from lower rows only; rooms of one row do not know each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("_atomic_file", "_serialization", "_version", "errors"),
    ("hardware", "hub", "image", "metadata", "paper"),
    ("_charts", "_console", "options", "visualize"),
    ("sources",),
    ("datasets", "detections", "postprocess"),
    ("checkpoint",),
    ("model",),
    ("export",),
    ("estimation",),
    ("tensorrt",),
    ("precision",),
    ("inspection",),
    ("runtimes",),
    ("detector",),
    ("evaluation",),
    ("doctor",),
    ("benchmark",),
    ("training",),
    ("workflows",),
    ("cli",),
)
# The two doors stand outside the rows: they reach rooms by name, when somebody asks.
DOORS = ("", "__main__")

# A place is a file or a folder (ends with a slash) of the package.
LIBRARIES: dict[str, set[str]] = {
    "cuda": {"runtimes/cudart.py"},
    "cv2": {
        "visualize.py",
        "image.py",
        "sources/",
        "training/augment.py",
        "training/dataloader.py",
        "training/copy_paste.py",
        "training/random_affine.py",
        "training/dataset.py",
        "sources/display.py",
    },
    "faster_coco_eval": {"evaluation/accuracy.py", "evaluation/accuracy_drop.py"},
    "google.protobuf": {"tensorrt/onnx_rewrite.py", "export/onnx_model.py"},
    "matplotlib": {"_charts.py", "benchmark/chart.py", "workflows/quantize.py", "training/plots.py"},
    "onnx": {"tensorrt/builder.py", "tensorrt/onnx_rewrite.py", "export/", "evaluation/onnx_probe.py", "precision/"},
    "onnxruntime": {"runtimes/onnxruntime.py", "evaluation/onnx_probe.py", "precision/ort_runner.py"},
    "onnxsim": {"export/onnx_exporter.py"},
    "rich": {"cli/", "_console.py"},
    "safetensors": {"checkpoint/loader.py", "training/resume_state.py"},
    "torch": {
        "runtimes/pytorch.py",
        "runtimes/torch_cuda_graphs.py",
        "runtimes/torch_network.py",
        "checkpoint/loader.py",
        "export/onnx_exporter.py",
        "model/fusion.py",
        "inspection/complexity.py",
        "estimation/layer_work.py",
        "model/",
        "training/",
    },
    "typer": {"cli/"},
    "yaml": {"datasets/yolo.py", "training/hyperparameters.py"},
}
EVERYWHERE = {"numpy"}
# Light enough to be imported where they are needed; all others stand at the top of their file.
LIGHT = {"rich", "typer"}
# Conversions of Detections that only their users need; looked up by name in this one place.
LOOKED_UP = {"detections.py"}
IMPORTERS = {"__import__", "import_module"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def files(folder: Path = PACKAGE) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def inside(path: Path) -> str:
    """The path as the tables write it: `backends/ort.py`."""
    return path.relative_to(PACKAGE).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """`yolov7_deploy.runtimes.onnxruntime` is in `backends`; the front door is in ``."""
    return module.split(".")[1] if "." in module else ""


MODULES = {module_name(path): path for path in files()}
ROWS = {name: row for row, names in enumerate(LAYERS) for name in names}


def imports(nodes: Iterator[ast.AST], package: str) -> Iterator[tuple[str, str, int]]:
    """(module, name, line) of every import; the name is empty for `import module`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], base]).rstrip(".")
            yield from ((base, alias.name, node.lineno) for alias in node.names)


def all_imports(path: Path) -> list[tuple[str, str, int]]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return list(imports(ast.walk(tree(path)), package))


def house_imports(path: Path) -> Iterator[tuple[str, str, int]]:
    """(module, name, line) of what is imported from the package; a submodule taken by name is the module."""
    for module, name, line in all_imports(path):
        if module.split(".")[0] == NAME:
            whole = f"{module}.{name}"
            yield (whole, "", line) if whole in MODULES else (module, name, line)


def at_start(path: Path) -> Iterator[ast.AST]:
    """The nodes that run when a file is imported: no function bodies, nothing under TYPE_CHECKING."""
    waiting: list[ast.AST] = list(tree(path).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def library(module: str) -> str:
    """The distribution's name in the table for `torch.nn`, `google.protobuf.message`."""
    return next((name for name in LIBRARIES if f"{module}.".startswith(f"{name}.")), module.split(".")[0])


def foreign_imports(path: Path) -> Iterator[tuple[str, int]]:
    """(library, line) of what comes from neither the standard library nor this package."""
    for module, _, line in all_imports(path):
        if module.split(".")[0] not in {*sys.stdlib_module_names, NAME}:
            yield library(module), line


def allowed(path: Path, places: set[str]) -> bool:
    return any(inside(path).startswith(place) if place.endswith("/") else inside(path) == place for place in places)


def test_every_file_has_a_room_in_the_image():
    homeless = {room(module) for module in MODULES} - set(ROWS) - set(DOORS)
    assert not homeless, f"add to LAYERS: {sorted(homeless)}"


def test_a_file_imports_only_from_layers_below_it():
    wrong = []
    for path in files():
        own = room(module_name(path))
        for module, _, line in house_imports(path):
            other = room(module)
            if own in DOORS or other == own:
                continue
            if other in DOORS or ROWS[other] >= ROWS[own]:
                wrong.append(f"{inside(path)}:{line} ({own}) imports {module} ({other or 'the front door'})")
    assert not wrong, "\n".join(wrong)


def test_the_front_door_imports_no_room_when_it_opens():
    package = f"{NAME}"
    taken = [
        module
        for module, *_ in imports(at_start(PACKAGE / "__init__.py"), package)
        if room(module) not in ("", "_version")
    ]
    assert taken == []


def test_no_two_files_import_each_other_in_a_circle():
    graph = {
        module: {other for other, *_ in house_imports(path) if room(other) and other != module}
        for module, path in MODULES.items()
        if room(module)
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_a_heavy_library_stays_in_its_rooms():
    wrong = [
        f"{inside(path)}:{line} imports {name}"
        for path in files()
        for name, line in foreign_imports(path)
        if name not in EVERYWHERE and not allowed(path, LIBRARIES.get(name, set()))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", sorted(LIBRARIES))
def test_the_library_table_lists_no_place_that_does_not_need_it(name):
    users = [path for path in files() if name in {found for found, _ in foreign_imports(path)}]
    unused = {place for place in LIBRARIES[name] if not any(allowed(path, {place}) for path in users)}
    assert not unused


def test_a_heavy_library_is_imported_at_the_top_of_a_file_or_not_at_all():
    wrong = []
    for path in files():
        top = {line for node in at_start(path) if (line := getattr(node, "lineno", None))}
        wrong += [
            f"{inside(path)}:{line} imports {name} inside a function"
            for name, line in foreign_imports(path)
            if name not in LIGHT and line not in top
        ]
    assert not wrong, "\n".join(wrong)


def test_no_heavy_library_is_looked_up_by_name():
    wrong = []
    for path in files():
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] not in IMPORTERS:
                continue
            literals = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if inside(path) not in LOOKED_UP and any(library(text) in LIBRARIES for text in literals):
                wrong.append(f"{inside(path)}:{node.lineno} imports {literals[0]}")
    assert not wrong, "\n".join(wrong)


def test_the_command_line_starts_without_a_heavy_library():
    """What is reached from cli/ when it is imported, through every file on the way."""
    waiting = [module for module in MODULES if room(module) == "cli"]
    came_from = dict.fromkeys(waiting, "")
    wrong = []
    while waiting:
        module = waiting.pop()
        package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
        for base, name, _ in imports(at_start(MODULES[module]), package):
            target = f"{base}.{name}" if f"{base}.{name}" in MODULES else base
            if target.split(".")[0] not in {*sys.stdlib_module_names, NAME} and library(target) != "typer":
                wrong.append(f"{module} imports {target} (from {came_from[module] or 'the command line'})")
            parents = {".".join(target.split(".")[:end]) for end in range(1, target.count(".") + 2)}
            for found in sorted(parents & set(MODULES) - set(came_from)):
                came_from[found] = module
                waiting.append(found)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["yolov7_deploy", "tests", "benchmarks"])
def test_no_file_is_longer_than_a_reader_can_hold(folder):
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in files(ROOT / folder)}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


@pytest.mark.parametrize("folder", ["yolov7_deploy", "tests", "benchmarks"])
def test_no_function_is_longer_than_a_screen(folder):
    wrong = [
        f"{path.relative_to(ROOT).as_posix()}:{node.lineno} {node.name} has {lines} lines"
        for path in files(ROOT / folder)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not wrong, "\n".join(wrong)


def test_no_error_is_caught_without_naming_it():
    wrong = [
        f"{inside(path)}:{node.lineno}"
        for path in files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert wrong == []


def test_the_library_does_not_print():
    wrong = [
        f"{inside(path)}:{node.lineno}"
        for path in files()
        if room(module_name(path)) != "cli"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"print", "pprint", "pprint.pprint"}
    ]
    assert wrong == []


def test_no_file_has_a_name_that_says_nothing():
    parts = {part for path in files() for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert parts & NO_NAMES == set()
