"""Time of NMS on the host against the reference NMS, on decoded outputs of real images, interleaved.

Both return the same bits, which each call checks. A case is a set of thresholds: those of `y7 detect`, those of
`y7 val`, and very low ones, with which thousands of boxes are candidates.

    python benchmarks/host_nms.py --weights yolov7.pt --images DIR [--count 16]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from recording import parser, record

from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.image import FloatArray, fit_letterbox, read_image
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import build_model
from yolov7_deploy.options import Thresholds
from yolov7_deploy.postprocess import RawDetections, postprocess
from yolov7_deploy.runtimes.pytorch import PytorchRuntime

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support import reference_nms

CASES = {
    "detect": Thresholds(),
    "val": Thresholds(conf=0.001, iou=0.65, multi_label=True),
    "val, best class": Thresholds(conf=0.001, iou=0.65),
    "val, class-agnostic": Thresholds(conf=0.001, iou=0.65, multi_label=True, class_agnostic=True),
    "thousands of boxes": Thresholds(conf=0.0001, iou=0.65, multi_label=True),
    "thousands of boxes, at most 1000": Thresholds(conf=0.0001, iou=0.65, multi_label=True, max_det=1000),
}
Nms = Callable[[FloatArray, Thresholds], RawDetections]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", type=Path, required=True)
    arguments.add_argument("--images", type=Path, required=True)
    arguments.add_argument("--count", type=int, default=16, help="number of images")
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    outputs = decoded_outputs(options.weights, sorted(options.images.glob("*.jpg"))[: options.count])
    result: dict[str, object] = {"weights": options.weights.name, "images": len(outputs)}
    for name, thresholds in CASES.items():
        row = result[name] = measure(outputs, thresholds, options.rounds)
        print(f"{name}: {row}", flush=True)
    record("host_nms", options.machine, result)


def decoded_outputs(weights: Path, images: list[Path]) -> list[FloatArray]:
    """Return the decoded output [A, 5 + C] of each image at the default size."""
    checkpoint = load_checkpoint(weights)
    runtime = PytorchRuntime(fuse(build_model(checkpoint)), checkpoint.metadata)
    outputs = []
    for path in images:
        image = read_image(path)
        canvas = fit_letterbox((image.shape[0], image.shape[1]), checkpoint.metadata.default_hw).apply(image)
        decoded = runtime.stages(canvas).decoded
        assert decoded is not None
        outputs.append(decoded)
    return outputs


def measure(outputs: list[FloatArray], thresholds: Thresholds, rounds: int) -> dict[str, float]:
    """Return the median number of candidates, median milliseconds of both, and the ratio of their total times."""
    reference, ours = [], []
    for _ in range(rounds):
        for output in outputs:
            expected = timed(reference_nms.postprocess, output, thresholds, reference)
            found = timed(postprocess, output, thresholds, ours)
            assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True)), "not bit-equal"
    return {
        "candidates": int(statistics.median(candidates(output, thresholds) for output in outputs)),
        "reference_ms": round(statistics.median(reference), 2),
        "ours_ms": round(statistics.median(ours), 2),
        "slowest_reference_ms": round(max(reference), 1),
        "slowest_ours_ms": round(max(ours), 1),
        "times_faster": round(sum(reference) / sum(ours), 1),
    }


def timed(nms: Nms, output: FloatArray, thresholds: Thresholds, times_ms: list[float]) -> RawDetections:
    started = time.perf_counter()
    found = nms(output, thresholds)
    times_ms.append((time.perf_counter() - started) * 1e3)
    return found


def candidates(output: FloatArray, thresholds: Thresholds) -> int:
    scores = output[:, 4:5] * output[:, 5:]
    passes = (scores > thresholds.conf) & (output[:, 4:5] > thresholds.conf)
    return int((passes if thresholds.multi_label else passes.any(axis=1)).sum())


if __name__ == "__main__":
    main()
