"""Compare the winners of several complete `y7 optimize` searches with that of one long measurement.

The long measurement times every candidate that the searches did not reject for `--seconds`, all interleaved, and none
leaves early. A winner is right if there it takes at most `AS_FAST` of the time of the fastest: an INT8 file in OpenVINO
and the same file with bfloat16 for the rest take the same time, so either can win.

    python benchmarks/optimize_winner.py --weights yolov7-tiny-shapes --calib IMAGES --data D.yaml
"""

from __future__ import annotations

import math
import re
import tempfile
from argparse import Namespace
from pathlib import Path
from statistics import median

from recording import parser, record

from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.hub import find_weights
from yolov7_deploy.options import OptimizeOptions
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.workflows.optimize import AS_FAST, Optimizer, OptimizeReport


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", default="yolov7-tiny-shapes")
    arguments.add_argument("--calib", required=True)
    arguments.add_argument("--data", required=True, type=Path)
    arguments.add_argument("--limit", type=int, default=50)
    arguments.add_argument("--max-drop", type=float, default=1.0)
    arguments.add_argument("--runs", type=int, default=5)
    arguments.add_argument("--duration", type=float, default=20.0, help="seconds of the final measurement of a search")
    arguments.add_argument("--seconds", type=float, default=120.0, help="seconds of the long measurement")
    options = arguments.parse_args()
    found = []
    for _ in range(options.runs):
        found.append(search(options, options.duration))
        assert found[-1].winner is not None
        print(f"winner: {found[-1].winner.name}", flush=True)
    from yolov7_deploy.benchmarking import race

    race._is_slower = lambda samples, name, leader: False
    long = search(options, options.seconds)
    assert long.winner is not None
    winners = [report.winner.name for report in found if report.winner]
    medians = {one.name: median(one.samples_ms) for one in long.candidates if one.samples_ms}
    record(
        "optimize_winner",
        options.machine,
        {
            "weights": options.weights,
            "true_winner": long.winner.name,
            "winners": winners,
            "right": sum(medians.get(name, math.inf) <= AS_FAST * min(medians.values()) for name in winners),
            "median_ms": {name: round(value, 2) for name, value in medians.items()},
            "rounds": len(long.winner.samples_ms),
            "rejected": {one.name: _without_folders(one.rejected) for one in long.candidates if one.rejected},
        },
    )


def _without_folders(text: str) -> str:
    return re.sub(r"(?<!\S)/\S*/", "", text)


def search(options: Namespace, seconds: float) -> OptimizeReport:
    """Return the result of one complete search."""
    with tempfile.TemporaryDirectory() as folder:
        return Optimizer(
            find_weights(options.weights),
            open_dataset(options.data, limit=options.limit),
            open_calibration(options.calib),
            OptimizeOptions(max_drop=options.max_drop, duration_s=seconds),
            folder=Path(folder),
        ).run()


if __name__ == "__main__":
    main()
