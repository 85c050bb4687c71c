"""Time of `y7 val` against the bare network on the same images, interleaved.

The bare network is ONNX Runtime's `run` alone on prepared inputs. `y7 val` is the whole command: start of Python,
reading, letterbox, network, NMS, metric.

    python benchmarks/val_overhead.py --weights yolov7.onnx --data D.yaml [--rounds 2]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
from recording import parser, record

from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.image import fit_letterbox, read_image, to_network_input


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", type=Path, required=True)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--rounds", type=int, default=2)
    options = arguments.parse_args()
    dataset = open_dataset(options.data)
    bare, complete = [], []
    for _ in range(options.rounds):
        bare.append(network_seconds(options.weights, [dataset.path(i) for i in range(len(dataset))]))
        complete.append(val_seconds(options.weights, options.data))
        print(f"network {bare[-1]:.1f} s, y7 val {complete[-1]:.1f} s", flush=True)
    ratios = [b / a for a, b in zip(bare, complete, strict=True)]
    record(
        "val_overhead",
        options.machine,
        {
            "weights": options.weights.name,
            "images": len(dataset),
            "network_s": [round(value, 1) for value in bare],
            "val_s": [round(value, 1) for value in complete],
            "ratios": [round(value, 3) for value in ratios],
            "ratio": round(sorted(ratios)[len(ratios) // 2], 3),
            "ratio_limit": 1.15,
        },
    )


def network_seconds(weights: Path, paths: list[Path]) -> float:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])
    name, (_, _, *input_hw) = session.get_inputs()[0].name, session.get_inputs()[0].shape
    total = 0.0
    for path in paths:
        image = read_image(path)
        canvas = fit_letterbox(image.shape[:2], tuple(input_hw)).apply(image)
        tensor = to_network_input([canvas])
        started = time.perf_counter()
        session.run(None, {name: tensor})
        total += time.perf_counter() - started
    return total


def val_seconds(weights: Path, data: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "yolov7_deploy", "val", "--weights", str(weights), "--data", str(data)]
        started = time.perf_counter()
        subprocess.run([*command, "--json", f"{folder}/val.json"], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
