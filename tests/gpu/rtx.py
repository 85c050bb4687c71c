"""TensorRT-RTX on this GPU; its messages are recorded verbatim, because it may not support the GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.gpu.environment import Environment
from tests.gpu.nms import END_FILE

TIMEOUT_S = 50.0
ONNX = END_FILE.format(kind="none", type="float32", batch=1)  # decoding alone, in standard operators

# Builds for each compute capability given, then for the GPU of this machine.
PROGRAM = """
import json, sys
import tensorrt_rtx as trt

logger = trt.Logger(trt.Logger.VERBOSE)
known = sorted(name for name in dir(trt.ComputeCapability) if name.startswith("SM"))
print("RESULT", json.dumps({"version": trt.__version__, "known": known}), flush=True)
for target in [*sys.argv[2:], "CURRENT"]:
    if target != "CURRENT" and not hasattr(trt.ComputeCapability, target):
        print("RESULT", json.dumps({target: "not in ComputeCapability"}), flush=True)
        continue
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(open(sys.argv[1], "rb").read())
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    plan = builder.build_serialized_network(network, config) if parsed else None
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan) if plan else None
    context = engine.create_execution_context() if engine else None
    answer = {"parsed": parsed, "plan": plan.nbytes if plan else 0, "engine": bool(engine), "context": bool(context)}
    print("RESULT", json.dumps({target: answer}), flush=True)
"""


def check(env: Environment) -> None:
    """Try to build and open an engine; a refusal is a result, not a failure."""
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    assert found is not None and found.submodule_search_locations, "tensorrt_rtx_libs is not installed"
    with tempfile.TemporaryDirectory() as links:
        for library in Path(next(iter(found.submodule_search_locations))).glob("*.so.*"):
            for name in (library.name, library.name.split(".so")[0] + ".so"):
                Path(links, name).symlink_to(library)
        environment = {**os.environ, "LD_LIBRARY_PATH": f"{links}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
        command = [sys.executable, "-c", PROGRAM, str(env.folder / ONNX), "SM86", "SM90"]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
            code, text = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            code, text = -1, f"{_text(error.stdout)}{_text(error.stderr)}\nnot finished after {TIMEOUT_S:.0f} s"
    env.record("exit", code)
    env.record("answers", [line.removeprefix("RESULT ") for line in text.splitlines() if line.startswith("RESULT")])
    errors = [line for line in text.splitlines() if "[E]" in line or "[W]" in line or "rror" in line]
    env.record("messages", errors[-20:])


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
