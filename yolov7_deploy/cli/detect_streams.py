"""`y7 detect` with several sources: their options, progress, event log, metrics, and a table of all streams."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolov7_deploy._output import echo, is_verbose, note, write_stdout
from yolov7_deploy.cli.options import check_writable
from yolov7_deploy.errors import UsageError, Y7Error, missing_library

if TYPE_CHECKING:
    from yolov7_deploy.detections import Detections
    from yolov7_deploy.detector import Detector
    from yolov7_deploy.sources.streams import StreamEvent, StreamSources
    from yolov7_deploy.streams import StreamCounters, StreamFrame, Streams
    from yolov7_deploy.workflows.event_log import EventLog
    from yolov7_deploy.workflows.predict import AnnotateOptions, PredictionReport

LOOPBACK = "127.0.0.1"
SHOW_EVERY_S = 0.5  # the progress


def check_jsonl_path(path: str | None) -> str | None:
    """Check before the work begins that lines can be appended to a file.

    Raises:
        UsageError: It cannot be written.
    """
    if path is not None and path != "-":
        check_writable(Path(path))
    return path


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamsRequest:
    """Options of `y7 detect` for several sources; if one is given, a single source is handled like several.

    Attributes:
        batch, max_age_s, realtime, reconnects: See `Detector.streams`.
        jsonl: File of the event log; `-` is standard output.
        metrics_port, metrics_host: See `serve_metrics`; no port, no metrics.
    """

    batch: int | None = None
    max_age_s: float = 1.0
    realtime: bool = False
    reconnects: int = 5
    jsonl: str | None = None
    metrics_port: int | None = None
    metrics_host: str = LOOPBACK

    @property
    def is_used(self) -> bool:
        """True if an option has another value than by default."""
        return self != StreamsRequest()

    def check(self, *, json_path: str | None) -> None:
        """Check the options before a model is loaded.

        Raises:
            UsageError: Two results are for standard output, or the port is not one.
            MissingLibraryError: The library of the metrics is not installed.
        """
        if self.jsonl == json_path == "-":
            raise UsageError("--json and --jsonl cannot both write to standard output.", fix="--jsonl events.jsonl")
        if self.metrics_port is None:
            return
        try:
            from yolov7_deploy.workflows.metrics import check_port
        except ModuleNotFoundError as error:
            raise missing_library(error, "for --metrics-port") from error
        check_port(self.metrics_port)


class StreamsConsole:
    """Terminal output for several sources: the progress of all, a line for each image and each change of a stream."""

    def __init__(self, sources: StreamSources, request: StreamsRequest, *, to_stderr: bool) -> None:
        self._sources = sources
        self._request = request
        self.to_stderr = to_stderr
        self.left_out = sources.left_out

    def print(self, line: str) -> None:
        """Print one line."""
        note(line, err=self.to_stderr)

    def annotate(
        self,
        detector: Detector,
        *,
        classes: tuple[int, ...] | None,
        options: AnnotateOptions,
        report: PredictionReport,
        settings: Mapping[str, Any],
    ) -> None:
        """Run the detector over all sources and fill the report."""
        from yolov7_deploy._console import progress_with_note
        from yolov7_deploy.workflows.predict import annotate_streams

        request = self._request
        streams = detector.streams(
            self._sources,
            classes=classes,
            batch=request.batch,
            max_age_s=request.max_age_s,
            realtime=request.realtime,
            reconnects=request.reconnects,
            on_event=self._print_event,
        )
        with contextlib.ExitStack() as stack:
            self._serve_metrics(stack, streams)
            event_log = self._open_log(stack, settings, streams, report)
            show = stack.enter_context(progress_with_note("detect"))
            shown_s = 0.0

            def on_frame(frame: StreamFrame, detections: Detections) -> None:
                nonlocal shown_s
                if frame.number is None or is_verbose():
                    self.print(f"{frame.path}: {detections.describe()}")
                if time.monotonic() - shown_s > SHOW_EVERY_S:
                    shown_s = time.monotonic()
                    show(frame.index + 1, 0, _describe(streams))

            annotate_streams(streams, options=options, report=report, event_log=event_log, on_frame=on_frame)

    def _serve_metrics(self, stack: contextlib.ExitStack, streams: Streams) -> None:
        if self._request.metrics_port is not None:
            from yolov7_deploy.workflows.metrics import serve_metrics

            port, host = self._request.metrics_port, self._request.metrics_host
            self.print(f"Metrics: {stack.enter_context(serve_metrics(streams, port=port, host=host))}")

    def _open_log(
        self, stack: contextlib.ExitStack, settings: Mapping[str, Any], streams: Streams, report: PredictionReport
    ) -> EventLog | None:
        """Open the event log; its last line is written when the run ends, for whatever reason."""
        from yolov7_deploy.workflows.event_log import EventLog, append_lines

        path = self._request.jsonl
        if path is None:
            return None
        write: Callable[[str], None]
        write = write_stdout if path == "-" else stack.enter_context(append_lines(Path(path)))
        event_log = EventLog(write)
        event_log.write_run(settings, sources=[stream.label for stream in self._sources.streams])
        stack.push(lambda kind, error, trace: event_log.write_end(streams.counters, reason=_reason(error, report)))
        return event_log

    def _print_event(self, event: StreamEvent) -> None:
        label = self._sources.streams[event.stream].label
        if event.state == "ended":
            self.print(f"{label} has ended" + (f": {event.reason}" if event.reason else ""))
        elif event.state == "running" and self._sources.streams[event.stream].is_live:
            self.print(f"{label} sends frames")

    def print_summary(self, report: PredictionReport) -> None:
        """Print a table of all streams."""
        from yolov7_deploy._console import table

        echo(table([_row(one) for one in report.streams], _COLUMNS), err=self.to_stderr)


_COLUMNS = ("stream", "source", "state", "frames", "dropped", "expired", "opened", "age ms", "latency ms", "max ms")


def _row(one: StreamCounters) -> tuple[object, ...]:
    age, latency = one.queue_age.to_dict(), one.latency.to_dict()
    times = (f"{age['mean']:.1f}", f"{latency['mean']:.1f}", f"{latency['max']:.1f}")
    return (one.stream, one.source, one.state, one.frames, one.dropped, one.expired, one.connections, *times)


def _reason(error: BaseException | None, report: PredictionReport) -> str:
    """Return why a run ended before its sources, in one line."""
    if report.stopped_by:
        return signal.Signals(report.stopped_by).name
    if error is None:
        return "stopped" if report.stopped else ""
    return error.message if isinstance(error, Y7Error) else str(error) or type(error).__name__


def _describe(streams: Streams) -> str:
    states = [one.state for one in streams.counters]
    running = sum(state == "running" for state in states)
    lost = sum(state in ("lost", "connecting") for state in states)
    return f"{running} of {len(states)} sources run" + (f", {lost} lost" if lost else "")
