"""compute-sanitizer on both kernels: memory errors, races, uninitialized reads, barriers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from typing import Any

import numpy as np

from tests.fakes.emulated_kernels import FLOAT16, FLOAT32
from tests.gpu.environment import CudaMemory, Environment, Stream
from tests.gpu.letterbox import LetterboxCall
from tests.gpu.nms import yolov7_heads
from tests.support.nms_cases import assert_equals_the_reference

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TOOL_S = 55.0


def check(env: Environment) -> None:
    """Run `work` under each tool, or once without a tool if compute-sanitizer is not installed."""
    program = shutil.which("compute-sanitizer")
    if program is None or env.emulated:
        work(env)
        env.record("tools", "compute-sanitizer is not installed: run without it")
        return
    started = time.monotonic()
    for tool in TOOLS:
        left = TOOL_S - (time.monotonic() - started)
        if left < 5:
            env.record(tool, "no time left")
            continue
        command = [program, "--tool", tool, "--error-exitcode", "86", "--print-limit", "5", sys.executable, "-m"]
        command += [
            "tests.gpu",
            "part",
            "sanitized",
            "--folder",
            str(env.folder),
            "--result",
            f"{env.result}.{tool}",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            env.record(tool, f"not finished after {left:.0f} s")
            continue
        text = done.stdout + done.stderr
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY:.*", text)
        env.record(tool, {"exit": done.returncode, "summary": summary, "end": text[-1500:] if done.returncode else ""})
        assert done.returncode == 0, f"{tool}: exit {done.returncode}, {summary}"


def work(env: Environment) -> None:
    """Run a small image in each mode and one frame in each type, on buffers of exactly the right size."""
    cuda, kernels = env.open_cuda(), env.open_kernels()
    with Stream(cuda) as stream:
        memory: Any = CudaMemory(cuda, stream, guard=0)
        for number, kind in enumerate((np.float16, np.float32)):
            heads = yolov7_heads(np.random.default_rng(number), 2, 150, kind, None, scale=8)
            options: dict[str, Any] = {"conf": 0.25, "iou": 0.45, "max_det": 50, "max_candidates": 100}
            options |= {"multi_label": bool(number), "class_agnostic": not number}
            assert_equals_the_reference(kernels, heads, memory=memory, **options)
        frame = np.random.default_rng(0).integers(0, 256, (61, 47, 3), dtype=np.uint8)
        for kind in (FLOAT32, FLOAT16):
            LetterboxCall(kernels, memory, [frame], (64, 96), kind, row_padding=1)()
        stream.synchronize()
    env.record("worked", True)
