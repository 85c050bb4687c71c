"""Functions that all benchmark scripts share: the command line, and one JSON document per result."""

from __future__ import annotations

import argparse
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from yolov7_deploy._console import write_json
from yolov7_deploy.hardware.machine import read_machine

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("numpy", "onnx", "onnxruntime", "opencv-python-headless", "torch", "yolov7-deploy")


def parser(text: str | None) -> argparse.ArgumentParser:
    """Return the argument parser of a script; `--machine` names the folder of its result."""
    arguments = argparse.ArgumentParser(description=text)
    arguments.add_argument("--machine", default="cpu", help="folder under benchmarks/results")
    return arguments


def result_path(name: str, machine: str) -> Path:
    """Return the file of a result."""
    return RESULTS / machine / f"{name}.json"


def record(name: str, machine: str, result: dict[str, object]) -> None:
    """Print the result and write it to results/MACHINE/NAME.json."""
    versions = {library: version(library) for library in LIBRARIES}
    document = {
        "benchmark": name,
        "machine": asdict(read_machine()),
        "python": platform.python_version(),
        "versions": versions,
        "result": result,
    }
    path = result_path(name, machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(document, path)
    for key, value in result.items():
        print(f"{key:34} {value}")
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
