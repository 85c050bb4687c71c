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


def downloaded_wheel(requirement, folder, *, minor=sys.version_info.minor):
    """Return the wheel of a distribution for Python 3.`minor`, downloaded unless it is in the folder, or skip."""
    pattern = f"{requirement.replace('==', '-')}-*.whl"
    tags = (f"-cp3{minor}-", "-py3-")
    found = [path for path in folder.glob(pattern) if any(tag in path.name for tag in tags)]
    if found:
        return found[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += [f"--python-version=3.{minor}"]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        what = f"{requirement} for Python 3.{minor}"
        pytest.skip(f"pip cannot download {what} ({reason}); ${FOLDER_VARIABLE} may have it")
    return next(path for path in folder.glob(pattern) if any(tag in path.name for tag in tags))
