"""Engines as users build them: by `y7 build`, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from gpu_parts.setting import Setting
from gpu_parts.weights import filled

BUILD_S = 300.0


def build(setting: Setting, onnx: Path, plugin: Path | None, *, level: str, into: Path) -> Path:
    """The engine of a file of `prepare`, through the command that users type."""
    whole = into / onnx.name
    whole.write_bytes(filled(onnx.read_bytes()))
    engine = whole.with_suffix(".engine")
    command = [sys.executable, "-m", "yolov7_deploy", "build", "--weights", str(whole), "--output", str(engine)]
    command += ["--opt-level", level]
    environment = {**os.environ, **({"Y7_PLUGIN": str(plugin)} if plugin else {})}
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=BUILD_S, check=False)
    said = (done.stdout + done.stderr)[-2500:]
    seconds = round(time.monotonic() - started, 1)
    setting.record(f"{onnx.stem} build", {"exit": done.returncode, "seconds": seconds, "said": said})
    assert done.returncode == 0, said
    return engine
