"""What the recipes share: the machine they ran on, and one JSON document a result."""

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
    """Command line of a recipe; `--machine` names the folder of its result."""
    made = argparse.ArgumentParser(description=text)
    made.add_argument("--machine", default="cpu", help="folder under benchmarks/results")
    return made


def record(name: str, machine: str, result: dict[str, object]) -> None:
    """Prints the result and writes results/MACHINE/NAME.json."""
    versions = {library: version(library) for library in LIBRARIES}
    document = {
        "benchmark": name,
        "machine": asdict(read_machine()),
        "python": platform.python_version(),
        "versions": versions,
        "result": result,
    }
    path = RESULTS / machine / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(document, path)
    for key, value in result.items():
        print(f"{key:34} {value}")
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
