"""Many callers of one Detector for a long time: memory, results, and throughput against a single caller at its best.

First the soak: every thread calls in a closed loop with images of its own turn, each result is compared bit for bit
with that of the same image alone before, and memory, threads and open files are sampled. Then throughput, in blocks
that take turns so that a machine's drift meets all alike: the threads, and one thread with 1, 2, 4, 8, 16 images a
call as far as the file takes them. Works with every kind of file.

    python benchmarks/soak.py --weights yolov7.onnx [--calls 2000 | --seconds 600] [--threads 8] [--images DIR]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import psutil
from recording import parser, record

from yolov7_deploy import Detections, Detector
from yolov7_deploy.hardware.machine import gpu_memory_used
from yolov7_deploy.image import Image, read_image

BATCHES = (1, 2, 4, 8, 16)
ROUNDS = 9
MIN_RATIO = 0.95  # of the threads' throughput to the best of one thread
SETTLED = 0.2  # of the run, after which memory must be flat
MAX_GROWTH = 0.02  # of the memory then, by the slope of a line through all samples after
SAMPLE_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What the process held when so many calls had come back."""

    calls: int
    memory_mb: float
    threads: int
    files: int


@dataclass(kw_only=True, slots=True)
class Soak:
    """What a soak saw.

    Attributes:
        samples: In order of time.
        call_ms: Of all calls.
        calls_of: Of each thread.
        unequal: Calls whose result was not that of the image alone.
        seconds: Wall time.
        other_cores: Cores that other programs kept busy meanwhile.
    """

    samples: list[Sample] = field(default_factory=list)
    call_ms: list[float] = field(default_factory=list)
    calls_of: list[int] = field(default_factory=list)
    unequal: int = 0
    seconds: float = 0.0
    other_cores: float = 0.0

    @property
    def settled(self) -> list[Sample]:
        """The samples of the time in which nothing may grow."""
        return [sample for sample in self.samples if sample.calls >= SETTLED * len(self.call_ms)]

    @property
    def memory_slope_mb(self) -> float:
        """Megabytes per call, by least squares over the settled samples."""
        calls, memory = ([getattr(one, name) for one in self.settled] for name in ("calls", "memory_mb"))
        return float(np.polyfit(calls, memory, 1)[0]) if len(set(calls)) > 1 else 0.0

    @property
    def memory_growth(self) -> float:
        """What the slope makes of the settled calls, as a share of the memory held when they began."""
        first, last = self.settled[0], self.settled[-1]
        return self.memory_slope_mb * (last.calls - first.calls) / first.memory_mb

    def failures(self) -> list[str]:
        """What a soak must not show, in words; nothing if all is well."""
        if not self.settled:
            return [*self._unequal(), "it was too short: what the process holds was never looked at"]
        (threads, threads_then), (files, files_then) = (self._early_and_late(name) for name in ("threads", "files"))
        return [
            *self._unequal(),
            *([f"memory grew by {self.memory_growth:.1%}"] if self.memory_growth > MAX_GROWTH else []),
            *([f"{threads} threads became {threads_then}"] if threads_then > threads else []),
            *([f"{files} open files became {files_then}"] if files_then > files else []),
        ]

    def _unequal(self) -> list[str]:
        return [f"{self.unequal} results differ from those of the image alone"] if self.unequal else []

    def _early_and_late(self, name: str) -> tuple[int, int]:
        """The usual number in each half: the C library opens a file for a moment now and then, and threads end late."""
        settled = [getattr(one, name) for one in self.settled]
        middle = (len(settled) + 1) // 2
        return statistics.mode(settled[:middle]), statistics.mode(settled[middle - 1 :])


