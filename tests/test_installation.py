"""Each extra, installed alone into a fresh environment, runs the commands that it promises; so do the lowest versions.

Every test creates a virtual environment and installs the project's wheel with pip, so it needs a package index and
takes minutes.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.small_models import fused_tiny, metadata_of
from yolov7_deploy.datasets.synthetic import CLASS_NAMES, write_shapes
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.options import ExportOptions

ROOT = Path(__file__).parent.parent
SIZE = 64
# The lowest torch (2.4) is not tried: for Linux, PyPI has it with CUDA only, which is a download of 3 GB.
TORCH = "torch==2.13.0"
# Extras that run on a machine without a GPU; the lowest versions of the others cannot be tried there.
LOWEST_EXTRAS = ("cpu", "export", "val", "bench", "report", "train")

pytestmark = pytest.mark.slow


@dataclass(frozen=True, kw_only=True, slots=True)
class Installation:
    """A virtual environment with the project, and a working folder without the repository on its path."""

    python: Path
    folder: Path

    def y7(self, arguments: str) -> str:
        """Run a command and return what it printed; fail with its output if its exit code is not 0."""
        return run(self.python.with_name("y7"), *arguments.split(), cwd=self.folder)


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a dataset of 16 small images, and an ONNX file with its classes."""
    folder = tmp_path_factory.mktemp("data")
    write_shapes(folder / "shapes", train=8, val=8, size=SIZE, seed=0)
    model = fused_tiny(len(CLASS_NAMES))
    metadata = replace(metadata_of(model), class_names=CLASS_NAMES)
    export_onnx(model, metadata, ExportOptions(input_hw=(SIZE, SIZE), max_det=100)).save(folder / "tiny.onnx")
    return folder


@pytest.fixture
def install(wheel, data, tmp_path):
    """Return a function that installs the project with extras, and optionally constraints on versions."""

    def create(*extras: str, constraints: tuple[str, ...] = ()) -> Installation:
        python = tmp_path / "venv" / "bin" / "python"
        run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
        limits = tmp_path / "constraints.txt"
        limits.write_text("\n".join((TORCH, *constraints)) + "\n", encoding="utf-8")
        requirement = f"{wheel}[{','.join(extras)}]" if extras else str(wheel)
        run(python, "-m", "pip", "install", "--quiet", "--constraint", limits, requirement, cwd=tmp_path)
        shutil.copytree(data, tmp_path / "work")
        return Installation(python=python, folder=tmp_path / "work")

    return create


DETECT = "detect --weights tiny.onnx --source shapes/images/val --save-dir detected"


def test_no_extra_is_needed_for_help_doctor_and_generated_data(install):
    installation = install()
    assert "export" in installation.y7("--help")
    assert "onnxruntime" in installation.y7("doctor")
    assert "tiny.onnx: yolov7-tiny" in installation.y7("info tiny.onnx")
    installation.y7("shapes --output generated --train 4 --val 4 --img 64")


def test_cpu_detects_with_an_exported_file(install):
    installation = install("cpu")
    assert "Results saved to detected" in installation.y7(DETECT)
    assert len(list((installation.folder / "detected").iterdir())) == 8


def test_metrics_and_cpu_serve_metrics(install):
    printed = install("metrics", "cpu").y7(f"{DETECT} --metrics-port 0")
    assert "Metrics: http://127.0.0.1:" in printed


def test_export_and_cpu_export_quantize_verify_and_estimate(install):
    installation = install("export", "cpu")
    assert "estimate" in installation.y7("bench --weights yolov7 --estimate v100")
    installation.y7(f"export --weights yolov7-tiny-shapes --img {SIZE} --output exported.onnx")
    installation.y7("quantize --weights exported.onnx --calib shapes/images/train --output int8.onnx")
    assert "Conv" in installation.y7("info int8.onnx")
    installation.y7("verify --weights yolov7-tiny-shapes --against exported.onnx")


def test_val_and_cpu_measure_average_precision(install):
    printed = install("val", "cpu").y7("val --weights tiny.onnx --data shapes/shapes.yaml")
    assert "AP  IoU 0.50:0.95" in printed


def test_report_export_and_cpu_write_a_report(install):
    installation = install("report", "export", "cpu")
    files = "--weights tiny.onnx --against tiny.onnx --data shapes/shapes.yaml"
    arguments = f"report {files} --duration 0 --limit 4 --stage-limit 1"
    done = subprocess.run(
        [installation.python.with_name("y7"), *arguments.split()],
        cwd=installation.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    # Random weights have AP 0, so there is nothing to lose: not verified, and the page says so.
    assert done.returncode == 1 and "NOT VERIFIED" in done.stderr
    assert "NOT VERIFIED" in (installation.folder / "report.html").read_text(encoding="utf-8")


def test_bench_and_cpu_measure_and_draw(install):
    installation = install("bench", "cpu")
    installation.y7("bench --weights tiny.onnx --duration 0.5 --warmup 0.2 --chart speed.png")
    assert (installation.folder / "speed.png").stat().st_size > 10_000


def test_train_trains_and_validates(install):
    installation = install("train")
    options = f"--epochs 1 --batch 8 --img {SIZE} --workers 0 --device cpu --variant yolov7-tiny --save-dir run"
    installation.y7(f"train --data shapes/shapes.yaml {options}")
    installation.y7(f"val --weights run/last.safetensors --data shapes/shapes.yaml --img {SIZE}")


@pytest.mark.skipif(sys.platform != "linux", reason="pip has a CUDA compiler for Linux only")
def test_plugin_compiles_the_kernels(install):
    installation = install("plugin")
    installation.y7("plugin --kernels-only --arch 86 --output built --jobs 1")
    assert list((installation.folder / "built").rglob("*.so"))


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="TensorRT-RTX exists for Linux on x86_64 only"
)
def test_tensorrt_rtx_builds_an_engine_without_a_gpu(install):
    installation = install("tensorrt-rtx")
    installation.y7("build --weights tiny.onnx --target sm86")
    assert "TensorRT-RTX" in installation.y7("info tiny.engine")


def test_the_lowest_versions_of_pyproject_run_help_info_and_detect(install):
    constraints = lowest_versions()
    installation = install(*LOWEST_EXTRAS, constraints=constraints)
    frozen = run(installation.python, "-m", "pip", "freeze", cwd=installation.folder).splitlines()
    versions = {
        canonicalize_name(name): Version(text) for name, _, text in (line.partition("==") for line in frozen) if text
    }
    for name, _, text in (constraint.partition("==") for constraint in constraints):
        assert versions[canonicalize_name(name)] == Version(text)
    assert "export" in installation.y7("--help")
    assert "yolov7-tiny" in installation.y7("info yolov7-tiny")
    assert "Results saved to detected" in installation.y7(DETECT)


def lowest_versions() -> tuple[str, ...]:
    """Return a constraint `NAME==X` for each requirement `NAME>=X` of the project and of `LOWEST_EXTRAS`."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    requirements = pytest.importorskip("packaging.requirements")
    project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *(text for extra in LOWEST_EXTRAS for text in extras[extra])]
    parsed = [requirements.Requirement(text) for text in texts]
    return tuple(
        f"{requirement.name}=={bound.version}"
        for requirement in parsed
        for bound in requirement.specifier
        if bound.operator == ">=" and requirement.name != "torch"
    )
