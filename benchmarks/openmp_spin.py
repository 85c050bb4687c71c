"""Training steps and detections in PyTorch on a CPU, for how long OpenMP's threads spin while they wait for each other.

Every measurement is a process of its own, alone and beside processes that keep all cores busy. A thread that spins
takes time from the thread it waits for, if there are more threads than cores.

    python benchmarks/openmp_spin.py [--neighbours 0 3] [--rounds 2]
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from recording import parser, record

# GNU OpenMP's own default is 300,000 iterations, about a millisecond; `y7` chooses 10,000.
SPIN_COUNTS = {"default": None, "10,000": "10000", "1,000": "1000"}
STEPS, CALLS = 3, 10
BUSY = "import os, torch\nparent, x = os.getppid(), torch.randn(600, 600)\nwhile os.getppid() == parent: x @ x"


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2])
        return
    arguments = parser(__doc__)
    arguments.add_argument("--neighbours", type=int, nargs="+", default=[0, 3])
    arguments.add_argument("--rounds", type=int, default=2)
    options = arguments.parse_args()
    result: dict[str, object] = {"steps": STEPS, "calls": CALLS, "spin_counts": SPIN_COUNTS}
    for neighbours in options.neighbours:
        with busy(neighbours):
            for what in ("train", "detect"):
                times: dict[str, list[dict[str, float]]] = {name: [] for name in SPIN_COUNTS}
                for _ in range(options.rounds):
                    for name, count in SPIN_COUNTS.items():
                        times[name].append(run(what, count))
                for name, runs in times.items():
                    wall, cpu = (round(median(one[kind] for one in runs), 3) for kind in ("wall_s", "cpu_s"))
                    result[f"{what}, {neighbours} neighbours, {name}"] = {"wall_s": wall, "cpu_s": cpu}
                    print(f"{what}, {neighbours} neighbours, {name}: {wall} s, CPU time {cpu} s", flush=True)
    record("openmp_spin", options.machine, result)


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Run processes that compute, each with its own default threads, during the block."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(what: str, count: str | None) -> dict[str, float]:
    """Return the seconds of one measurement in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if count is not None:
        environment["GOMP_SPINCOUNT"] = count
    command = [sys.executable, str(Path(__file__)), "--measure", what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(what: str) -> None:
    """Print the wall and the CPU seconds of training steps of yolov7-tiny at 320, or of detections at 640."""
    import numpy as np
    from train_loss import make

    from yolov7_deploy.detector import Detector
    from yolov7_deploy.hub import bundled_weights

    if what == "train":
        train_step, batch = make("yolov7-tiny", 16, 320)

        def work(number: int) -> None:
            train_step.run(batch, epoch=0, step=number, epoch_step=0)

        count = STEPS
    else:
        detector = Detector(bundled_weights(), device="cpu", img=640)
        image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)

        def work(number: int) -> None:
            detector(image)

        count = CALLS
    work(0)
    wall, cpu = time.perf_counter(), time.process_time()
    for number in range(count):
        work(number)
    print(json.dumps({"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}))


if __name__ == "__main__":
    main()
