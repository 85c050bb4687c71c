"""Running a detector on a source and writing the results: annotated images and videos, label files, a JSON report."""

from __future__ import annotations

import itertools
import re
import signal
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from yolov7_deploy._console import write_text
from yolov7_deploy._output_folder import ResultFolder
from yolov7_deploy._process import Interrupted, deferred_signals
from yolov7_deploy.detections import Detections, Speed
from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import IMAGE_SUFFIXES, Image
from yolov7_deploy.sources import VIDEO_SUFFIXES, Frame, Skipped, Source
from yolov7_deploy.sources.video import VideoWriter, Window
from yolov7_deploy.visualize import write_image

LABELS_FOLDER = "labels"
SAVED_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # annotated images of others are .jpg
SCHEMA = 1
MAX_LIVE_FPS = 240  # streams often report 0, or the 90 000 ticks of their clock
MAX_PAUSE_S = 60.0  # a longer pause of a live stream is not filled with its last frame

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
        stopped: The user ended the run, in the window or with a signal such as Ctrl-C.
        stopped_by: Number of that signal, 0 for none.
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
    _refuse_overwriting(options, source)
    report = PredictionReport() if report is None else report
    with ExitStack() as stack:
        stack.enter_context(source)
        stack.callback(_copy_skipped, report, source)
        window = stack.enter_context(Window("y7 detect")) if options.view else None
        writer = stack.enter_context(_ResultWriter(options, report))
        try:
            _run(detector, source, options=options, report=report, writer=writer, window=window, on_frame=on_frame)
        except KeyboardInterrupt as error:
            report.stopped = True
            report.stopped_by = error.number if isinstance(error, Interrupted) else signal.SIGINT
            if not source.is_live:
                raise
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
    dropped: dict[int, int] = {}
    for frame in source:
        detections = replace(detector(frame.image), path=frame.path)
        _record(report, frame, detections, keep_record=options.keep_records)
        dropped[frame.item] = frame.dropped
        report.dropped = sum(dropped.values())
        drawn = detections.plot(frame.image) if draws else None
        writer.write(frame, detections, drawn)
        if on_frame is not None:
            on_frame(frame, detections)
        if window is not None and drawn is not None and not window.show(drawn, wait=frame.number is None):
            report.stopped = True
            return


def _refuse_overwriting(options: AnnotateOptions, source: Source) -> None:
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
    folders = {Path(path).parent for path in source.paths if path and "://" not in path}
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
        report.records.append({**detections.to_dict(), "index": frame.index, **position})


class _ResultWriter:
    """Writes the files of each frame; a context manager that finishes videos, after an error only those of streams."""

    def __init__(self, options: AnnotateOptions, report: PredictionReport) -> None:
        self._options = options
        self._report = report
        self._names = _UniqueNames(pair_with_labels=options.save_txt)
        self._stems: dict[int, str] = {}  # of videos and streams, by their number in the source
        self._videos: dict[int, VideoWriter] = {}
        self._live: set[int] = set()
        folder = options.save_dir or Path()
        self._folder, self._labels = ResultFolder(folder, (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)), _labels_folder(folder)

    def write(self, frame: Frame, detections: Detections, drawn: Image | None) -> None:
        if self._options.save_dir is None:
            return
        saved = drawn if self._options.save_drawn else None
        if frame.number is None:
            name = self._names.reserve_image(*_image_name(frame))
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
        if frame.item not in self._stems:
            self._stems[frame.item] = self._names.reserve_video(_slug(frame.path))
        return self._stems[frame.item]

    def _write_video(self, frame: Frame, drawn: Image) -> None:
        """Append a frame to the video of its source.

        A changed frame size (after a reconnection) or a long pause of a stream starts a new file.
        """
        if not frame.is_live and frame.item not in self._videos:
            self._finish()
        video = self._videos.get(frame.item)
        if video is not None and (video.hw != drawn.shape[:2] or _is_after_pause(frame, video)):
            self._report.files.append(self._videos.pop(frame.item).finish())
            del self._stems[frame.item]
            video = None
        if video is None:
            path = self._folder.result(f"{self._video_stem(frame)}.mp4")
            fps = 0.0 if frame.is_live and not 1 <= frame.fps <= MAX_LIVE_FPS else frame.fps
            video = VideoWriter(path, fps=fps, hw=(drawn.shape[0], drawn.shape[1]))
            self._videos[frame.item] = video
        if frame.is_live:
            self._live.add(frame.item)
            video.write_at(drawn, frame.timestamp_s)
        else:
            video.write(drawn)

    def _finish(self) -> None:
        while self._videos:
            self._report.files.append(self._videos.popitem()[1].finish())

    def __enter__(self) -> _ResultWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with deferred_signals():
            if error is not None and not isinstance(error, KeyboardInterrupt):
                for item in [item for item in self._videos if item not in self._live]:
                    self._videos.pop(item).discard()
            try:
                self._finish()
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
    if not frame.path:
        return f"image_{frame.index:06d}", ".jpg"
    suffix = Path(urlsplit(frame.path).path if "://" in frame.path else frame.path).suffix
    return _slug(frame.path), suffix if suffix.lower() in SAVED_SUFFIXES else ".jpg"


def _slug(path: str) -> str:
    """Return the stem of a file, or a file name from a URL without its login: `camera.local_8554_live`."""
    if "://" not in path:
        return Path(path).stem.replace(" ", "_") if path.startswith("camera ") else Path(path).stem
    parts = urlsplit(path)
    if Path(parts.path).suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
        return Path(parts.path).stem
    location = f"{parts.netloc.rpartition('@')[2]}{parts.path}"
    return re.sub(r"[^\w.-]+", "_", location).strip("_") or "stream"
