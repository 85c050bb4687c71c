"""Architecture: which package imports which, which module uses which library, and how long files and functions are.

The source is parsed with `ast`, so imports inside functions and under TYPE_CHECKING count, too.
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
MEANINGLESS_NAMES = {"common", "core", "helper", "helpers", "misc", "util", "utils"}

# From low to high. A file imports from its own package and from rows above this one in the list; packages (or
# modules) of one row do not import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("_bounded_read", "_download", "_protobuf"),
    ("_atomic_file", "_python_spelling", "_serialization", "_statistics", "_text", "_version"),
    ("errors",),
    ("_output", "_output_folder", "_process", "hardware", "hub", "image", "metadata", "paper"),
    ("_charts", "_console", "_ort_options", "options", "visualize"),
    ("sources",),
    ("datasets", "detections", "postprocess"),
    ("checkpoint", "output_layout"),
    ("model",),
    ("onnx_export",),
    ("estimation",),
    ("tensorrt",),
    ("precision",),
    ("inspection",),
    ("runtimes",),
    ("streams",),
    ("detector",),
    ("evaluation",),
    ("doctor",),
    ("benchmarking",),
    ("deployment",),
    ("training",),
    ("scoring", "serving", "workflows"),
    ("cli",),
)
# Entry points, outside the layers: they import other modules lazily.
ENTRY_POINTS = ("", "__main__")

# Third-party libraries, and the files and folders (with a slash) of the package that may import them.
LIBRARIES: dict[str, set[str]] = {
    "cuda": {"runtimes/cudart.py"},
    "cv2": {
        "visualize.py",
        "image.py",
        "deployment/triton.py",
        "sources/",
        "training/augment.py",
        "training/dataloader.py",
        "training/copy_paste.py",
        "training/random_affine.py",
        "training/dataset.py",
    },
    "faster_coco_eval": {"evaluation/accuracy.py", "evaluation/accuracy_drop.py"},
    "google.protobuf": {"tensorrt/onnx_rewrite.py", "onnx_export/onnx_model.py"},
    "jinja2": {"workflows/report_page.py"},
    "markupsafe": {"workflows/report_page.py"},
    "matplotlib": {
        "_charts.py",
        "benchmarking/chart.py",
        "evaluation/plots.py",
        "training/plots.py",
        "workflows/report_charts.py",
        "workflows/sensitivity_chart.py",
    },
    "onnx": {
        "tensorrt/builder.py",
        "tensorrt/onnx_rewrite.py",
        "onnx_export/",
        "evaluation/onnx_probe.py",
        "precision/",
    },
    "onnxruntime": {
        "_ort_options.py",
        "runtimes/onnxruntime.py",
        "precision/ort_runner.py",
    },
    "openvino": {"runtimes/openvino.py"},
    "onnxsim": {"onnx_export/onnx_exporter.py"},
    "pyarrow": {"scoring/parquet.py"},
    "prometheus_client": {"workflows/metrics.py"},
    "pynvml": {"hardware/gpu.py"},
    "ray": {"scoring/ray_workers.py", "serving/application.py"},
    "rich": {"_console.py"},
    "safetensors": {"checkpoint/loader.py", "training/checkpoints.py"},
    "starlette": {"serving/application.py"},
    "torch": {
        "runtimes/pytorch.py",
        "runtimes/pytorch_network.py",
        "checkpoint/loader.py",
        "onnx_export/onnx_exporter.py",
        "precision/fake_quantize.py",
        "precision/qat.py",
        "inspection/complexity.py",
        "estimation/layer_work.py",
        "model/",
        "training/",
    },
    "triton_python_backend_utils": {"deployment/triton_backend.py"},
    "typer": {"cli/"},
    "typing_extensions": {"workflows/functions.py"},  # for type checkers only
    "yaml": {"datasets/yaml_file.py"},
}
EVERYWHERE = {"numpy"}
# Light, or optional where they are used, so imported inside functions; all others at the top of a file.
LIGHT = {"rich", "typer", "typing_extensions"}
# Conversions of Detections to optional libraries import these by name.
IMPORTS_BY_NAME = {"detections.py"}
IMPORTERS = {"__import__", "import_module"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def files(folder: Path = PACKAGE) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def relative(path: Path) -> str:
    """Return the path inside the package, as in the tables: `runtimes/onnxruntime.py`."""
    return path.relative_to(PACKAGE).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """Return the entry of LAYERS: `runtimes` for `yolov7_deploy.runtimes.onnxruntime`; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


MODULES = {module_name(path): path for path in files()}
ROWS = {name: row for row, names in enumerate(LAYERS) for name in names}


def imports(nodes: Iterator[ast.AST], package: str) -> Iterator[tuple[str, str, int]]:
    """Return (module, name, line) of every import; the name is empty for `import module`."""
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


def internal_imports(path: Path) -> Iterator[tuple[str, str, int]]:
    """Return (module, name, line) of every import from this package; the name is empty if a submodule is imported."""
    for module, name, line in all_imports(path):
        if module.split(".")[0] == NAME:
            submodule = f"{module}.{name}"
            yield (submodule, "", line) if submodule in MODULES else (module, name, line)


