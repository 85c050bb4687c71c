"""Speed of a Detector: the shipped path by the wall clock, its spans, its throughput, and what it cost."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from yolov7_deploy._version import __version__
from yolov7_deploy.benchmark.consistency import ConsistencyChecker
from yolov7_deploy.benchmark.devices import DeviceProfile
from yolov7_deploy.benchmark.inputs import Frames
from yolov7_deploy.benchmark.monitors import Meters
from yolov7_deploy.benchmark.report import BUSY, SPANS, SpanTime, SpeedReport, SpeedRow
from yolov7_deploy.benchmark.sampling import (
    Throughput,
    Warmup,
    interleave,
    run_concurrently,
    span_time,
    timed_ms,
    warm_up,
)
from yolov7_deploy.detections import Detections
from yolov7_deploy.detector import LARGEST_BATCH
from yolov7_deploy.errors import UsageError
from yolov7_deploy.hardware.cpu import OtherLoad
from yolov7_deploy.hardware.machine import read_machine
from yolov7_deploy.hub import file_digest
from yolov7_deploy.image import Image
from yolov7_deploy.options import BenchOptions
from yolov7_deploy.runtimes.base import backend_row

if TYPE_CHECKING:
    from yolov7_deploy.detector import Detector

LEAST_CALLS = 20  # of each series of a row, so that there are blocks to compare
LEAST_TOGETHER = 3  # calls of every caller
TURN_S = 0.1
P99_CALLS = 100  # the 99th percentile of fewer is the largest
# What a backend's speed depends on, by distribution.
_LIBRARIES = {
    "pytorch": ("torch",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-rtx-cu13", "cuda-python", "pycuda"),
}
_PARTS = 100  # of progress for each part of a row

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


def measure_speed(
    detector: Detector,
    frames: Frames,
    *,
    options: BenchOptions = BenchOptions(),  # noqa: B008 - frozen
    place: DeviceProfile | None = None,
    gpu_bytes_before: int | None = None,
    progress: Progress | None = None,
    on_row: Callable[[SpeedRow], None] | None = None,
) -> SpeedReport:
    """How fast a detector is with these images.

    For every batch size: a warm-up until times are stable, then turns of `detector.batch` (end to end, with nothing
    measured inside) and `detector.profile` (the spans). For every number of callers: all calling at once, while power
    and clocks are read.

    Args:
        detector: Open, with the thresholds to measure with.
        frames: A call takes consecutive ones, again from the start after the last.
        options: What to measure, and for how long.
        place: What it runs on, with its modes and what to know of them; the processor's name where left out.
        gpu_bytes_before: Memory in use on the GPU before the detector was opened.
        progress: Called with work done and in all.
        on_row: Called with every row that is complete.

    Raises:
        UsageError: A batch size that the file cannot run.
        DeviceError: The detector gave different results for the same image, or ran out of memory.
    """
    check_batches(detector, options.batches)
    started_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    started = time.perf_counter()
    meters = Meters(detector.device, gpu_bytes_before=gpu_bytes_before)
    meters.read_idle()
    bench = _Bench(detector, frames, options, meters, progress or (lambda done, total: None))
    rows = []
    for row in bench.rows():
        rows.append(row)
        if on_row is not None:
            on_row(row)
    logger.info("%s measured in %.1f s", detector.path, time.perf_counter() - started)
    report = replace(
        _described(detector, frames, place),
        rows=tuple(rows),
        detections_per_image=round(bench.detections_per_image, 2),
        started_at=started_at,
    )
    return replace(report, notes=(*report.notes, *_notes(report, detector)))


def _described(detector: Detector, frames: Frames, place: DeviceProfile | None) -> SpeedReport:
    """What is measured, on what and how; without a row."""
    metadata, here = detector.metadata, read_machine()
    backend = backend_row(detector.path).name
    return SpeedReport(
        weights=str(detector.path),
        weights_sha256=file_digest(detector.path),
        variant="" if metadata.variant == "custom" else metadata.variant,
        backend=backend,
        precision=metadata.precision,
        nms=metadata.nms.kind if metadata.nms else "host",
        device=detector.device,
        machine=place.machine if place else here.cpu,
        environment=(
            ("system", here.system),
            ("processor", f"{here.cpu}, {here.usable_cores} of {here.cores} cores"),
            *((f"GPU {number}", f"{gpu.name}, driver {gpu.driver}") for number, gpu in enumerate(here.gpus)),
            ("python", platform.python_version()),
            *_versions(("numpy", "opencv-python-headless", *_LIBRARIES[backend])),
        ),
        input_hw=detector.input_hw,
        frame_hw=frames.hw,
        frames=frames.words,
        settings=(*_settings(detector), *(place.settings if place else ())),
        rows=(),
        notes=place.notes if place else (),
        y7_version=__version__,
    )


def check_batches(detector: Detector, batches: Sequence[int]) -> None:
    """Refuses batch sizes that would not enter the network as they are.

    Raises:
        UsageError: The file takes fewer, or always runs more.
    """
    fixed, largest, path = detector.metadata.batch, detector.max_batch_size, detector.path
    is_engine = backend_row(path).name == "tensorrt"
    weights = detector.metadata.source or "WEIGHTS.pt"
    for batch in batches:
        larger = (
            f"y7 build --weights {path.stem}.onnx --max-batch {batch}   (of a file exported with --dynamic-batch)"
            if is_engine and fixed is None
            else f"y7 export --weights {weights} --batch {batch}" + (" --engine" if is_engine else "")
        )
        if batch > (largest or LARGEST_BATCH):
            if largest is None:
                why, larger = f"a Detector lets at most {LARGEST_BATCH} images enter", f"--batch {LARGEST_BATCH}"
            else:
                why = f"{path} takes at most {largest}"
            raise UsageError(f"--batch {batch}: {why} at once.", fix=larger)
        if fixed is not None and batch < fixed:
            raise UsageError(
                f"--batch {batch}: {path} has a fixed batch of {fixed} and would be filled up, so that the time of "
                f"{fixed} images would be measured.",
                fix=f"--batch {fixed}, or export one of this size:  {larger}",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Latency:
    """What a single caller saw at one batch size."""

    warmup: Warmup
    calls: int
    spans: tuple[SpanTime, ...]
    other_load: float | None


class _Bench:
    """One run over all batch sizes and numbers of callers."""

    def __init__(
        self, detector: Detector, frames: Frames, options: BenchOptions, meters: Meters, progress: Progress
    ) -> None:
        self._detector, self._frames, self._options, self._meters = detector, frames, options, meters
        self._progress = progress
        self._total = _PARTS * len(options.batches) * (1 + len(options.threads))
        self._done = 0
        self._answers = ConsistencyChecker(detector.thresholds.conf)
        self.detections_per_image = 0.0

    def rows(self) -> Iterator[SpeedRow]:
        """Each row as soon as it is complete."""
        self._progress(0, self._total)
        for batch in self._options.batches:
            batches, self._answers = self._frames.batches(batch), ConsistencyChecker(self._detector.thresholds.conf)
            latency = self._latency(batches)
            self._advance()
            for threads in self._options.threads:
                yield self._row(batches, threads, latency)
                self._advance()

    def _advance(self) -> None:
        self._done += _PARTS
        self._progress(self._done, self._total)

    def _latency(self, batches: list[list[Image]]) -> _Latency:
        detector, answers = self._detector, self._answers
        turn = 0
        whole: list[float] = []
        spans: dict[str, list[float]] = {name: [] for name in SPANS[:-1]}

        def next_batch() -> int:
            nonlocal turn
            turn = (turn + 1) % len(batches)
            return turn

        def warm() -> None:
            number = next_batch()
            answers.keep(number, detector.batch(batches[number]))

        def run_whole() -> None:
            number = next_batch()
            found: list[Detections] = []
            whole.append(timed_ms(lambda: found.extend(detector.batch(batches[number]))))
            answers.keep(number, found)

        def run_spans() -> None:
            number = next_batch()
            found, times = detector.profile(batches[number])
            for name, values in spans.items():
                values.append(getattr(times, f"{name}_ms"))
            answers.keep(number, found)

        warmup = warm_up(warm, limit_s=self._options.warmup_s)
        detector.profile(batches[0])
        others = OtherLoad()
        interleave(
            (run_whole, run_spans),
            turn_s=TURN_S,
            seconds=self._options.duration_s,
            least_turns=LEAST_CALLS,
            on_turn=lambda share: self._progress(self._done + int(share * _PARTS), self._total),
        )
        load = others.share()
        answers.check()
        self.detections_per_image = answers.mean_count()
        times = [span_time(name, values) for name, values in spans.items()]
        spans_of_a_call = (*times, span_time("end_to_end", whole))
        return _Latency(warmup=warmup, calls=len(whole), spans=spans_of_a_call, other_load=load)

    def _row(self, batches: list[list[Image]], threads: int, latency: _Latency) -> SpeedRow:
        batch = len(batches[0])
        others = OtherLoad()
        with self._meters.reading() as reading:
            together = self._together(batches, threads)
        loads = [load for load in (latency.other_load, others.share()) if load is not None]
        self._answers.check()
        rate = batch * together.calls / together.seconds
        host_peak, gpu_peak = self._meters.look_at_memory()
        energy, energy_absent = self._meters.energy(reading, images_per_second=rate)
        return SpeedRow(
            batch=batch,
            threads=threads,
            calls=latency.calls,
            images=round(together.calls * batch),
            seconds=together.seconds,
            images_per_second=rate,
            spans=latency.spans,
            warmup_calls=latency.warmup.calls,
            warmup_s=latency.warmup.seconds,
            settled=latency.warmup.settled,
            host_peak_bytes=host_peak,
            gpu_peak_bytes=gpu_peak,
            energy=energy,
            energy_absent=energy_absent,
            clocks=reading.clocks,
            other_load=max(loads, default=None),
            loaded=span_time("end_to_end", together.samples_ms) if threads > 1 else None,
        )

    def _together(self, batches: list[list[Image]], threads: int) -> Throughput:
        turns = list(range(threads))

        def call(caller: int) -> None:
            turns[caller] += 1
            number = turns[caller] % len(batches)
            self._answers.keep(number, self._detector.batch(batches[number]), caller=caller)

        return run_concurrently(call, threads=threads, seconds=self._options.duration_s, least_calls=LEAST_TOGETHER)


def _versions(libraries: Sequence[str]) -> Iterator[tuple[str, str]]:
    for library in libraries:
        try:
            yield library, importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue


def _settings(detector: Detector) -> tuple[tuple[str, str], ...]:
    """How it was measured: what is said here, and what the backend says."""
    kept = detector.thresholds
    return (
        ("end to end", "uint8 BGR frames in host memory to Detections: letterbox, transfers, network, NMS"),
        ("thresholds", f"conf {kept.conf:g}, iou {kept.iou:g}, max-det {kept.max_det}"),
        ("garbage collector", "off while measuring"),
        *detector.runtime_info,
    )


def _notes(report: SpeedReport, detector: Detector) -> Iterator[str]:
    """What a reader should know of the numbers."""
    yield from detector.metadata.notes
    if not report.detections_per_image:
        yield "nothing was found in these frames, so NMS and drawing up results had nothing to do"
    if detector.metadata.nms is not None:
        yield "NMS is inside the file: it counts as engine time"
    for row in report.rows:
        name = f"batch {row.batch}, {row.threads} caller{'s' * (row.threads > 1)}"
        if row.threads == report.rows[0].threads:
            if not row.settled:
                yield f"{name}: times were not stable when the warm-up ended after {row.warmup_s:.0f} s"
            if row.calls < P99_CALLS:
                yield f"{name}: p99 of {row.calls} calls is about their maximum; --duration gives it more"
        if row.other_load is not None and row.other_load > BUSY:
            yield f"{name}: other programs had {row.other_load:.0%} of the processors meanwhile"
        if row.clocks is not None and row.clocks.throttled:
            yield f"{name}: held back by {', '.join(row.clocks.throttled)}"
