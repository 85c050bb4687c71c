"""Many threads that call one Detector for a long time: memory, results, and throughput against the best single thread.

First the soak: every thread calls the Detector in a closed loop, each result is compared bit for bit with that of a
single call for the same image, and memory, threads and open files are sampled. Then throughput, in interleaved blocks,
so that changes of the machine's speed affect all alike: all threads, and one thread with 1, 2, 4, 8 and 16 images per
call, up to the maximum batch size of the file. Works with every kind of model file.

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
MIN_RATIO = 0.95  # throughput of the threads relative to the best single thread
SETTLED = 0.2  # share of the run after which memory must not grow
MAX_GROWTH = 0.02  # share of that memory, by the slope of a line through all later samples
SAMPLE_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Resources of the process after a number of calls."""

    calls: int
    memory_mb: float
    threads: int
    files: int


@dataclass(kw_only=True, slots=True)
class Soak:
    """The result of a soak.

    Attributes:
        samples: Samples in order of time.
        call_ms: Milliseconds of all calls.
        calls_by_thread: Number of calls of each thread.
        unequal: Number of calls whose result differs from that of a single call.
        seconds: Wall time.
        other_cores: Mean number of cores that other programs kept busy.
    """

    samples: list[Sample] = field(default_factory=list)
    call_ms: list[float] = field(default_factory=list)
    calls_by_thread: list[int] = field(default_factory=list)
    unequal: int = 0
    seconds: float = 0.0
    other_cores: float = 0.0

    @property
    def settled(self) -> list[Sample]:
        """The samples of the period in which nothing may grow."""
        return [sample for sample in self.samples if sample.calls >= SETTLED * len(self.call_ms)]

    @property
    def memory_slope_mb(self) -> float:
        """Memory growth in megabytes per call, by least squares over the settled samples."""
        calls, memory = ([getattr(one, name) for one in self.settled] for name in ("calls", "memory_mb"))
        return float(np.polyfit(calls, memory, 1)[0]) if len(set(calls)) > 1 else 0.0

    @property
    def memory_growth(self) -> float:
        """Memory growth by the slope over the settled calls, as a share of the memory at their start."""
        first, last = self.settled[0], self.settled[-1]
        return self.memory_slope_mb * (last.calls - first.calls) / first.memory_mb

    def failures(self) -> list[str]:
        """Return descriptions of everything that failed; empty if nothing did."""
        if not self.settled:
            return [*self._unequal(), "the run was too short: no resources were sampled"]
        (threads, threads_then), (files, files_then) = (self._early_and_late(name) for name in ("threads", "files"))
        return [
            *self._unequal(),
            *([f"memory grew by {self.memory_growth:.1%}"] if self.memory_growth > MAX_GROWTH else []),
            *([f"threads increased from {threads} to {threads_then}"] if threads_then > threads else []),
            *([f"open files increased from {files} to {files_then}"] if files_then > files else []),
        ]

    def _unequal(self) -> list[str]:
        return [f"{self.unequal} results differ from those of single calls"] if self.unequal else []

    def _early_and_late(self, name: str) -> tuple[int, int]:
        """Return the most frequent number in each half, because files are open briefly and threads end late."""
        settled = [getattr(one, name) for one in self.settled]
        middle = (len(settled) + 1) // 2
        return statistics.mode(settled[:middle]), statistics.mode(settled[middle - 1 :])


