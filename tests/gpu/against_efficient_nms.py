"""Speed of decoding and NMS: EfficientNMS_TRT, the plugin of this project, and its kernels without an engine."""

from __future__ import annotations

import json

import numpy as np

from tests.gpu.environment import PLUGIN, CudaMemory, Environment, Stream, times_us
from tests.gpu.nms import CONF, END_BATCHES, END_FILE, TARGET_US, NmsCall, yolov7_heads
from tests.gpu.tensorrt_run import Runner, build, load_plugins, plugin_names

COUNTS, ROUNDS = (100, 300, 1000), 100
NMS_CHOICES = ("efficient", "plugin")
KINDS = (*((np.float16, batch) for batch in END_BATCHES), (np.float32, 1))
TARGET_RATIO = 5.0


def measure(env: Environment) -> None:
    """Build the NMS networks once per batch size and type, then measure them by number of candidates."""
    library = env.folder / PLUGIN
    load_plugins(library if library.exists() else None)
    names = plugin_names()
    env.record("registry", {"Y7NMS": "Y7NMS" in names, "EfficientNMS_TRT": "EfficientNMS_TRT" in names})
    cuda, kernels = env.open_cuda(), env.open_kernels()
    rows: list[dict[str, object]] = []
    for kind, batch in KINDS:
        files = {end: env.folder / END_FILE.format(kind=end, type=kind.__name__, batch=batch) for end in NMS_CHOICES}
        with Stream(cuda) as stream:
            memory = CudaMemory(cuda, stream, guard=0)
            runners = {
                end: Runner(cuda, stream, build(path.read_bytes(), half=kind is np.float16))
                for end, path in files.items()
                if path.exists() and (end == "efficient" or "Y7NMS" in names)
            }
            sizes = {end: runner.scratch_bytes for end, runner in runners.items()}
            for count in COUNTS:
                heads = yolov7_heads(np.random.default_rng(count), min(batch, 4), count, kind, None)
                row: dict[str, object] = {"type": kind.__name__, "batch": batch, "pairs": count, "engine_bytes": sizes}
                kept = {}
                for end, runner in runners.items():
                    for level, values in enumerate(heads.maps):
                        runner.upload(f"head_{level}", np.tile(values, (batch // len(values), 1, 1, 1)))
                    row[end] = times_us(stream, runner, rounds=ROUNDS)
                    kept[end] = int(runner.download("num_dets").sum())
                work = NmsCall(kernels, memory, heads, batch)
                row["kernels"] = times_us(stream, work, rounds=ROUNDS)
                kept["kernels"] = int(memory.download(work.buffers["num_dets"]).view(np.int32).sum())
                row["detections"] = kept
                row["workspace_bytes"] = work.workspace_bytes
                rows.append(row | _ratios(row))
                env.record("rows", rows)
    env.record("limits", {"batch_1_us": TARGET_US, "times_faster": TARGET_RATIO, "conf": CONF})


def _ratios(row: dict[str, object]) -> dict[str, object]:
    """Return how many times faster plugin and kernels are than EfficientNMS_TRT, each as one graph launch."""
    times = json.loads(json.dumps(row))
    if "efficient" not in times:
        return {}
    reference_us = times["efficient"]["graph_us"]
    measured = [end for end in ("plugin", "kernels") if end in times]
    return {f"{end}_times_faster": round(reference_us / times[end]["graph_us"], 2) for end in measured}
