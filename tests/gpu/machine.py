"""Describes the machine: GPU, driver, compilers, tools, and the libraries of this Python interpreter."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

from tests.gpu.environment import Environment
from yolov7_deploy.hardware.machine import read_machine

LIBRARIES = (
    *("numpy", "torch", "torchvision", "cupy", "cuda", "tensorrt", "tensorrt_rtx"),
    *("onnx", "onnxruntime", "cv2", "typer", "pytest"),
)
PROGRAMS = ("nvidia-smi", "nvcc", "compute-sanitizer", "ncu", "cmake", "g++", "python3.10", "python3.12")
CLOCKS = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,persistence_mode"


def describe(env: Environment) -> None:
    """Record the description; nothing here can fail."""
    env.record("machine", asdict(read_machine()))
    env.record("python", {"version": platform.python_version(), "path": sys.executable})
    env.record("libraries", {name: _version(name) for name in LIBRARIES})
    env.record("programs", {name: shutil.which(name) for name in PROGRAMS})
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        env.record("nvidia-smi", {"query": CLOCKS, "answer": (done.stdout or done.stderr).strip()})


def _version(name: str) -> str | None:
    """Return the version of an installed library without importing it."""
    if importlib.util.find_spec(name) is None:
        return None
    for distribution in (name, f"{name}-python", "opencv-python-headless" if name == "cv2" else f"{name}-cu13"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"
