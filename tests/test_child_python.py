"""No command executes a file of the working directory, whatever module of Python or of a library it is called."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import fuzz_seeds
from yolov7_deploy._process import python_command

ROOT = Path(__file__).parents[1]
# Modules that a command may import without being installed here, and those that Python looks for when it starts.
OPTIONAL = (
    *("tensorrt", "tensorrt_rtx", "tensorrt_bindings", "tensorrt_libs", "cuda", "pycuda", "pynvml", "supervision"),
    *("pandas", "torchvision", "triton", "cupy", "wandb", "comet_ml", "sitecustomize", "usercustomize", "antigravity"),
)
LIMIT_S = 600  # the demo takes two minutes of two cores


def module_names() -> set[str]:
    """Return the top-level modules of Python, of every installed distribution, and of libraries that are not."""
    return {*sys.stdlib_module_names, *importlib.metadata.packages_distributions(), *OPTIONAL, "yolov7_deploy"}


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A working directory in which every module name is a file that reports that it was imported."""
    folder, marker = tmp_path / "hostile", tmp_path / "imported"
    folder.mkdir()
    for name in module_names():
        if name.isidentifier():
            (folder / f"{name}.py").write_text(f"with open({str(marker)!r}, 'a') as file: file.write('{name}\\n')\n")
    return folder


def imported(hostile: Path) -> str:
    """Return the names of the hostile files that were imported, one per line."""
    marker = hostile.parent / "imported"
    return marker.read_text() if marker.exists() else ""


def run(
    command: list[str], hostile: Path, *, python_path: tuple[Path, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in the hostile folder."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"},
        "PYTHONPATH": os.pathsep.join(map(str, (*python_path, ROOT))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_CACHE_HOME": str(hostile.parent / "cache"),
        **variables,
    }
    return subprocess.run(
        command, cwd=hostile, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


@pytest.fixture
def y7(hostile: Path) -> list[str]:
    """The console script: a file outside the working directory, as `pip install` writes it."""
    script = hostile.parent / "bin" / "y7"
    script.parent.mkdir()
    script.write_text("from yolov7_deploy.__main__ import main\nmain()\n")
    return [sys.executable, str(script)]


@pytest.fixture
def tensorrt(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with a TensorRT that reports its import and cannot build."""
    folder = tmp_path / "python-path"
    folder.mkdir()
    text = f"open({str(tmp_path / 'tensorrt-imported')!r}, 'w').close()\n__version__ = '10.3.0'\n"
    (folder / "tensorrt.py").write_text(text)
    return folder


def test_the_planted_files_are_executed_by_an_ordinary_python(hostile):
    code = "import json, cv2, yolov7_deploy"
    assert run([sys.executable, "-c", code], hostile).returncode == 0
    assert {"json", "cv2", "yolov7_deploy"} <= set(imported(hostile).split())


def test_a_child_imports_the_libraries_and_no_file_of_the_working_directory(hostile):
    command = python_command("import json, typing, numpy, cv2, yolov7_deploy.image; print(sys.argv)", "one", "two")
    done = run(command, hostile)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "['-c', 'one', 'two']", "")
    assert imported(hostile) == ""


def test_a_child_has_the_absolute_entries_of_the_search_path(monkeypatch, tmp_path):
    absolute = [entry for entry in sys.path if Path(entry).is_absolute()]
    monkeypatch.setattr(sys, "path", ["", ".", "relative", str(tmp_path), *absolute])
    done = subprocess.run(python_command("print(sys.path)"), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([str(tmp_path), *absolute])


def test_a_child_imports_from_the_working_directory_if_its_absolute_path_is_searched(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    done = subprocess.run(
        python_command("import mine; print(mine.answer)"), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "42"


def test_a_child_ignores_relative_entries_of_pythonpath(hostile):
    done = run(python_command("import json, numpy"), hostile, PYTHONPATH=f":.:{ROOT}")
    assert (done.returncode, imported(hostile)) == (0, "")


def test_doctor_executes_nothing_in_the_working_directory(hostile, y7, tensorrt):
    done = run([*y7, "doctor"], hostile, python_path=(tensorrt,))
    assert (done.returncode, done.stderr) == (0, "")
    assert imported(hostile) == ""
    assert (hostile.parent / "tensorrt-imported").exists(), "the probe of TensorRT has PYTHONPATH"


def test_build_executes_nothing_in_the_working_directory(hostile, y7, tensorrt):
    (hostile / "model.onnx").write_bytes(fuzz_seeds.graphs()[0])
    done = run([*y7, "build", "--weights", "model.onnx"], hostile, python_path=(tensorrt,))
    assert done.returncode in (0, 1), "TensorRT-RTX may be installed"
    assert imported(hostile) == ""
    assert (hostile.parent / "tensorrt-imported").exists(), "the build process has PYTHONPATH"


def test_python_m_executes_only_what_python_itself_imports_first(hostile):
    """Python puts the working directory first for `-m` and imports some modules before it runs any of ours."""
    for file in hostile.iterdir():
        if file.stem in python_m_imports():
            file.unlink()
    done = run([sys.executable, "-m", "yolov7_deploy", "doctor"], hostile)
    assert done.returncode == 0, done.stderr
    assert imported(hostile) == ""


def python_m_imports() -> set[str]:
    """Return the modules that `python -m yolov7_deploy` imports before `yolov7_deploy/__main__.py` runs."""
    code = "import sys, runpy, yolov7_deploy; print(*{name.partition('.')[0] for name in sys.modules})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH exists since Python 3.11")
def test_python_m_executes_nothing_with_pythonsafepath(hostile):
    done = run([sys.executable, "-m", "yolov7_deploy", "doctor"], hostile, PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    assert imported(hostile) == ""


WEIGHTS, DATA = "--weights yolov7-tiny-shapes --img 64", "--data ../shapes/shapes.yaml"
COMMANDS = (
    "shapes --output ../shapes --train 8 --val 4 --img 64",
    f"export {WEIGHTS} -o ../network.onnx",
    f"train {WEIGHTS} {DATA} --batch 4 --epochs 1 --workers 2 --save-dir ../run",
    f"val {WEIGHTS} {DATA}",
    f"detect {WEIGHTS} --source ../shapes/images/val --save-dir ../detect",
    f"bench {WEIGHTS} --device cpu --duration 0.2 --warmup 0.2 --chart ../chart.png",
    "verify --weights yolov7-tiny-shapes --against ../network.onnx",
    "quantize --weights ../network.onnx --calib ../shapes/images/val -o ../int8.onnx",
    "info ../network.onnx",
    "demo --save-dir ../demo",
)
# These need TensorRT and a compiler; without them they fail, after they have started their processes.
OPTIONAL_COMMANDS = (f"export {WEIGHTS} --engine -o ../engine.onnx", "plugin")


@pytest.mark.slow
def test_no_command_executes_a_file_of_the_working_directory(hostile, y7, tensorrt):
    for command in (*COMMANDS, *OPTIONAL_COMMANDS):
        done = run([*y7, *command.split()], hostile, python_path=(tensorrt,))
        assert done.returncode == 0 or (command in OPTIONAL_COMMANDS and done.returncode == 1), (command, done.stderr)
        assert imported(hostile) == "", command