def main() -> None:
    options = _options()
    images = _images(options.images, 2 * options.threads)
    with Detector(options.weights, device=options.device, conf=options.conf) as detector:
        detector.warmup()
        expected = [detector(image) for image in images]
        gpu_mb = [_gpu_mb(detector.device)]
        done = soak(detector, images, expected, threads=options.threads, calls=options.calls, seconds=options.seconds)
        gpu_mb.append(_gpu_mb(detector.device))
        rates = throughput(detector, images, threads=options.threads, block_s=options.block_s)
        about = {
            "weights": options.weights.name,
            "nms": detector.metadata.nms.kind if detector.metadata.nms else "host",
            "precision": detector.metadata.precision,
            "device": detector.device,
            "input_hw": detector.input_hw,
            "settings": dict(detector.runtime_info),
            "conf": detector.thresholds.conf,
            "images": f"{len(images)} of {options.images.name if options.images else 'generated noise'}",
            "detections_per_image": round(statistics.fmean(map(len, expected)), 1),
        }
    best, ratio = best_ratio(rates)
    failures = done.failures() + ([f"ratio {ratio:.3f} is below {MIN_RATIO}"] if ratio < MIN_RATIO else [])
    record(
        options.name,
        options.machine,
        about
        | _told(done)
        | {"gpu_memory_mb": gpu_mb}
        | {"images_per_second": {name: round(statistics.median(of), 2) for name, of in rates.items()}}
        | {"ratios_by_round": [round(a / b, 3) for a, b in zip(rates["threads"], rates[best], strict=True)]}
        | {"best_single_thread": best, "ratio": round(ratio, 3), "ratio_limit": MIN_RATIO, "failures": failures},
    )
    sys.exit("\n".join(failures) or 0)


def soak(
    detector: Callable[[Image], Detections],
    images: Sequence[Image],
    expected: Sequence[Detections],
    *,
    threads: int,
    calls: int = 0,
    seconds: float | None = None,
) -> Soak:
    """Calls the detector from many threads, `calls` times in all or for some seconds; an error of a call is raised."""
    seen, numbers, finished = Soak(calls_of=[0] * threads), count(), threading.Event()
    process, lock = psutil.Process(), threading.Lock()
    gc.collect()  # what earlier work left behind shall not go meanwhile, with its threads
    begin = time.perf_counter()

    def is_over(number: int) -> bool:
        return number >= calls if seconds is None else time.perf_counter() - begin >= seconds

    def call(thread: int) -> None:
        while not is_over(number := next(numbers)) and not finished.is_set():
            one = number % len(images)
            started = time.perf_counter()
            found = detector(images[one])
            call_ms = (time.perf_counter() - started) * 1e3
            is_equal = equal(found, expected[one])
            with lock:
                seen.call_ms.append(call_ms)
                seen.calls_of[thread] += 1
                seen.unequal += not is_equal

    def sample() -> None:
        while not finished.wait(SAMPLE_S):
            memory_mb, made = process.memory_info().rss / 1e6, len(seen.call_ms)
            # Callers that are through go one by one at the end, which is no change of what a Detector holds.
            if len(callers) == threads and not any(caller.done() for caller in callers):
                seen.samples.append(
                    Sample(calls=made, memory_mb=memory_mb, threads=process.num_threads(), files=process.num_fds())
                )

    busy = _busy_s(process)
    with ThreadPoolExecutor(threads + 1) as pool:
        callers = [pool.submit(call, thread) for thread in range(threads)]
        sampling = pool.submit(sample)
        try:
            wait(callers, return_when=FIRST_EXCEPTION)
        finally:
            finished.set()
        for one in [*callers, sampling]:
            one.result()
    seen.seconds = time.perf_counter() - begin
    seen.other_cores = (_busy_s(process) - busy) / seen.seconds
    return seen


def equal(found: Detections, expected: Detections) -> bool:
    """Bit for bit."""
    return all(
        np.array_equal(getattr(found, name), getattr(expected, name)) for name in ("boxes", "scores", "class_ids")
    )


