"""The engine stage of `y7 bench` against ONNX Runtime itself, and what the rest of a call adds.

The bare loop calls `session.run` of its own session with one prepared input. It, `detector.profile` and
`detector.batch` are interleaved, one call each in a random order, so that other load on the machine slows all of them
alike. Ratios are taken within a round; the script reports their median and its 95 % interval by the sign test. The bare
session has the same options as the `Detector`; with `--defaults` it has those of ONNX Runtime, whose threads keep
spinning after a run and slow down the next one.

    python benchmarks/engine_span.py --weights yolov7.onnx [--rounds 100] [--defaults]
"""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path

import numpy as np
import onnxruntime
from recording import parser, record

from yolov7_deploy import Detector
from yolov7_deploy.benchmarking.benchmark import synthetic_frames
from yolov7_deploy.benchmarking.sampling import no_garbage_collection, timed_ms
from yolov7_deploy.image import fit_letterbox, to_network_input
from yolov7_deploy.runtimes.onnxruntime import session_options

LIMIT = 0.03
WARM_ROUNDS = 5


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", type=Path, required=True)
    arguments.add_argument("--rounds", type=int, default=100)
    arguments.add_argument("--defaults", action="store_true", help="the bare session with ONNX Runtime's own options")
    options = arguments.parse_args()
    frame = synthetic_frames().images[0]
    bare, engine, complete = [], [], []
    with Detector(options.weights, device="cpu") as detector:
        session = bare_session(options.weights, defaults=options.defaults)
        letterbox = fit_letterbox((frame.shape[0], frame.shape[1]), detector.input_hw)
        # One image of the file's own batch, float32 or bytes, as the Detector feeds it.
        canvases = [letterbox.apply(frame)] * (detector.metadata.batch or 1)
        array = np.stack(canvases) if detector.metadata.input_kind == "uint8" else to_network_input(canvases)
        feeds = {session.get_inputs()[0].name: array}

        def run_bare() -> None:
            bare.append(timed_ms(lambda: session.run(None, feeds)))

        def run_profile() -> None:
            engine.append(detector.profile([frame])[1].engine_ms)

        def run_complete() -> None:
            complete.append(timed_ms(lambda: detector.batch([frame])))

        runs, order = [run_bare, run_profile, run_complete], random.Random(7)
        for number in range(WARM_ROUNDS + options.rounds):
            order.shuffle(runs)
            with no_garbage_collection():
                for run in runs:
                    run()
            if number % 10 == 0:
                print(f"{number} rounds", flush=True)
        metadata, runtime_info = detector.metadata, detector.runtime_info
    ratio, low, high = median_ratio(engine[WARM_ROUNDS:], bare[WARM_ROUNDS:])
    added, *_ = median_ratio(complete[WARM_ROUNDS:], bare[WARM_ROUNDS:])
    result = {
        "weights": options.weights.name,
        "variant": metadata.variant,
        "input_hw": metadata.input_hw,
        "settings": dict(runtime_info),
        "bare_options": "ONNX Runtime's own" if options.defaults else "the Detector's",
        "rounds": options.rounds,
        "bare_ms": summary(bare[WARM_ROUNDS:]),
        "engine_ms": summary(engine[WARM_ROUNDS:]),
        "end_to_end_ms": summary(complete[WARM_ROUNDS:]),
        "engine_to_bare": round(ratio, 4),
        "engine_to_bare_95": [round(low, 4), round(high, 4)],
        "limit": LIMIT,
        "within_limit": abs(ratio - 1) <= LIMIT,
        "end_to_end_to_bare": round(added, 4),
    }
    record("engine_span" + ("_defaults" if options.defaults else ""), options.machine, result)


def bare_session(path: Path, *, defaults: bool) -> onnxruntime.InferenceSession:
    """Return a session of ONNX Runtime without a `Detector` around it."""
    options = onnxruntime.SessionOptions() if defaults else session_options()
    options.log_severity_level = 3  # it warns about inputs that have a default
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def median_ratio(ours: list[float], bare: list[float]) -> tuple[float, float, float]:
    """Return the median ratio within rounds and its 95 % interval by the sign test."""
    ratios = sorted(a / b for a, b in zip(ours, bare, strict=True))
    n = len(ratios)
    # Normal approximation of the binomial distribution of ranks.
    reach = math.ceil(1.96 * math.sqrt(n) / 2)
    return statistics.median(ratios), ratios[max(0, n // 2 - reach)], ratios[min(n - 1, n // 2 + reach)]


def summary(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "min": round(min(values), 2)}


if __name__ == "__main__":
    main()
