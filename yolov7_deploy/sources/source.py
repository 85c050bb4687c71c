"""Iteration over a source: every image, video frame and live frame is a `Frame`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt

from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import ImageError, SourceError
from yolov7_deploy.image import Image, ImageBytes, PilImage, as_bgr, read_image
from yolov7_deploy.sources.files import Skipped
from yolov7_deploy.sources.live import CLOSE_TIMEOUT_S, LiveReader
from yolov7_deploy.sources.resolve import Item, OnError, check_on_error, resolve
from yolov7_deploy.sources.video import OpenCapture, VideoFile, download_image, open_capture

log = get_logger(__name__)

LIVE_POLL_S = 0.01  # timeout for each of several streams, which are polled in turn

OneSource = str | Path | int | npt.NDArray[Any] | PilImage | ImageBytes
SourceLike = OneSource | Sequence[OneSource]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Frame:
    """One image and its origin.

    Attributes:
        image: uint8 BGR [H, W, 3].
        path: File path, URL without password, or `camera 0`; empty for arrays.
        index: Number of the image in the whole source, from 0.
        number: Number of the frame in its own video or stream, from 0; `None` for images.
        timestamp_s: Seconds from the start of the video; for live frames the capture time in seconds since 1970;
            0 for images.
        is_live: The frame is from a camera or stream, where frames may be dropped.
        fps: Frames per second of its video or stream, 0 if unknown.
        dropped: Number of frames of this stream that were dropped so far.
        item: Number of its file or stream in the source, from 0; the paths of two may be equal.
        stream: Number of its stream in `Detector.streams`, from 0; 0 elsewhere.
    """

    image: Image
    path: str
    index: int
    number: int | None = None
    timestamp_s: float = 0.0
    is_live: bool = False
    fps: float = 0.0
    dropped: int = 0
    item: int = 0
    stream: int = 0

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        number = "" if self.number is None else f", number={self.number}, timestamp_s={self.timestamp_s:g}"
        return f"Frame({self.path!r}, index={self.index}{number}, image {height}x{width})"


class Source:
    """An iterable of frames: files first, in order; then the newest frames of all cameras and streams, in turn.

    Files can be iterated repeatedly. Use it as a context manager, or call `close`, to stop the threads of live streams.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        on_error: OnError,
        skipped: Sequence[Skipped],
        left_out: Sequence[Skipped],
        reader: Callable[[str | int], LiveReader],
        opener: OpenCapture,
    ) -> None:
        self._files = [item for item in items if item.kind != "live"]
        self._live = [item for item in items if item.kind == "live"]
        self._on_error = on_error
        self._skipped_entries = list(skipped)
        self._left_out = tuple(left_out)
        self._skipped_items: list[Skipped] = []
        self._reader = reader
        self._opener = opener
        self._readers: list[tuple[int, str, LiveReader]] = []

    @property
    def is_live(self) -> bool:
        """True if the source has a camera or stream, so that iteration does not end."""
        return bool(self._live)

    @property
    def paths(self) -> tuple[str, ...]:
        """All files and URLs, in the form of `Frame.path`."""
        return tuple(item.label for item in (*self._files, *self._live))

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The items skipped so far because of `on_error="skip"`, with reasons."""
        return (*self._skipped_entries, *self._skipped_items)

    @property
    def left_out(self) -> tuple[Skipped, ...]:
        """Files of its folders and patterns that are not used (hidden, other suffixes), and subfolders."""
        return self._left_out

    @functools.cached_property
    def total(self) -> int | None:
        """Total number of frames, or `None` if it is unknown. Opens every video once."""
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
        self._skipped_items.clear()
        index = 0
        for number, item in enumerate(self._files):
            try:
                for frame in self._read(item, index):
                    index = frame.index + 1
                    yield replace(frame, item=number)
            except (ImageError, SourceError) as error:
                if self._on_error == "raise":
                    raise
                log.info("Skipped %s: %s", item.label, error.message)
                self._skipped_items.append(Skipped(path=item.label, reason=error.message))
        if self._live:
            yield from self._read_live(index)
        elif index == 0:
            raise _no_frames_error(self.skipped)

    def _read(self, item: Item, index: int) -> Iterator[Frame]:
        if item.kind == "video":
            with VideoFile(item.address, opener=self._opener) as video:
                for number, (image, seconds) in enumerate(video.read()):
                    yield Frame(
                        image=image,
                        path=item.label,
                        index=index + number,
                        number=number,
                        timestamp_s=seconds,
                        fps=video.info.fps,
                    )
        elif item.kind == "array":
            yield Frame(image=as_bgr(item.address), path="", index=index)
        elif "://" in item.label:
            yield Frame(image=download_image(item.address), path=item.label, index=index)
        else:
            yield Frame(image=read_image(item.address), path=item.label, index=index)

    def _read_live(self, index: int) -> Iterator[Frame]:
        self._readers = [
            (number, item.label, self._reader(item.address))
            for number, item in enumerate(self._live, start=len(self._files))
        ]
        try:
            while self._readers:
                pause_s = LIVE_POLL_S if len(self._readers) > 1 else None
                for number, path, reader in list(self._readers):
                    frame = self._take(path, reader, index, timeout_s=pause_s)
                    if frame is not None:
                        index += 1
                        yield replace(frame, item=number)
        finally:
            self.close()

    def _take(self, path: str, reader: LiveReader, index: int, *, timeout_s: float | None) -> Frame | None:
        """Return the newest frame of a reader, or `None`; a reader that failed is removed.

        Raises:
            SourceError: The reader failed, and it was the last one or `on_error` is `raise`.
        """
        try:
            live = reader.take(timeout_s=timeout_s)
        except SourceError as error:
            self._readers = [entry for entry in self._readers if entry[2] is not reader]
            if self._on_error == "raise" or not self._readers:
                raise
            log.info("Skipped %s: %s", path, error.message)
            self._skipped_items.append(Skipped(path=path, reason=error.message))
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
        """Stop the threads of live streams, which ends the iteration. It can be called repeatedly."""
        readers, self._readers = self._readers, []
        for _, _, reader in readers:
            reader.stop()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for _, _, reader in readers:
            reader.close(timeout_s=max(0.0, deadline - time.monotonic()))

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
    """Open anything that has images, as an iterable of frames.

    The suffix decides what is an image or a video. Names with a leading dot are not used unless they are given, and
    `Source.left_out` lists what else is in folders. A list has one path per line, relative to the list or to the
    working directory; lines that start with # are ignored.

    Args:
        source: An image or video file, a folder (without its subfolders), a glob pattern (`shots/**/*.jpg`), a camera
            number, the URL of a stream or image, a `.txt` file that lists any of these, an array [H, W, 3], a PIL
            image, the bytes of an image file, or a sequence of any of these.
        on_error: `raise` or `skip` unreadable images and videos; skipped ones are listed in `Source.skipped`.
        reconnects: Number of consecutive attempts to reopen a lost stream.
        reconnect_wait_s: Seconds before the first attempt; doubled for each further one.
        opener: Function that opens cameras, streams and videos.

    Raises:
        SourceError: There is nothing to read: a missing file, an empty folder, a pattern without a match.
        ImageError: While iterating, if an image cannot be read.
        UsageError: The type of `source` is not supported.
    """
    check_on_error(on_error)
    skipped: list[Skipped] = []
    left_out: list[Skipped] = []
    items = list(resolve(source, folder=None, on_error=on_error, skipped=skipped, left_out=left_out))
    if not items:
        raise _no_frames_error(skipped)

    def reader(address: str | int) -> LiveReader:
        return LiveReader(address, open_capture=opener, reconnects=reconnects, wait_s=reconnect_wait_s)

    return Source(items, on_error=on_error, skipped=skipped, left_out=left_out, reader=reader, opener=opener)


def read_each(sources: Iterator[OneSource], *, on_error: OnError) -> Iterator[Frame]:
    """Yield the frames of each source that an iterator gives, which is asked for the next one after the last frame.

    Unlike a list, the iterator may be infinite, such as one that waits for images. Skipped sources are logged.

    Raises:
        SourceError, ImageError, UsageError: See `open_source`.
    """
    index = 0
    for number, source in enumerate(sources):
        try:
            with open_source(source, on_error=on_error) as frames:
                for frame in frames:
                    yield replace(frame, index=index, item=number)
                    index += 1
        except (ImageError, SourceError) as error:
            if on_error == "raise":
                raise
            log.warning("skipped: %s", error.message)


def _no_frames_error(skipped: Sequence[Skipped]) -> SourceError:
    first = "; ".join(item.reason for item in skipped[:3])
    is_address = any("://" in item.path for item in skipped[:3])
    fix = (
        "Check the address, and that this machine can reach it."
        if is_address
        else "Pass images or videos that can be opened; copy damaged ones again."
    )
    return SourceError(f"Nothing could be read. {first or 'The source is empty.'}", fix=fix)
