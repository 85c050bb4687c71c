"""Calibration images: the same images in the same order, from folders, videos, lists, patterns or datasets."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from yolov7_deploy._text import get_logger, printable_line
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.errors import (
    DatasetError,
    ImageError,
    MissingSplitError,
    SourceError,
    UsageError,
    missing_library,
)
from yolov7_deploy.image import Image, read_image
from yolov7_deploy.sources import VIDEO_SUFFIXES, Skipped, open_source
from yolov7_deploy.sources.files import summarize_left_out
from yolov7_deploy.sources.video import VideoFile

logger = get_logger(__name__)

LIMIT = 512
ENOUGH = "100 to 500 images"
SINGLE_COLOR = "is of a single color, which says nothing about activation ranges"  # a `Skipped.reason`
_FEW, _FAR_TOO_FEW = 100, 8
_LISTED = 3  # files listed in one note
_DATASET_SUFFIXES = (".json", ".yaml", ".yml")
_ADVICE = (
    "activation ranges are measured on these images, and larger values on other images are clipped. "
    f"Use {ENOUGH} that are representative of the application, and not those on which AP is measured."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """An image or a video: its number of frames, and the numbers of the frames to use."""

    path: Path
    frames: int = 1
    selected: tuple[int, ...] = ()

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


class CalibrationImages:
    """Calibration images, uint8 BGR [H, W, 3]. Every iteration reads them again, in the same order.

    Unreadable images and images of a single color are skipped. An iteration raises `SourceError` at its end if no
    image was left.

    Args:
        source: The folder, list, pattern or dataset that was opened, for messages.
        files: Images and videos in order.
        limit: Maximum number of images; they are evenly spaced.
        missing: Files that were skipped before anything was read.
        notes: Remarks about the origin of the images.

    Attributes:
        source: The folder, list, pattern or dataset that was opened.
        files: The images and videos that are used, in order.
    """

    def __init__(
        self, source: str, files: Sequence[_File], *, limit: int, missing: Sequence[Skipped], notes: Sequence[str]
    ) -> None:
        self.source = source
        self._selected = _evenly_spaced(files, limit)
        self.files = tuple(file.path for file in self._selected)
        self._missing = tuple(missing)
        self._skipped = list(missing)
        self._used: int | None = None
        self._notes = (*notes, *_selection_notes(self._selected, sum(file.frames for file in files)))

    def __len__(self) -> int:
        """Return the number of selected images, including those that will be skipped."""
        return sum(len(file.selected) for file in self._selected)

    def __iter__(self) -> Iterator[Image]:
        self._skipped = skipped = list(self._missing)
        used = 0
        for file in self._selected:
            try:
                for name, image in _read(file):
                    if _is_single_color(image):
                        skipped.append(Skipped(path=name, reason=SINGLE_COLOR))
                        continue
                    used += 1
                    yield image
            except (ImageError, SourceError) as error:
                logger.info("Skipped %s: %s", file.path, error.message)
                skipped.append(Skipped(path=str(file.path), reason=error.message))
        self._used = used
        if not used:
            raise _no_images(self.source, skipped)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Files that the latest iteration skipped so far; before the first one, files of a list that do not exist."""
        return tuple(self._skipped)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the metadata and the user: origin, selection, skipped files, too few images.

        They are complete after an iteration.
        """
        return (*self._notes, *_skip_notes(self._skipped), *_count_notes(self._used or len(self)))


def open_calibration(data: str | Path, *, limit: int = LIMIT) -> CalibrationImages:
    """Open calibration images; at most `limit`, evenly spaced over all of them.

    Args:
        data: A folder (not its subfolders), an image, a video, a pattern (`shots/**/*.jpg`), a `.txt` list of any of
            these, a dataset YAML (its `train` images, or `val` if it has none), or a COCO instances JSON.
        limit: Maximum number of images: images `i * n // limit` of n.

    Raises:
        UsageError: `limit` is below 1, or `data` is a camera, stream or URL, whose images would differ each time.
        SourceError: There are no images; at the end of an iteration: none could be used.
        DatasetError: A YAML or JSON cannot be opened.
        MissingLibraryError: PyYAML is not installed, and `data` is a YAML.

    Example:
        >>> len(open_calibration("images", limit=3))
        3
    """
    if limit < 1:
        raise UsageError(f"Calibration needs at least 1 image, not {limit}.", fix=f"Use {ENOUGH}.")
    text = str(data).strip()
    if Path(text).suffix.lower() in _DATASET_SUFFIXES and "://" not in text and not os.path.isdir(text):  # noqa: PTH112
        paths, notes = _open_as_dataset(Path(text))
        missing: list[Skipped] = []
    else:
        paths, missing, notes = _open_as_source(text)
    files = []
    for path in dict.fromkeys(paths):
        file = _File(path=path)
        try:
            files.append(replace(file, frames=_count_frames(path)) if file.is_video else file)
        except SourceError as error:
            missing.append(Skipped(path=str(path), reason=error.message))
    if not files:
        raise _no_images(text, missing)
    return CalibrationImages(text, files, limit=limit, missing=missing, notes=notes)


def count_overlap(calibration: CalibrationImages, paths: Iterable[Path]) -> int:
    """Return the number of calibration files among these paths; AP measured on them would be too high.

    Paths are resolved; copies of a file are not found.
    """
    return len(set(map(_resolved, calibration.files)) & set(map(_resolved, paths)))


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, or an invalid name
        return path.absolute()


# --- opening ----------------------------------------------------------------------------------------------------------


def _open_as_source(text: str) -> tuple[list[Path], list[Skipped], list[str]]:
    """Return the files of everything that `open_source` accepts, those of a list that do not exist, and notes."""
    try:
        source = open_source(text, on_error="skip")
    except SourceError as error:
        raise SourceError(error.message, fix=error.fix.replace("--source", "--calib")) from error
    not_files = [path for path in source.paths if "://" in path]
    if source.is_live:
        not_files += source.paths[-1:]
    if not_files:
        raise UsageError(
            f"{not_files[0]} is not a file: calibration reads the same images several times, and a camera, stream or "
            "URL may return others.",
            fix="Record a video first, or download the images:  ffmpeg -i URL -t 60 recorded.mp4   and then  "
            "--calib recorded.mp4",
        )
    notes = [f"Left out: {summarize_left_out(source.left_out)}."] if source.left_out else []
    return [Path(path) for path in source.paths], list(source.skipped), notes


def _open_as_dataset(path: Path) -> tuple[list[Path], list[str]]:
    """Return the images of a YAML or JSON, and notes about the split and what is left out of it."""
    is_json = path.suffix.lower() == ".json"
    split, why = "val" if is_json else "train", ""
    try:
        try:
            dataset = open_dataset(path, split=split)
        except MissingSplitError:
            split, why = "val", ", because it has no train images: AP measured on these images is too high"
            dataset = open_dataset(path, split=split)
    except ModuleNotFoundError as error:
        raise missing_library(error, f"to read {path}") from error
    except DatasetError as error:
        raise DatasetError(
            error.message, fix="Correct it, or use the folder of the images instead:  --calib FOLDER"
        ) from error
    split_of = "" if is_json else f"{split} of "
    notes = [f"Calibrated on {split_of}{printable_line(path.name)}{why}.", *map(_sentence, dataset.left_out)]
    return [dataset.path(i) for i in range(len(dataset))], notes


def _count_frames(path: Path) -> int:
    """Return the number of frames in the header of a video; without it, decode and count them."""
    with VideoFile(str(path)) as video:
        return video.info.frames or sum(1 for _ in video.read())


def _evenly_spaced(files: Sequence[_File], limit: int) -> list[_File]:
    """Return the files with selected frames."""
    ends = list(accumulate(file.frames for file in files))
    count = min(limit, ends[-1])
    selected: dict[int, list[int]] = {}
    for i in range(count):
        index = i * ends[-1] // count
        at = bisect_right(ends, index)
        selected.setdefault(at, []).append(index - ends[at] + files[at].frames)
    return [replace(files[at], selected=tuple(numbers)) for at, numbers in selected.items()]


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(file: _File) -> Iterator[tuple[str, Image]]:
    """Yield name and image of each selected frame.

    Raises:
        ImageError: The image is unreadable.
        SourceError: The video is unreadable, or ends before the last selected frame.
    """
    if not file.is_video:
        yield str(file.path), read_image(file.path)
        return
    selected, last, number = set(file.selected), file.selected[-1], 0
    with VideoFile(str(file.path)) as video:
        for number, (image, _) in enumerate(video.read()):
            if number in selected:
                yield f"{file.path} frame {number}", image
            if number == last:
                return
    raise SourceError(
        f"{file.path} ended after {number + 1} of the {file.frames} frames that its header declares.",
        fix="Copy the video again.",
    )


def _is_single_color(image: Image) -> bool:
    color = image[0, 0]
    return bool((image[0] == color).all() and (image == color).all())  # the first row is enough for most images


def _no_images(source: str, skipped: Sequence[Skipped]) -> SourceError:
    reasons = [f"{s.path} {SINGLE_COLOR}." if s.reason == SINGLE_COLOR else s.reason for s in skipped]
    more = f" And {len(reasons) - _LISTED} more." if len(reasons) > _LISTED else ""
    return SourceError(
        f"{source} has no image to calibrate on. {' '.join(reasons[:_LISTED])}{more}",
        fix=f"Use {ENOUGH} that are representative of the application:  --calib FOLDER",
    )


# --- notes ------------------------------------------------------------------------------------------------------------


def _selection_notes(files: Sequence[_File], total: int) -> Iterator[str]:
    count = sum(len(file.selected) for file in files)
    if count < total:
        yield f"{count} of {total} images were selected, evenly spaced."
    frames = sum(len(file.selected) for file in files if file.is_video)
    if frames > 1:
        yield f"{frames} are frames of videos. Successive frames are similar; images of many scenes are better."


def _skip_notes(skipped: Sequence[Skipped]) -> Iterator[str]:
    single = [entry.path for entry in skipped if entry.reason == SINGLE_COLOR]
    unreadable = [entry.path for entry in skipped if entry.reason != SINGLE_COLOR]
    if unreadable:
        yield f"Skipped, because they cannot be read: {_some(unreadable)}."
    if single:
        yield f"Skipped, because a single color says nothing about activation ranges: {_some(single)}."


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    return ", ".join(printable_line(Path(path).name) for path in paths[:_LISTED]) + more


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _count_notes(count: int) -> Iterator[str]:
    if count < _FAR_TOO_FEW:
        yield f"Far too few images ({count}): {_ADVICE}"
    elif count < _FEW:
        yield f"Few images ({count}): {_ADVICE}"
