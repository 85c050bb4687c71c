"""Compiles the fake libraries of tests/fakes/cudart and tests/fakes/nvml, once for each version of their source."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "fakes" / "cudart" / "cudart.c"
NVML_SOURCE = Path(__file__).parents[1] / "fakes" / "nvml" / "nvml.c"
COMMAND = ("-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror")
# A torch for CUDA loads the real runtime for the whole process; the calls within a fake library stay in it.
OWN_SYMBOLS = "-Wl,-Bsymbolic"


def fake_cudart():
    """Return the path of the fake CUDA runtime, or skip the test without a C compiler."""
    return compiled(SOURCE)


def install_fake_nvml(monkeypatch, *options):
    """Make the fake library the NVML and the CUDA driver of this process; `-DOLD_DRIVER` for an old one."""
    path = str(compiled(NVML_SOURCE, *options))
    monkeypatch.setattr("yolov7_deploy.hardware.gpu.CUDA_DRIVER", path)
    monkeypatch.setattr("pynvml.nvmlLib", ctypes.CDLL(path))
    monkeypatch.setattr("pynvml._nvmlGetFunctionPointer_cache", {})


def compiled(source, *options):
    """Compile a C file to a library; return its path."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip(f"there is no C compiler: the fake library of {source.name} cannot be built")
    command = [*COMMAND, OWN_SYMBOLS, *options]
    content = hashlib.sha256(source.read_bytes() + " ".join(command).encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"y7-fake-cudart-{os.getuid()}"
    library = folder / f"{content[:24]}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        unfinished = folder / f"{library.name}.{os.getpid()}"
        subprocess.run([compiler, *command, "-o", str(unfinished), str(source)], check=True)
        unfinished.replace(library)
    return library
