"""The fake CUDA runtime of tests/fake_cudart, compiled once per content."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "fake_cudart" / "cudart.c"
COMMAND = ("-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror")


def fake_cudart():
    """Path of the library; a skip where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler: the fake CUDA runtime cannot be built")
    content = hashlib.sha256(SOURCE.read_bytes() + " ".join(COMMAND).encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"y7-fake-cudart-{os.getuid()}"
    library = folder / f"{content[:24]}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        unfinished = folder / f"{library.name}.{os.getpid()}"
        subprocess.run([compiler, *COMMAND, "-o", str(unfinished), str(SOURCE)], check=True)
        unfinished.replace(library)
    return library