def executed_on_import(path: Path) -> Iterator[ast.AST]:
    """Return the nodes executed when the file is imported: no function bodies, nothing under TYPE_CHECKING."""
    pending: list[ast.AST] = list(tree(path).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        yield node
        pending += ast.iter_child_nodes(node)


def library(module: str) -> str:
    """Return the name in the table: `torch` for `torch.nn`, `google.protobuf` for `google.protobuf.message`."""
    return next((name for name in LIBRARIES if f"{module}.".startswith(f"{name}.")), module.split(".")[0])


def third_party_imports(path: Path) -> Iterator[tuple[str, int]]:
    """Return (library, line) of every import that is neither from the standard library nor from this package."""
    for module, _, line in all_imports(path):
        if module.split(".")[0] not in {*sys.stdlib_module_names, NAME}:
            yield library(module), line


def allowed(path: Path, paths: set[str]) -> bool:
    return any(relative(path).startswith(entry) if entry.endswith("/") else relative(path) == entry for entry in paths)


def test_every_module_belongs_to_a_layer():
    missing = {layer_of(module) for module in MODULES} - set(ROWS) - set(ENTRY_POINTS)
    assert not missing, f"add to LAYERS: {sorted(missing)}"


def test_a_file_imports_only_from_layers_below_it():
    wrong = []
    for path in files():
        own = layer_of(module_name(path))
        for module, _, line in internal_imports(path):
            other = layer_of(module)
            if own in ENTRY_POINTS or other == own:
                continue
            if other in ENTRY_POINTS or ROWS[other] >= ROWS[own]:
                wrong.append(f"{relative(path)}:{line} ({own}) imports {module} ({other or 'the package itself'})")
    assert not wrong, "\n".join(wrong)


def test_importing_the_package_imports_no_submodule():
    imported = [module for module, *_ in imports(executed_on_import(PACKAGE / "__init__.py"), NAME)]
    assert [module for module in imported if layer_of(module) not in ("", "_version")] == []


def test_imports_have_no_cycle():
    graph = {
        module: {other for other, *_ in internal_imports(path) if layer_of(other) and other != module}
        for module, path in MODULES.items()
        if layer_of(module)
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_a_heavy_library_is_imported_only_where_the_table_allows_it():
    wrong = [
        f"{relative(path)}:{line} imports {name}"
        for path in files()
        for name, line in third_party_imports(path)
        if name not in EVERYWHERE and not allowed(path, LIBRARIES.get(name, set()))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", sorted(LIBRARIES))
def test_the_library_table_lists_no_path_that_does_not_need_it(name):
    users = [path for path in files() if name in {found for found, _ in third_party_imports(path)}]
    unused = {entry for entry in LIBRARIES[name] if not any(allowed(path, {entry}) for path in users)}
    assert not unused


def test_a_heavy_library_is_imported_at_the_top_of_a_file():
    wrong = []
    for path in files():
        top = {line for node in executed_on_import(path) if (line := getattr(node, "lineno", None))}
        wrong += [
            f"{relative(path)}:{line} imports {name} inside a function"
            for name, line in third_party_imports(path)
            if name not in LIGHT and line not in top
        ]
    assert not wrong, "\n".join(wrong)


def test_no_heavy_library_is_imported_by_name():
    wrong = []
    for path in files():
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] not in IMPORTERS:
                continue
            literals = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if relative(path) not in IMPORTS_BY_NAME and any(library(text) in LIBRARIES for text in literals):
                wrong.append(f"{relative(path)}:{node.lineno} imports {literals[0]}")
    assert not wrong, "\n".join(wrong)


def test_the_command_line_starts_without_a_heavy_library():
    """Follows every import that is executed when cli/ is imported."""
    pending = [module for module in MODULES if layer_of(module) == "cli"]
    imported_by = dict.fromkeys(pending, "")
    wrong = []
    while pending:
        module = pending.pop()
        package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
        for base, name, _ in imports(executed_on_import(MODULES[module]), package):
            target = f"{base}.{name}" if f"{base}.{name}" in MODULES else base
            if target.split(".")[0] not in {*sys.stdlib_module_names, NAME} and library(target) != "typer":
                wrong.append(f"{module} imports {target} (from {imported_by[module] or 'the command line'})")
            parents = {".".join(target.split(".")[:end]) for end in range(1, target.count(".") + 2)}
            for found in sorted(parents & set(MODULES) - set(imported_by)):
                imported_by[found] = module
                pending.append(found)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["yolov7_deploy", "tests", "benchmarks", "examples"])
def test_no_file_is_too_long(folder):
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in files(ROOT / folder)}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def docstring_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if ast.get_docstring(function) is None:
        return 0
    return (function.body[0].end_lineno or 0) - function.body[0].lineno + 1


@pytest.mark.parametrize("folder", ["yolov7_deploy", "tests", "benchmarks", "examples"])
def test_no_function_is_too_long(folder):
    wrong = [
        f"{path.relative_to(ROOT).as_posix()}:{node.lineno} {node.name} has {lines} lines"
        for path in files(ROOT / folder)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1 - docstring_lines(node)) > MAX_FUNCTION_LINES
    ]
    assert not wrong, "\n".join(wrong)


def test_no_except_clause_is_bare():
    wrong = [
        f"{relative(path)}:{node.lineno}"
        for path in files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert wrong == []


def test_texts_are_printed_and_logged_only_by_the_functions_that_make_them_printable():
    """`echo` prints and `get_logger` logs; both show control characters of foreign texts as escapes."""
    others = {"print", "pprint", "pprint.pprint", "typer.echo", "typer.secho", "logging.getLogger"}
    wrong = [
        f"{relative(path)}:{node.lineno}"
        for path in files()
        if relative(path) != "_text.py"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in others
    ]
    assert wrong == []


def test_the_library_does_not_print():
    wrong = [
        f"{relative(path)}:{line}"
        for path in files()
        if layer_of(module_name(path)) not in {"cli", "_console"}
        for module, name, line in all_imports(path)
        if (module, name) in {(f"{NAME}._output", "echo"), (f"{NAME}._output", "write_stdout")}
    ]
    assert wrong == []


def test_no_file_has_a_meaningless_name():
    parts = {part for path in files() for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert parts & MEANINGLESS_NAMES == set()
