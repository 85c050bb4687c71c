"""Running a detector on a source and writing the results: annotated images and videos, label files, a JSON report."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from yolov7_deploy._console import write_text
from yolov7_deploy.detections import Detections, Speed
from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import IMAGE_SUFFIXES, Image
from yolov7_deploy.sources import VIDEO_SUFFIXES, Frame, Skipped, Source
from yolov7_deploy.sources.display import Window
from yolov7_deploy.sources.video import VideoWriter
from yolov7_deploy.visualize import write_image

LABELS_FOLDER = "labels"
SCHEMA = 1

Detect = Callable[[Image], Detections]


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
        stopped: The user ended the run, in the window or with Ctrl-C on a live stream.
    """

    frames: int = 0
    detections: int = 0
    speed: Speed = field(default_factory=Speed)
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: tuple[Skipped, ...] = ()
    dropped: int = 0
    files: list[Path] = field(default_factory=list)
    stopped: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {
            "schema": SCHEMA,
            "frames": self.frames,
            "detections": self.detections,
            "images": self.records,
            "skipped": [{"path": item.path, "reason": item.reason} for item in self.skipped],
            "dropped": self.dropped,
            "speed_ms": {
                "preprocess": round(self.speed.preprocess_ms, 3),
                "inference": round(self.speed.inference_ms, 3),
                "postprocess": round(self.speed.postprocess_ms, 3),
            },
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

    Ctrl-C on a live stream ends the run normally. On files it is an interruption: the unfinished video is removed and
    `KeyboardInterrupt` is raised. The recording of a live stream is always kept.

    Args:
        detector: Called with each image, uint8 BGR [H, W, 3].
        source: See `open_source`.
        options: See `AnnotateOptions`.
        report: Updated in place, so that it is available if an error ends the run; a new one by default.
        on_frame: Called after the files of each frame are written.

    Raises:
        SourceError: Nothing could be read, or a video cannot be written.
        ImageError: An image cannot be read (depending on the source's `on_error`) or written.
        UsageError: A result would overwrite its own input, or there is no display to show it on.
    """
    _refuse_overwriting(options, source)
    report = PredictionReport() if report is None else report
    with ExitStack() as stack:
        stack.enter_context(source)
        stack.callback(_copy_skipped, report, source)
        window = stack.enter_context(Window("y7 detect")) if options.view else None
        writer = stack.enter_context(_ResultWriter(options, report))
        try:
            _run(detector, source, options=options, report=report, writer=writer, window=window, on_frame=on_frame)
        except KeyboardInterrupt:
            if not source.is_live:
                raise
            report.stopped = True
    return report


def _copy_skipped(report: PredictionReport, source: Source) -> None:
    report.skipped = source.skipped


def _run(
    detector: Detect,
    source: Source,
    *,
    options: AnnotateOptions,
    report: PredictionReport,
    writer: _ResultWriter,
    window: Window | None,
    on_frame: Callable[[Frame, Detections], None] | None,
) -> None:
    draws = options.view or (options.save_dir is not None and options.save_drawn)
    dropped: dict[str, int] = {}
    for frame in source:
        detections = replace(detector(frame.image), path=frame.path)
        _record(report, frame, detections, keep_record=options.keep_records)
        dropped[frame.path] = frame.dropped
        report.dropped = sum(dropped.values())
        drawn = detections.plot(frame.image) if draws else None
        writer.write(frame, detections, drawn)
        if on_frame is not None:
            on_frame(frame, detections)
        if window is not None and drawn is not None and not window.show(drawn, wait=frame.number is None):
            report.stopped = True
            return


def _refuse_overwriting(options: AnnotateOptions, source: Source) -> None:
    """Reject an output folder that has input images, since annotated images keep their names."""
    if options.save_dir is None or not options.save_drawn:
        return
    target = options.save_dir.resolve()
    folders = {Path(path).parent for path in source.paths if path and "://" not in path}
    if any(folder.resolve() == target for folder in folders):
        raise UsageError(
            f"{options.save_dir} is the folder of the input images; annotated images would overwrite them.",
            fix="Choose another folder:  --save-dir results",
        )


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
        report.records.append({**detections.to_dict(), "index": frame.index, **position})


class _ResultWriter:
    """Writes the files of each frame; a context manager that finishes videos, after an error only those of streams."""

    def __init__(self, options: AnnotateOptions, report: PredictionReport) -> None:
        self._options = options
        self._report = report
        self._names = _UniqueNames(pair_with_labels=options.save_txt)
        self._stems: dict[str, str] = {}
        self._videos: dict[str, VideoWriter] = {}
        self._live: set[str] = set()

    def write(self, frame: Frame, detections: Detections, drawn: Image | None) -> None:
        folder = self._options.save_dir
        if folder is None:
            return
        if frame.number is None:
            name = self._names.reserve(*_image_name(frame))
            stem = Path(name).stem
            if self._options.save_drawn and drawn is not None:
                write_image(folder / name, drawn)
                self._report.files.append(folder / name)
        else:
            stem = f"{self._video_stem(frame)}_{frame.number + 1}"  # the official program counts frames from 1
            if self._options.save_drawn and drawn is not None:
                self._write_video(folder, frame, drawn)
        if self._options.save_txt:
            write_text(folder / LABELS_FOLDER / f"{stem}.txt", detections.to_yolo(save_conf=self._options.save_conf))

    def _video_stem(self, frame: Frame) -> str:
        if frame.path not in self._stems:
            self._stems[frame.path] = Path(self._names.reserve(_slug(frame.path), ".mp4")).stem
        return self._stems[frame.path]

    def _write_video(self, folder: Path, frame: Frame, drawn: Image) -> None:
        """Append a frame to the video of its source; a changed frame size (after a reconnection) starts a new file."""
        if not frame.is_live and frame.path not in self._videos:
            self._finish()
        video_writer = self._videos.get(frame.path)
        if video_writer is not None and video_writer.hw != drawn.shape[:2]:
            self._report.files.append(video_writer.finish())
            del self._stems[frame.path], self._videos[frame.path]
            video_writer = None
        if video_writer is None:
            path = folder / f"{self._video_stem(frame)}.mp4"
            video_writer = VideoWriter(path, fps=frame.fps, hw=(drawn.shape[0], drawn.shape[1]))
            self._videos[frame.path] = video_writer
            if frame.is_live:
                self._live.add(frame.path)
        video_writer.write(drawn)

    def _finish(self) -> None:
        while self._videos:
            self._report.files.append(self._videos.popitem()[1].finish())

    def __enter__(self) -> _ResultWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for path in [path for path in self._videos if path not in self._live]:
                self._videos.pop(path).discard()
        try:
            self._finish()
        finally:
            for video_writer in self._videos.values():
                video_writer.discard()


class _UniqueNames:
    """File names that are unique within a run, ignoring case.

    With labels the stem must be unique: `a.jpg` and `a.png` would share `a.txt`.
    """

    def __init__(self, *, pair_with_labels: bool) -> None:
        self._pair = pair_with_labels
        self._taken: set[str] = set()

    def reserve(self, stem: str, suffix: str) -> str:
        for number in itertools.count(1):
            candidate = stem if number == 1 else f"{stem}_{number}"
            key = (candidate if self._pair else candidate + suffix).casefold()
            if key not in self._taken:
                self._taken.add(key)
                return candidate + suffix
        raise AssertionError("unreachable")


def _image_name(frame: Frame) -> tuple[str, str]:
    if not frame.path:
        return f"image_{frame.index:06d}", ".jpg"
    suffix = Path(urlsplit(frame.path).path if "://" in frame.path else frame.path).suffix
    return _slug(frame.path), suffix if suffix.lower() in IMAGE_SUFFIXES else ".jpg"


def _slug(path: str) -> str:
    """Return the stem of a file, or a file name from a URL without its login: `camera.local_8554_live`."""
    if "://" not in path:
        return Path(path).stem.replace(" ", "_") if path.startswith("camera ") else Path(path).stem
    parts = urlsplit(path)
    if Path(parts.path).suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
        return Path(parts.path).stem
    location = f"{parts.netloc.rpartition('@')[2]}{parts.path}"
    return re.sub(r"[^\w.-]+", "_", location).strip("_") or "stream"


def next_run_folder(parent: Path) -> Path:
    """Return the next of `exp`, `exp2`, `exp3`, ... after the highest that exists, as the official programs do."""
    taken = [re.fullmatch(r"exp(\d*)", path.name) for path in parent.iterdir()] if parent.is_dir() else []
    numbers = [int(match[1] or 1) for match in taken if match]
    number = max(numbers, default=0) + 1
    return parent / ("exp" if number == 1 else f"exp{number}")
