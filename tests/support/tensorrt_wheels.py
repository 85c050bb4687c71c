"""Wheels of TensorRT and CUDA that tests download with pip, into `$Y7_TENSORRT_BINDINGS` or a temporary folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER_VARIABLE = "Y7_TENSORRT_BINDINGS"
TIMEOUT_S = 300


def wheel_folder(tmp_path_factory):
    """Return the folder that the variable names, or a temporary one."""
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given) if given else tmp_path_factory.mktemp("wheels")


def downloaded_wheel(requirement, folder):
    """Return the wheel of a distribution for this Python, downloaded unless it is in the folder; or skip the test."""
    pattern = f"{requirement.replace('==', '-')}-*.whl"
    tags = (f"-cp3{sys.version_info.minor}-", "-py3-")
    found = [path for path in folder.glob(pattern) if any(tag in path.name for tag in tags)]
    if found:
        return found[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode:
        python = ".".join(map(str, sys.version_info[:2]))
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"pip cannot download {requirement} for Python {python} ({reason}); ${FOLDER_VARIABLE} may have it")
    return next(path for path in folder.glob(pattern) if any(tag in path.name for tag in tags))
