"""`Detector` on engines built on this GPU: stages, threads, energy, CUDA graphs, and a soak test."""

from __future__ import annotations

import os
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import soak as soak_test

from tests.gpu import engine_build
from tests.gpu.environment import NMS_FILE, PLUGIN, Environment
from yolov7_deploy.benchmarking.benchmark import Frames, measure_speed, synthetic_frames
from yolov7_deploy.detections import Detections
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import Y7Error
from yolov7_deploy.options import BenchOptions
from yolov7_deploy.runtimes.cuda import DeviceBuffer, Stream

FILES = (NMS_FILE.format("yolov7-tiny"), "yolov7.onnx", NMS_FILE.format("yolov7-w6"))
OPT_LEVEL = "3"  # TensorRT's default
CONCURRENCY = (1, 4)
SECONDS = 4.0  # per latency and per throughput measurement
WARM_UP_S = 10.0
MAX_RATIO_TO_ENGINE = 1.15  # end-to-end time of a 1080p frame divided by the engine time, at batch 1
SOAK_S = 570.0
FRAME_HW = (1080, 1920)


def measure(env: Environment) -> None:
    """Measure one model after the other; failures are raised at the end, after all were tried."""
    failures = []
    for name in FILES:
        if not (env.folder / name).exists():
            env.record(name, "is missing")
            continue
        try:
            engine = cached_engine(env, name)
            env.record(name, compare_executions(env, engine, synthetic_frames(FRAME_HW), seconds=SECONDS))
        except (AssertionError, OSError, subprocess.SubprocessError, RuntimeError, Y7Error) as error:
            env.record(name, {"failed": str(error)[-3000:]})
            failures.append(name)
    assert not failures, f"failed: {failures}"


def soak(env: Environment) -> None:
    """Run eight threads on one engine for nearly ten minutes and compare every result."""
    engine = cached_engine(env, "yolov7.onnx")
    images = soak_test.load_images(None, 16)
    with open_detector(env, engine) as detector:
        expected = [detector(image) for image in images]
        done = soak_test.soak(detector, images, expected, threads=8, seconds=env.choose(int(SOAK_S), 2))
    env.record("soak", soak_test.summarize(done) | {"failures": done.failures()})
    assert not done.failures(), done.failures()


def cached_engine(env: Environment, name: str) -> Path:
    """Return the engine of a file, with our plugin if its library is there."""
    plugin = env.folder / PLUGIN
    return engine_build.cached_engine(env, name, plugin if plugin.exists() else None, level=OPT_LEVEL)


def open_detector(env: Environment, engine: Path) -> Detector:
    """Open a Detector that uses our kernels."""
    plugin = env.folder / PLUGIN
    if plugin.exists():
        os.environ["Y7_PLUGIN"] = str(plugin)
    return Detector(engine, device="cuda:0")


def compare_executions(env: Environment, engine: Path, frames: Frames, *, seconds: float) -> dict[str, object]:
    """Measure an engine with CUDA graphs, without them, and with a frame that is already on the GPU."""
    with open_detector(env, engine) as detector:
        options = BenchOptions(batches=(1,), concurrency=CONCURRENCY, duration_s=seconds, warmup_s=WARM_UP_S)
        report = measure_speed(detector, frames, options=options)
        found = detector(frames.images[0])
        on_gpu = detect_on_gpu(env, detector, frames)
    with open_detector(env, engine) as plain:
        plain._runtime._engine.graph_state = "off: for comparison"
        without = measure_speed(
            plain, frames, options=BenchOptions(batches=(1,), duration_s=seconds, warmup_s=WARM_UP_S)
        )
        same = identical_detections(found, plain(frames.images[0]))
    single, concurrent = report.rows
    end_to_end, engine_ms = single.stage("end_to_end").p50, single.stage("engine").p50
    result: dict[str, object] = {
        "report": report.to_dict(),
        "without_graph": [asdict(row) for row in without.rows],
        "end_to_end_to_engine": round(end_to_end / engine_ms, 4),
        "limit": MAX_RATIO_TO_ENGINE,
        "within_limit": end_to_end <= MAX_RATIO_TO_ENGINE * engine_ms,
        "graph_times_faster": round(without.rows[0].stage("end_to_end").p50 / end_to_end, 4),
        "threads_times_faster": round(concurrent.images_per_second / single.images_per_second, 4),
        "detections": len(found),
        "same_without_graph": same,
        "same_from_gpu": on_gpu is None or identical_detections(found, on_gpu),
    }
    env.record(f"{engine.stem} ratios", {name: value for name, value in result.items() if name[0] != "r"})
    assert result["same_without_graph"] and result["same_from_gpu"], "results differ"
    return result


def detect_on_gpu(env: Environment, detector: Detector, frames: Frames) -> Detections | None:
    """Return the detections of the first frame, uploaded before; `None` if our kernels are not available."""
    if not detector._runtime.takes_gpu_arrays:
        return None
    image = frames.images[0]
    cuda = env.open_cuda()
    with Stream(cuda) as stream, DeviceBuffer(cuda, image.shape, np.uint8) as buffer:
        stream.upload(buffer, image)
        stream.synchronize()
        times = []
        for _ in range(env.choose(200, 3)):
            found = detector(buffer)
            times.append(found.speed.total_ms)
        env.record("frame on the GPU, ms", round(statistics.median(times), 4))
    return found


def identical_detections(one: Detections, other: Detections) -> bool:
    """Return whether two results are bit-equal."""
    pairs = ((one.boxes, other.boxes), (one.scores, other.scores), (one.class_ids, other.class_ids))
    return all(np.array_equal(mine, theirs) for mine, theirs in pairs)
