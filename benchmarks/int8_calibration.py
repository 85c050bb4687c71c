"""Time and peak memory of a calibration against the same forward passes, interleaved, each in its own process.

python benchmarks/int8_calibration.py --weights yolov7 --calib IMAGES
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from recording import parser, record

from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.precision.ort_runner import NetworkRunner, network_input
from yolov7_deploy.precision.subgraph import Network

ROUNDS = 2


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", default="yolov7")
    arguments.add_argument("--calib", required=True)
    arguments.add_argument("--only", choices=("calibrate", "forward"), help="internal: run one of the two")
    arguments.add_argument("--model", help="internal: the exported file")
    options = arguments.parse_args()
    if options.only:
        print(json.dumps(run_one(options.only, Path(options.model), options.calib)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        y7 = [sys.executable, "-m", "yolov7_deploy", "export", "--no-verify"]
        subprocess.run([*y7, "--weights", options.weights, "--output", str(path)], check=True, capture_output=True)
        runs: dict[str, list[dict[str, float]]] = {"calibrate": [], "forward": []}
        for _ in range(ROUNDS):
            for kind, found in runs.items():
                again = [sys.executable, __file__, "--only", kind, "--model", str(path), "--calib", options.calib]
                found.append(json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout))
                print(kind, found[-1], flush=True)
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs["calibrate"], runs["forward"], strict=True)]
    record(
        "int8_calibration",
        options.machine,
        {
            "weights": Path(options.weights).name,
            "images": runs["calibrate"][0]["images"],
            "ratio": round(float(np.median(ratios)), 2),
            "ratio_limit": 2.5,
            "ratios": [round(ratio, 2) for ratio in ratios],
            "peak_memory_gb": round(max(run["peak_gb"] for run in runs["calibrate"]), 2),
            "peak_memory_limit_gb": 3,
            "runs": runs,
        },
    )


def run_one(kind: str, path: Path, calib: str) -> dict[str, float]:
    """Time from opening the network to the last image; both kinds read the images."""
    model, images = OnnxModel.load(path), open_calibration(calib)
    started = time.perf_counter()
    if kind == "calibrate":
        count = calibrate(model, images, count=len(images)).images
    else:
        runner, count = NetworkRunner(model.proto, Network(model).nodes, model.metadata.heads), 0
        for image in images:
            runner.run(network_input(image, model.metadata))
            count += 1
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"seconds": round(seconds, 2), "peak_gb": round(peak, 3), "images": count}


if __name__ == "__main__":
    main()
