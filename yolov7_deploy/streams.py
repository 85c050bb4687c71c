"""Streams: cameras and files that are detected at the same time, with one model and shared batches.

A thread for each stream reads frames (`sources/streams.py`). Another thread forms a batch of what is there, at most one
frame of each stream, and runs the network, while the caller works on the results of the batch before. It starts a batch
only when those were fetched, so that frames do not grow old in a queue of results.
"""

from __future__ import annotations

import bisect
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any

from yolov7_deploy.detections import Detections
from yolov7_deploy.errors import SourceError, UsageError, Y7Error
from yolov7_deploy.sources import Frame, Skipped
from yolov7_deploy.sources.live import CLOSE_TIMEOUT_S, POLL_S, StreamState
from yolov7_deploy.sources.streams import Captured, Stream, StreamEvent, StreamOptions, StreamSources

MAX_AGE_S = 1.0
# Upper bounds of the classes of a histogram, in seconds; the last class has no bound.
BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SMOOTHING = 0.2  # weight of the newest batch in the expected time of a frame, if it was slower
MAX_REASONS = 3  # of streams, in an error message

DetectFrames = Callable[[Sequence[Frame]], list[Detections]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class StreamFrame(Frame):
    """A frame of one of several streams.

    Attributes:
        queue_age_s: Seconds from its capture until its batch started, at most `max_age_s` for cameras.
        latency_s: Seconds from its capture until its detections were returned.
    """

    queue_age_s: float
    latency_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Durations of something, in classes.

    Attributes:
        counts: Number of durations up to each of `BOUNDS_S`, and of longer ones.
        total_s: Their sum.
        max_s: The longest.
    """

    counts: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)
    total_s: float = 0.0
    max_s: float = 0.0

    @property
    def count(self) -> int:
        """Number of all durations."""
        return sum(self.counts)

    @property
    def mean_s(self) -> float:
        """The mean, 0 without any."""
        return self.total_s / max(self.count, 1)

    def to_dict(self) -> dict[str, float]:
        """Return mean and maximum in milliseconds as plain data for JSON."""
        return {"mean": round(self.mean_s * 1e3, 3), "max": round(self.max_s * 1e3, 3)}


class _Durations:
    """The changing state of a `Histogram`."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._total_s = self._max_s = 0.0

    def add(self, duration_s: float) -> None:
        self._counts[bisect.bisect_left(BOUNDS_S, duration_s)] += 1
        self._total_s += duration_s
        self._max_s = max(self._max_s, duration_s)

    def snapshot(self) -> Histogram:
        return Histogram(counts=tuple(self._counts), total_s=self._total_s, max_s=self._max_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamCounters:
    """Counters of a stream; `received` is the sum of `frames`, `dropped`, `expired` and the frames in progress.

    Attributes:
        stream: Its number, from 0.
        source: Address without password, or path.
        state: `connecting`, `running`, `lost` or `ended`.
        received: Frames that were read.
        frames: Frames whose detections were returned.
        dropped: Frames that were replaced by a newer one before a batch took them.
        expired: Frames that were older than `max_age_s` when a batch would have taken them.
        detections: Detections in all frames.
        connections: How often the camera was opened and sent a frame; 1 for files.
        last_frame_s: Capture time of the last frame, in seconds since 1970; 0 without any, and for files.
        queue_age, latency: Distributions of those of `StreamFrame`.
        skipped: Files that could not be read, with reasons.
    """

    stream: int
    source: str
    state: StreamState
    received: int
    frames: int
    dropped: int
    expired: int
    detections: int
    connections: int
    last_frame_s: float
    queue_age: Histogram
    latency: Histogram
    skipped: tuple[Skipped, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the counters as plain data for JSON."""
        names = "stream source state received frames dropped expired detections connections"
        return {
            **{name: getattr(self, name) for name in names.split()},
            "queue_age_ms": self.queue_age.to_dict(),
            "latency_ms": self.latency.to_dict(),
        }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Batch:
    """Detections of one run of the network, and when it started on the clock of `time.monotonic`."""

    captured: Sequence[Captured]
    detections: Sequence[Detections]
    started_s: float


class _BatchLoop:
    """The thread that forms batches and runs the network; it hands over one result at a time.

    Args:
        sources: What is read.
        detect: Returns the detections of each frame of a batch.
        options: Options of the streams.
        max_batch: Maximum number of frames in a batch.
        max_age_s: Older frames of cameras are not used.
    """

    def __init__(
        self, sources: StreamSources, detect: DetectFrames, *, options: StreamOptions, max_batch: int, max_age_s: float
    ) -> None:
        self._detect = detect
        self._max_batch = max_batch
        self._max_age_s = max_age_s
        self._skips = sources.on_error == "skip"
        self._changed = threading.Condition()  # of frames; `_handed_over` is the one of results
        self._handed_over = threading.Condition()
        self._events: deque[StreamEvent] = deque()
        self.streams = [
            Stream(
                number,
                source,
                on_error=sources.on_error,
                options=options,
                changed=self._changed,
                on_event=self._events.append,
            )
            for number, source in enumerate(sources.streams)
        ]
        self.expired = [0] * len(self.streams)
        self._order = list(self.streams)  # those that waited longest for a batch come first
        self._started_s = 0.0
        self._ended: set[int] = set()
        self._frame_s = float("inf")  # expected time of a frame in a batch; the first batch has one frame
        self._batch_times = _Durations()
        self._result: _Batch | None = None
        self.error: Exception | None = None
        self._has_ended = False
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="y7-batches", daemon=True)

    def start(self) -> None:
        """Start all threads."""
        for stream in self.streams:
            stream.start()
        self._thread.start()

    @property
    def batch_times(self) -> Histogram:
        """Times of all runs of the network."""
        return self._batch_times.snapshot()

    @property
    def is_over(self) -> bool:
        """True after the last result was fetched, after an error, and after `close`."""
        return self._has_ended or self._is_closed.is_set()

    def wait(self, timeout_s: float) -> tuple[_Batch | None, list[StreamEvent]]:
        """Return the next result, or `None` after the timeout or at the end, and the events before it.

        The thread continues after it, so that the end of a file is not among the events before its last frame.
        """
        with self._handed_over:
            if self._result is None and not self.is_over:
                self._handed_over.wait(timeout_s)
            events = [self._events.popleft() for _ in range(len(self._events))]
            result, self._result = self._result, None
            self._handed_over.notify_all()
        return result, events

    def close(self) -> None:
        """Stop all threads; a running batch is finished, and a stream that waits for the network ends later."""
        self._is_closed.set()
        for stream in self.streams:
            stream.stop()
        for condition in (self._changed, self._handed_over):
            with condition:
                condition.notify_all()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for stream in self.streams:
            stream.close(timeout_s=max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            while batch := self._next_batch():
                detections = self._detect([captured.frame for captured in batch])
                self._measure(len(batch), time.monotonic() - self._started_s)
                with self._handed_over:
                    self._result = _Batch(captured=batch, detections=detections, started_s=self._started_s)
                    self._handed_over.notify_all()
        except Exception as error:  # noqa: BLE001 - the caller's thread raises it
            self.error = error
        finally:
            with self._handed_over:
                self._has_ended = True
                self._handed_over.notify_all()

    def _measure(self, frames: int, seconds: float) -> None:
        self._batch_times.add(seconds)
        frame_s = seconds / frames
        slower_s = self._frame_s + SMOOTHING * (frame_s - self._frame_s)
        self._frame_s = frame_s if frame_s < self._frame_s else slower_s

    def _next_batch(self) -> list[Captured]:
        """Wait until the last result was fetched and there are frames; return `[]` at the end.

        Raises:
            Y7Error: Files cannot be read, and are not to be skipped; any other error in the thread of a stream.
        """
        with self._handed_over:
            while self._result is not None and not self._is_closed.is_set():
                self._handed_over.wait(POLL_S)
        with self._changed:
            while not self._is_closed.is_set():
                self._check_ended()
                batch = self._take()
                if batch or all(stream.is_over for stream in self.streams):
                    return batch
                self._changed.wait(POLL_S)
        return []

    def _take(self) -> list[Captured]:
        """Return a frame of each stream that has one, first of those that waited longest, up to the limit."""
        self._started_s = time.monotonic()
        ready = [stream for stream in self._order if stream.is_ready]
        limit = self._batch_size(len(ready))
        batch: list[Captured] = []
        served: list[Stream] = []
        for stream in ready:
            captured = stream.poll() if len(batch) < limit else None
            if captured is None:
                continue
            if captured.expires and self._started_s - captured.monotonic_s > self._max_age_s:
                self.expired[stream.number] += 1
                continue
            batch.append(captured)
            served.append(stream)
        self._order = [stream for stream in self._order if stream not in served] + served
        return batch

    def _batch_size(self, ready: int) -> int:
        """Return how many of the frames that are ready form a batch: the maximum, or a power of two.

        So there are few sizes: engines capture a CUDA graph for each. A batch is expected to take at most half of the
        age limit, but has at least one frame.
        """
        maximum = min(self._max_batch, len(self.streams))
        in_time = max(1, int(min(self._max_age_s / 2 / max(self._frame_s, 1e-9), maximum)))
        size = min(ready, in_time)
        return size if size in (0, maximum) else 1 << (size.bit_length() - 1)

    def _check_ended(self) -> None:
        """Report the streams of files that have ended since the last call, and raise their errors."""
        for stream in self.streams:
            if stream.state != "ended" or stream.number in self._ended:
                continue
            self._ended.add(stream.number)
            error = stream.error
            if error is not None and not (self._skips and isinstance(error, Y7Error)):
                raise error
            reason = error.message if isinstance(error, Y7Error) else ""
            self._events.append(
                StreamEvent(stream=stream.number, state="ended", reason=reason, timestamp_s=time.time())
            )

    def final_error(self) -> Exception | None:
        """Return the error with which the iteration ends after all frames, if any: cameras that do not come back."""
        if self._is_closed.is_set():
            return None
        if self.error is not None:
            return self.error
        errors = [stream.error for stream in self.streams if stream.error is not None]
        lost = any(stream.state == "lost" for stream in self.streams)
        if not errors or not (lost or all(stream.received == 0 for stream in self.streams)):
            return None
        if len(errors) == 1:
            return errors[0]
        messages = [error.message if isinstance(error, Y7Error) else str(error) for error in errors]
        more = f" And {len(errors) - MAX_REASONS} more." if len(errors) > MAX_REASONS else ""
        return SourceError(" ".join(messages[:MAX_REASONS]) + more, fix="Check the addresses with:  ffplay URL")


class _Tally:
    """The counters of a stream that change with each returned frame."""

    def __init__(self) -> None:
        self.frames = self.detections = 0
        self.last_frame_s = 0.0
        self.queue_age, self.latency = _Durations(), _Durations()

    def add(self, frame: StreamFrame, detections: Detections) -> None:
        self.frames += 1
        self.detections += len(detections)
        self.last_frame_s = frame.timestamp_s if frame.is_live else 0.0
        self.queue_age.add(frame.queue_age_s)
        self.latency.add(frame.latency_s)


class Streams:
    """An iterator over the frames of several cameras and files with their detections; see `Detector.streams`.

    Reading begins with the first frame. The iteration ends when all files are read and no camera is left; use it as a
    context manager, or call `close`, to end it earlier.

    Args:
        sources: What is read.
        detect: Returns the detections of each frame of a batch.
        options: Options of the streams.
        max_batch: Maximum number of frames in a batch.
        max_age_s: Frames of cameras that are older are not used.
        on_event: Called with each `StreamEvent`, in the thread that iterates.

    Example:
        >>> def count(streams: Streams) -> int:
        ...     return sum(len(detections) for frame, detections in streams)
        >>> with Detector("shapes.onnx") as detector, detector.streams(["street.jpg", "images"]) as streams:
        ...     number = count(streams)
        >>> [counters.frames for counters in streams.counters]
        [1, 8]
    """

    def __init__(
        self,
        sources: StreamSources,
        detect: DetectFrames,
        *,
        options: StreamOptions,
        max_batch: int,
        max_age_s: float = MAX_AGE_S,
        on_event: Callable[[StreamEvent], None] | None = None,
    ) -> None:
        _check_limits(max_batch=max_batch, max_age_s=max_age_s)
        self.sources = sources
        self._listeners = [on_event] if on_event is not None else []
        self._realtime = options.realtime
        self._loop = _BatchLoop(sources, detect, options=options, max_batch=max_batch, max_age_s=max_age_s)
        self._tallies = [_Tally() for _ in sources.streams]
        self._lock = threading.Lock()  # of the tallies, which another thread may read
        self._ready: deque[tuple[Captured, Detections, float]] = deque()
        self._index = 0
        self._is_started = False
        self._finalizer = weakref.finalize(self, self._loop.close)  # also if the caller leaves the iteration

    @property
    def is_live(self) -> bool:
        """True if frames may be dropped: there is a camera, or videos play like one."""
        return self._realtime or any(stream.is_live for stream in self.sources.streams)

    def listen(self, on_event: Callable[[StreamEvent], None]) -> None:
        """Also call a function with each `StreamEvent`, in the thread that iterates."""
        self._listeners.append(on_event)

    @property
    def counters(self) -> tuple[StreamCounters, ...]:
        """Counters of each stream, also from other threads and after the end."""
        with self._lock:
            return tuple(map(self._snapshot, self._loop.streams, self._tallies, self._loop.expired))

    @property
    def batch_times(self) -> Histogram:
        """Times of all runs of the network."""
        return self._loop.batch_times

    def _snapshot(self, stream: Stream, tally: _Tally, expired: int) -> StreamCounters:
        return StreamCounters(
            stream=stream.number,
            source=stream.source.label,
            state=stream.state,
            received=stream.received,
            frames=tally.frames,
            dropped=stream.dropped,
            expired=expired,
            detections=tally.detections,
            connections=stream.connections,
            last_frame_s=tally.last_frame_s,
            queue_age=tally.queue_age.snapshot(),
            latency=tally.latency.snapshot(),
            skipped=stream.skipped,
        )

    def __iter__(self) -> Streams:
        return self

    def __next__(self) -> tuple[StreamFrame, Detections]:
        if not self._is_started:
            self._is_started = True
            self._loop.start()
        while not self._ready:
            self._fetch()
        captured, detections, started_s = self._ready.popleft()
        frame = _to_stream_frame(captured, index=self._index, started_s=started_s)
        self._index += 1
        with self._lock:
            self._tallies[frame.stream].add(frame, detections)
        return frame, detections

    def _fetch(self) -> None:
        """Wait a short time for the next batch, so that events are reported also without one.

        Raises:
            StopIteration: The end.
            Y7Error: An error ended it.
        """
        is_over = self._loop.is_over
        batch, events = self._loop.wait(POLL_S)
        for event in events:
            for listener in self._listeners:
                listener(event)
        if batch is not None:
            self._ready.extend((*one, batch.started_s) for one in zip(batch.captured, batch.detections, strict=True))
        elif is_over:
            error = self._loop.final_error()
            self.close()
            raise error or StopIteration

    def close(self) -> None:
        """End the iteration and stop all threads. It can be called repeatedly."""
        self._is_started = True
        self._ready.clear()
        self._finalizer()

    def __enter__(self) -> Streams:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _to_stream_frame(captured: Captured, *, index: int, started_s: float) -> StreamFrame:
    frame = replace(captured.frame, index=index)
    return StreamFrame(
        **{field.name: getattr(frame, field.name) for field in fields(Frame)},
        queue_age_s=started_s - captured.monotonic_s,
        latency_s=time.monotonic() - captured.monotonic_s,
    )


def _check_limits(*, max_batch: int, max_age_s: float) -> None:
    if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
        raise UsageError(f"--batch must be a number of frames from 1, not {max_batch!r}.", fix="For example: --batch 8")
    if isinstance(max_age_s, bool) or not isinstance(max_age_s, int | float) or not 0 < max_age_s < float("inf"):
        raise UsageError(f"--max-age must be a number of seconds above 0, not {max_age_s!r}.", fix="--max-age 1")
