"""No file can make a loader do anything but load it or refuse it with one of our errors.

Every loader gets random bytes and damaged files in a process of its own, with limited memory and time, because native
code (protobuf, ONNX Runtime, OpenCV, FFmpeg) does not raise: it kills. Seeds are case numbers, so a failure is
repeated by the command that its message ends with. `Y7_FUZZ_CASES=20000` makes a campaign of it.
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

SCRIPT = Path(__file__).with_name("fuzz_targets.py")
CASES = int(os.environ.get("Y7_FUZZ_CASES", "250"))
FIRST = int(os.environ.get("Y7_FUZZ_FIRST", "0"))
MAX_DEATHS = 20  # a loader that keeps dying has shown enough
# One thread and one heap each: address space is what is limited, and other tests want the cores.
QUIET = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENCV_LOG_LEVEL": "OFF", "OPENCV_FFMPEG_LOGLEVEL": "-8"}


def run(name: str, folder: Path, first: int, count: int) -> tuple[int, str, str]:
    """Exit code, the case that was under way (`done` at the end) and the last of standard error."""
    command = [sys.executable, str(SCRIPT), name, f"--first={first}", f"--count={count}", f"--folder={folder}"]
    with (folder / "stderr").open("w+b") as stderr:
        ended = subprocess.run(
            command, env={**os.environ, **QUIET}, stdout=subprocess.DEVNULL, stderr=stderr, check=False
        )
        stderr.seek(max(0, stderr.tell() - 3000))
        last = stderr.read().decode("utf-8", "replace")
    current = folder / "current"
    return ended.returncode, current.read_text().strip() if current.exists() else "", last


def findings(name: str, folder: Path, cases: int) -> dict[int, str]:
    """What went wrong, by case; a campaign goes on behind a case that killed it."""
    wrong: dict[int, str] = {}
    first, end = FIRST, FIRST + cases
    for attempt in range(MAX_DEATHS):
        home = folder / str(attempt)
        home.mkdir()
        code, current, last = run(name, home, first, end - first)
        if (home / "findings").exists():
            wrong |= dict(map(json.loads, (home / "findings").read_text().splitlines()))
        if code == 0 and current == "done":
            break
        assert current.isdigit(), f"the campaign did not begin: {last}"
        died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        wrong[int(current)] = f"the process died ({died}):\n{last}"
        first = int(current) + 1
        if first >= end:
            break
    return wrong


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_loaded_or_refused_with_our_error(name, tmp_path):
    wrong = findings(name, tmp_path, max(1, CASES * TARGETS[name].weight // 100))
    report = "\n\n".join(
        f"{text}\nagain: python tests/fuzz/fuzz_targets.py {name} --first {case} --count 1 --keep damaged"
        for case, text in sorted(wrong.items())[:5]
    )
    assert not wrong, f"{len(wrong)} cases ({', '.join(map(str, sorted(wrong)[:50]))}):\n{report}"
