"""The measurement of the paper: forward pass in PyTorch with FP16, all official models, with the paper's FPS."""

from __future__ import annotations

import statistics

import torch

from tests.gpu.environment import Environment
from tests.gpu.networks import untrained
from yolov7_deploy.benchmarking.sampling import interleave, warm_up
from yolov7_deploy.evaluation.synthetic_image import street_scene
from yolov7_deploy.hardware.power import open_power_meter
from yolov7_deploy.image import fit_letterbox
from yolov7_deploy.options import Thresholds
from yolov7_deploy.paper import VARIANTS, paper_row
from yolov7_deploy.runtimes.pytorch import PytorchRuntime

# No score passes this threshold, so NMS takes no time; random weights are as fast as trained ones.
NO_DETECTIONS = Thresholds(conf=1.0)
BATCHES = (1, 32)
SECONDS = 3.0  # per measurement
WARM_UP_S = 8.0


def measure(env: Environment) -> None:
    """Measure every model at both batch sizes of the paper, with square and 4:3 canvases (most COCO images are 4:3)."""
    names = ("yolov7-tiny",) if env.emulated else tuple(VARIANTS)
    device = "cpu" if env.emulated else "cuda:0"
    for name in names:
        row = paper_row(name)
        network, metadata = untrained(name)
        runtime = PytorchRuntime(network, metadata, device=device)
        side = 128 if env.emulated else metadata.default_hw[0]
        for batch in BATCHES[: env.choose(2, 1)]:
            for canvas in ((side, side), (side * 3 // 4, side)):
                result = engine_ms(runtime, canvas, batch, env, device)
                key = f"{name} {canvas[0]}x{canvas[1]} batch {batch}"
                env.record(key, result | {"paper_fps": row.fps, "paper_batch32_ms": row.batch32_ms})
        runtime.close()
        del runtime, network
        if not env.emulated:
            torch.cuda.empty_cache()


def engine_ms(
    runtime: PytorchRuntime, canvas: tuple[int, int], batch: int, env: Environment, device: str
) -> dict[str, object]:
    """Return milliseconds per image of the engine stage, and of the complete call without stage timing."""
    image = street_scene()
    images = [image] * batch
    letterboxes = [fit_letterbox((image.shape[0], image.shape[1]), canvas)] * batch
    engine: list[float] = []
    complete: list[float] = []

    def stages() -> None:
        found = runtime.infer(images, letterboxes, NO_DETECTIONS, timed=True).timing
        assert found is not None
        engine.append(found.engine_ms / batch)

    def call() -> None:
        found = runtime.infer(images, letterboxes, NO_DETECTIONS)
        complete.append((found.preprocess_ms + found.inference_ms + found.postprocess_ms) / batch)

    seconds = 0.2 if env.emulated else SECONDS
    warm_up(call, limit_s=0.2 if env.emulated else WARM_UP_S)
    stages()
    engine.clear()
    complete.clear()
    meter = open_power_meter(device)
    if isinstance(meter, str):
        interleave((stages, call), slice_s=0.1, seconds=seconds, min_rounds=3, on_progress=lambda share: None)
        watts: object = meter
    else:
        with meter:
            interleave((stages, call), slice_s=0.1, seconds=seconds, min_rounds=3, on_progress=lambda share: None)
        watts = round(meter.mean_watts, 1)
    median_ms = statistics.median(engine)
    return {
        "engine_ms": round(median_ms, 4),
        "engine_fps": round(1e3 / median_ms, 1),
        "call_ms": round(statistics.median(complete), 4),
        "calls": len(complete),
        "watts": watts,
        "settings": dict(runtime.runtime_info),
    }
