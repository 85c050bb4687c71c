"""Time and boxes of rectangular input against the square letterbox, on the same images, interleaved.

Each image is detected by PyTorch and by ONNX Runtime (a file of `y7 export --dynamic`), square and rectangular in turn.
The boxes of the rectangular input are compared with the official detection geometry, written independently of the
package: letterbox, the PyTorch network, the reference NMS, and scaling back.

    python benchmarks/rect.py --weights yolov7.pt --images DIR [--count 82]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from recording import parser, record

from yolov7_deploy import Detections, Detector
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.image import Image, fit_rect_letterbox, read_image
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import Yolov7, build_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.options import ExportOptions, Thresholds

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.test_detector_rect import official_detections

EQUAL = (0.02, 2e-5)  # pixels and scores: float32 sums in another order
CLOSE = (1.0, 0.01)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", type=Path, required=True)
    arguments.add_argument("--images", type=Path, required=True)
    arguments.add_argument("--count", type=int, default=82, help="number of images")
    options = arguments.parse_args()
    images = [read_image(path) for path in sorted(options.images.glob("*.jpg"))[: options.count]]
    checkpoint = load_checkpoint(options.weights)
    model = fuse(build_model(checkpoint))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dynamic.onnx"
        export_onnx(model, checkpoint.metadata, ExportOptions(batch=None, dynamic_size=True)).save(path)
        files = {"pytorch": (options.weights, "auto"), "onnxruntime": (path, "onnxruntime")}
        detectors = {
            (name, rect): Detector(file, device="cpu", runtime=runtime, rect=rect)
            for name, (file, runtime) in files.items()
            for rect in (False, True)
        }
        times, boxes = measure(detectors, images, model)
    size = next(iter(detectors.values())).input_hw
    stride = checkpoint.metadata.stride
    pixels = [np.prod(fit_rect_letterbox(image.shape[:2], size, stride=stride).canvas_hw) for image in images]
    record(
        "rect",
        options.machine,
        {
            "weights": options.weights.name,
            "images": len(images),
            "smaller_canvas": sum(count < np.prod(size) for count in pixels),
            "share_of_pixels": round(float(np.mean(pixels) / np.prod(size)), 3),
            "time_rect_over_square": {name: ratios(times[name, True], times[name, False]) for name in files},
            "median_ms": {
                name: {
                    "square": round(statistics.median(times[name, False]), 1),
                    "rect": round(statistics.median(times[name, True]), 1),
                }
                for name in files
            },
            "boxes": boxes,
            "limits": {"equal": EQUAL, "close": CLOSE},
        },
    )


def measure(
    detectors: dict[tuple[str, bool], Detector], images: list[Image], model: Yolov7
) -> tuple[dict[tuple[str, bool], list[float]], dict[str, int]]:
    """Return the milliseconds of each detector and image, and how many boxes equal those of the official geometry."""
    times: dict[tuple[str, bool], list[float]] = {key: [] for key in detectors}
    names = ("official geometry", "pytorch rect, equal", "onnxruntime rect, equal", "square, close")
    boxes = dict.fromkeys(names, 0)
    for detector in detectors.values():
        detector(images[0])
    for number, image in enumerate(images):
        found: dict[tuple[str, bool], Detections] = {}
        for key, detector in detectors.items():
            started = time.perf_counter()
            found[key] = detector(image)
            times[key].append((time.perf_counter() - started) * 1e3)
        size = max(detectors["pytorch", True].input_hw)
        expected = official_detections(
            model, image, size, Thresholds(), stride=detectors["pytorch", True].metadata.stride
        )
        boxes["official geometry"] += len(expected[1])
        boxes["pytorch rect, equal"] += same(found["pytorch", True], *expected, limits=EQUAL)
        boxes["onnxruntime rect, equal"] += same(found["onnxruntime", True], *expected, limits=EQUAL)
        boxes["square, close"] += same(found["pytorch", False], *expected, limits=CLOSE)
        print(number + 1, boxes, flush=True)
    return times, boxes


def same(
    found: Detections, boxes: np.ndarray, scores: np.ndarray, class_ids: np.ndarray, *, limits: tuple[float, float]
) -> int:
    """Return how many boxes both have, each counted once."""
    remaining = list(range(len(scores)))
    for box, score, class_id in zip(found.boxes, found.scores, found.class_ids, strict=True):
        for other in remaining:
            is_near = np.abs(boxes[other] - box).max() <= limits[0] and abs(scores[other] - score) <= limits[1]
            if is_near and class_ids[other] == class_id:
                remaining.remove(other)
                break
    return len(scores) - len(remaining)


def ratios(rect_ms: list[float], square_ms: list[float]) -> dict[str, float]:
    """Return quartiles over the images of the time of rectangular input divided by that of the square."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(rect_ms, square_ms, strict=True)], n=4)
    total = sum(rect_ms) / sum(square_ms)
    return {"of_sums": round(total, 3), "median": round(median, 3), "quartiles": [round(low, 3), round(high, 3)]}


if __name__ == "__main__":
    main()