def throughput(
    detector: Detector, images: Sequence[Image], *, threads: int, block_s: float, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Images per second in each round: `threads`, and one thread by images a call."""
    most = detector.max_batch_size or max(BATCHES)
    sizes = sorted({size for size in BATCHES if size <= most} | {min(most, max(BATCHES))})
    lists = {size: [images[i % len(images)] for i in range(size)] for size in sizes}

    def alone(size: int) -> float:
        return _rate(lambda _: detector.batch(lists[size]), size, 1, block_s)

    def together() -> float:
        return _rate(lambda number: detector(images[number % len(images)]), 1, threads, block_s)

    blocks = {f"one thread, {size} a call": partial(alone, size) for size in sizes} | {"threads": together}
    for size in sizes:
        detector.batch(lists[size])  # the first of a size takes memory
    order, rates = list(blocks), {name: list[float]() for name in blocks}
    for turn in range(rounds):
        for name in order if turn % 2 == 0 else reversed(order):
            rates[name].append(blocks[name]())
    return rates


def best_ratio(rates: dict[str, list[float]]) -> tuple[str, float]:
    """The single-thread arrangement with the highest median, and the median of the threads' ratio to it by round."""
    best = max((name for name in rates if name != "threads"), key=lambda name: statistics.median(rates[name]))
    return best, statistics.median(a / b for a, b in zip(rates["threads"], rates[best], strict=True))


def _rate(call: Callable[[int], object], size: int, threads: int, block_s: float) -> float:
    """Images per second of threads that each call again until the time is over; every call counts to its end."""
    numbers, begin = count(), time.perf_counter()

    def work() -> tuple[int, float]:
        calls = 0
        while time.perf_counter() - begin < block_s:
            call(next(numbers))
            calls += 1
        return calls, time.perf_counter() - begin

    if threads == 1:
        calls, seconds = work()
        return calls * size / seconds
    with ThreadPoolExecutor(threads) as pool:
        done = [future.result() for future in [pool.submit(work) for _ in range(threads)]]
    return sum(calls for calls, _ in done) * size / max(seconds for _, seconds in done)


def _busy_s(process: psutil.Process) -> float:
    """Processor seconds of all programs but this one."""
    everyone, own = psutil.cpu_times(), process.cpu_times()
    return float(everyone.user + everyone.nice + everyone.system - own.user - own.system)


def _gpu_mb(device: str) -> float | None:
    used = gpu_memory_used(device)
    return None if used is None else round(used / 1e6, 1)


def _told(done: Soak) -> dict[str, object]:
    times, settled = sorted(done.call_ms), done.settled
    return {
        "calls": len(times),
        "threads": len(done.calls_of),
        "calls_by_thread": done.calls_of,
        "unequal_results": done.unequal,
        "seconds": round(done.seconds, 1),
        "call_ms": {"p50": round(times[len(times) // 2], 1), "p99": round(times[int(len(times) * 0.99)], 1)},
        "other_programs_cores": round(done.other_cores, 2),
        "memory_samples": len(done.samples),
        "memory_mb": {
            "first": round(done.samples[0].memory_mb, 1),
            "settled": round(settled[0].memory_mb, 1),
            "least": round(min(one.memory_mb for one in settled), 1),
            "most": round(max(one.memory_mb for one in settled), 1),
            "last": round(settled[-1].memory_mb, 1),
        },
        "memory_mb_per_1000_calls": round(done.memory_slope_mb * 1000, 3),
        "memory_growth": round(done.memory_growth, 4),
        "memory_growth_limit": MAX_GROWTH,
        "process_threads": sorted({one.threads for one in settled}),
        "open_files": sorted({one.files for one in settled}),
    }


def _images(folder: Path | None, number: int) -> list[Image]:
    """The first of a folder, or noise at two scales, all of other sizes and always the same."""
    if folder is not None:
        return [read_image(path) for path in sorted(folder.glob("*.jpg"))[:number]]
    made = []
    for seed in range(number):
        rng = np.random.default_rng(seed)
        height, width = (int(side) for side in rng.integers(200, 800, 2))
        coarse = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (width, height)).astype(np.int16)
        made.append(np.clip(coarse + rng.integers(-40, 40, coarse.shape), 0, 255).astype(np.uint8))
    return made


def _options() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", type=Path, required=True)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--calls", type=int, default=2000)
    arguments.add_argument("--seconds", type=float, help="soak for this long instead of --calls")
    arguments.add_argument("--threads", type=int, default=8)
    arguments.add_argument("--images", type=Path, help="folder of .jpg; noise where left out")
    arguments.add_argument("--conf", type=float, help="score threshold, where the file's own finds too much")
    arguments.add_argument(
        "--block-s", type=float, default=3.0, help="length of one block: several calls of all threads"
    )
    arguments.add_argument("--name", default="soak")
    return arguments.parse_args()


if __name__ == "__main__":
    main()
