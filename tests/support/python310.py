"""Python 3.10 for tests: that of JetPack 6, and of the last TensorRT 8.6.0 on PyPI."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def run(*command: object, cwd: Path, timeout_s: float, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command without the Python path of this process."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def create_environment(folder: Path, *, timeout_s: float) -> Path:
    """Return the interpreter of a new environment of Python 3.10 in a folder, or skip the test."""
    for base in _interpreters(folder / "uv", timeout_s):
        if run(base, "-m", "venv", folder / "venv", cwd=folder, timeout_s=timeout_s).returncode == 0:
            return folder / "venv" / "bin" / "python"
    pytest.skip("needs Python 3.10 with venv (uv python install 3.10)")


def _interpreters(folder: Path, timeout_s: float) -> Iterator[Path]:
    """Yield what may be Python 3.10: that of the PATH, of pyenv, and one that uv downloads into the folder."""
    on_path = shutil.which("python3.10")
    if on_path:
        yield Path(on_path)
    yield from Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10")
    uv = shutil.which("uv")
    if uv is None:
        return
    folder.mkdir()
    command = (uv, "python", "install", "3.10")
    if run(*command, cwd=folder, timeout_s=timeout_s, UV_PYTHON_INSTALL_DIR=str(folder)).returncode == 0:
        yield from folder.glob("*/bin/python3.10")
