"""Running a detector on a source and writing the results: annotated images and videos, label files, a JSON report."""

from __future__ import annotations

import itertools
import re
import signal
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from yolov7_deploy._console import write_text
from yolov7_deploy._output_folder import ResultFolder
from yolov7_deploy._process import Interrupted, deferred_signals
from yolov7_deploy.detections import Detections, Speed
from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import IMAGE_SUFFIXES, Image
from yolov7_deploy.sources import VIDEO_SUFFIXES, Frame, Skipped, Source
from yolov7_deploy.sources.resolve import MOTION_JPEG_SUFFIXES
from yolov7_deploy.sources.streams import StreamEvent, StreamSources
from yolov7_deploy.sources.video import VideoWriter, Window
from yolov7_deploy.streams import StreamCounters, StreamFrame, Streams
from yolov7_deploy.visualize import write_image
from yolov7_deploy.workflows.event_log import EventLog

LABELS_FOLDER = "labels"
SAVED_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # annotated images of others are .jpg
SCHEMA = 1
MAX_LIVE_FPS = 240  # streams often report 0, or the 90 000 ticks of their clock
MAX_PAUSE_S = 60.0  # a longer pause of a live stream is not filled with its last frame

Detect = Callable[[Image], Detections]
_Frame = TypeVar("_Frame", bound=Frame)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotateOptions:
    """Options of `annotate`: which results are written, shown and collected.

    Attributes:
        save_dir: Folder of annotated images, videos and `labels/`, created with the first file; `None` writes no files.
        save_drawn: Write annotated images and videos.
        save_txt: Write a YOLO label file per image or frame; it is empty if there are no detections.
        save_conf: Write the score at the end of each label line.
        keep_records: Collect the detections of every frame in `PredictionReport.records`; needs memory on long streams.
        view: Show each image in a window; q or Esc ends.
    """

    save_dir: Path | None = None
    save_drawn: bool = True
    save_txt: bool = False
    save_conf: bool = False
    keep_records: bool = False
    view: bool = False

    def __post_init__(self) -> None:
        if self.save_txt and self.save_dir is None:
            raise UsageError("save_txt needs a folder to write into.", fix="Pass save_dir.")
        if self.save_conf and not self.save_txt:
            raise UsageError("--save-conf does nothing without --save-txt.", fix="Add --save-txt")


