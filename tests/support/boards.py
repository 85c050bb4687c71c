"""Jetson boards as trees of files, and what a build finds there.

Release lines, model names, power modes and answers of `nvpmodel -q` are those that owners of such boards show; the
parameters of the modes are shortened and the memory figures chosen. Paths and rail names of sensors are those that
owners and device trees show, and some of their numbers; the others are chosen.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from yolov7_deploy.hardware.jetson import read_board
from yolov7_deploy.tensorrt.preflight import Finding, preflight

BOARDS = Path(__file__).parents[1] / "fixtures" / "jetson"


def recorded(name):
    """`nvpmodel -q` as recorded with the board; no other command is there."""
    answer = BOARDS / name / "nvpmodel-q.txt"
    return lambda command: answer.read_text() if command[0] == "nvpmodel" and answer.exists() else None


def silent(_command):
    return None


def board(name):
    return read_board(root=BOARDS / name, run=recorded(name))


def findings(name, build, **surroundings) -> list[Finding]:
    around = {"root": BOARDS / name, "run": recorded(name), "wheels": (), **surroundings}
    return preflight(build, **around)


def about(field: str, found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.field == field]


def laid_out(name: str, root: Path) -> Path:
    """A copy of a board's tree in which its sensors stand as sysfs has them."""
    shutil.copytree(BOARDS / name, root, dirs_exist_ok=True)
    for line in (BOARDS / name / "sensors.txt").read_text().splitlines():
        path, _, content = line.partition(" ")
        if path != "#":
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(f"{content}\n")
    return root


def wait_until(seen, timeout_s: float = 20.0) -> None:
    """Returns when something is seen; what threads do on a busy machine has no other clock."""
    last = time.monotonic() + timeout_s
    while not seen():
        assert time.monotonic() < last, "nothing was seen in time"
        time.sleep(0.01)


def write(root: Path, **files: str) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root
