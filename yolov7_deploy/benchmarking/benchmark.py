"""Benchmark of a Detector: end-to-end latency, time of each pipeline stage, throughput, power and memory."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy._text import get_logger
from yolov7_deploy._version import __version__
from yolov7_deploy.benchmarking.devices import DeviceProfile
from yolov7_deploy.benchmarking.report import BUSY, STAGES, SpeedReport, SpeedRow, StageTime
from yolov7_deploy.benchmarking.sampling import (
    Monitors,
    Throughput,
    Warmup,
    interleave,
    run_concurrently,
    stage_time,
    timed_ms,
    warm_up,
)
from yolov7_deploy.datasets.coco import COCO_NAMES
from yolov7_deploy.detections import Detections
from yolov7_deploy.detector import MAX_BATCH_SIZE
from yolov7_deploy.errors import DeviceError, SourceError, UsageError
from yolov7_deploy.evaluation.synthetic_image import synthetic_image
from yolov7_deploy.hardware.machine import read_machine
from yolov7_deploy.hardware.system import OtherCpuLoad
from yolov7_deploy.image import Image
from yolov7_deploy.options import BenchOptions
from yolov7_deploy.runtimes.base import runtime_entry
from yolov7_deploy.sources import SourceLike, open_source

if TYPE_CHECKING:
    from yolov7_deploy.detector import Detector

MIN_CALLS = 20  # per series of a row, so that there are blocks to compare
MIN_CONCURRENT_CALLS = 3  # per thread
SLICE_S = 0.1
P99_CALLS = 100  # the 99th percentile of fewer calls is their maximum
_STEPS = 100  # progress steps per part of a row

logger = get_logger(__name__)
Progress = Callable[[int, int], None]


# --- images -----------------------------------------------------------------------------------------------------------

SYNTHETIC_HW = (1080, 1920)
MAX_FRAMES = 64  # 400 MB of Full HD
_DRAWN_HEIGHT = 3 / 4  # share of the requested height that `synthetic_image` fills; the rest is padding


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frames:
    """Images in memory, uint8 BGR [H, W, 3], and a description of their source."""

    images: tuple[Image, ...]
    description: str

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width of the first image."""
        height, width = self.images[0].shape[:2]
        return height, width

    def batches(self, size: int) -> list[list[Image]]:
        """Return lists of `size` images that contain every image in order; the last one is filled up from the start.

        An image that appears twice in a list is copied, because the images of a real batch do not share memory.
        """
        count = -(-len(self.images) // size)
        return [self._batch(range(number * size, (number + 1) * size)) for number in range(count)]

    def _batch(self, numbers: Sequence[int]) -> list[Image]:
        total = len(self.images)
        return [
            self.images[number % total] if number - numbers[0] < total else self.images[number % total].copy()
            for number in numbers
        ]


def synthetic_frames(hw: tuple[int, int] = SYNTHETIC_HW) -> Frames:
    """Return one synthetic image of this height and width, always the same."""
    height, width = hw
    image = synthetic_image((int(height / _DRAWN_HEIGHT) + 1, width))[:height]
    return Frames(images=(image,), description=f"one synthetic image, {height}x{width}")


def read_frames(source: SourceLike) -> Frames:
    """Return the first images of anything that `open_source` reads, at most `MAX_FRAMES`.

    Raises:
        SourceError: The source has no image.
        ImageError: An image cannot be read.
    """
    with open_source(source) as opened:
        images = tuple(frame.image for frame in islice(opened, MAX_FRAMES))
        name = str(source) if isinstance(source, str | Path | int) else f"a {type(source).__name__}"
        if not images:
            raise SourceError(f"{name} has no image.", fix="Check --source.")
        complete = opened.total == len(images)
    count = f"{len(images)} image{'s' * (len(images) > 1)}"
    return Frames(images=images, description=f"{count} of {name}" if complete else f"the first {count} of {name}")


# --- measurement ------------------------------------------------------------------------------------------------------


def measure_speed(
    detector: Detector,
    frames: Frames,
    *,
    options: BenchOptions = BenchOptions(),  # noqa: B008 - frozen
    profile: DeviceProfile | None = None,
    gpu_baseline_bytes: int | None = None,
    progress: Progress | None = None,
    on_row: Callable[[SpeedRow], None] | None = None,
) -> SpeedReport:
    """Measure the speed of a detector on images.

    For every batch size: a warm-up until times are stable, then interleaved calls of `detector.batch` (end to end,
    without measuring inside) and of `detector.profile` (the stages). For every concurrency: all threads calling at the
    same time, while power and clocks are read.

    Args:
        detector: An open detector, with the thresholds to measure with.
        frames: Each call takes the next images, and starts over after the last.
        options: What to measure, and for how long.
        profile: The device with its settings and notes; the name of the CPU if left out.
        gpu_baseline_bytes: Memory in use on the GPU before the detector was opened.
        progress: Called with finished and total work.
        on_row: Called with every complete row.

    Raises:
        UsageError: A batch size that the file cannot run.
        DeviceError: The detector gave different results for the same image, or ran out of memory.
    """
    check_batch_sizes(detector, options.batches)
    started_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    started = time.perf_counter()
    monitors = Monitors(detector.device, gpu_baseline_bytes=gpu_baseline_bytes)
    monitors.read_idle()
    bench = _Bench(detector, frames, options, monitors, progress or (lambda done, total: None))
    rows = []
    for row in bench.rows():
        rows.append(row)
        if on_row is not None:
            on_row(row)
    logger.info("%s measured in %.1f s", detector.path, time.perf_counter() - started)
    report = replace(
        _empty_report(detector, frames, profile),
        rows=tuple(rows),
        detections_per_image=round(bench.detections_per_image, 2),
        started_at=started_at,
    )
    return replace(report, notes=(*report.notes, *_notes(report, detector)))


def check_batch_sizes(detector: Detector, batches: Sequence[int]) -> None:
    """Reject batch sizes that the network cannot run without padding or splitting.

    Raises:
        UsageError: The file takes fewer images, or always runs more.
    """
    fixed, largest, path = detector.metadata.batch, detector.max_batch_size, detector.path
    is_engine = runtime_entry(path).name == "tensorrt"
    weights = detector.metadata.source or "WEIGHTS.pt"
    size = "--batch {}" if len(set(batches)) == 1 or is_engine else "--dynamic-batch"
    for batch in batches:
        larger = (
            f"y7 build --weights {path.stem}.onnx --max-batch {batch}   (of a file exported with --dynamic-batch)"
            if is_engine and fixed is None
            else f"y7 export --weights {weights} {size.format(batch)}" + (" --engine" if is_engine else "")
        )
        if batch > (largest or MAX_BATCH_SIZE):
            if largest is None:
                reason, larger = f"a Detector runs at most {MAX_BATCH_SIZE} images", f"--batch {MAX_BATCH_SIZE}"
            else:
                reason = f"{path} takes at most {largest}"
            raise UsageError(f"--batch {batch}: {reason} at once.", fix=larger)
        if fixed is not None and batch < fixed:
            raise UsageError(
                f"--batch {batch}: {path} has a fixed batch of {fixed} and would be padded, so that the time of "
                f"{fixed} images would be measured.",
                fix=f"--batch {fixed}, or export a file of this size:  {larger}",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Latency:
    """Times of a single thread at one batch size."""

    warmup: Warmup
    calls: int
    stages: tuple[StageTime, ...]
    other_cpu_load: float | None


class _Bench:
    """One run over all batch sizes and concurrencies."""

    def __init__(
        self, detector: Detector, frames: Frames, options: BenchOptions, monitors: Monitors, progress: Progress
    ) -> None:
        self._detector, self._frames, self._options, self._monitors = detector, frames, options, monitors
        self._progress = progress
        self._total = _STEPS * len(options.batches) * (1 + len(options.concurrency))
        self._done = 0
        self._results = ConsistencyChecker(detector.thresholds.conf)
        self.detections_per_image = 0.0

    def rows(self) -> Iterator[SpeedRow]:
        """Yield each row when it is complete."""
        self._progress(0, self._total)
        for batch in self._options.batches:
            batches, self._results = self._frames.batches(batch), ConsistencyChecker(self._detector.thresholds.conf)
            latency = self._latency(batches)
            self._advance()
            for concurrency in self._options.concurrency:
                yield self._row(batches, concurrency, latency)
                self._advance()

    def _advance(self) -> None:
        self._done += _STEPS
        self._progress(self._done, self._total)

    def _latency(self, batches: list[list[Image]]) -> _Latency:
        detector, results = self._detector, self._results
        call_number = 0
        end_to_end: list[float] = []
        stages: dict[str, list[float]] = {name: [] for name in STAGES[:-1]}

        def next_batch() -> int:
            nonlocal call_number
            call_number = (call_number + 1) % len(batches)
            return call_number

        def call() -> None:
            number = next_batch()
            results.add(number, detector.batch(batches[number]))

        def time_call() -> None:
            number = next_batch()
            found: list[Detections] = []
            end_to_end.append(timed_ms(lambda: found.extend(detector.batch(batches[number]))))
            results.add(number, found)

        def time_stages() -> None:
            number = next_batch()
            found, timing = detector.profile(batches[number])
            for name, values in stages.items():
                values.append(getattr(timing, f"{name}_ms"))
            results.add(number, found)

        warmup = warm_up(call, limit_s=self._options.warmup_s)
        detector.profile(batches[0])
        other_load = OtherCpuLoad()
        interleave(
            (time_call, time_stages),
            slice_s=SLICE_S,
            seconds=self._options.duration_s,
            min_rounds=MIN_CALLS,
            on_progress=lambda share: self._progress(self._done + int(share * _STEPS), self._total),
        )
        load = other_load.share()
        results.check()
        self.detections_per_image = results.mean_count()
        times = [stage_time(name, values) for name, values in stages.items()]
        return _Latency(
            warmup=warmup,
            calls=len(end_to_end),
            stages=(*times, stage_time("end_to_end", end_to_end)),
            other_cpu_load=load,
        )

    def _row(self, batches: list[list[Image]], concurrency: int, latency: _Latency) -> SpeedRow:
        batch = len(batches[0])
        other_load = OtherCpuLoad()
        with self._monitors.reading() as reading:
            throughput = self._throughput(batches, concurrency)
        loads = [load for load in (latency.other_cpu_load, other_load.share()) if load is not None]
        self._results.check()
        images_per_second = batch * throughput.calls / throughput.seconds
        host_peak, gpu_peak = self._monitors.peak_memory()
        energy, energy_unavailable = self._monitors.energy(reading, images_per_second=images_per_second)
        return SpeedRow(
            batch=batch,
            concurrency=concurrency,
            calls=latency.calls,
            images=round(throughput.calls * batch),
            seconds=throughput.seconds,
            images_per_second=images_per_second,
            stages=latency.stages,
            warmup_calls=latency.warmup.calls,
            warmup_s=latency.warmup.seconds,
            warmup_stable=latency.warmup.stable,
            host_peak_bytes=host_peak,
            gpu_peak_bytes=gpu_peak,
            energy=energy,
            energy_unavailable=energy_unavailable,
            clocks=reading.clocks,
            other_cpu_load=max(loads, default=None),
            under_load=stage_time("end_to_end", throughput.samples_ms) if concurrency > 1 else None,
        )

    def _throughput(self, batches: list[list[Image]], concurrency: int) -> Throughput:
        call_numbers = list(range(concurrency))

        def call(thread: int) -> None:
            call_numbers[thread] += 1
            number = call_numbers[thread] % len(batches)
            self._results.add(number, self._detector.batch(batches[number]), thread=thread)

        return run_concurrently(
            call, concurrency=concurrency, seconds=self._options.duration_s, min_calls=MIN_CONCURRENT_CALLS
        )


# --- consistency of results -------------------------------------------------------------------------------------------

# Results of two calls with one image differ by no more, even where a GPU sums in another order.
SAME_SCORE = 0.02
SAME_BOX = 0.01  # of the longer side of the image


class ConsistencyChecker:
    """Compares the first and the latest results of calls with the same images.

    Args:
        conf: The confidence threshold; boxes that score close to it may appear and disappear.
    """

    def __init__(self, conf: float) -> None:
        self._conf = conf
        self._first: dict[int, Sequence[Detections]] = {}
        self._latest: dict[tuple[int, int], Sequence[Detections]] = {}

    def add(self, batch_number: int, found: Sequence[Detections], *, thread: int = 0) -> None:
        """Add the results of a call; several threads may call this at the same time."""
        self._first.setdefault(batch_number, found)
        self._latest[batch_number, thread] = found

    def check(self) -> None:
        """Compare the latest results of each batch with its first.

        Raises:
            DeviceError: They differ, so the detector is broken.
        """
        for (batch_number, thread), latest in self._latest.items():
            for index, (now, before) in enumerate(zip(latest, self._first[batch_number], strict=True)):
                if not same_detections(now, before, conf=self._conf):
                    where = f"image {index + 1} of batch {batch_number + 1}, thread {thread + 1}"
                    raise _inconsistent(before, now, where)

    def mean_count(self) -> float:
        """Return the mean number of detections per image in the first results."""
        return float(np.mean([len(one) for found in self._first.values() for one in found]))


def same_detections(a: Detections, b: Detections, *, conf: float) -> bool:
    """Return whether each object of one is nearly the same in the other, ignoring those that score close to `conf`."""
    matches = (
        (a.class_ids[:, None] == b.class_ids[None])
        & (np.abs(a.scores[:, None] - b.scores[None]) <= SAME_SCORE)
        & (np.abs(a.boxes[:, None] - b.boxes[None]) <= SAME_BOX * max(a.image_hw)).all(-1)
    )
    unmatched = (a.scores[~matches.any(1)], b.scores[~matches.any(0)])
    return all((scores <= conf + SAME_SCORE).all() for scores in unmatched)


def _inconsistent(before: Detections, now: Detections, where: str) -> DeviceError:
    moved = ", with other boxes" if len(before) == len(now) else ""
    return DeviceError(
        f"The same image gave {len(before)} detections first ({before.describe()}) and {len(now)} later "
        f"({now.describe()}{moved}): {where}. The times of such a detector are meaningless.",
        fix="Find the difference:  y7 verify --weights WEIGHTS.pt --against FILE",
    )


# --- report -----------------------------------------------------------------------------------------------------------


def _empty_report(detector: Detector, frames: Frames, profile: DeviceProfile | None) -> SpeedReport:
    """Return a report with the model, the machine and the settings, without rows."""
    metadata, machine = detector.metadata, read_machine()
    runtime = runtime_entry(detector.path, detector.runtime)
    return SpeedReport(
        weights=str(detector.path),
        weights_sha256=sha256_hex(detector.path),
        variant="" if metadata.variant == "custom" else metadata.variant,
        runtime=runtime.name,
        precision=metadata.precision,
        nms=metadata.nms.kind if metadata.nms else "host",
        device=detector.device,
        machine=profile.machine if profile else machine.cpu,
        environment=(
            ("system", machine.system),
            ("CPU", f"{machine.cpu}, {machine.usable_cores} of {machine.cores} cores"),
            *((f"GPU {number}", f"{gpu.name}, driver {gpu.driver}") for number, gpu in enumerate(machine.gpus)),
            ("python", platform.python_version()),
            *library_versions(("numpy", "opencv-python-headless", *runtime.distributions)),
        ),
        input_hw=detector.input_hw,
        frame_hw=frames.hw,
        frames=frames.description,
        settings=(*_settings(detector), *(profile.settings if profile else ())),
        rows=(),
        is_coco=_has_coco_classes(metadata.class_names),
        notes=profile.notes if profile else (),
        y7_version=__version__,
    )


def _has_coco_classes(names: Sequence[str]) -> bool:
    """Return whether classes are those of COCO, by their names or, without names, by their number."""
    unnamed = [f"class_{index}" for index in range(len(COCO_NAMES))]
    return list(names) == unnamed or [name.casefold() for name in names] == [name.casefold() for name in COCO_NAMES]


def library_versions(libraries: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield name and version of those distributions that are installed."""
    for library in libraries:
        try:
            yield library, importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue


def _settings(detector: Detector) -> tuple[tuple[str, str], ...]:
    thresholds = detector.thresholds
    return (
        ("end to end", "uint8 BGR frames in host memory to Detections: letterbox, transfers, network, NMS"),
        ("thresholds", f"conf {thresholds.conf:g}, iou {thresholds.iou:g}, max-det {thresholds.max_det}"),
        ("garbage collector", "off while measuring"),
        *detector.runtime_info,
    )


def _notes(report: SpeedReport, detector: Detector) -> Iterator[str]:
    yield from detector.metadata.notes
    if not report.detections_per_image:
        yield "nothing was detected in these frames, so NMS had nothing to do; --source IMAGES measures with your own"
    if detector.metadata.nms is not None:
        yield "NMS is inside the file: it counts as engine time"
    for row in report.rows:
        name = f"batch {row.batch}, concurrency {row.concurrency}"
        if row.concurrency == report.rows[0].concurrency:
            if not row.warmup_stable:
                yield f"{name}: times were not stable when the warm-up ended after {row.warmup_s:.0f} s"
            if row.calls < P99_CALLS:
                yield f"{name}: p99 of {row.calls} calls is about their maximum; use a longer --duration"
        if row.other_cpu_load is not None and row.other_cpu_load > BUSY:
            yield f"{name}: other programs used {row.other_cpu_load:.0%} of the CPU time"
        if row.clocks is not None and row.clocks.throttled:
            yield f"{name}: throttled: {', '.join(row.clocks.throttled)}"
