"""Speed reports with chosen times, without a benchmark."""

from __future__ import annotations

from functools import cache

import numpy as np

from yolov7_deploy.benchmarking.report import STAGES, Energy, SpeedReport, SpeedRow, StageTime, paper_speed
from yolov7_deploy.benchmarking.sampling import stage_time
from yolov7_deploy.hardware.clocks import Clocks

CALLS = 61  # odd, so that the median is one of the samples
OTHER_MS = {"preprocess": 2.0, "upload": 0.0, "download": 0.0, "postprocess": 0.5}


def speed_report(
    variant="yolov7",
    *,
    engine_ms=10.0,
    end_to_end_ms=12.0,
    batch=1,
    size=640,
    with_paper=False,
    **fields: object,
) -> SpeedReport:
    """Return a report with one row of these medians; `fields` are those of SpeedReport."""
    defaults: dict[str, object] = {
        "weights": f"models/{variant}.onnx",
        "weights_sha256": "0" * 64,
        "variant": variant,
        "runtime": "onnxruntime",
        "precision": "fp32",
        "nms": "plugin",
        "device": "cpu",
        "machine": "AMD EPYC",
        "environment": (("numpy", "2"),),
        "input_hw": (size, size),
        "frame_hw": (1080, 1920),
        "frames": "one synthetic image",
        "settings": (("threads", "2"),),
        "rows": (speed_row(batch=batch, engine_ms=engine_ms, end_to_end_ms=end_to_end_ms),),
        "detections_per_image": 4.0,
        "paper": paper_speed(variant, (size, size)) if with_paper else None,
    }
    return SpeedReport(**{**defaults, **fields})


def speed_row(*, batch=1, concurrency=1, engine_ms=10.0, end_to_end_ms=12.0, **fields: object) -> SpeedRow:
    """Return a row with these medians, and noise of one percent around them."""
    defaults: dict[str, object] = {
        "batch": batch,
        "concurrency": concurrency,
        "calls": CALLS,
        "images": 100 * batch,
        "seconds": 1.5,
        "images_per_second": 1e3 * batch / end_to_end_ms,
        "stages": noisy_stages(batch, engine_ms, end_to_end_ms),
        "warmup_calls": 9,
        "warmup_s": 1.0,
        "warmup_stable": True,
        "host_peak_bytes": 600_000_000,
        "gpu_peak_bytes": None,
        "energy": Energy(source="a meter", watts=50.0, idle_watts=9.5, joules_per_image=0.62, samples=70),
        "clocks": Clocks(source="a clock", mhz=2400.0, throttled=()),
    }
    return SpeedRow(**{**defaults, **fields})


@cache
def noisy_stages(batch: int, engine_ms: float, end_to_end_ms: float) -> tuple[StageTime, ...]:
    medians_ms = {**OTHER_MS, "engine": engine_ms, "end_to_end": end_to_end_ms}
    rng = np.random.default_rng(batch)
    stages = []
    for name in STAGES:
        noise = rng.normal(0, 0.01, CALLS)
        stages.append(stage_time(name, list(medians_ms[name] * np.exp(noise - np.median(noise)))))
    return tuple(stages)
