"""`Detector` on engines that TensorRT chose its kernels for: spans, threads, energy, graphs, and a soak."""

from __future__ import annotations

import os
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import soak as soaking

from tests.gpu import building
from tests.gpu.environment import PLUGIN, SUPPRESSED, Setting
from yolov7_deploy.benchmark.benchmark import measure_speed
from yolov7_deploy.benchmark.inputs import Frames, drawn_frames
from yolov7_deploy.detections import Detections
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import Y7Error
from yolov7_deploy.options import BenchOptions
from yolov7_deploy.runtimes.cuda import DeviceBuffer, Stream

FILES = (SUPPRESSED.format("yolov7-tiny"), "yolov7.onnx", SUPPRESSED.format("yolov7-w6"))
OPT_LEVEL = "3"  # TensorRT's own
THREADS = (1, 4)
SECONDS = 4.0  # of each half of a row
WARM_UP_S = 10.0
MOST_TO_ENGINE = 1.15  # end to end of a 1080p frame to the engine's own time, at batch 1
SOAK_S = 570.0
FRAME_HW = (1080, 1920)


def measure(setting: Setting) -> None:
    """One model after the other; the first failure is raised at the end, when all were tried."""
    failures = []
    for name in FILES:
        if not (setting.folder / name).exists():
            setting.record(name, "was not brought")
            continue
        try:
            engine = kept_engine(setting, name)
            setting.record(name, compared(setting, engine, drawn_frames(FRAME_HW), seconds=SECONDS))
        except (AssertionError, OSError, subprocess.SubprocessError, RuntimeError, Y7Error) as error:
            setting.record(name, {"failed": str(error)[-3000:]})
            failures.append(name)
    assert not failures, f"failed: {failures}"


def soak(setting: Setting) -> None:
    """Eight threads on one engine for nearly ten minutes, every result compared."""
    engine = kept_engine(setting, "yolov7.onnx")
    images = soaking._images(None, 16)
    with opened(setting, engine) as detector:
        expected = [detector(image) for image in images]
        done = soaking.soak(detector, images, expected, threads=8, seconds=setting.some(int(SOAK_S), 2))
    setting.record("soak", soaking._told(done) | {"failures": done.failures()})
    assert not done.failures(), done.failures()


def kept_engine(setting: Setting, name: str) -> Path:
    """The engine of a file, with our plugin where it was brought."""
    plugin = setting.folder / PLUGIN
    return building.kept_engine(setting, name, plugin if plugin.exists() else None, level=OPT_LEVEL)


def opened(setting: Setting, engine: Path) -> Detector:
    """A Detector with our kernels."""
    plugin = setting.folder / PLUGIN
    if plugin.exists():
        os.environ["Y7_PLUGIN"] = str(plugin)
    return Detector(engine, device="cuda:0")


def compared(setting: Setting, engine: Path, frames: Frames, *, seconds: float) -> dict[str, object]:
    """The whole report of an engine, the same without CUDA graphs, and a frame that already is on the GPU."""
    with opened(setting, engine) as detector:
        options = BenchOptions(batches=(1,), threads=THREADS, duration_s=seconds, warmup_s=WARM_UP_S)
        report = measure_speed(detector, frames, options=options)
        found = detector(frames.images[0])
        on_gpu = found_on_gpu(setting, detector, frames)
    with opened(setting, engine) as plain:
        plain._backend._engine.graph_state = "off: to compare"
        without = measure_speed(
            plain, frames, options=BenchOptions(batches=(1,), duration_s=seconds, warmup_s=WARM_UP_S)
        )
        same = alike(found, plain(frames.images[0]))
    alone, together = report.rows
    end_to_end, engine_ms = alone.span("end_to_end").p50, alone.span("engine").p50
    result: dict[str, object] = {
        "report": report.to_dict(),
        "without_graph": [asdict(row) for row in without.rows],
        "end_to_end_to_engine": round(end_to_end / engine_ms, 4),
        "limit": MOST_TO_ENGINE,
        "within_limit": end_to_end <= MOST_TO_ENGINE * engine_ms,
        "graph_times_faster": round(without.rows[0].span("end_to_end").p50 / end_to_end, 4),
        "threads_times_faster": round(together.images_per_second / alone.images_per_second, 4),
        "detections": len(found),
        "same_without_graph": same,
        "same_from_gpu": on_gpu is None or alike(found, on_gpu),
    }
    setting.record(f"{engine.stem} ratios", {name: value for name, value in result.items() if name[0] != "r"})
    assert result["same_without_graph"] and result["same_from_gpu"], "results differ"
    return result


def found_on_gpu(setting: Setting, detector: Detector, frames: Frames) -> Detections | None:
    """Of the first frame, uploaded beforehand; nothing where our kernels are not there."""
    if not detector._backend.takes_gpu_arrays:
        return None
    image = frames.images[0]
    cuda = setting.open_cuda()
    with Stream(cuda) as stream, DeviceBuffer(cuda, image.shape, np.uint8) as buffer:
        stream.upload(buffer, image)
        stream.synchronize()
        times = []
        for _ in range(setting.some(200, 3)):
            found = detector(buffer)
            times.append(found.speed.total_ms)
        setting.record("frame on the GPU, ms", round(statistics.median(times), 4))
    return found


def alike(one: Detections, other: Detections) -> bool:
    """The same bytes."""
    pairs = ((one.boxes, other.boxes), (one.scores, other.scores), (one.class_ids, other.class_ids))
    return all(np.array_equal(mine, theirs) for mine, theirs in pairs)
