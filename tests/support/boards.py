"""Jetson boards as trees of files, and the findings of the checks before a build on them.

Release lines, model names, power modes and answers of `nvpmodel -q` were published by owners of such boards; the
parameters of the modes are shortened and the memory sizes invented. Paths, rail names and some readings of the sensors
are from owners and device trees; the other readings are invented.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from yolov7_deploy.hardware.jetson import read_board
from yolov7_deploy.tensorrt.preflight import Finding, preflight

BOARDS = Path(__file__).parents[1] / "fixtures" / "jetson"


def recorded(name):
    """Run `nvpmodel -q` as recorded with the board; no other command exists."""
    answer = BOARDS / name / "nvpmodel-q.txt"
    return lambda command: answer.read_text() if command[0] == "nvpmodel" and answer.exists() else None


def silent(_command):
    return None


def board(name):
    return read_board(root=BOARDS / name, run=recorded(name))


def findings(name, build, **options) -> list[Finding]:
    return preflight(build, **{"root": BOARDS / name, "run": recorded(name), "wheels": (), **options})


def about(field: str, found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.field == field]


def laid_out(name: str, root: Path) -> Path:
    """Copy the tree of a board, with its sensors where sysfs has them."""
    shutil.copytree(BOARDS / name, root, dirs_exist_ok=True)
    for line in (BOARDS / name / "sensors.txt").read_text().splitlines():
        path, _, content = line.partition(" ")
        if path != "#":
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(f"{content}\n")
    return root


def wait_until(condition, timeout_s: float = 20.0) -> None:
    """Wait until `condition()` is true: on a busy machine, sleeping for a fixed time does not synchronise threads."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.01)


def write(root: Path, **files: str) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root
