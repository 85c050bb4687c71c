"""The paper's span: the network's forward in PyTorch half precision, all official models, beside the paper's FPS."""

from __future__ import annotations

import statistics

import torch

from tests.gpu.environment import Setting
from tests.gpu.networks import untrained
from yolov7_deploy.benchmark.sampling import interleave, warm_up
from yolov7_deploy.evaluation import synthetic_image as street
from yolov7_deploy.hardware.power import open_power_meter
from yolov7_deploy.image import fit_letterbox
from yolov7_deploy.options import Thresholds
from yolov7_deploy.paper import VARIANTS, paper_row
from yolov7_deploy.runtimes.pytorch import PytorchBackend

# Random weights take as long as trained ones; nothing passes this threshold, so NMS does not matter.
EMPTY_RESULT = Thresholds(conf=1.0)
BATCHES = (1, 32)
SECONDS = 3.0  # of each measurement
WARM_UP_S = 8.0


def measure(setting: Setting) -> None:
    """Every model at both of the paper's batch sizes, the square canvas and the 4:3 one of most COCO images."""
    names = ("yolov7-tiny",) if setting.emulated else tuple(VARIANTS)
    device = "cpu" if setting.emulated else "cuda:0"
    for name in names:
        row = paper_row(name)
        network, metadata = untrained(name)
        backend = PytorchBackend(network, metadata, device=device)
        side = 128 if setting.emulated else metadata.default_hw[0]
        for batch in BATCHES[: setting.some(2, 1)]:
            for canvas in ((side, side), (side * 3 // 4, side)):
                result = engine_ms(backend, canvas, batch, setting, device)
                key = f"{name} {canvas[0]}x{canvas[1]} batch {batch}"
                setting.record(key, result | {"paper_fps": row.fps, "paper_batch32_ms": row.batch32_ms})
        backend.close()
        del backend, network
        if not setting.emulated:
            torch.cuda.empty_cache()


def engine_ms(
    backend: PytorchBackend, canvas: tuple[int, int], batch: int, setting: Setting, device: str
) -> dict[str, object]:
    """Milliseconds an image of the engine span, and of the whole call without any span measured."""
    image = street()
    images = [image] * batch
    letterboxes = [fit_letterbox((image.shape[0], image.shape[1]), canvas)] * batch
    engine: list[float] = []
    whole: list[float] = []

    def spans() -> None:
        found = backend.infer(images, letterboxes, EMPTY_RESULT, timed=True).spans
        assert found is not None
        engine.append(found.engine_ms / batch)

    def call() -> None:
        found = backend.infer(images, letterboxes, EMPTY_RESULT)
        whole.append((found.preprocess_ms + found.inference_ms + found.postprocess_ms) / batch)

    seconds = 0.2 if setting.emulated else SECONDS
    warm_up(call, limit_s=0.2 if setting.emulated else WARM_UP_S)
    spans()
    engine.clear()
    whole.clear()
    meter = open_power_meter(device)
    if isinstance(meter, str):
        interleave((spans, call), turn_s=0.1, seconds=seconds, least_turns=3, on_turn=lambda share: None)
        watts: object = meter
    else:
        with meter:
            interleave((spans, call), turn_s=0.1, seconds=seconds, least_turns=3, on_turn=lambda share: None)
        watts = round(meter.mean_watts, 1)
    middle = statistics.median(engine)
    return {
        "engine_ms": round(middle, 4),
        "engine_fps": round(1e3 / middle, 1),
        "call_ms": round(statistics.median(whole), 4),
        "calls": len(whole),
        "watts": watts,
        "settings": dict(backend.runtime_info),
    }
