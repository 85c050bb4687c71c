"""The images that INT8 ranges are measured on: from any files that hold images, the same ones in the same order."""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from yolov7_deploy.errors import DatasetError, ImageError, SourceError, UsageError, missing_library
from yolov7_deploy.image import Image, read_image
from yolov7_deploy.sources import VIDEO_SUFFIXES, Skipped, open_source
from yolov7_deploy.sources.video import VideoFile

logger = logging.getLogger(__name__)

LIMIT = 512
ENOUGH = "100 to 500 images"
SINGLE_COLOUR = "is of a single colour, which shows nothing that a range could be learnt from"  # as `Skipped.reason`
_FEW, _FAR_TOO_FEW = 100, 8
_NAMED = 3  # files named in one note
_DATASET_SUFFIXES = (".json", ".yaml", ".yml")
_WHY_MANY = (
    "ranges come from what images show, and values that only others reach are clipped. "
    f"Use {ENOUGH} like those to come, and not those that AP is measured on."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """An image, or a video: how many frames it has, and the numbers of those that are measured on."""

    path: Path
    frames: int = 1
    wanted: tuple[int, ...] = ()

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


class CalibrationImages:
    """Images uint8 BGR [H, W, 3], any number of times, always in the same order; each is read when it is asked for.

    What cannot be read, or is of a single colour, is left out. While iterating, `SourceError` is raised at the end if
    nothing was left.

    Args:
        source: What they were opened from, for messages.
        files: Images and videos in order.
        limit: So many images at most, evenly spaced.
        missing: What was left out before anything was read.
        notes: What a reader should know of where they come from.

    Attributes:
        source: What they were opened from.
        files: Each image and video that is measured on, in order.
    """

    def __init__(
        self, source: str, files: Sequence[_File], *, limit: int, missing: Sequence[Skipped], notes: Sequence[str]
    ) -> None:
        self.source = source
        self._chosen = _evenly_spaced(files, limit)
        self.files = tuple(file.path for file in self._chosen)
        self._missing = tuple(missing)
        self._skipped = list(missing)
        self._used: int | None = None
        self._notes = (*notes, *_notes_on_choice(self._chosen, sum(file.frames for file in files)))

    def __len__(self) -> int:
        """How many will be tried; what is skipped is among them."""
        return sum(len(file.wanted) for file in self._chosen)

    def __iter__(self) -> Iterator[Image]:
        self._skipped = skipped = list(self._missing)
        used = 0
        for file in self._chosen:
            try:
                for name, image in _read(file):
                    if _is_single_colour(image):
                        skipped.append(Skipped(path=name, reason=SINGLE_COLOUR))
                        continue
                    used += 1
                    yield image
            except (ImageError, SourceError) as error:
                logger.info("Skipped %s: %s", file.path, error.message)
                skipped.append(Skipped(path=str(file.path), reason=error.message))
        self._used = used
        if not used:
            raise _nothing_left(self.source, skipped)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What the latest iteration left out so far; before the first, what is named in a list and not there."""
        return tuple(self._skipped)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the metadata and for people: where from, how many of how many, what was left out, too few.

        They are complete after an iteration.
        """
        return (*self._notes, *_notes_on_skipped(self._skipped), *_notes_on_number(self._used or len(self)))


def open_calibration(data: str | Path, *, limit: int = LIMIT) -> CalibrationImages:
    """The images that `data` means, evenly spaced over all of them where they are more than `limit`.

    Args:
        data: A folder (not its subfolders), an image, a video, a pattern (`shots/**/*.jpg`), a `.txt` list of any of
            these, a dataset YAML (its `train` images, or `val` where it names none), or a COCO instances JSON.
        limit: So many at most: images `i * n // limit` of n.

    Raises:
        UsageError: A limit below 1; a camera, stream or address, which would not give the same images again.
        SourceError: Nothing to read, or at the end of an iteration nothing that could be used.
        DatasetError: A YAML or JSON that does not open.
        MissingLibraryError: PyYAML is needed for a dataset file.
    """
    if limit < 1:
        raise UsageError(f"Calibration needs at least 1 image, not {limit}.", fix=f"Use {ENOUGH}.")
    text = str(data).strip()
    if Path(text).suffix.lower() in _DATASET_SUFFIXES and "://" not in text and not os.path.isdir(text):  # noqa: PTH112
        paths, notes = _in_dataset(Path(text))
        missing: list[Skipped] = []
    else:
        paths, missing = _in_source(text)
        notes = []
    files = []
    for path in dict.fromkeys(paths):
        file = _File(path=path)
        try:
            files.append(replace(file, frames=_count_frames(path)) if file.is_video else file)
        except SourceError as error:
            missing.append(Skipped(path=str(path), reason=error.message))
    if not files:
        raise _nothing_left(text, missing)
    return CalibrationImages(text, files, limit=limit, missing=missing, notes=notes)


def overlap(calibration: CalibrationImages, paths: Iterable[Path]) -> int:
    """How many of the calibration's files are among these paths: AP measured on them would be flattered.

    Files are the same where their paths lead to one place; copies are not found.
    """
    return len(set(map(_resolved, calibration.files)) & set(map(_resolved, paths)))


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links; a name that no file can have
        return path.absolute()


# --- what `data` means ------------------------------------------------------------------------------------------------


def _in_source(text: str) -> tuple[list[Path], list[Skipped]]:
    """The files of anything `open_source` takes, and what a list names that is not there."""
    try:
        source = open_source(text, on_error="skip")
    except SourceError as error:
        raise SourceError(error.message, fix=error.fix.replace("--source", "--calib")) from error
    elsewhere = [path for path in source.paths if "://" in path] or list(source.paths[-1:] if source.is_live else ())
    if elsewhere:
        raise UsageError(
            f"{elsewhere[0]} is no file: calibration needs the same images every time, and a camera, stream or "
            "address may give others.",
            fix="Record a video first, or download the images:  ffmpeg -i ADDRESS -t 60 recorded.mp4   and then  "
            "--calib recorded.mp4",
        )
    return [Path(path) for path in source.paths], list(source.skipped)


def _in_dataset(path: Path) -> tuple[list[Path], list[str]]:
    """The images of a YAML or JSON, and a note which of its splits they are."""
    try:
        # Only here, because it needs PyYAML, and a folder of images does not.
        from yolov7_deploy.datasets import open_dataset
    except ModuleNotFoundError as error:
        raise missing_library(error, f"to read {path}") from error
    split, why = "val" if path.suffix.lower() == ".json" else "train", ""
    try:
        try:
            dataset = open_dataset(path, split=split)
        except DatasetError as error:
            if not error.message.startswith(f"{path} has no train images"):
                raise
            split, why = "val", ", as it names no train images: AP measured on these is flattered"
            dataset = open_dataset(path, split=split)
    except DatasetError as error:
        raise DatasetError(
            error.message, fix="Correct it, or give the folder of the images instead:  --calib FOLDER"
        ) from error
    of_split = "" if path.suffix.lower() == ".json" else f"{split} of "
    return [dataset.path(i) for i in range(len(dataset))], [f"Calibrated on {of_split}{_printable(path.name)}{why}."]


def _count_frames(path: Path) -> int:
    """Of a video: what its header announces, or all that can be decoded where it announces nothing."""
    with VideoFile(str(path)) as video:
        return video.info.frames or sum(1 for _ in video.read())


def _evenly_spaced(files: Sequence[_File], limit: int) -> list[_File]:
    """The files with frames that are wanted, each with their numbers."""
    ends = list(accumulate(file.frames for file in files))
    count = min(limit, ends[-1])
    wanted: dict[int, list[int]] = {}
    for i in range(count):
        index = i * ends[-1] // count
        at = bisect_right(ends, index)
        wanted.setdefault(at, []).append(index - ends[at] + files[at].frames)
    return [replace(files[at], wanted=tuple(numbers)) for at, numbers in wanted.items()]


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(file: _File) -> Iterator[tuple[str, Image]]:
    """Name and image of each wanted frame.

    Raises:
        ImageError: It is no image.
        SourceError: It is no video, or ends before the last frame that is wanted.
    """
    if not file.is_video:
        yield str(file.path), read_image(file.path)
        return
    wanted, last, number = set(file.wanted), file.wanted[-1], 0
    with VideoFile(str(file.path)) as video:
        for number, (image, _) in enumerate(video.read()):
            if number in wanted:
                yield f"{file.path} frame {number}", image
            if number == last:
                return
    raise SourceError(
        f"{file.path} ended after {number + 1} of the {file.frames} frames that its header announces.",
        fix="Copy the video again.",
    )


def _is_single_colour(image: Image) -> bool:
    colour = image[0, 0]
    return bool((image[0] == colour).all() and (image == colour).all())  # most images are told by their first row


def _nothing_left(source: str, skipped: Sequence[Skipped]) -> SourceError:
    reasons = [f"{s.path} {SINGLE_COLOUR}." if s.reason == SINGLE_COLOUR else s.reason for s in skipped]
    more = f" And {len(reasons) - _NAMED} more." if len(reasons) > _NAMED else ""
    return SourceError(
        f"{source} has no image to calibrate on. {' '.join(reasons[:_NAMED])}{more}",
        fix=f"Give {ENOUGH} like those to come:  --calib FOLDER",
    )


# --- notes ------------------------------------------------------------------------------------------------------------


def _notes_on_choice(chosen: Sequence[_File], total: int) -> Iterator[str]:
    count = sum(len(file.wanted) for file in chosen)
    if count < total:
        yield f"{count} of {total} images were taken, evenly spaced."
    frames = sum(len(file.wanted) for file in chosen if file.is_video)
    if frames > 1:
        yield f"{frames} are frames of videos, where neighbours look alike: images of many scenes tell more."


def _notes_on_skipped(skipped: Sequence[Skipped]) -> Iterator[str]:
    single = [entry.path for entry in skipped if entry.reason == SINGLE_COLOUR]
    unreadable = [entry.path for entry in skipped if entry.reason != SINGLE_COLOUR]
    if unreadable:
        yield f"Left out, as they cannot be read: {_some(unreadable)}."
    if single:
        yield f"Left out, as a single colour shows nothing that a range could be learnt from: {_some(single)}."


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ", ".join(_printable(Path(path).name) for path in paths[:_NAMED]) + more


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _notes_on_number(count: int) -> Iterator[str]:
    if count < _FAR_TOO_FEW:
        yield f"Far too few images ({count}): {_WHY_MANY}"
    elif count < _FEW:
        yield f"Few images ({count}): {_WHY_MANY}"
