"""Every loader either loads a file or refuses it with an error of this package.

Every loader gets random bytes and damaged files in its own process with limited memory and time, because native code
(protobuf, ONNX Runtime, OpenCV, FFmpeg) may crash instead of raising. Seeds are case numbers, so the command at the end
of a failure message reproduces it. `Y7_FUZZ_CASES=20000` runs a longer campaign.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.fuzz_targets import TARGETS

ROOT = Path(__file__).parents[2]
CASES = int(os.environ.get("Y7_FUZZ_CASES", "250"))
FIRST = int(os.environ.get("Y7_FUZZ_FIRST", "0"))
MAX_CRASHES = 20  # after which a campaign stops
# One thread and one heap each, because address space is limited and other tests use the cores.
QUIET = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENCV_LOG_LEVEL": "OFF", "OPENCV_FFMPEG_LOGLEVEL": "-8"}


def run(name: str, folder: Path, first: int, count: int) -> tuple[int, str, str]:
    """Return exit code, the current case (`done` at the end) and the end of standard error."""
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.fuzz_targets",
        name,
        f"--first={first}",
        f"--count={count}",
        f"--folder={folder}",
    ]
    with (folder / "stderr").open("w+b") as stderr:
        ended = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **QUIET}, stdout=subprocess.DEVNULL, stderr=stderr, check=False
        )
        stderr.seek(max(0, stderr.tell() - 3000))
        last = stderr.read().decode("utf-8", "replace")
    current = folder / "current"
    return ended.returncode, current.read_text().strip() if current.exists() else "", last


def findings(name: str, folder: Path, cases: int) -> dict[int, str]:
    """Return the faults by case; after a case that crashed the process, the campaign continues with the next one."""
    faults: dict[int, str] = {}
    first, end = FIRST, FIRST + cases
    for attempt in range(MAX_CRASHES):
        attempt_folder = folder / str(attempt)
        attempt_folder.mkdir()
        code, current, last = run(name, attempt_folder, first, end - first)
        if (attempt_folder / "findings").exists():
            faults |= dict(map(json.loads, (attempt_folder / "findings").read_text().splitlines()))
        if code == 0 and current == "done":
            break
        assert current.isdigit(), f"the campaign did not start: {last}"
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        faults[int(current)] = f"the process crashed ({cause}):\n{last}"
        first = int(current) + 1
        if first >= end:
            break
    return faults


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_loaded_or_refused_with_an_error_of_this_package(name, tmp_path):
    faults = findings(name, tmp_path, max(1, CASES * TARGETS[name].weight // 100))
    report = "\n\n".join(
        f"{text}\nreproduce: python -m tests.fuzz.fuzz_targets {name} --first {case} --count 1 --keep damaged"
        for case, text in sorted(faults.items())[:5]
    )
    assert not faults, f"{len(faults)} cases ({', '.join(map(str, sorted(faults)[:50]))}):\n{report}"
