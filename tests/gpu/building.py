"""Engines as users build them: by `y7 build`, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.environment import Setting
from tests.gpu.weights import filled

BUILD_S = 300.0


def build(
    setting: Setting, onnx: Path, plugin: Path | None, *, level: str, into: Path, more: Sequence[str] = ()
) -> Path:
    """The engine of a file of `prepare`, through the command that users type, with `more` options."""
    whole = into / onnx.name
    whole.write_bytes(filled(onnx.read_bytes(), onnx.parent))
    engine = whole.with_suffix(".engine")
    command = [sys.executable, "-m", "yolov7_deploy", "build", "--weights", str(whole), "--output", str(engine)]
    command += ["--opt-level", level, *more]
    environment = {**os.environ, **({"Y7_PLUGIN": str(plugin)} if plugin else {})}
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=BUILD_S, check=False)
    said = (done.stdout + done.stderr)[-2500:]
    seconds = round(time.monotonic() - started, 1)
    setting.record(f"{onnx.stem} build", {"exit": done.returncode, "seconds": seconds, "said": said})
    assert done.returncode == 0, said
    return engine


def kept_engine(setting: Setting, name: str, plugin: Path | None, *, level: str, more: Sequence[str] = ()) -> Path:
    """The engine of a file, kept beside it for the next part, and for the next run."""
    folder = setting.folder / "engines"
    folder.mkdir(exist_ok=True)
    engine = folder / Path(name).with_suffix(".engine")
    if engine.exists():
        return engine
    return build(setting, setting.folder / name, plugin, level=level, into=folder, more=more)
