"""The scripts of examples/: how they are loaded, installed by their own pip line, and run in a fresh environment."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
TIMEOUT_S = 300
SHAPES_SIZE = 320


def load_example(name: str) -> ModuleType:
    """Return a script as a module, without running its `main`."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def head_comment(name: str) -> str:
    """Return the comment at the top of a script of Python, or of a source file of C++."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    pattern = r'\A"""(.*?)"""' if name.endswith(".py") else r"\A((?://.*\n)+)"
    found = re.match(pattern, text, flags=re.DOTALL if name.endswith(".py") else 0)
    assert found, f"{name} does not begin with a comment"
    return found[1]


def pip_requirements(name: str) -> list[str]:
    """Return the arguments of the line `pip install ...` in the head comment of a script."""
    lines = re.findall(r"^\s+pip install (.*)$", head_comment(name), flags=re.MULTILINE)
    assert len(lines) == 1, f"{name} has {len(lines)} lines of pip install"
    return shlex.split(lines[0])


def python_options(name: str) -> set[str]:
    """Return the options in the line `python SCRIPT ...` of the head comment of a script."""
    (line,) = re.findall(rf"^\s+python {re.escape(name)}(.*)$", head_comment(name), flags=re.MULTILINE)
    return set(re.findall(r"--[a-z-]+", line))


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleEnvironment:
    """A virtual environment with what a script names, and this project from its wheel."""

    python: Path

    def start(self, name: str, *arguments: object, cwd: Path, **options: object) -> subprocess.Popen[str]:
        """Start a script in a folder without the repository on its path; both outputs are pipes."""
        command = [str(self.python), str(EXAMPLES / name), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=cwd, env=own_environment(), **{**pipes, **options})

    def run(self, name: str, *arguments: object, cwd: Path) -> str:
        """Run a script, and return what it printed; fail with its output if its exit code is not 0."""
        code, printed, errors = self.finish(name, *arguments, cwd=cwd)
        assert code == 0, f"{name}: exit code {code}\n{printed}\n{errors}"
        return printed

    def finish(self, name: str, *arguments: object, cwd: Path) -> tuple[int, str, str]:
        """Run a script, and return its exit code and both outputs."""
        process = self.start(name, *arguments, cwd=cwd)
        try:
            printed, errors = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
        return process.returncode, printed, errors


def own_environment() -> dict[str, str]:
    """Return the environment variables without the path of the repository."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def build_wheel(folder: Path) -> Path:
    """Return the wheel of this project, built into a folder."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, cwd=folder, env=own_environment(), check=True)
    (path,) = folder.glob("*.whl")
    return path


def install_example(name: str, *, wheel: Path, folder: Path, more: tuple[str, ...] = ()) -> ExampleEnvironment:
    """Return a new environment with the packages of a script's pip line; skip the test if pip cannot install them."""
    requirements = [
        text.replace("yolov7-deploy", str(wheel)) if text.startswith("yolov7-deploy") else text
        for text in pip_requirements(name)
    ]
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements, *more]
    done = subprocess.run(command, cwd=folder, env=own_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        pytest.skip(f"pip cannot install {' '.join(requirements)}: {reasons[-1]}")
    return ExampleEnvironment(python=python)
