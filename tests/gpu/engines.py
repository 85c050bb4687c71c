"""Whole engines, built by `y7 build` and run once, against what ONNX Runtime made of the float32 file beforehand."""

from __future__ import annotations

import json
import subprocess

import numpy as np

from tests.gpu.building import build
from tests.gpu.comparing import compare_detections, compare_raw
from tests.gpu.environment import PLUGIN, Array, Cuda, Setting, Stream, times_us
from tests.gpu.tensorrt_run import Runner, load_plugins

MODELS = ("yolov7-tiny", "yolov7", "yolov7-w6")
OPT_LEVEL = "2"  # correctness is looked at here: builds faster, runs a little slower


def check(setting: Setting) -> None:
    """One model after the other; the first failure is raised at the end, when all were tried."""
    failures = []
    plugin = setting.folder / PLUGIN
    load_plugins(plugin if plugin.exists() else None)
    cuda = setting.open_cuda()
    for name in MODELS:
        onnx, reference = setting.folder / f"{name}.onnx", setting.folder / f"{name}.npz"
        if not onnx.exists():
            setting.record(name, f"{onnx.name} was not brought")
            continue
        try:
            engine = build(
                setting, onnx, plugin if plugin.exists() else None, level=OPT_LEVEL, into=setting.result.parent
            )
            run(setting, cuda, name, engine.read_bytes(), dict(np.load(reference)))
        except (AssertionError, OSError, subprocess.SubprocessError, RuntimeError) as error:
            setting.record(name, {"failed": str(error)[-3000:]})
            failures.append(name)
    assert not failures, f"failed: {failures}"


def run(setting: Setting, cuda: Cuda, name: str, plan: bytes, reference: dict[str, Array]) -> None:
    """One inference of the image that the reference was made of, and the engine's time."""
    with Stream(cuda) as stream:
        runner = Runner(cuda, stream, plan)
        tensor = reference["canvas"][:, :, ::-1].transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
        runner.upload("images", tensor)
        runner()
        if "output" in reference:
            result = compare_raw(runner.download("output")[0, reference["rows"]], reference["output"])
        else:
            found = {key: runner.download(key)[0] for key in ("num_dets", "det_boxes", "det_scores", "det_classes")}
            result = compare_detections(found, reference)
        result["times"] = times_us(stream, runner, rounds=50)
    setting.record(name, result)
    assert result["same"], json.dumps(result)
