"""Jetson boards as trees of files, and what a build finds there.

Release lines, model names, power modes and answers of `nvpmodel -q` are those that owners of such boards show; the
parameters of the modes are shortened and the memory figures chosen.
"""

from __future__ import annotations

from pathlib import Path

from yolov7_deploy.engine.preflight import Finding, preflight
from yolov7_deploy.machine.jetson import read_board

BOARDS = Path(__file__).parent / "fixtures" / "jetson"


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


def write(root: Path, **files: str) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root