@dataclass(kw_only=True, slots=True)
class PredictionReport:
    """Results of `annotate`, updated after each frame.

    Attributes:
        frames: Number of images and frames processed.
        detections: Number of detections in all of them.
        speed: Mean milliseconds per frame.
        records: One JSON object per frame, with `keep_records`.
        skipped: Images and videos that could not be read, with reasons.
        dropped: Number of dropped frames of live streams.
        files: Annotated images and videos that were written; label files are not listed.
        stopped: The user ended the run, in the window or with a signal such as Ctrl-C.
        stopped_by: Number of that signal, 0 for none.
        streams: Counters of each stream, of `annotate_streams`.
    """

    frames: int = 0
    detections: int = 0
    speed: Speed = field(default_factory=Speed)
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: tuple[Skipped, ...] = ()
    dropped: int = 0
    files: list[Path] = field(default_factory=list)
    stopped: bool = False
    stopped_by: int = 0
    streams: tuple[StreamCounters, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {
            "schema": SCHEMA,
            "frames": self.frames,
            "detections": self.detections,
            "images": self.records,
            "skipped": [{"path": item.path, "reason": item.reason} for item in self.skipped],
            "dropped": self.dropped,
            "stopped": self.stopped,
            "speed_ms": {
                "preprocess": round(self.speed.preprocess_ms, 3),
                "inference": round(self.speed.inference_ms, 3),
                "postprocess": round(self.speed.postprocess_ms, 3),
            },
            **({"streams": [counters.to_dict() for counters in self.streams]} if self.streams else {}),
        }


def annotate(
    detector: Detect,
    source: Source,
    *,
    options: AnnotateOptions,
    report: PredictionReport | None = None,
    on_frame: Callable[[Frame, Detections], None] | None = None,
) -> PredictionReport:
    """Run a detector on every frame of a source, write the results, and close the source.

    Ctrl-C, and in `y7` every signal that ends a program, ends the run of a live stream normally. On files it is an
    interruption: `KeyboardInterrupt` is raised, and the unfinished video ends at that frame. After an error the
    unfinished video of a file is removed; the recording of a live stream is always kept.

    Args:
        detector: Called with each image, uint8 BGR [H, W, 3].
        source: See `open_source`.
        options: See `AnnotateOptions`.
        report: Updated in place, so that it is available if an error ends the run; a new one by default.
        on_frame: Called after the files of each frame are written.

    Raises:
        SourceError: Nothing could be read, or a video cannot be written.
        ImageError: An image cannot be read (depending on the source's `on_error`) or written.
        UsageError: A result would overwrite its own input, or a file that y7 detect did not write, such as the labels
            of a dataset; there is no display to show images on; the detector returned NaN or infinity.
    """
    _refuse_overwriting(options, source.paths)
    report = PredictionReport() if report is None else report
    with ExitStack() as stack:
        stack.enter_context(source)
        stack.callback(_copy_skipped, report, source)
        pairs = ((frame, replace(detector(frame.image), path=frame.path)) for frame in source)
        writer = _ResultWriter(options, report)
        _run(pairs, writer, is_live=source.is_live, options=options, report=report, on_frame=on_frame)
    return report


def annotate_streams(
    streams: Streams,
    *,
    options: AnnotateOptions,
    report: PredictionReport | None = None,
    event_log: EventLog | None = None,
    on_frame: Callable[[StreamFrame, Detections], None] | None = None,
) -> PredictionReport:
    """Iterate over streams, write the results as `annotate` does, and close the streams.

    Each camera has its video, which plays at its true speed whatever the number of processed frames. If one of the
    streams is live, a signal ends the run normally.

    Args:
        streams: See `Detector.streams`.
        options: See `AnnotateOptions`.
        report: Updated in place; a new one by default.
        event_log: Gets one line for each frame, and for each change of a stream.
        on_frame: Called after the files of each frame are written.

    Raises:
        SourceError: No camera is left, or a video cannot be written.
        ImageError, UsageError: See `annotate`.
    """
    _refuse_overwriting(options, streams.sources.paths)
    report = PredictionReport() if report is None else report
    writer = _ResultWriter(options, report)
    writer.reserve_names(streams.sources)

    def on_event(event: StreamEvent) -> None:
        if event_log is not None:
            event_log.write_event(event, source=streams.sources.streams[event.stream].label)
        if event.state == "ended":
            writer.finish_stream(event.stream)

    def on_each(frame: StreamFrame, detections: Detections) -> None:
        if event_log is not None:
            event_log.write_frame(frame, detections)
        if on_frame is not None:
            on_frame(frame, detections)

    streams.listen(on_event)
    with ExitStack() as stack:
        stack.enter_context(streams)
        stack.callback(_copy_counters, report, streams)
        _run(streams, writer, is_live=streams.is_live, options=options, report=report, on_frame=on_each)
    return report


def _copy_skipped(report: PredictionReport, source: Source) -> None:
    report.skipped = source.skipped


def _copy_counters(report: PredictionReport, streams: Streams) -> None:
    report.streams = streams.counters
    report.dropped = sum(counters.dropped + counters.expired for counters in report.streams)
    report.skipped = (*streams.sources.skipped, *(item for counters in report.streams for item in counters.skipped))


def _run(
    pairs: Iterable[tuple[_Frame, Detections]],
    writer: _ResultWriter,
    *,
    is_live: bool,
    options: AnnotateOptions,
    report: PredictionReport,
    on_frame: Callable[[_Frame, Detections], None] | None,
) -> None:
    """Write, show and count the results of each frame."""
    with ExitStack() as stack:
        windows = stack.enter_context(_Windows()) if options.view else None
        stack.enter_context(writer)
        try:
            _write_all(pairs, writer, windows, options=options, report=report, on_frame=on_frame)
        except KeyboardInterrupt as error:
            report.stopped = True
            report.stopped_by = error.number if isinstance(error, Interrupted) else signal.SIGINT
            if not is_live:
                raise


def _write_all(
    pairs: Iterable[tuple[_Frame, Detections]],
    writer: _ResultWriter,
    windows: _Windows | None,
    *,
    options: AnnotateOptions,
    report: PredictionReport,
    on_frame: Callable[[_Frame, Detections], None] | None,
) -> None:
    draws = options.view or (options.save_dir is not None and options.save_drawn)
    dropped: dict[tuple[int, int], int] = {}
    for frame, detections in pairs:
        _record(report, frame, detections, keep_record=options.keep_records)
        dropped[_key(frame)] = frame.dropped
        report.dropped = sum(dropped.values())
        drawn = detections.plot(frame.image) if draws else None
        writer.write(frame, detections, drawn)
        if on_frame is not None:
            on_frame(frame, detections)
        if windows is not None and drawn is not None and not windows.show(frame, drawn):
            report.stopped = True
            return


class _Windows:
    """One window for each stream; a context manager that closes them."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._windows = {0: self._stack.enter_context(Window("y7 detect"))}

    def show(self, frame: Frame, drawn: Image) -> bool:
        """Show an image, and return False if the user quits."""
        if frame.stream not in self._windows:
            self._windows[frame.stream] = self._stack.enter_context(Window(f"y7 detect {frame.stream + 1}"))
        return self._windows[frame.stream].show(drawn, wait=frame.number is None)

    def __enter__(self) -> _Windows:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _key(frame: Frame) -> tuple[int, int]:
    """Return what identifies the file or camera of a frame."""
    return frame.stream, frame.item


def _refuse_overwriting(options: AnnotateOptions, paths: Sequence[str]) -> None:
    """Reject output folders in which results would replace the input images or the labels of a dataset."""
    if options.save_dir is None:
        return
    if options.save_txt and _labels_folder(options.save_dir).has_foreign_files:
        raise UsageError(
            f"{options.save_dir / LABELS_FOLDER} has label files that y7 detect did not write, such as the labels of a "
            "dataset. They are not replaced.",
            fix="Choose another folder:  --save-dir results",
        )
    if not options.save_drawn:
        return
    target = options.save_dir.resolve()
    folders = {Path(path).parent for path in paths if path and "://" not in path}
    if any(folder.resolve() == target for folder in folders):
        raise UsageError(
            f"{options.save_dir} is the folder of the input images; annotated images would overwrite them.",
            fix="Choose another folder:  --save-dir results",
        )


def _labels_folder(save_dir: Path) -> ResultFolder:
    return ResultFolder(save_dir / LABELS_FOLDER, (".txt", ""))  # names without a suffix are folders such as `train`


def _record(report: PredictionReport, frame: Frame, detections: Detections, *, keep_record: bool) -> None:
    report.frames += 1
    report.detections += len(detections)
    old, new, n = report.speed, detections.speed, report.frames
    report.speed = Speed(
        preprocess_ms=old.preprocess_ms + (new.preprocess_ms - old.preprocess_ms) / n,
        inference_ms=old.inference_ms + (new.inference_ms - old.inference_ms) / n,
        postprocess_ms=old.postprocess_ms + (new.postprocess_ms - old.postprocess_ms) / n,
    )
    if keep_record:
        position = {} if frame.number is None else {"frame": frame.number, "timestamp_s": round(frame.timestamp_s, 6)}
        stream = {"stream": frame.stream} if isinstance(frame, StreamFrame) else {}
        report.records.append({**detections.to_dict(), "index": frame.index, **stream, **position})


class _ResultWriter:
    """Writes the files of each frame; a context manager that finishes videos, after an error only those of streams."""

    def __init__(self, options: AnnotateOptions, report: PredictionReport) -> None:
        self._options = options
        self._report = report
        self._names = _UniqueNames(pair_with_labels=options.save_txt)
        self._stems: dict[tuple[int, int], str] = {}  # of videos and cameras, by `_key`
        self._image_names: dict[tuple[int, int], str] = {}
        self._videos: dict[tuple[int, int], VideoWriter] = {}
        self._live: set[tuple[int, int]] = set()
        folder = options.save_dir or Path()
        self._folder, self._labels = ResultFolder(folder, (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)), _labels_folder(folder)

    def reserve_names(self, sources: StreamSources) -> None:
        """Reserve the names of all results in the order of their sources, because streams are read in any order."""
        for stream, source in enumerate(sources.streams):
            for number, item in enumerate(source.items):
                if item.kind == "image":
                    self._image_names[stream, number] = self._names.reserve_image(*_image_name_of(item.label))
                elif item.kind != "array":
                    self._stems[stream, number] = self._names.reserve_video(_slug(item.label))

    def write(self, frame: Frame, detections: Detections, drawn: Image | None) -> None:
        if self._options.save_dir is None:
            return
        saved = drawn if self._options.save_drawn else None
        if frame.number is None:
            name = self._image_names.pop(_key(frame), "") or self._names.reserve_image(*_image_name(frame))
            stem = Path(name).stem
            if saved is not None:
                path = self._folder.result(name)
                write_image(path, saved)
                self._report.files.append(path)
        else:
            if saved is not None:
                self._write_video(frame, saved)  # first, because it may begin a new file
            stem = f"{self._video_stem(frame)}_{frame.number + 1}"  # the official program counts frames from 1
        if self._options.save_txt:
            write_text(self._labels.result(f"{stem}.txt"), detections.to_yolo(save_conf=self._options.save_conf))

    def _video_stem(self, frame: Frame) -> str:
        key = _key(frame)
        if key not in self._stems:
            self._stems[key] = self._names.reserve_video(_slug(frame.path))
        return self._stems[key]

    def _write_video(self, frame: Frame, drawn: Image) -> None:
        """Append a frame to the video of its source.

        A changed frame size (after a reconnection) or a long pause of a stream starts a new file.
        """
        key = _key(frame)
        if not frame.is_live and key not in self._videos:
            self.finish_stream(frame.stream)
        video = self._videos.get(key)
        if video is not None and (video.hw != drawn.shape[:2] or _is_after_pause(frame, video)):
            self._finish(key)
            del self._stems[key]
            video = None
        if video is None:
            path = self._folder.result(f"{self._video_stem(frame)}.mp4")
            fps = 0.0 if frame.is_live and not 1 <= frame.fps <= MAX_LIVE_FPS else frame.fps
            video = VideoWriter(path, fps=fps, hw=(drawn.shape[0], drawn.shape[1]))
            self._videos[key] = video
        if frame.is_live:
            self._live.add(key)
            video.write_at(drawn, frame.timestamp_s)
        else:
            video.write(drawn)

    def finish_stream(self, stream: int) -> None:
        """Finish the videos of a stream, to which no frame will be added."""
        for key in [key for key in self._videos if key[0] == stream]:
            self._finish(key)

    def _finish(self, key: tuple[int, int]) -> None:
        self._report.files.append(self._videos.pop(key).finish())

    def __enter__(self) -> _ResultWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with deferred_signals():
            if error is not None and not isinstance(error, KeyboardInterrupt):
                for key in [key for key in self._videos if key not in self._live]:
                    self._videos.pop(key).discard()
            try:
                for key in list(self._videos):
                    self._finish(key)
            finally:
                for video in self._videos.values():
                    video.discard()


def _is_after_pause(frame: Frame, video: VideoWriter) -> bool:
    return frame.is_live and frame.timestamp_s - video.end_s > MAX_PAUSE_S


class _UniqueNames:
    """File names that are unique within a run, ignoring case and the two ways of writing accents.

    With labels the stem of an image must be unique: `a.jpg` and `a.png` would share `a.txt`, and an image `clip_7.jpg`
    would share `clip_7.txt` with the seventh frame of `clip.mp4`.
    """

    def __init__(self, *, pair_with_labels: bool) -> None:
        self._pair = pair_with_labels
        self._taken: set[str] = set()  # names, and with labels the stems of images
        self._videos: set[str] = set()  # stems

    def reserve_image(self, stem: str, suffix: str) -> str:
        """Return the name, or one with `_2`, `_3`, ... if another result would have the same name or label file."""
        # After the stem of a video, these would look like its frames.
        separator = "-" if self._pair and _name_key(stem) in self._videos else "_"
        for candidate in _candidates(stem, separator):
            key = _name_key(candidate if self._pair else candidate + suffix)
            if key not in self._taken and not (self._pair and _is_frame_of(key, self._videos)):
                self._taken.add(key)
                return candidate + suffix
        raise AssertionError("unreachable")

    def reserve_video(self, stem: str) -> str:
        """Return the stem of a video whose label files have `_1`, `_2`, ... after it; see `reserve_image`."""
        for candidate in _candidates(stem, "_"):
            key = _name_key(candidate)
            shares_labels = self._pair and any(_is_frame_of(image, {key}) for image in self._taken)
            if key not in self._videos and not shares_labels:
                self._videos.add(key)
                return candidate
        raise AssertionError("unreachable")


def _candidates(stem: str, separator: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}{separator}{number}" for number in itertools.count(2))


def _is_frame_of(key: str, videos: set[str]) -> bool:
    stem, _, number = key.rpartition("_")
    return stem in videos and number.isdecimal()


def _name_key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _image_name(frame: Frame) -> tuple[str, str]:
    return _image_name_of(frame.path) if frame.path else (f"image_{frame.index:06d}", ".jpg")


def _image_name_of(path: str) -> tuple[str, str]:
    suffix = Path(urlsplit(path).path if "://" in path else path).suffix
    return _slug(path), suffix if suffix.lower() in SAVED_SUFFIXES else ".jpg"


def _slug(path: str) -> str:
    """Return the stem of a file, or a file name from a URL without its login: `camera.local_8554_live`."""
    if "://" not in path:
        return Path(path).stem.replace(" ", "_") if path.startswith("camera ") else Path(path).stem
    parts = urlsplit(path)
    suffix = Path(parts.path).suffix
    if suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) and suffix.lower() not in MOTION_JPEG_SUFFIXES:
        return Path(parts.path).stem
    location = f"{parts.netloc.rpartition('@')[2]}{parts.path}"
    if suffix.lower() in MOTION_JPEG_SUFFIXES:  # cameras of one kind differ in the host only
        location = location.removesuffix(suffix)
    return re.sub(r"[^\w.-]+", "_", location).strip("_") or "stream"
