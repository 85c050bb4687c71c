"""The event log of streams: one JSON object per line, written while the program runs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from yolov7_deploy._console import json_text
from yolov7_deploy.detections import Detections
from yolov7_deploy.errors import UsageError
from yolov7_deploy.sources.streams import StreamEvent
from yolov7_deploy.streams import StreamCounters, StreamFrame

SCHEMA = 1


@contextlib.contextmanager
def append_lines(path: Path) -> Iterator[Callable[[str], None]]:
    """Yield a function that appends lines to a file, each of which a reader gets at once.

    Unlike other results, an event log is written in place, so that programs can follow it, and an existing one is
    continued: a program that is started again must not delete what was detected before. A line that a killed program
    left incomplete is ended first.

    Args:
        path: The file; missing folders are created.

    Raises:
        UsageError: It cannot be written, or exists and does not have JSON lines.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        needs_break = _check_lines(path)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise _not_written(path, error) from error

    def write(line: str) -> None:
        try:
            file.write(line)
            file.flush()
        except OSError as error:
            raise _not_written(path, error) from error

    try:
        if needs_break:
            write("\n")
        yield write
    finally:
        with contextlib.suppress(OSError):  # what could not be written was reported by `write`
            file.close()


def _check_lines(path: Path) -> bool:
    """Return whether the last line of an existing file has no line break.

    Raises:
        UsageError: The file does not begin as a JSON object.
    """
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        if file.read(1) != b"{":
            raise UsageError(
                f"{path} exists and does not have JSON lines. Nothing is appended to it.",
                fix="Choose another path:  --jsonl events.jsonl",
            )
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _not_written(path: Path, error: OSError) -> UsageError:
    reason = error.strerror or error
    return UsageError(f"{path} cannot be written: {reason}.", fix="Choose another path:  --jsonl events.jsonl")


class EventLog:
    """Writes events as JSON lines.

    Every line has `event` (`run`, `frame`, `running`, `lost`, `ended` or `end`) and `timestamp_s`, in seconds since
    1970; that of a frame is its capture time.

    Args:
        write: Writes one line, such as the function of `append_lines`.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write_line = write

    def write_run(self, settings: Mapping[str, Any], *, sources: Sequence[str]) -> None:
        """Write the first line of a run: its settings, and the source of each stream."""
        names = [{"stream": number, "source": label} for number, label in enumerate(sources)]
        self._write("run", time.time(), {"schema": SCHEMA, **settings, "streams": names})

    def write_frame(self, frame: StreamFrame, detections: Detections) -> None:
        """Write the detections of a frame."""
        record: dict[str, Any] = {
            **detections.to_dict(),
            "stream": frame.stream,
            "frame": frame.number,
            "index": frame.index,
            "dropped": frame.dropped,
            "queue_age_ms": round(frame.queue_age_s * 1e3, 3),
            "latency_ms": round(frame.latency_s * 1e3, 3),
        }
        if not frame.is_live:
            record["position_s"] = round(frame.timestamp_s, 6)
        self._write("frame", frame.timestamp_s if frame.is_live else time.time() - frame.latency_s, record)

    def write_event(self, event: StreamEvent, *, source: str) -> None:
        """Write a change of a stream."""
        reason = {"reason": event.reason} if event.reason else {}
        self._write(event.state, event.timestamp_s, {"stream": event.stream, "source": source, **reason})

    def write_end(self, counters: tuple[StreamCounters, ...], *, reason: str) -> None:
        """Write the last line of a run: the counters of each stream, and why it ended."""
        self._write("end", time.time(), {"reason": reason, "streams": [one.to_dict() for one in counters]})

    def _write(self, event: str, timestamp_s: float, record: Mapping[str, Any]) -> None:
        self._write_line(json_text({"event": event, "timestamp_s": round(timestamp_s, 6), **record}) + "\n")
