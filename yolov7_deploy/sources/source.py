"""Where images come from: files, folders, patterns, videos, cameras, streams, lists and arrays, all as `Frame`s."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt

from yolov7_deploy.errors import ImageError, SourceError
from yolov7_deploy.image import Image, as_bgr, read_image
from yolov7_deploy.sources.live import LiveReader
from yolov7_deploy.sources.resolve import Item, OnError, Skipped, resolve
from yolov7_deploy.sources.video import OpenCapture, VideoFile, download_image, open_capture

log = logging.getLogger(__name__)

LIVE_TURN_S = 0.01  # how long one of several streams is waited for before the next has its turn

SourceLike = str | Path | int | npt.NDArray[Any] | Sequence[str | Path | npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frame:
    """One image and where it comes from.

    Attributes:
        image: uint8 BGR [H, W, 3].
        path: File or address, without passwords; `camera 0`; empty for arrays.
        index: Number of the image in the whole source, from 0.
        number: Number of the frame in its own video or stream, from 0; `None` for images.
        timestamp_s: Seconds from the start of the video; for live frames the capture time as `time.time()`;
            0 for images.
        is_live: From a camera or stream, where frames may have been dropped.
        fps: Frames per second of its video or stream, 0 where unknown.
        dropped: Frames of this stream that came and went unused so far.
    """

    image: Image
    path: str
    index: int
    number: int | None = None
    timestamp_s: float = 0.0
    is_live: bool = False
    fps: float = 0.0
    dropped: int = 0


class Source:
    """Frames in order: files first, then all cameras and streams together, in turn, each with its newest frame.

    Files can be iterated again. Use it as a context manager, or call `close`, to stop the threads of live streams.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        on_error: OnError,
        missing: Sequence[Skipped],
        reader: Callable[[str | int], LiveReader],
        opener: OpenCapture,
    ) -> None:
        self._files = [item for item in items if item.kind != "live"]
        self._live = [item for item in items if item.kind == "live"]
        self._on_error = on_error
        self._missing = list(missing)
        self._unreadable: list[Skipped] = []
        self._reader = reader
        self._opener = opener
        self._readers: list[tuple[str, LiveReader]] = []

    @property
    def is_live(self) -> bool:
        """Whether it ends only when it is stopped."""
        return bool(self._live)

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file and address, as `Frame.path` will show them."""
        return tuple(item.shown for item in (*self._files, *self._live))

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What was left out so far under `on_error="skip"`."""
        return (*self._missing, *self._unreadable)

    @functools.cached_property
    def total(self) -> int | None:
        """How many frames there will be, or `None` where nobody knows. Opens every video once."""
        if self._live:
            return None
        count = 0
        for item in self._files:
            frames = 1
            if item.kind == "video":
                try:
                    with VideoFile(item.address, opener=self._opener) as video:
                        frames = video.info.frames
                except SourceError:
                    return None
            if frames < 1:
                return None
            count += frames
        return count

    def __iter__(self) -> Iterator[Frame]:
        self._unreadable.clear()
        index = 0
        for item in self._files:
            try:
                for frame in self._read(item, index):
                    index = frame.index + 1
                    yield frame
            except (ImageError, SourceError) as error:
                if self._on_error == "raise":
                    raise
                log.info("Skipped %s: %s", item.shown, error.message)
                self._unreadable.append(Skipped(path=item.shown, reason=error.message))
        if self._live:
            yield from self._read_live(index)
        elif index == 0:
            raise _nothing_left(self.skipped)

    def _read(self, item: Item, index: int) -> Iterator[Frame]:
        if item.kind == "video":
            with VideoFile(item.address, opener=self._opener) as video:
                for number, (image, seconds) in enumerate(video.read()):
                    yield Frame(
                        image=image,
                        path=item.shown,
                        index=index + number,
                        number=number,
                        timestamp_s=seconds,
                        fps=video.info.fps,
                    )
        elif item.kind == "array":
            yield Frame(image=as_bgr(item.address), path="", index=index)
        elif item.shown.startswith(("http://", "https://")):
            yield Frame(image=download_image(item.address), path=item.shown, index=index)
        else:
            yield Frame(image=read_image(item.address), path=item.shown, index=index)

    def _read_live(self, index: int) -> Iterator[Frame]:
        self._readers = [(item.shown, self._reader(item.address)) for item in self._live]
        try:
            while self._readers:
                pause_s = LIVE_TURN_S if len(self._readers) > 1 else None
                for path, reader in list(self._readers):
                    frame = self._take(path, reader, index, timeout_s=pause_s)
                    if frame is not None:
                        index += 1
                        yield frame
        finally:
            self.close()

    def _take(self, path: str, reader: LiveReader, index: int, *, timeout_s: float | None) -> Frame | None:
        """The newest frame; a reader that has none for good is taken out, the last one with its error."""
        try:
            live = reader.take(timeout_s=timeout_s)
        except SourceError as error:
            self._readers = [pair for pair in self._readers if pair[1] is not reader]
            if self._on_error == "raise" or not self._readers:
                raise
            log.info("Skipped %s: %s", path, error.message)
            self._unreadable.append(Skipped(path=path, reason=error.message))
            return None
        if live is None:
            return None
        return Frame(
            image=live.image,
            path=path,
            index=index,
            number=live.number,
            timestamp_s=live.captured_s,
            is_live=True,
            fps=live.fps,
            dropped=reader.dropped,
        )

    def close(self) -> None:
        """Stops the threads of live streams; a loop over it ends. Calling it twice is fine."""
        readers, self._readers = self._readers, []
        for _, reader in readers:
            reader.stop()
        for _, reader in readers:
            reader.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_source(
    source: SourceLike,
    *,
    on_error: OnError = "raise",
    reconnects: int = 5,
    reconnect_wait_s: float = 1.0,
    opener: OpenCapture = open_capture,
) -> Source:
    """Everything `source` means, ready to iterate.

    Args:
        source: An image or video file, a folder (not its subfolders), a pattern (`shots/**/*.jpg`), a camera number,
            a stream or image address, a `.txt` file that lists any of these, an array [H, W, 3], or a sequence
            of any of these.
        on_error: What an unreadable image among good ones does; what was skipped stands in `Source.skipped`.
        reconnects: How often in a row a lost stream is opened again.
        reconnect_wait_s: Pause before the first of these.
        opener: Opens cameras, streams and videos; tests pass a stand-in.

    Raises:
        SourceError: Nothing to read: an absent file, an empty folder, a pattern without match.
        ImageError: While iterating, an image that cannot be read.
        UsageError: An argument of a kind that is no source.
    """
    missing: list[Skipped] = []
    items = list(resolve(source, folder=None, on_error=on_error, missing=missing))
    if not items:
        raise _nothing_left(missing)

    def reader(address: str | int) -> LiveReader:
        return LiveReader(address, open_capture=opener, reconnects=reconnects, wait_s=reconnect_wait_s)

    return Source(items, on_error=on_error, missing=missing, reader=reader, opener=opener)


def _nothing_left(skipped: Sequence[Skipped]) -> SourceError:
    first = "; ".join(f"{item.reason}" for item in skipped[:3])
    return SourceError(f"Nothing could be read. {first or 'The source is empty.'}", fix="Check the path.")
