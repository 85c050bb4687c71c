"""Timing of repeated calls: warm-up, interleaved series, concurrent calls; and power, clocks and memory."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np

from yolov7_deploy.benchmarking.report import Energy, StageTime
from yolov7_deploy.hardware.clocks import Clocks, open_clock_monitor
from yolov7_deploy.hardware.machine import gpu_memory_used, host_peak_bytes
from yolov7_deploy.hardware.power import PowerMeter, open_power_meter

BLOCKS = 20  # parts of a run; two runs are compared by their medians
# The warm-up ends when the medians of this many consecutive blocks, of at least this length, agree this closely.
STABLE_BLOCKS = 3
STABLE_WITHIN = 0.02
STABLE_BLOCK_S = 0.3
INTERRUPT_CHECK_S = 0.2  # how soon Ctrl-C is noticed
IDLE_S = 1.0

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Warmup:
    """Calls before the measurement; see `SpeedRow`."""

    calls: int
    seconds: float
    stable: bool


def warm_up(call: Call, *, limit_s: float) -> Warmup:
    """Call until the medians of the last blocks agree, or the time limit is reached.

    Until then clocks rise, libraries choose algorithms and caches fill.
    """
    started = time.perf_counter()
    medians: list[float] = []
    calls = 0
    while True:
        block: list[float] = []
        while not block or sum(block) < STABLE_BLOCK_S * 1e3:
            block.append(timed_ms(call))
        calls += len(block)
        medians.append(median(block))
        last = medians[-STABLE_BLOCKS:]
        stable = len(last) == STABLE_BLOCKS and max(last) <= min(last) * (1 + STABLE_WITHIN)
        seconds = time.perf_counter() - started
        if stable or seconds >= limit_s:
            return Warmup(calls=calls, seconds=seconds, stable=stable)


def timed_ms(call: Call) -> float:
    """Return the milliseconds of one call."""
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e6


def interleave(
    series: Sequence[Call],
    *,
    slice_s: float,
    seconds: float,
    min_rounds: int,
    on_progress: Callable[[float], None],
) -> None:
    """Run several series alternately, so that a drift of the machine affects all of them equally.

    Every other round runs in reverse order. A slice is never cut short, and the garbage collector is off during it.

    Args:
        series: Functions that each take one sample and keep it.
        slice_s: Approximate time that one series runs before the next.
        seconds: Time after which the last round ends.
        min_rounds: Rounds to run in any case.
        on_progress: Called after each round with the share that is done, 0 to 1.
    """
    started = time.perf_counter()
    rounds = 0
    while rounds < min_rounds or time.perf_counter() - started < seconds:
        for call in series if rounds % 2 == 0 else reversed(series):
            with no_garbage_collection():
                deadline = time.perf_counter() + slice_s
                call()
                while time.perf_counter() < deadline:
                    call()
        rounds += 1
        on_progress(min(1.0, rounds / min_rounds, (time.perf_counter() - started) / seconds if seconds else 1.0))


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turn the garbage collector off inside the block, and restore its state afterwards."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def stage_time(name: str, samples_ms: Sequence[float]) -> StageTime:
    """Return the statistics of samples in the order in which they were taken."""
    values = np.asarray(samples_ms, dtype=np.float64)
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    edges = np.linspace(0, len(values), min(BLOCKS, len(values)) + 1).astype(int)
    return StageTime(
        name=name,
        p50=float(p50),
        p90=float(p90),
        p99=float(p99),
        mean=float(values.mean()),
        min=float(values.min()),
        blocks=tuple(median(values[start:end].tolist()) for start, end in pairwise(edges)),
    )


# --- concurrency ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """The work that concurrent threads completed.

    Attributes:
        calls: Calls within `seconds`; one that crosses the start or the end counts by its part inside.
        seconds: From the moment when all threads were calling to the end.
        samples_ms: Duration of every call except the first of each thread, in the order of their ends.
    """

    calls: float
    seconds: float
    samples_ms: tuple[float, ...]


def run_concurrently(call: Callable[[int], object], *, concurrency: int, seconds: float, min_calls: int) -> Throughput:
    """Call from several threads, each again as soon as its call returns.

    The clock starts when every thread has completed its first call, so that all of them are calling.

    Args:
        call: Receives the number of the thread. An exception ends all threads and is raised here.
        concurrency: Number of threads; a single one runs in a separate thread too.
        seconds: Minimum duration.
        min_calls: Calls that every thread completes in any case.
    """
    workers = _Workers(call, concurrency=concurrency, seconds=seconds, min_calls=min_calls)
    threads = [threading.Thread(target=workers.run, args=(number,), daemon=True) for number in range(concurrency)]
    with no_garbage_collection():
        try:
            for thread in threads:
                thread.start()
            while not workers.stop.wait(INTERRUPT_CHECK_S):  # Ctrl-C is raised here, in the main thread
                pass
        finally:
            workers.stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
    if workers.errors:
        raise workers.errors[0]
    return workers.throughput()


class _Workers:
    """State that the threads of `run_concurrently` share."""

    def __init__(self, call: Callable[[int], object], *, concurrency: int, seconds: float, min_calls: int) -> None:
        self._call, self._seconds, self._min_calls = call, seconds, min_calls
        self._calls: list[list[tuple[float, float]]] = [[] for _ in range(concurrency)]  # start and end of each call
        self._ended = 0.0
        self.stop = threading.Event()
        self.errors: list[BaseException] = []

    def run(self, number: int) -> None:
        """Call repeatedly in one thread."""
        try:
            while not self.stop.is_set():
                begun = time.perf_counter()
                self._call(number)
                ended = time.perf_counter()
                self._calls[number].append((begun, ended))
                if min(map(len, self._calls)) > self._min_calls and ended - self._began() >= self._seconds:
                    self._ended = ended
                    self.stop.set()
        except BaseException as error:  # noqa: BLE001 - raised again by `run_concurrently`
            self.errors.append(error)
            self.stop.set()

    def _began(self) -> float:
        return max(calls[0][1] for calls in self._calls)

    def throughput(self) -> Throughput:
        """Return the calls from the moment when every first call had returned to the end."""
        begin, end = self._began(), self._ended
        calls = [call for own in self._calls for call in own]
        warm = sorted((call for own in self._calls for call in own[1:]), key=lambda call: call[1])
        parts = [(min(ended, end) - max(begun, begin)) / (ended - begun) for begun, ended in calls]
        return Throughput(
            calls=sum(max(0.0, part) for part in parts),
            seconds=end - begin,
            samples_ms=tuple((ended - begun) * 1e3 for begun, ended in warm),
        )


# --- power, clocks, memory --------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class MonitorReading:
    """Mean power and clocks of a block of work; filled when the block has ended."""

    watts: float | None = None
    samples: int = 0
    clocks: Clocks | None = None


class Monitors:
    """Power meter, clock monitor and memory readings of a device.

    Args:
        device: `cpu` or `cuda:N`.
        gpu_baseline_bytes: Memory in use on the GPU before the model was loaded; `None` where it is not known.
    """

    def __init__(self, device: str, *, gpu_baseline_bytes: int | None = None) -> None:
        self._device = device
        self._gpu_baseline, self._gpu_peak = gpu_baseline_bytes, 0
        meter = open_power_meter(device)
        self._meter: PowerMeter | None = None if isinstance(meter, str) else meter
        self._no_meter_reason = meter if isinstance(meter, str) else ""
        self.idle_watts: float | None = None

    def read_idle(self) -> None:
        """Measure the power for a second with nothing running."""
        if self._meter is not None:
            with self._meter:
                time.sleep(IDLE_S)
            self.idle_watts = self._meter.mean_watts if self._meter.samples else None

    @contextlib.contextmanager
    def reading(self) -> Iterator[MonitorReading]:
        """Read power and clocks inside the block."""
        reading = MonitorReading()
        clock_monitor = open_clock_monitor(self._device)
        with contextlib.ExitStack() as running:
            for monitor in (self._meter, clock_monitor):
                if monitor is not None:
                    running.enter_context(monitor)
            yield reading
        if self._meter is not None and self._meter.samples:
            reading.watts, reading.samples = self._meter.mean_watts, self._meter.samples
        if clock_monitor is not None:
            reading.clocks = clock_monitor.clocks

    def energy(self, reading: MonitorReading, *, images_per_second: float) -> tuple[Energy | None, str]:
        """Return the energy of a reading, or `None` and the reason."""
        if self._meter is None:
            return None, self._no_meter_reason
        if reading.watts is None:
            return None, f"{self._meter.source} had too few readings in this time: use a longer --duration."
        energy = Energy(
            source=self._meter.source,
            watts=reading.watts,
            idle_watts=self.idle_watts,
            joules_per_image=reading.watts / images_per_second,
            samples=reading.samples,
        )
        return energy, ""

    def peak_memory(self) -> tuple[int, int | None]:
        """Return the peak memory of this process, and the highest GPU memory above the baseline seen so far."""
        if self._gpu_baseline is not None:
            used = gpu_memory_used(self._device)
            self._gpu_peak = max(self._gpu_peak, (used or 0) - self._gpu_baseline)
        return host_peak_bytes(), None if self._gpu_baseline is None else self._gpu_peak
