"""The TensorRT runtime in the Python environment of JetPack 6: Python 3.10, NumPy 1.26, neither cuda-python nor torch.

There the CUDA runtime is called with ctypes. The fakes of TensorRT and of the CUDA runtime library replace the GPU.
"""

from __future__ import annotations

import functools
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support import python310

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


run = functools.partial(python310.run, cwd=ROOT, timeout_s=TIMEOUT_S)


@pytest.fixture
def python(tmp_path) -> Path:
    """The interpreter of a new environment with the packages of a Jetson."""
    created = python310.create_environment(tmp_path, timeout_s=TIMEOUT_S)
    done = run(created, "-m", "pip", "install", "--quiet", *REQUIREMENTS)
    assert done.returncode == 0, done.stderr
    return created


def test_what_the_jetpack_6_image_installs_is_ready_there(python, tmp_path):
    """The requirements are those of docker/jetson-jetpack6.Dockerfile; JetPack brings TensorRT."""
    done = run(python, "-m", "pip", "install", "--quiet", f"{ROOT}[cpu,engine]", "numpy==1.26.*")
    assert done.returncode == 0, done.stderr
    major, minor, numpy, *others = run(python, "-c", VERSIONS).stdout.split()
    assert (major, minor, others) == ("3", "10", ["None", "None"]) and numpy.startswith("1.26.")
    ready = run(python.with_name("y7"), "doctor", "--ready", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert ready.returncode == 0 and ready.stdout.startswith("ready: onnxruntime opened "), ready.stderr


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
