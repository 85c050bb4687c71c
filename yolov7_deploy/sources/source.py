"""Where pictures come from: files, folders, patterns, videos, cameras, streams, lists and arrays, all as `Frame`s."""

from __future__ import annotations

import functools
import logging
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from yolov7_deploy.errors import ImageError, SourceError, UsageError
from yolov7_deploy.image import IMAGE_SUFFIXES, Image, as_bgr, read_image
from yolov7_deploy.sources.live import LiveReader
from yolov7_deploy.sources.video import OpenCapture, VideoFile, download_picture, hide_password, open_capture

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mjpeg", ".mjpg", ".mkv"),
    *(".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv"),
)
STREAM_SCHEMES = ("http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "tcp", "udp", "srt")
LIST_SUFFIX = ".txt"
LIVE_TURN_S = 0.01  # how long one of several streams is waited for before the next has its turn

OnError = Literal["raise", "skip"]
Kind = Literal["picture", "video", "live", "array"]
SourceLike = str | Path | int | npt.NDArray[Any] | Sequence[str | Path | npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frame:
    """One picture and where it comes from.

    Attributes:
        image: uint8 BGR [H, W, 3].
        path: File or address, without passwords; `camera 0`; empty for arrays.
        index: Number of the picture in the whole source, from 0.
        number: Number of the frame in its own video or stream, from 0; `None` for pictures.
        timestamp_s: Seconds from the start of the video; for live frames the capture time as `time.time()`;
            0 for pictures.
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Item:
    """One thing to read; `address` is a path, an address, a camera number or an array."""

    kind: Kind
    address: Any
    shown: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """Something that was left out, and why."""

    path: str
    reason: str


class Source:
    """Frames in order: files first, then all cameras and streams together, in turn, each with its newest frame.

    Files can be iterated again. Use it as a context manager, or call `close`, to stop the threads of live streams.
    """

    def __init__(
        self,
        items: Sequence[_Item],
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

    def _read(self, item: _Item, index: int) -> Iterator[Frame]:
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
            yield Frame(image=download_picture(item.address), path=item.shown, index=index)
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
        source: A picture or video file, a folder (not its subfolders), a pattern (`shots/**/*.jpg`), a camera number,
            a stream or picture address, a `.txt` file that lists any of these, an array [H, W, 3], or a sequence
            of any of these.
        on_error: What an unreadable picture among good ones does; what was skipped stands in `Source.skipped`.
        reconnects: How often in a row a lost stream is opened again.
        reconnect_wait_s: Pause before the first of these.
        opener: Opens cameras, streams and videos; tests pass a stand-in.

    Raises:
        SourceError: Nothing to read: an absent file, an empty folder, a pattern without match.
        ImageError: While iterating, a picture that cannot be read.
        UsageError: An argument of a kind that is no source.
    """
    missing: list[Skipped] = []
    items = list(_resolve(source, folder=None, on_error=on_error, missing=missing))
    if not items:
        raise _nothing_left(missing)

    def reader(address: str | int) -> LiveReader:
        return LiveReader(address, open_capture=opener, reconnects=reconnects, wait_s=reconnect_wait_s)

    return Source(items, on_error=on_error, missing=missing, reader=reader, opener=opener)


def _nothing_left(skipped: Sequence[Skipped]) -> SourceError:
    first = "; ".join(f"{item.reason}" for item in skipped[:3])
    return SourceError(f"Nothing could be read. {first or 'The source is empty.'}", fix="Check the path.")


def _resolve(source: object, *, folder: Path | None, on_error: OnError, missing: list[Skipped]) -> Iterator[_Item]:
    if isinstance(source, np.ndarray):
        arrays = source if source.ndim == 4 else [source]
        yield from (_Item(kind="array", address=array, shown="") for array in arrays)
    elif isinstance(source, int) and not isinstance(source, bool):
        yield _camera(source)
    elif isinstance(source, str | Path):
        text = str(source).strip()
        if text.lower().endswith(LIST_SUFFIX) and "://" not in text and folder is None:
            yield from _resolve_list(Path(text).expanduser(), on_error=on_error, missing=missing)
        else:
            yield from _resolve_text(text, folder=folder)
    elif isinstance(source, Sequence):
        for one in source:
            yield from _resolve(one, folder=folder, on_error=on_error, missing=missing)
    else:
        raise UsageError(
            f"A source cannot be of type {type(source).__name__}.",
            fix="Pass a path, a camera number, an address, or uint8 arrays.",
        )


def _camera(number: int) -> _Item:
    return _Item(kind="live", address=number, shown=f"camera {number}")


def _resolve_text(text: str, *, folder: Path | None) -> Iterator[_Item]:
    """A path, pattern, address or camera number; relative paths are looked for in `folder` first, then here."""
    if text.isascii() and text.isdigit():
        yield _camera(int(text))
        return
    scheme, separator, _ = text.partition("://")
    if separator:
        yield _address(text, scheme.lower())
        return
    path = Path(text).expanduser()
    if folder is not None and not path.is_absolute() and ((folder / path).exists() or not path.exists()):
        path = folder / path
    if path.is_dir():
        yield from _resolve_folder(path)
    elif path.exists():
        yield _file(path)
    elif any(sign in text for sign in "*?["):
        yield from _resolve_pattern(path)
    else:
        raise SourceError(f"{text} does not exist (looked for {path.absolute()}).", fix="Check the path.")


def _address(text: str, scheme: str) -> _Item:
    if scheme not in STREAM_SCHEMES:
        raise SourceError(
            f"{hide_password(text)} is not an address that can be opened.", fix=f"One of: {', '.join(STREAM_SCHEMES)}"
        )
    suffix = Path(urllib.parse.urlsplit(text).path).suffix.lower()
    kind: Kind = "live"
    if scheme in ("http", "https"):
        is_motion_jpeg = suffix in (".mjpg", ".mjpeg")
        kind = "picture" if suffix in IMAGE_SUFFIXES else "video" if _is_video(suffix) and not is_motion_jpeg else kind
    return _Item(kind=kind, address=text, shown=hide_password(text))


def _is_video(suffix: str) -> bool:
    return suffix.lower() in VIDEO_SUFFIXES


def _is_media(path: Path) -> bool:
    hidden = path.name.startswith(".")  # macOS leaves "._photo.jpg" files that are no pictures
    return not hidden and path.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) and path.is_file()


def _file(path: Path) -> _Item:
    if _is_video(path.suffix):
        return _Item(kind="video", address=str(path), shown=str(path))
    if path.suffix.lower() not in IMAGE_SUFFIXES and not cv2.haveImageReader(str(path)):
        raise SourceError(
            f"{path} is neither a picture nor a video by its suffix.",
            fix=f"Pictures: {' '.join(IMAGE_SUFFIXES)}   videos: {' '.join(VIDEO_SUFFIXES)}   lists: {LIST_SUFFIX}",
        )
    return _Item(kind="picture", address=str(path), shown=str(path))


def _resolve_folder(folder: Path) -> Iterator[_Item]:
    files = sorted(path for path in folder.iterdir() if _is_media(path))
    if not files:
        deeper = any(_is_media(path) for path in folder.rglob("*"))
        raise SourceError(
            f"The folder {folder} has no picture and no video in it.",
            fix=f"Its subfolders do:  --source '{folder}/**/*'"
            if deeper
            else f"Looked for {' '.join(IMAGE_SUFFIXES)} and videos.",
        )
    yield from map(_file, files)


def _resolve_pattern(pattern: Path) -> Iterator[_Item]:
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    base, rest = Path(*parts[:first]), Path(*parts[first:])
    if parts[-1] == "**":
        rest = rest / "*"
    matches = sorted(base.glob(str(rest))) if base.is_dir() else []
    files = [path for path in matches if _is_media(path)]
    if not files:
        found = f"{len(matches)} matches, none of them a picture or video" if matches else "no match"
        raise SourceError(
            f"The pattern {pattern} found nothing to read ({found}; looked in {base.absolute()}).",
            fix="Check the pattern, and quote it so that the shell leaves it alone.",
        )
    yield from map(_file, files)


def _resolve_list(path: Path, *, on_error: OnError, missing: list[Skipped]) -> Iterator[_Item]:
    """The entries of a text file, one a line; blank lines and lines that start with # are left out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.", fix="Check the path.") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text ({error}).", fix="Save the list as UTF-8.") from error
    for number, line in enumerate(lines, start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        try:
            yield from _resolve_text(entry, folder=path.parent)
        except SourceError as error:
            message = f"{path}, line {number}: {error.message}"
            if on_error == "raise":
                raise SourceError(message, fix="Correct the list, or skip what is missing.") from error
            log.info("Skipped %s", message)
            missing.append(Skipped(path=entry, reason=message))
