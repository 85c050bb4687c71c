"""Several streams that are read at the same time: cameras, of which the newest frame counts, and files.

Each stream has a thread of its own, so a camera that does not answer delays no other. All threads notify one condition,
on which the consumer of the frames waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from yolov7_deploy.errors import SourceError, UsageError
from yolov7_deploy.image import ImageBytes, is_pil_image
from yolov7_deploy.sources.files import Skipped
from yolov7_deploy.sources.live import CLOSE_TIMEOUT_S, POLL_S, LiveReader, OnState, StreamState
from yolov7_deploy.sources.resolve import Item, OnError, check_on_error, identify, resolve
from yolov7_deploy.sources.source import Frame, Source, SourceLike
from yolov7_deploy.sources.video import AnsweredCapture, OpenCapture, open_capture

MAX_REASONS = 3  # of lines of a list, in a message


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StreamSource:
    """One camera, or the files of one source.

    Attributes:
        items: One item for a camera; files are read one after the other.
        label: The address without password, or the path of the files.
        is_live: It is a camera or stream, or an address that may be one.
    """

    items: tuple[Item, ...]
    label: str
    is_live: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StreamSources:
    """The streams of a list of sources; nothing is opened yet.

    Attributes:
        streams: In the order of the sources; a text list with several cameras has a stream for each.
        skipped: Invalid lines of text lists, with `on_error="skip"`.
        left_out: What folders and patterns have besides images and videos.
        on_error: `raise` or `skip` images and videos that cannot be read.
    """

    streams: tuple[StreamSource, ...]
    skipped: tuple[Skipped, ...]
    left_out: tuple[Skipped, ...]
    on_error: OnError

    @property
    def paths(self) -> tuple[str, ...]:
        """All files and URLs, in the form of `Frame.path`."""
        return tuple(item.label for stream in self.streams for item in stream.items)


def resolve_streams(sources: Sequence[SourceLike], *, on_error: OnError = "raise") -> StreamSources:
    """Find the cameras and files of several sources, without opening them and without asking any server.

    Args:
        sources: Each is anything that `open_source` takes. The files of one source are one stream.
        on_error: `raise` or `skip` images and videos that cannot be read.

    Raises:
        SourceError: A file does not exist, or a folder, pattern or list has nothing to read.
        UsageError: `sources` is a single source, or the type of a source is not supported.
    """
    check_on_error(on_error)
    _check_several(sources)
    skipped: list[Skipped] = []
    left_out: list[Skipped] = []
    streams: list[StreamSource] = []
    for source in sources:
        found = resolve(source, folder=None, on_error=on_error, skipped=skipped, left_out=left_out, ask_servers=False)
        streams += _group(list(found), source)
    if not streams:
        reason = "; ".join(item.reason for item in skipped[:MAX_REASONS]) or "There are no sources."
        raise SourceError(f"Nothing could be read. {reason}", fix="Check the paths and addresses.")
    return StreamSources(streams=tuple(streams), skipped=tuple(skipped), left_out=tuple(left_out), on_error=on_error)


def _check_several(sources: object) -> None:
    is_one = isinstance(sources, str | ImageBytes) or is_pil_image(sources) or not isinstance(sources, Sequence)
    if is_one:
        raise UsageError(
            f"Several sources are expected, such as a list, not a single {type(sources).__name__}.",
            fix="For one source use detector.stream(source), or pass a list:  detector.streams([source])",
        )


def _group(items: Sequence[Item], source: object) -> Iterator[StreamSource]:
    """Yield a stream for each camera, and one for all files of a source."""
    for item in items:
        if item.kind in ("live", "http"):
            yield StreamSource(items=(item,), label=item.label, is_live=True)
    files = tuple(item for item in items if item.kind not in ("live", "http"))
    if files:
        yield StreamSource(items=files, label=_label(files, source), is_live=False)


def _label(files: Sequence[Item], source: object) -> str:
    if len(files) == 1:
        return files[0].label or "an array"
    return str(source) if isinstance(source, str | Path) else f"{len(files)} files"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Captured:
    """A frame that waits for a batch.

    Attributes:
        frame: The frame.
        monotonic_s: When it was read, on the clock of `time.monotonic`.
        expires: It loses its value with time: it is of a camera, or of a video that is played like one.
    """

    frame: Frame
    monotonic_s: float
    expires: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamEvent:
    """A change of the state of a stream.

    Attributes:
        stream: Number of the stream, from 0.
        state: The new state: `running`, `lost` or `ended`.
        reason: Why it is lost, or what could not be read; empty otherwise.
        timestamp_s: Time in seconds since 1970.
    """

    stream: int
    state: StreamState
    reason: str
    timestamp_s: float


class FileReader:
    """Reads the frames of files in a thread, one frame ahead of its consumer.

    Args:
        source: Images and videos.
        changed: Condition that is notified of each frame.
        realtime: Play videos at their frame rate: a frame that was not taken is dropped for the next one.
        on_state: Called in the thread of the reader when the state changes.
    """

    def __init__(
        self,
        source: Source,
        *,
        changed: threading.Condition,
        realtime: bool,
        on_state: OnState,
    ) -> None:
        self._source = source
        self._changed = changed
        self._realtime = realtime
        self._on_state = on_state
        self._stop = threading.Event()
        self._next: Captured | None = None
        self._item, self._start_s = -1, 0.0
        self._is_read = False
        self.received = self.dropped = 0
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="y7-files", daemon=True)
        self._thread.start()

    @property
    def state(self) -> StreamState:
        """The state: `connecting` before the first frame, `running`, or `ended`."""
        return "ended" if self.is_over else "running" if self.received else "connecting"

    @property
    def is_ready(self) -> bool:
        """True if `poll` returns a frame."""
        return self._next is not None

    @property
    def is_over(self) -> bool:
        """True after the last frame was taken."""
        return self._is_read and self._next is None

    @property
    def connections(self) -> int:
        """1 after the first frame."""
        return int(self.received > 0)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Files that could not be read, with reasons."""
        return self._source.skipped

    def poll(self) -> Captured | None:
        """Return the next frame, without waiting."""
        with self._changed:
            frame, self._next = self._next, None
            if frame is not None:
                self._changed.notify_all()
        return frame

    def stop(self) -> None:
        """Request the thread to end after the current frame, without waiting for it."""
        self._stop.set()

    def close(self, *, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Stop the thread and wait for it."""
        self.stop()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=timeout_s)

    def _run(self) -> None:
        try:
            for frame in self._source:
                self._put(self._play(frame) if self._realtime and frame.number is not None else frame)
                if self._stop.is_set():
                    return
        except Exception as error:  # noqa: BLE001 - the consumer's thread raises it
            self.error = error
        finally:
            with self._changed:
                self._is_read = True
                self._changed.notify_all()

    def _play(self, frame: Frame) -> Frame:
        """Wait until a frame of a video is due, and return it as a live frame."""
        now_s = time.monotonic()
        if frame.item != self._item:
            self._item, self._start_s = frame.item, now_s
        self._stop.wait(max(0.0, self._start_s + frame.timestamp_s - now_s))
        return replace(frame, is_live=True, timestamp_s=time.time(), dropped=self.dropped)

    def _put(self, frame: Frame) -> None:
        """Offer a frame; one of a file waits until the frame before was taken."""
        with self._changed:
            while self._next is not None and not frame.is_live:
                if self._stop.is_set():
                    return
                self._changed.wait(POLL_S)
            if self.received == 0:
                self._on_state("running", "")  # before its first frame can be taken
            self.dropped += self._next is not None
            self._next = Captured(frame=frame, monotonic_s=time.monotonic(), expires=frame.is_live)
            self.received += 1
            self._changed.notify_all()


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions:
    """Options that all streams share.

    Attributes:
        realtime: Play videos at their frame rate, and drop frames as with a camera.
        reconnects: Number of consecutive attempts to open a camera, after which the run ends if no other stream runs.
        reconnect_wait_s: Seconds before the first attempt; doubled for each further one, up to 30.
        opener: Function that opens cameras, streams and videos; by default OpenCV, which opens a camera on the network
            after it has answered.
    """

    realtime: bool = False
    reconnects: int = 5
    reconnect_wait_s: float = 1.0
    opener: OpenCapture | None = None

    def __post_init__(self) -> None:
        if isinstance(self.reconnects, bool) or not isinstance(self.reconnects, int) or self.reconnects < 0:
            raise UsageError(
                f"--reconnects must be a number from 0, not {self.reconnects!r}.", fix="For example: --reconnects 5"
            )


class Stream:
    """A camera or the files of one source, read in a thread from `start` until `close`.

    Args:
        number: Its number among all streams, from 0.
        source: What it reads.
        on_error: `raise` or `skip` images and videos that cannot be read.
        options: See `StreamOptions`.
        changed: Condition that is notified of each frame and of each change of the state.
        on_event: Called with changes of the state, in the thread of the stream.
    """

    def __init__(
        self,
        number: int,
        source: StreamSource,
        *,
        on_error: OnError,
        options: StreamOptions,
        changed: threading.Condition,
        on_event: Callable[[StreamEvent], None],
    ) -> None:
        self.number = number
        self.source = source
        self._on_error = on_error
        self._options = options
        self._changed = changed
        self._on_event = on_event
        self._reader: LiveReader | FileReader | None = None
        self._error: SourceError | None = None
        self._stop = threading.Event()

    def start(self) -> None:
        """Begin to read; an HTTP address that may be a file is asked about in a thread first."""
        item = self.source.items[0]
        if item.kind == "http":
            threading.Thread(target=self._identify, args=(item,), name="y7-identify", daemon=True).start()
        else:
            self._open(self.source.items)

    def _identify(self, item: Item) -> None:
        try:
            self._open((identify(item),))
        except SourceError as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _open(self, items: Sequence[Item]) -> None:
        with self._changed:
            if not self._stop.is_set():
                self._reader = self._read_live(items[0]) if items[0].kind == "live" else self._read_files(items)

    def _read_live(self, item: Item) -> LiveReader:
        return LiveReader(
            item.address,
            open_capture=self._options.opener or AnsweredCapture(),
            reconnects=None,
            wait_s=self._options.reconnect_wait_s,
            changed=self._changed,
            on_state=self._report,
        )

    def _read_files(self, items: Sequence[Item]) -> FileReader:
        source = Source(
            items,
            on_error=self._on_error,
            skipped=(),
            left_out=(),
            reader=LiveReader,
            opener=self._options.opener or open_capture,
        )
        return FileReader(source, changed=self._changed, realtime=self._options.realtime, on_state=self._report)

    def _report(self, state: StreamState, reason: str) -> None:
        self._on_event(StreamEvent(stream=self.number, state=state, reason=reason, timestamp_s=time.time()))

    @property
    def state(self) -> StreamState:
        """The state of the stream: `connecting`, `running`, `lost` or `ended`."""
        if self._reader is None:
            return "connecting" if self._error is None else "ended"
        return self._reader.state

    @property
    def received(self) -> int:
        """Number of frames that were read."""
        return 0 if self._reader is None else self._reader.received

    @property
    def dropped(self) -> int:
        """Number of frames that were replaced by a newer one."""
        return 0 if self._reader is None else self._reader.dropped

    @property
    def connections(self) -> int:
        """Number of times that it was opened and gave a frame."""
        return 0 if self._reader is None else self._reader.connections

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Files that could not be read, with reasons."""
        return self._reader.skipped if isinstance(self._reader, FileReader) else ()

    @property
    def is_over(self) -> bool:
        """True if no frame can be expected: the files are read, or too many attempts to open the camera failed."""
        if isinstance(self._reader, LiveReader):
            return self._reader.failures > self._options.reconnects
        return self._error is not None if self._reader is None else self._reader.is_over

    @property
    def error(self) -> Exception | None:
        """The error that ended the stream, or that keeps it from being opened."""
        if isinstance(self._reader, LiveReader):
            return self._reader.error() if self._reader.failures else None
        return self._error if self._reader is None else self._reader.error

    @property
    def is_ready(self) -> bool:
        """True if `poll` returns a frame."""
        return self._reader is not None and self._reader.is_ready

    def poll(self) -> Captured | None:
        """Return the frame that is to be detected next, without waiting: the newest of a camera, the next of a file."""
        if isinstance(self._reader, FileReader):
            captured = self._reader.poll()
            return captured and replace(captured, frame=replace(captured.frame, stream=self.number))
        live = None if self._reader is None else self._reader.poll()
        if live is None:
            return None
        frame = Frame(
            image=live.image,
            path=self.source.label,
            index=live.number,
            number=live.number,
            timestamp_s=live.captured_s,
            is_live=True,
            fps=live.fps,
            dropped=self.dropped,
            stream=self.number,
        )
        return Captured(frame=frame, monotonic_s=live.monotonic_s, expires=True)

    def stop(self) -> None:
        """Request the thread to end, without waiting for it."""
        self._stop.set()
        with self._changed:
            if self._reader is not None:
                self._reader.stop()

    def close(self, *, timeout_s: float) -> None:
        """Stop reading and wait for the thread; one that waits for the network ends later."""
        self.stop()
        if self._reader is not None:
            self._reader.close(timeout_s=timeout_s)
