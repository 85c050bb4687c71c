"""Speed reports made up for tests."""

from __future__ import annotations

from functools import cache

import numpy as np

from yolov7_deploy.benchmark.report import SPANS, Energy, SpanTime, SpeedReport, SpeedRow
from yolov7_deploy.benchmark.sampling import span_time
from yolov7_deploy.hardware.clocks import Clocks

MS = {"preprocess": 2.0, "upload": 0.0, "engine": 10.0, "download": 0.0, "postprocess": 0.5, "end_to_end": 12.0}


def span(name: str, samples: list[float]) -> SpanTime:
    return span_time(name, samples)


@cache
def spans(batch: int) -> tuple[SpanTime, ...]:
    rng = np.random.default_rng(batch)
    return tuple(span(name, list(MS[name] * batch * np.exp(rng.normal(0, 0.01, 60)))) for name in SPANS)


def row(*, batch: int = 1, threads: int = 1, **changes: object) -> SpeedRow:
    fields: dict[str, object] = {
        "batch": batch,
        "threads": threads,
        "calls": 60,
        "images": 100 * batch,
        "seconds": 1.5,
        "images_per_second": 80.5,
        "spans": spans(batch),
        "warmup_calls": 9,
        "warmup_s": 1.0,
        "settled": True,
        "host_peak_bytes": 600_000_000,
        "gpu_peak_bytes": None,
        "energy": Energy(source="a meter", watts=50.0, idle_watts=9.5, joules_per_image=0.62, samples=70),
        "clocks": Clocks(source="a clock", mhz=2400.0, throttled=()),
    }
    return SpeedRow(**{**fields, **changes})


def report(**changes: object) -> SpeedReport:
    fields: dict[str, object] = {
        "weights": "folder/yolov7.onnx",
        "weights_sha256": "0" * 64,
        "variant": "yolov7",
        "backend": "onnxruntime",
        "precision": "fp32",
        "nms": "plugin",
        "device": "cpu",
        "machine": "a machine",
        "environment": (("numpy", "2"),),
        "input_hw": (640, 640),
        "frame_hw": (1080, 1920),
        "frames": "one drawn image",
        "settings": (("threads", "2"),),
        "rows": (row(),),
        "detections_per_image": 4.0,
    }
    return SpeedReport(**{**fields, **changes})
