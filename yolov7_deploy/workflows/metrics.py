"""Metrics of streams for Prometheus, as text over HTTP.

Nothing is counted here: each request reads the counters of the streams, so metrics cost nothing between requests.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from yolov7_deploy._text import printable_line
from yolov7_deploy._version import __version__
from yolov7_deploy.errors import UsageError
from yolov7_deploy.streams import BOUNDS_S, Histogram, StreamCounters, Streams

MAX_PORT = 2**16 - 1
_LABELS = ("stream", "source")
_COUNTERS: tuple[tuple[str, str, Callable[[StreamCounters], float]], ...] = (
    ("received", "Frames that were read.", lambda one: one.received),
    ("processed", "Frames whose detections were returned.", lambda one: one.frames),
    ("dropped", "Frames that were replaced by a newer one before a batch took them.", lambda one: one.dropped),
    ("expired", "Frames that were too old when a batch would have taken them.", lambda one: one.expired),
)


class StreamsCollector:
    """Reads the counters of streams when Prometheus asks for them.

    Args:
        streams: See `Detector.streams`.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics."""
        counters = self._streams.counters
        for name, text, value in _COUNTERS:
            yield _family(CounterMetricFamily(f"y7_frames_{name}", text, labels=_LABELS), counters, value)
        family = CounterMetricFamily("y7_detections", "Detections in all frames.", labels=_LABELS)
        yield _family(family, counters, lambda one: one.detections)
        family = CounterMetricFamily("y7_connections", "How often a stream was opened.", labels=_LABELS)
        yield _family(family, counters, lambda one: one.connections)
        up = GaugeMetricFamily("y7_stream_up", "1 if a stream sends frames.", labels=_LABELS)
        yield _family(up, counters, lambda one: one.state == "running")
        newest = GaugeMetricFamily(
            "y7_last_frame_timestamp_seconds", "Capture time of the last frame of a camera.", labels=_LABELS
        )
        yield _family(newest, counters, lambda one: one.last_frame_s)
        yield _histograms("y7_queue_age_seconds", "From capture to batch.", counters, lambda one: one.queue_age)
        yield _histograms("y7_latency_seconds", "From capture to detections.", counters, lambda one: one.latency)
        times = HistogramMetricFamily("y7_batch_seconds", "Runs of the network.")
        _add_histogram(times, (), self._streams.batch_times)
        yield times
        version = GaugeMetricFamily("y7_build_info", "The version of this program.", labels=("version",))
        version.add_metric((__version__,), 1)
        yield version


@contextlib.contextmanager
def serve_metrics(streams: Streams, *, port: int, host: str = "127.0.0.1") -> Iterator[str]:
    """Serve the metrics of streams, and memory and CPU time of the process, and yield the address.

    Args:
        streams: See `Detector.streams`.
        port: The port; 0 takes a free one.
        host: Address of this machine on which other programs can ask; `0.0.0.0` is all of them.

    Raises:
        UsageError: The port is in use, or the address is not one of this machine.

    Example:
        >>> with detector.streams(["rtsp://gate/1", "rtsp://yard/1"]) as streams, serve_metrics(streams, port=9100):
        ...     for frame, detections in streams:
        ...         print(frame.stream, detections.describe())
    """
    check_port(port)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(cast(Collector, StreamsCollector(streams)))
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise UsageError(
            f"Metrics cannot be served on {host}:{port}: {error.strerror or error}.",
            fix="Choose another port, or 0 for a free one:  --metrics-port 0",
        ) from error
    try:
        yield f"http://{host}:{server.server_port}/metrics"
    finally:
        _stop(server.shutdown, server.server_close, thread)


def check_port(port: int) -> None:
    """Check the number of a port.

    Raises:
        UsageError: It is not one.
    """
    if not 0 <= port <= MAX_PORT:
        raise UsageError(f"--metrics-port {port} is not a port.", fix=f"A number from 0 to {MAX_PORT}; 0 is a free one")


def _stop(shutdown: Callable[[], None], close: Callable[[], None], thread: threading.Thread) -> None:
    shutdown()
    thread.join()
    close()


def _label_values(one: StreamCounters) -> tuple[str, str]:
    return str(one.stream), printable_line(one.source)


def _family(
    family: CounterMetricFamily | GaugeMetricFamily,
    counters: Sequence[StreamCounters],
    value: Callable[[StreamCounters], float],
) -> Metric:
    for one in counters:
        family.add_metric(_label_values(one), value(one))
    return family


def _histograms(
    name: str, text: str, counters: Sequence[StreamCounters], histogram: Callable[[StreamCounters], Histogram]
) -> Metric:
    family = HistogramMetricFamily(name, text, labels=_LABELS)
    for one in counters:
        _add_histogram(family, _label_values(one), histogram(one))
    return family


def _add_histogram(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram) -> None:
    """Add a histogram; Prometheus counts all durations up to each bound."""
    bounds = [*map(str, BOUNDS_S), "+Inf"]
    buckets = [(bound, float(sum(histogram.counts[: end + 1]))) for end, bound in enumerate(bounds)]
    family.add_metric(labels, buckets=buckets, sum_value=histogram.total_s)
