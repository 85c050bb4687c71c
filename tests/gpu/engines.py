"""Complete engines, built by `y7 build` and run once, against recorded results of ONNX Runtime in float32."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np

from tests.gpu.comparison import compare_detections, compare_raw
from tests.gpu.engine_build import build
from tests.gpu.environment import PLUGIN, Array, Cuda, Environment, Stream, times_us
from tests.gpu.tensorrt_run import Runner, load_plugins
from yolov7_deploy.metadata import NMS_OUTPUTS
from yolov7_deploy.tensorrt.engine import Engine
from yolov7_deploy.tensorrt.inspector import engine_layers

MODELS = ("yolov7-tiny", "yolov7", "yolov7-w6")
OPT_LEVEL = "2"  # only correctness is checked here: builds faster, runs a little slower


def check(env: Environment) -> None:
    """Check one model after the other; failures are raised at the end, after all were tried."""
    failures = []
    plugin = env.folder / PLUGIN
    load_plugins(plugin if plugin.exists() else None)
    cuda = env.open_cuda()
    for name in MODELS:
        onnx, reference = env.folder / f"{name}.onnx", env.folder / f"{name}.npz"
        if not onnx.exists():
            env.record(name, f"{onnx.name} is missing")
            continue
        try:
            engine = build(env, onnx, plugin if plugin.exists() else None, level=OPT_LEVEL, into=env.result.parent)
            env.record(f"{name} layers", layers(engine))
            run(env, cuda, name, engine.read_bytes(), dict(np.load(reference)))
        except (AssertionError, OSError, subprocess.SubprocessError, RuntimeError) as error:
            env.record(name, {"failed": str(error)[-3000:]})
            failures.append(name)
    assert not failures, f"failed: {failures}"


def layers(path: Path) -> dict[str, object]:
    """Return how many layers and reformats the engine has, and which formats its plugins read."""
    record = Engine.load(path).record
    table = engine_layers(record)[0] if record is not None else None
    if table is None:
        return {"layers": "unknown"}
    formats = [tensor.format for layer in table.layers if layer.plugin for tensor in layer.inputs]
    return {
        "layers": len(table.layers),
        "reformats": table.reformats,
        "reformats_around_plugins": table.plugin_reformats,
        "plugin_inputs": formats,
    }


def run(env: Environment, cuda: Cuda, name: str, plan: bytes, reference: dict[str, Array]) -> None:
    """Run the engine on the image of the reference, compare the results, and measure its time."""
    with Stream(cuda) as stream:
        runner = Runner(cuda, stream, plan)
        tensor = reference["canvas"][:, :, ::-1].transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
        runner.upload("images", tensor)
        runner()
        if "output" in reference:
            result = compare_raw(runner.download("output")[0, reference["rows"]], reference["output"])
        else:
            found = {key: runner.download(key)[0] for key in NMS_OUTPUTS}
            result = compare_detections(found, reference)
        result["times"] = times_us(stream, runner, rounds=50)
    env.record(name, result)
    assert result["same"], json.dumps(result)
