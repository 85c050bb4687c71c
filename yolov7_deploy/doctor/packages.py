"""Which libraries are installed, without importing them here.

Versions come from the installed distributions. What only an import can tell (does it load at all, which devices does
it know) is asked of a second Python, so that a broken library cannot take this one with it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A library we may use.

    Attributes:
        module: What is imported.
        distributions: What pip may have installed it from.
        extra: Extra of this package that installs it; empty for what is always needed or never installed by us.
        probe: Expression whose words tell what it can do, evaluated after an import in a second Python; empty where
            the import is slow and not needed.
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

ROWS = (
    Row(module="numpy", distributions=("numpy",)),
    Row(module="cv2", distributions=OPENCV, probe="''"),
    Row(module="torch", distributions=("torch",), extra="export"),
    Row(module="safetensors", distributions=("safetensors",), extra="export"),
    Row(module="onnx", distributions=("onnx",), extra="export"),
    Row(module="onnxsim", distributions=("onnxsim",), extra="export"),
    Row(module="onnxruntime", distributions=ONNXRUNTIME, extra="cpu", probe="' '.join(m.get_available_providers())"),
    Row(module="faster_coco_eval", distributions=("faster-coco-eval",), extra="val"),
    Row(module="yaml", distributions=("pyyaml",), extra="val"),
    Row(module="matplotlib", distributions=("matplotlib",), extra="bench"),
    Row(module="tensorboard", distributions=("tensorboard",), extra="train"),
    Row(
        module="tensorrt",
        distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11"),
        extra="tensorrt",
        probe="''",
    ),
    Row(
        module="tensorrt_rtx",
        distributions=("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
        extra="tensorrt-rtx",
        probe="''",
    ),
    Row(module="cuda", distributions=("cuda-python", "cuda-bindings"), extra="tensorrt"),
    Row(module="pycuda", distributions=("pycuda",), extra="pycuda"),
    Row(module="supervision", distributions=("supervision",)),
    Row(module="pandas", distributions=("pandas",)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """One library as it is found.

    Attributes:
        name: What is imported.
        version: Empty if absent, or if no distribution says it.
        distributions: What is installed under this name, with versions; more than one may be a conflict.
        installed: The module is where Python looks for it.
        fault: Why it does not load; empty if it does, or was not tried.
        details: What it says it can do: the providers of onnxruntime, the CUDA version of torch or `cpu`.
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
        """Installed, and as far as it was tried it loads."""
        return self.installed and not self.fault


def read_libraries() -> dict[str, Library]:
    """Every library of `ROWS` by its module name, in that order. Takes as long as the slowest import that is tried."""
    with ThreadPoolExecutor(max_workers=len(ROWS)) as pool:
        return {library.name: library for library in pool.map(_library, ROWS)}


def find_module(name: str) -> ModuleSpec | None:
    """Where Python would import it from; `None` if it is absent or its absence is enforced."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # a blocked, half-loaded or broken module
        return None


def _library(row: Row) -> Library:
    versions = {name: version for name in row.distributions if (version := _version(name))}
    spec = find_module(row.module)
    if spec is not None and spec.origin is None and not versions:
        spec = None  # no library, but a folder of this name where Python was started
    fault = ""
    details: tuple[str, ...] = ()
    if spec is None and versions:
        fault = f"{', '.join(versions)} is installed, but there is no module {row.module}"
    elif spec is not None and row.probe:
        fault, details = _probe(row)
    elif spec is not None and row.module == "torch":
        details = _torch_cuda(spec)
    return Library(
        name=row.module,
        version=next(iter(versions.values()), ""),
        distributions=tuple(f"{name} {version}" for name, version in versions.items()),
        installed=spec is not None,
        fault=fault,
        details=details,
        extra=row.extra,
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def _probe(row: Row) -> tuple[str, tuple[str, ...]]:
    """Why the library does not load, and what it says it can do."""
    code = f"import {row.module} as m; print({row.probe})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"it could not be tried ({error})", ()
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"its import ended Python with {done.returncode}", ()
    words = done.stdout.split()
    return "", tuple(words)


def _torch_cuda(spec: ModuleSpec) -> tuple[str, ...]:
    """CUDA version of this torch, or `cpu`, as its version.py says; importing torch would take seconds."""
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