def main() -> None:
    options = _options()
    images = load_images(options.images, 2 * options.threads)
    with Detector(options.weights, device=options.device, conf=options.conf) as detector:
        detector.warmup()
        expected = [detector(image) for image in images]
        gpu_mb = [_gpu_mb(detector.device)]
        result = soak(detector, images, expected, threads=options.threads, calls=options.calls, seconds=options.seconds)
        gpu_mb.append(_gpu_mb(detector.device))
        rates = throughput(detector, images, threads=options.threads, block_s=options.block_s)
        settings = {
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
    failures = result.failures() + ([f"ratio {ratio:.3f} is below {MIN_RATIO}"] if ratio < MIN_RATIO else [])
    record(
        options.name,
        options.machine,
        settings
        | summarize(result)
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
    """Call the detector from many threads, `calls` times in total or for some seconds; errors of calls are raised."""
    result, numbers, finished = Soak(calls_by_thread=[0] * threads), count(), threading.Event()
    process, lock = psutil.Process(), threading.Lock()
    gc.collect()  # so that objects of earlier work, and their threads, do not disappear during the run
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
                result.call_ms.append(call_ms)
                result.calls_by_thread[thread] += 1
                result.unequal += not is_equal

    def sample() -> None:
        while not finished.wait(SAMPLE_S):
            memory_mb, done = process.memory_info().rss / 1e6, len(result.call_ms)
            # At the end, callers finish one by one; this does not change the resources of the Detector.
            if len(callers) == threads and not any(caller.done() for caller in callers):
                result.samples.append(
                    Sample(calls=done, memory_mb=memory_mb, threads=process.num_threads(), files=process.num_fds())
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
    result.seconds = time.perf_counter() - begin
    result.other_cores = (_busy_s(process) - busy) / result.seconds
    return result


def equal(found: Detections, expected: Detections) -> bool:
    """Return whether two results are bit-equal."""
    return all(
        np.array_equal(getattr(found, name), getattr(expected, name)) for name in ("boxes", "scores", "class_ids")
    )


def throughput(
    detector: Detector, images: Sequence[Image], *, threads: int, block_s: float, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Return images per second in each round, of `threads` threads, and of one thread by images per call."""
    maximum = detector.max_batch_size or max(BATCHES)
    sizes = sorted({size for size in BATCHES if size <= maximum} | {min(maximum, max(BATCHES))})
    lists = {size: [images[i % len(images)] for i in range(size)] for size in sizes}

    def single(size: int) -> float:
        return _rate(lambda _: detector.batch(lists[size]), size, 1, block_s)

    def concurrent() -> float:
        return _rate(lambda number: detector(images[number % len(images)]), 1, threads, block_s)

    blocks = {f"one thread, {size} per call": partial(single, size) for size in sizes} | {"threads": concurrent}
    for size in sizes:
        detector.batch(lists[size])  # the first call of a size allocates memory
    order, rates = list(blocks), {name: list[float]() for name in blocks}
    for number in range(rounds):
        for name in order if number % 2 == 0 else reversed(order):
            rates[name].append(blocks[name]())
    return rates


def best_ratio(rates: dict[str, list[float]]) -> tuple[str, float]:
    """Return the best single-thread configuration by median, and the median ratio of the threads to it by round."""
    best = max((name for name in rates if name != "threads"), key=lambda name: statistics.median(rates[name]))
    return best, statistics.median(a / b for a, b in zip(rates["threads"], rates[best], strict=True))


def _rate(call: Callable[[int], object], size: int, threads: int, block_s: float) -> float:
    """Return images per second of threads that call until the time is over; each call counts until its end."""
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
    """Return the CPU seconds of all other programs."""
    total, own = psutil.cpu_times(), process.cpu_times()
    return float(total.user + total.nice + total.system - own.user - own.system)


def _gpu_mb(device: str) -> float | None:
    used = gpu_memory_used(device)
    return None if used is None else round(used / 1e6, 1)


def summarize(result: Soak) -> dict[str, object]:
    """Return the result as plain data for JSON."""
    times, settled = sorted(result.call_ms), result.settled
    return {
        "calls": len(times),
        "threads": len(result.calls_by_thread),
        "calls_by_thread": result.calls_by_thread,
        "unequal_results": result.unequal,
        "seconds": round(result.seconds, 1),
        "call_ms": {"p50": round(times[len(times) // 2], 1), "p99": round(times[int(len(times) * 0.99)], 1)},
        "other_programs_cores": round(result.other_cores, 2),
        "memory_samples": len(result.samples),
        "memory_mb": {
            "first": round(result.samples[0].memory_mb, 1),
            "settled": round(settled[0].memory_mb, 1),
            "min": round(min(one.memory_mb for one in settled), 1),
            "max": round(max(one.memory_mb for one in settled), 1),
            "last": round(settled[-1].memory_mb, 1),
        },
        "memory_mb_per_1000_calls": round(result.memory_slope_mb * 1000, 3),
        "memory_growth": round(result.memory_growth, 4),
        "memory_growth_limit": MAX_GROWTH,
        "process_threads": sorted({one.threads for one in settled}),
        "open_files": sorted({one.files for one in settled}),
    }


def load_images(folder: Path | None, number: int) -> list[Image]:
    """Return the first images of a folder, or reproducible noise images of different sizes."""
    if folder is not None:
        return [read_image(path) for path in sorted(folder.glob("*.jpg"))[:number]]
    images = []
    for seed in range(number):
        rng = np.random.default_rng(seed)
        height, width = (int(side) for side in rng.integers(200, 800, 2))
        coarse = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (width, height)).astype(np.int16)
        images.append(np.clip(coarse + rng.integers(-40, 40, coarse.shape), 0, 255).astype(np.uint8))
    return images


def _options() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", type=Path, required=True)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--calls", type=int, default=2000)
    arguments.add_argument("--seconds", type=float, help="duration of the soak instead of --calls")
    arguments.add_argument("--threads", type=int, default=8)
    arguments.add_argument("--images", type=Path, help="folder of .jpg files (default: noise)")
    arguments.add_argument("--conf", type=float, help="confidence threshold (default: the value in the model file)")
    arguments.add_argument(
        "--block-s", type=float, default=3.0, help="seconds per block, enough for several calls of each thread"
    )
    arguments.add_argument("--name", default="soak")
    return arguments.parse_args()


if __name__ == "__main__":
    main()
