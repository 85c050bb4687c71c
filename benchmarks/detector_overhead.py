"""Overhead of a `Detector` call over the network itself on a CPU, and growth of its memory.

Overhead is everything but ONNX Runtime's `run`: letterbox, layout, NMS, and boxes back in image pixels. Both parts
come from the same calls, so the speed of the machine cancels out.

    python benchmarks/detector_overhead.py --weights yolov7.onnx --images DIR [--calls 1000]
"""

from __future__ import annotations

import time
from pathlib import Path

import psutil
from recording import parser, record

from yolov7_deploy import Detector
from yolov7_deploy.image import read_image

SETTLED = 100  # calls after which the allocator has seen every image


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", type=Path, required=True)
    arguments.add_argument("--images", type=Path, required=True)
    arguments.add_argument("--calls", type=int, default=1000)
    arguments.add_argument("--name", default="detector_overhead")
    options = arguments.parse_args()
    images = [read_image(path) for path in sorted(options.images.glob("*.jpg"))]
    shares, calls_ms, memory_mb = [], [], {}
    process = psutil.Process()
    with Detector(options.weights, device="cpu") as detector:
        detector.warmup()
        for call in range(1, options.calls + 1):
            started = time.perf_counter()
            found = detector(images[call % len(images)])
            total_ms = (time.perf_counter() - started) * 1e3
            calls_ms.append(total_ms)
            shares.append(1 - found.speed.inference_ms / total_ms)
            if call % SETTLED == 0:
                memory_mb[str(call)] = round(process.memory_info().rss / 1e6, 1)
                print(f"{call} calls, {memory_mb[str(call)]} MB", flush=True)
        metadata = detector.metadata
    middle = sorted(shares)[len(shares) // 2]
    record(
        options.name,
        options.machine,
        {
            "weights": options.weights.name,
            "nms": metadata.nms.kind if metadata.nms else "none",
            "input_hw": metadata.input_hw,
            "calls": options.calls,
            "call_ms": round(sorted(calls_ms)[len(calls_ms) // 2], 1),
            "overhead_share": round(middle, 4),
            "overhead_limit": 0.06,
            "memory_mb": memory_mb,
            "memory_growth_mb": round(memory_mb[max(memory_mb, key=int)] - memory_mb[str(SETTLED)], 1),
        },
    )


if __name__ == "__main__":
    main()
