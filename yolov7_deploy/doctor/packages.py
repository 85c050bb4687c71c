"""Installed libraries, found without importing them in this process.

Versions come from the metadata of the installed distributions. What needs an import (does the library load, which
devices does it support) is checked in a second Python process, so that a broken library cannot crash this one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

from yolov7_deploy._process import python_command

PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownPackage:
    """A library that this package can use.

    Attributes:
        module: Name of the module.
        distributions: Names of the distributions on PyPI that contain it.
        extra: Extra of this package that installs it; empty for libraries of no extra.
        probe: Expression of the imported module `m`, evaluated in a second Python process; it returns the capabilities
            as a string separated by spaces. Empty if the import is slow and not needed.
    """

    module: str
    distributions: tuple[str, ...]
    extra: str = ""
    probe: str = ""


OPENCV = (
    "opencv-python-headless",
    "opencv-python",
    "opencv-contrib-python-headless",
    "opencv-contrib-python",
)
ONNXRUNTIME = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")

KNOWN_PACKAGES = (
    KnownPackage(module="numpy", distributions=("numpy",)),
    KnownPackage(module="cv2", distributions=OPENCV, probe="''"),
    KnownPackage(module="torch", distributions=("torch",), extra="export"),
    KnownPackage(module="safetensors", distributions=("safetensors",), extra="export"),
    KnownPackage(module="onnx", distributions=("onnx",), extra="export"),
    KnownPackage(module="onnxsim", distributions=("onnxsim",), extra="export"),
    KnownPackage(
        module="onnxruntime", distributions=ONNXRUNTIME, extra="cpu", probe="' '.join(m.get_available_providers())"
    ),
    KnownPackage(module="openvino", distributions=("openvino",), extra="openvino", probe="''"),
    KnownPackage(module="faster_coco_eval", distributions=("faster-coco-eval",), extra="val"),
    KnownPackage(module="yaml", distributions=("pyyaml",), extra="val"),
    KnownPackage(module="matplotlib", distributions=("matplotlib",), extra="bench"),
    KnownPackage(module="prometheus_client", distributions=("prometheus-client",), extra="metrics"),
    KnownPackage(module="tensorboard", distributions=("tensorboard",), extra="train"),
    KnownPackage(
        module="tensorrt",
        distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11"),
        extra="tensorrt",
        probe="''",
    ),
    KnownPackage(
        module="tensorrt_rtx",
        distributions=("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
        extra="tensorrt-rtx",
        probe="''",
    ),
    KnownPackage(module="cuda", distributions=("cuda-python", "cuda-bindings"), extra="tensorrt"),
    KnownPackage(module="pycuda", distributions=("pycuda",), extra="pycuda"),
    KnownPackage(module="supervision", distributions=("supervision",)),
    KnownPackage(module="pandas", distributions=("pandas",)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """The state of one library.

    Attributes:
        name: Name of the module.
        version: Installed version; empty if missing or unknown.
        distributions: Installed distributions with versions; more than one may be a conflict.
        installed: True if Python finds the module.
        fault: The reason why it does not load; empty if it does or was not tried.
        details: The providers of onnxruntime, or the CUDA version of torch or `cpu`.
        extra: Extra of this package that installs it.
    """

    name: str
    version: str
    distributions: tuple[str, ...]
    installed: bool
    fault: str
    details: tuple[str, ...]
    extra: str

    @property
    def works(self) -> bool:
        """True if it is installed, and loads if that was tried."""
        return self.installed and not self.fault


def read_libraries() -> dict[str, Library]:
    """Return the state of every known package by module name. It takes as long as the slowest probed import."""
    with ThreadPoolExecutor(max_workers=len(KNOWN_PACKAGES)) as pool:
        return {library.name: library for library in pool.map(_library, KNOWN_PACKAGES)}


def find_module(name: str) -> ModuleSpec | None:
    """Return the import spec of a module; `None` if it is missing or blocked."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # a blocked, partially loaded or broken module
        return None


def _library(package: KnownPackage) -> Library:
    versions = {name: version for name in package.distributions if (version := _version(name))}
    spec = find_module(package.module)
    if spec is not None and spec.origin is None and not versions:
        spec = None  # a folder of this name in the working directory, not a library
    fault = ""
    details: tuple[str, ...] = ()
    if spec is None and versions:
        fault = f"{', '.join(versions)} is installed, but there is no module {package.module}"
    elif spec is not None and package.probe:
        fault, details = _probe(package)
    elif spec is not None and package.module == "torch":
        details = _torch_cuda(spec)
    return Library(
        name=package.module,
        version=next(iter(versions.values()), ""),
        distributions=tuple(f"{name} {version}" for name, version in versions.items()),
        installed=spec is not None,
        fault=fault,
        details=details,
        extra=package.extra,
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def _probe(package: KnownPackage) -> tuple[str, tuple[str, ...]]:
    """Return why the library does not load (empty if it does), and its details."""
    code = f"import {package.module} as m; print({package.probe})"
    try:
        done = subprocess.run(
            python_command(code),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return "", (f"not tested: {error}",)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"importing it ended Python with exit code {done.returncode}", ()
    return "", tuple(done.stdout.split())


def _torch_cuda(spec: ModuleSpec) -> tuple[str, ...]:
    """Return the CUDA version of torch, or `cpu`, from its version.py; importing torch would take seconds."""
    if not spec.origin:
        return ()
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ()
    found = re.search(r"^cuda\b[^=\n]*=\s*(?:'([\d.]+)'|None)", text, re.MULTILINE)
    if found is None:
        return ()
    return (f"CUDA {found[1]}",) if found[1] else ("cpu",)
