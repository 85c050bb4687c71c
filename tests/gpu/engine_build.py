"""Builds engines as users do: with `y7 build`, in a separate process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.environment import Environment
from tests.gpu.weights import with_weights

BUILD_S = 300.0


def build(
    env: Environment, onnx: Path, plugin: Path | None, *, level: str, into: Path, more: Sequence[str] = ()
) -> Path:
    """Build the engine of a file of `prepare` with `y7 build` and the additional options `more`; return its path."""
    complete = into / onnx.name
    complete.write_bytes(with_weights(onnx.read_bytes(), onnx.parent))
    engine = complete.with_suffix(".engine")
    command = [sys.executable, "-m", "yolov7_deploy", "build", "--weights", str(complete), "--output", str(engine)]
    command += ["--opt-level", level, *more]
    environment = dict(os.environ)
    if plugin:
        environment["Y7_PLUGIN"] = str(plugin)
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=BUILD_S, check=False)
    output = (done.stdout + done.stderr)[-2500:]
    seconds = round(time.monotonic() - started, 1)
    env.record(f"{onnx.stem} build", {"exit": done.returncode, "seconds": seconds, "output": output})
    assert done.returncode == 0, output
    return engine


def cached_engine(env: Environment, name: str, plugin: Path | None, *, level: str, more: Sequence[str] = ()) -> Path:
    """Return the engine of a file, built once and kept for the next parts and runs."""
    folder = env.folder / "engines"
    folder.mkdir(exist_ok=True)
    engine = folder / Path(name).with_suffix(".engine")
    if engine.exists():
        return engine
    return build(env, env.folder / name, plugin, level=level, into=folder, more=more)
