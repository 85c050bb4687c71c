"""What the text of a source means: which images, videos, cameras and streams it names."""

from __future__ import annotations

import logging
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from yolov7_deploy.errors import SourceError, UsageError
from yolov7_deploy.image import IMAGE_SUFFIXES
from yolov7_deploy.sources.video import hide_password

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mjpeg", ".mjpg", ".mkv"),
    *(".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv"),
)
STREAM_SCHEMES = ("http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "tcp", "udp", "srt")
LIST_SUFFIX = ".txt"
MAX_CAMERA_DIGITS = 4
MAX_SHOWN = 200  # characters of a path or address in a message
MAX_PATTERN = 4096  # characters, as long as paths may be; matching takes their square
SIGNS = "*?["  # of a pattern

OnError = Literal["raise", "skip"]
Kind = Literal["image", "video", "live", "array"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Item:
    """One thing to read; `address` is a path, an address, a camera number or an array."""

    kind: Kind
    address: Any
    shown: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """Something that was left out, and why."""

    path: str
    reason: str


def resolve(source: object, *, folder: Path | None, on_error: OnError, missing: list[Skipped]) -> Iterator[Item]:
    """The items of a source, in order; what `on_error="skip"` leaves out is added to `missing`.

    Args:
        source: See `open_source`.
        folder: Of the text list it stands in, `None` elsewhere.
        on_error: What a wrong line of a list does.
        missing: Grows by what was left out.

    Raises:
        SourceError: Something that does not exist, or has nothing to read in it.
        UsageError: An argument of a kind that is no source.
    """
    if isinstance(source, np.ndarray):
        arrays = source if source.ndim == 4 else [source]
        yield from (Item(kind="array", address=array, shown="") for array in arrays)
    elif isinstance(source, int) and not isinstance(source, bool):
        yield _camera(source)
    elif isinstance(source, str | Path):
        text = str(source).strip()
        if text.lower().endswith(LIST_SUFFIX) and "://" not in text and folder is None:
            yield from _resolve_list(_home(text), on_error=on_error, missing=missing)
        else:
            yield from _resolve_text(text, folder=folder)
    elif isinstance(source, Sequence):
        for one in source:
            yield from resolve(one, folder=folder, on_error=on_error, missing=missing)
    else:
        raise UsageError(
            f"A source cannot be of type {type(source).__name__}.",
            fix="Pass a path, a camera number, an address, or uint8 arrays.",
        )


def _camera(number: int) -> Item:
    return Item(kind="live", address=number, shown=f"camera {number}")


def _resolve_text(text: str, *, folder: Path | None) -> Iterator[Item]:
    """A path, pattern, address or camera number; relative paths are looked for in `folder` first, then here."""
    if text.isascii() and text.isdigit() and len(text) <= MAX_CAMERA_DIGITS:
        yield _camera(int(text))
        return
    scheme, separator, _ = text.partition("://")
    if separator:
        yield _address(text, scheme.lower())
        return
    path = _home(text)
    if folder is not None and not path.is_absolute() and (_exists(folder / path) or not _exists(path)):
        path = folder / path
    if not _exists(path):
        if not any(sign in text for sign in SIGNS):
            looked = _shown(str(path.absolute()))
            raise SourceError(f"{_shown(text)} does not exist (looked for {looked}).", fix="Check the path.")
        yield from _resolve_pattern(path)
    elif path.is_dir():
        yield from _resolve_folder(path)
    else:
        yield _file(path)


def _home(text: str) -> Path:
    """The path with its `~` replaced, or as it is where there is no such user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _exists(path: Path) -> bool:
    """Whether something is there; `Path.exists` raises where a name is too long for any file."""
    return os.path.exists(path)  # noqa: PTH110


def _shown(text: str) -> str:
    """A text of the user for a message: printable, and not longer than a few lines."""
    cut = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    return cut if cut.isprintable() else ascii(cut)


def _address(text: str, scheme: str) -> Item:
    if scheme not in STREAM_SCHEMES:
        raise SourceError(
            f"{_shown(hide_password(text))} is not an address that can be opened.",
            fix=f"One of: {', '.join(STREAM_SCHEMES)}",
        )
    try:
        suffix = Path(urllib.parse.urlsplit(text).path).suffix.lower()
    except ValueError as error:
        raise SourceError(f"{_shown(hide_password(text))} is no address: {error}.", fix="Correct it.") from error
    kind: Kind = "live"
    if scheme in ("http", "https"):
        is_motion_jpeg = suffix in (".mjpg", ".mjpeg")
        kind = "image" if suffix in IMAGE_SUFFIXES else "video" if _is_video(suffix) and not is_motion_jpeg else kind
    return Item(kind=kind, address=text, shown=hide_password(text))


def _is_video(suffix: str) -> bool:
    return suffix.lower() in VIDEO_SUFFIXES


def _is_media(path: Path) -> bool:
    hidden = path.name.startswith(".")  # macOS leaves "._photo.jpg" files that are no images
    return not hidden and path.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) and path.is_file()


def _file(path: Path) -> Item:
    if _is_video(path.suffix):
        return Item(kind="video", address=str(path), shown=str(path))
    if not path.is_file():  # a pipe or device would be waited for
        raise SourceError(f"{path} is no file.", fix="Name an image, video, folder, camera number or address.")
    if path.suffix.lower() not in IMAGE_SUFFIXES and not cv2.haveImageReader(str(path)):
        raise SourceError(
            f"{path} is neither an image nor a video by its suffix.",
            fix=f"Images: {' '.join(IMAGE_SUFFIXES)}   videos: {' '.join(VIDEO_SUFFIXES)}   lists: {LIST_SUFFIX}",
        )
    return Item(kind="image", address=str(path), shown=str(path))


def _resolve_folder(folder: Path) -> Iterator[Item]:
    files = sorted(path for path in folder.iterdir() if _is_media(path))
    if not files:
        deeper = any(_is_media(path) for path in folder.rglob("*"))
        raise SourceError(
            f"The folder {folder} has no image and no video in it.",
            fix=f"Its subfolders do:  --source '{folder}/**/*'"
            if deeper
            else f"Looked for {' '.join(IMAGE_SUFFIXES)} and videos.",
        )
    yield from map(_file, files)


def _resolve_pattern(pattern: Path) -> Iterator[Item]:
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in SIGNS))
    base, rest = Path(*parts[:first]), Path(*parts[first:])
    if parts[-1] == "**":
        rest = rest / "*"
    try:
        if len(str(pattern)) > MAX_PATTERN:
            raise ValueError(f"it has {len(str(pattern))} characters")
        matches = sorted(base.glob(str(rest))) if base.is_dir() else []
    except (ValueError, OSError, RecursionError, re.error) as error:
        raise SourceError(
            f"{_shown(str(pattern))} is no pattern: {error}.", fix="For example: 'shots/**/*.jpg'"
        ) from error
    files = [path for path in matches if _is_media(path)]
    if not files:
        found = f"{len(matches)} matches, none of them an image or video" if matches else "no match"
        raise SourceError(
            f"The pattern {_shown(str(pattern))} found nothing to read ({found}; looked in "
            f"{_shown(str(base.absolute()))}).",
            fix="Check the pattern, and quote it so that the shell leaves it alone.",
        )
    yield from map(_file, files)


def _resolve_list(path: Path, *, on_error: OnError, missing: list[Skipped]) -> Iterator[Item]:
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
