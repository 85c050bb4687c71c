"""Timing of repeated calls: warm-up until times are stable, samples in turns, percentiles, callers at the same time."""

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

from yolov7_deploy.benchmark.report import SpanTime

BLOCKS = 20  # parts of a run whose medians two runs are compared by
STABLE_BLOCKS = 3  # of the warm-up, one after the other,
STABLE_WITHIN = 0.02  # whose medians lie this close together,
STABLE_BLOCK_S = 0.3  # and which last at least so long
LOOK_S = 0.2  # between two looks at whether somebody pressed Ctrl-C

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Warmup:
    """What ran before anything was measured; see `SpeedRow`."""

    calls: int
    seconds: float
    settled: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """What callers at the same time got done.

    Attributes:
        calls: In `seconds`; those across its start or end by their part inside.
        seconds: From the moment when all were at work to the end.
        samples_ms: Duration of every call but the first of each caller, in the order of their ends.
    """

    calls: float
    seconds: float
    samples_ms: tuple[float, ...]


def warm_up(call: Call, *, limit_s: float) -> Warmup:
    """Calls until the medians of the last blocks lie close together, or the limit has passed.

    Processors raise their clocks, libraries choose algorithms and fill caches: none of that is what is asked for.
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
        settled = len(last) == STABLE_BLOCKS and max(last) <= min(last) * (1 + STABLE_WITHIN)
        seconds = time.perf_counter() - started
        if settled or seconds >= limit_s:
            return Warmup(calls=calls, seconds=seconds, settled=settled)


def timed_ms(call: Call) -> float:
    """Milliseconds of one call."""
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e6


def interleave(
    runs: Sequence[Call], *, turn_s: float, seconds: float, least_turns: int, on_turn: Callable[[float], None]
) -> None:
    """Runs several things in turns, so that a machine that drifts is the same to all of them.

    The order is reversed every other time. No turn is cut; the garbage collector waits until it is over.

    Args:
        runs: Each is called as often as fits a turn, and keeps its own samples.
        turn_s: About how long one of them runs on.
        seconds: After which it ends,
        least_turns: but not before so many turns of each.
        on_turn: Told the share that is done, 0 to 1.
    """
    started = time.perf_counter()
    turn = 0
    while turn < least_turns or time.perf_counter() - started < seconds:
        for run in runs if turn % 2 == 0 else reversed(runs):
            with no_garbage_collection():
                until = time.perf_counter() + turn_s
                run()
                while time.perf_counter() < until:
                    run()
        turn += 1
        on_turn(min(1.0, turn / least_turns, (time.perf_counter() - started) / seconds if seconds else 1.0))


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps Python from looking for cycles inside; afterwards it is as before."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def span_time(name: str, samples_ms: Sequence[float]) -> SpanTime:
    """What the samples, in the order in which they were taken, say about a span."""
    values = np.asarray(samples_ms, dtype=np.float64)
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    edges = np.linspace(0, len(values), min(BLOCKS, len(values)) + 1).astype(int)
    return SpanTime(
        name=name,
        p50=float(p50),
        p90=float(p90),
        p99=float(p99),
        mean=float(values.mean()),
        least=float(values.min()),
        blocks=tuple(median(values[start:end].tolist()) for start, end in pairwise(edges)),
    )


def run_concurrently(call: Callable[[int], object], *, threads: int, seconds: float, least_calls: int) -> Throughput:
    """Callers that each call again as soon as they have their answer, until each got `least_calls` done.

    The clock starts when everybody has had the first answer, so that all are at work, one behind the other where they
    must wait for each other. A call that lies across the start or the end counts by its part in between.

    Args:
        call: Is given the number of the caller; what it raises ends all of them and is raised here.
        threads: How many callers; a single one runs in a thread of its own as well.
        seconds: At least so long.
        least_calls: Of every caller.
    """
    callers = _Callers(call, threads=threads, seconds=seconds, least_calls=least_calls)
    workers = [threading.Thread(target=callers.work, args=(number,), daemon=True) for number in range(threads)]
    with no_garbage_collection():
        try:
            for worker in workers:
                worker.start()
            while not callers.over.wait(LOOK_S):  # Ctrl-C arrives here, in the main thread
                pass
        finally:
            callers.over.set()
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
    if callers.errors:
        raise callers.errors[0]
    return callers.result()


class _Callers:
    """What callers share: their calls, and whether it is over."""

    def __init__(self, call: Callable[[int], object], *, threads: int, seconds: float, least_calls: int) -> None:
        self._call, self._seconds, self._least_calls = call, seconds, least_calls
        self._calls: list[list[tuple[float, float]]] = [[] for _ in range(threads)]  # start and end of each
        self._ended = 0.0
        self.over = threading.Event()
        self.errors: list[BaseException] = []

    def work(self, number: int) -> None:
        """One caller, in its own thread."""
        try:
            while not self.over.is_set():
                begun = time.perf_counter()
                self._call(number)
                ended = time.perf_counter()
                self._calls[number].append((begun, ended))
                if min(map(len, self._calls)) > self._least_calls and ended - self._began() >= self._seconds:
                    self._ended = ended
                    self.over.set()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that asked
            self.errors.append(error)
            self.over.set()

    def _began(self) -> float:
        return max(calls[0][1] for calls in self._calls)

    def result(self) -> Throughput:
        """What was done from the first answer of everybody to the end."""
        begin, end = self._began(), self._ended
        calls = [call for own in self._calls for call in own]
        warm = sorted((call for own in self._calls for call in own[1:]), key=lambda call: call[1])
        parts = [(min(ended, end) - max(begun, begin)) / (ended - begun) for begun, ended in calls]
        return Throughput(
            calls=sum(max(0.0, part) for part in parts),
            seconds=end - begin,
            samples_ms=tuple((ended - begun) * 1e3 for begun, ended in warm),
        )
