"""The release: the changelog, and a wheel and a source distribution with the package and nothing else."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from yolov7_deploy import __version__
from yolov7_deploy.datasets.synthetic import write_shapes

ROOT = Path(__file__).parent.parent
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}  # of keepachangelog.com 1.1.0
MAX_WHEEL_BYTES = 40e6
SOURCES = {"yolov7_deploy", "plugins"}  # folders of the source distribution
TEXTS = {
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "pyproject.toml",
    "PKG-INFO",
    ".gitignore",
}


# --- changelog --------------------------------------------------------------------------------------------------------


def test_the_newest_release_of_the_changelog_is_this_version():
    headings = re.findall(r"^## (.+)$", CHANGELOG, flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    newest = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})", headings[1])
    assert newest and newest[1] == __version__
    assert datetime.date.fromisoformat(newest[2])


def test_the_changelog_has_the_sections_of_keep_a_changelog_and_a_link_for_each_release():
    assert set(re.findall(r"^### (.+)$", CHANGELOG, flags=re.MULTILINE)) <= SECTIONS
    for name in re.findall(r"^## \[(.+?)\]", CHANGELOG, flags=re.MULTILINE):
        assert re.search(rf"^\[{re.escape(name)}\]: https://\S+$", CHANGELOG, flags=re.MULTILINE)


# --- distributions ----------------------------------------------------------------------------------------------------


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def new_environment(folder: Path, *requirements: object) -> Path:
    """Return the Python of a new virtual environment with these packages."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements, cwd=folder)
    return python


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of the source distribution, and of the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("built")
    python = new_environment(folder / "environment", "build")
    run(python, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.slow
def test_names_have_the_version(built, wheel):
    assert wheel.name == f"yolov7_deploy-{__version__}-py3-none-any.whl"
    assert (built / f"yolov7_deploy-{__version__}.tar.gz").is_file()
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


@pytest.mark.slow
def test_the_wheel_has_the_package_with_plugin_sources_and_demo_weights_and_nothing_else(wheel_files):
    package = {name for name in wheel_files if name.startswith("yolov7_deploy/")}
    others = {name for name in wheel_files - package if not name.startswith(f"yolov7_deploy-{__version__}.dist-info/")}
    assert others == set()
    sources = {f"yolov7_deploy/tensorrt/plugin_sources/{path}" for path in tracked("plugins")}
    modules = {f"yolov7_deploy/{path}" for path in tracked("yolov7_deploy")}
    assert package == sources | modules
    assert {f"yolov7_deploy/assets/yolov7-tiny-shapes{suffix}" for suffix in (".safetensors", ".onnx")} <= package


def tracked(folder: str) -> list[str]:
    """Return the tracked files of a folder of the repository, relative to it."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT / folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout, so the tracked files are unknown")
    return [name for name in done.stdout.splitlines() if Path(name).name != ".gitignore"]


@pytest.mark.slow
def test_the_source_distribution_has_what_the_wheel_is_built_from(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if "/" in name}
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == SOURCES
    assert {name for name in names if "/" not in name} - SOURCES <= TEXTS
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


@pytest.mark.slow
def test_the_wheel_runs_in_a_fresh_environment_with_the_weights_inside(wheel, tmp_path):
    python = new_environment(tmp_path / "environment", f"{wheel}[cpu]")
    y7 = python.with_name("y7")
    assert run(y7, "--version", cwd=tmp_path).strip() == f"yolov7-deploy {__version__}"
    write_shapes(tmp_path / "shapes", train=2, val=2, size=320, seed=0)
    weights = "yolov7-tiny-shapes.onnx"
    shown = run(y7, "detect", "--weights", weights, "--source", "shapes/images/val", "--save-dir", "out", cwd=tmp_path)
    assert "Results saved to out" in shown
    report = run(y7, "doctor", "--report", cwd=tmp_path)
    assert f"| yolov7-deploy | {__version__} |" in report and str(tmp_path) not in report
    found = run(python, "-c", "import yolov7_deploy.tensorrt as t; print(t.__path__[0])", cwd=tmp_path).strip()
    assert list((Path(found) / "plugin_sources" / "kernels").glob("*.cu"))
