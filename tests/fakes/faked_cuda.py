"""The fake libraries of tests/fakes/cudart and tests/fakes/nvml, compiled once per content."""

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


def fake_cudart():
    """Path of the CUDA runtime; a skip where there is no C compiler."""
    return compiled(SOURCE)


def fake_nvml(*options):
    """Path of NVML and of CUDA's driver library, which are one file here; `-DOLD_DRIVER` for one of long ago."""
    return str(compiled(NVML_SOURCE, *options))


def compiled(source, *options):
    """Path of the library that a C file makes."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip(f"there is no C compiler: the fake library of {source.name} cannot be built")
    command = [*COMMAND, *options]
    content = hashlib.sha256(source.read_bytes() + " ".join(command).encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"y7-fake-cudart-{os.getuid()}"
    library = folder / f"{content[:24]}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        unfinished = folder / f"{library.name}.{os.getpid()}"
        subprocess.run([compiler, *command, "-o", str(unfinished), str(source)], check=True)
        unfinished.replace(library)
    return library
