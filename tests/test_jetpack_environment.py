"""The TensorRT runtime in the Python environment of JetPack 6: Python 3.10, NumPy 1.26, neither cuda-python nor torch.

There the CUDA runtime is called with ctypes. The fakes of TensorRT and of the CUDA runtime library replace the GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
REQUIREMENTS = ("numpy==1.26.*", "onnx", "onnxruntime", "opencv-python-headless", "pytest", "rich", "typer")
NEEDS_TORCH = "test_tensorrt_network.py"
MIN_PASSED = 150  # 170 of 174 passed when this was written; the others need cuda-python or TensorRT-RTX
TIMEOUT_S = 500

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="JetPack is Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ for the fake CUDA runtime library"),
]


def run(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def pythons(folder: Path) -> Iterator[Path]:
    """Yield what may be Python 3.10: that of the PATH, of pyenv, and one that uv downloads into the folder."""
    on_path = shutil.which("python3.10")
    if on_path:
        yield Path(on_path)
    yield from Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10")
    uv = shutil.which("uv")
    if uv and run(uv, "python", "install", "3.10", UV_PYTHON_INSTALL_DIR=str(folder)).returncode == 0:
        yield from folder.glob("*/bin/python3.10")


@pytest.fixture
def python(tmp_path) -> Path:
    """The interpreter of a new environment with the packages of a Jetson."""
    for base in pythons(tmp_path / "uv"):
        if run(base, "-m", "venv", tmp_path / "venv").returncode == 0:
            break
    else:
        pytest.skip("needs Python 3.10 with venv (uv python install 3.10)")
    created = tmp_path / "venv" / "bin" / "python"
    done = run(created, "-m", "pip", "install", "--quiet", *REQUIREMENTS)
    assert done.returncode == 0, done.stderr
    return created


VERSIONS = """
import importlib.util, sys, numpy
print(*sys.version_info[:2], numpy.__version__, importlib.util.find_spec("cuda"), importlib.util.find_spec("torch"))
"""


def test_the_tensorrt_runtime_passes_its_tests_with_python_3_10_and_numpy_1_26(python, tmp_path):
    major, minor, numpy, *others = run(python, "-c", VERSIONS).stdout.split()
    assert (major, minor, others) == ("3", "10", ["None", "None"])
    assert numpy.startswith("1.26.")
    files = sorted((ROOT / "tests" / "runtimes").glob("test_tensorrt*.py"))
    names = [path for path in files if path.name != NEEDS_TORCH] + [ROOT / "tests" / "runtimes" / "test_cuda.py"]
    # The fixtures of conftest.py need torch, and these tests need none of them.
    options = ("-q", "--noconftest", "-p", "no:cacheprovider", f"--junitxml={tmp_path / 'results.xml'}")
    done = run(python, "-m", "pytest", *options, *names, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    suite = ElementTree.parse(tmp_path / "results.xml").getroot()[0]
    assert int(suite.get("tests")) - int(suite.get("skipped")) >= MIN_PASSED, done.stdout
