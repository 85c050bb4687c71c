"""Resolution of a source: the images, videos, cameras and streams that a path, pattern, list or URL refers to."""

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
MAX_MESSAGE_CHARACTERS = 200  # characters of a path or address in a message
MAX_PATTERN = 4096  # characters, the limit of paths; matching takes quadratic time
GLOB_CHARACTERS = "*?["

OnError = Literal["raise", "skip"]
Kind = Literal["image", "video", "live", "array"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Item:
    """One item of a source.

    Attributes:
        kind: `image`, `video` (a file), `live` (a camera or stream) or `array`.
        address: Path, URL, camera number or array, depending on `kind`.
        label: The address for messages and `Frame.path`, without password; empty for arrays.
    """

    kind: Kind
    address: Any
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """An item that was skipped, and the reason."""

    path: str
    reason: str


def resolve(source: object, *, folder: Path | None, on_error: OnError, skipped: list[Skipped]) -> Iterator[Item]:
    """Yield the items of a source, in order.

    Args:
        source: See `open_source`.
        folder: Folder of the text list that has this entry, `None` outside lists.
        on_error: `raise` or `skip` invalid lines of a list.
        skipped: Skipped lines are appended to it.

    Raises:
        SourceError: A file does not exist, or a folder, pattern or list has nothing to read.
        UsageError: The type of `source` is not supported.
    """
    if isinstance(source, np.ndarray):
        arrays = source if source.ndim == 4 else [source]
        yield from (Item(kind="array", address=array, label="") for array in arrays)
    elif isinstance(source, int) and not isinstance(source, bool):
        yield _camera(source)
    elif isinstance(source, str | Path):
        text = str(source).strip()
        if text.lower().endswith(LIST_SUFFIX) and "://" not in text and folder is None:
            yield from _resolve_list(_expand_user(text), on_error=on_error, skipped=skipped)
        else:
            yield from _resolve_path_or_url(text, folder=folder)
    elif isinstance(source, Sequence):
        for one in source:
            yield from resolve(one, folder=folder, on_error=on_error, skipped=skipped)
    else:
        raise UsageError(
            f"A source cannot be of type {type(source).__name__}.",
            fix="Pass a path, a camera number, a URL, or uint8 arrays.",
        )


def _camera(number: int) -> Item:
    return Item(kind="live", address=number, label=f"camera {number}")


def _resolve_path_or_url(text: str, *, folder: Path | None) -> Iterator[Item]:
    """Yield the items of a path, pattern, URL or camera number.

    Relative paths are looked for in `folder` first, then in the working directory.
    """
    if text.isascii() and text.isdigit() and len(text) <= MAX_CAMERA_DIGITS:
        yield _camera(int(text))
        return
    scheme, separator, _ = text.partition("://")
    if separator:
        yield _url(text, scheme.lower())
        return
    path = _expand_user(text)
    if folder is not None and not path.is_absolute() and (_exists(folder / path) or not _exists(path)):
        path = folder / path
    if not _exists(path):
        if not any(character in text for character in GLOB_CHARACTERS):
            looked = _printable(str(path.absolute()))
            raise SourceError(f"{_printable(text)} does not exist (looked for {looked}).", fix="Check the path.")
        yield from _resolve_pattern(path)
    elif path.is_dir():
        yield from _resolve_folder(path)
    else:
        yield _file(path)


def _expand_user(text: str) -> Path:
    """Expand `~` in the path; a path with an unknown user is returned unchanged."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _exists(path: Path) -> bool:
    """Return whether the path exists; `Path.exists` would raise if a name is too long."""
    return os.path.exists(path)  # noqa: PTH110


def _printable(text: str) -> str:
    """Return a text of the user for a message: printable and at most a few lines long."""
    cut = text if len(text) <= MAX_MESSAGE_CHARACTERS else f"{text[:MAX_MESSAGE_CHARACTERS]}..."
    return cut if cut.isprintable() else ascii(cut)


def _url(text: str, scheme: str) -> Item:
    if scheme not in STREAM_SCHEMES:
        raise SourceError(
            f"{_printable(hide_password(text))} is not a URL of a supported scheme.",
            fix=f"One of: {', '.join(STREAM_SCHEMES)}",
        )
    try:
        suffix = Path(urllib.parse.urlsplit(text).path).suffix.lower()
    except ValueError as error:
        raise SourceError(
            f"{_printable(hide_password(text))} is not a valid URL: {error}.", fix="Correct it."
        ) from error
    kind: Kind = "live"
    if scheme in ("http", "https"):
        is_motion_jpeg = suffix in (".mjpg", ".mjpeg")
        kind = "image" if suffix in IMAGE_SUFFIXES else "video" if _is_video(suffix) and not is_motion_jpeg else kind
    return Item(kind=kind, address=text, label=hide_password(text))


def _is_video(suffix: str) -> bool:
    return suffix.lower() in VIDEO_SUFFIXES


def _is_media(path: Path) -> bool:
    hidden = path.name.startswith(".")  # macOS writes "._photo.jpg" files, which are not images
    return not hidden and path.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) and path.is_file()


def _file(path: Path) -> Item:
    if _is_video(path.suffix):
        return Item(kind="video", address=str(path), label=str(path))
    if not path.is_file():  # reading a pipe or device could block
        raise SourceError(f"{path} is not a file.", fix="Pass an image, video, folder, camera number or URL.")
    if path.suffix.lower() not in IMAGE_SUFFIXES and not cv2.haveImageReader(str(path)):
        raise SourceError(
            f"{path} is neither an image nor a video by its suffix.",
            fix=f"Images: {' '.join(IMAGE_SUFFIXES)}   videos: {' '.join(VIDEO_SUFFIXES)}   lists: {LIST_SUFFIX}",
        )
    return Item(kind="image", address=str(path), label=str(path))


def _resolve_folder(folder: Path) -> Iterator[Item]:
    files = sorted(path for path in folder.iterdir() if _is_media(path))
    if not files:
        deeper = any(_is_media(path) for path in folder.rglob("*"))
        raise SourceError(
            f"The folder {folder} has no image and no video in it.",
            fix=f"To include subfolders:  --source '{folder}/**/*'"
            if deeper
            else f"Supported are {' '.join(IMAGE_SUFFIXES)} and videos.",
        )
    yield from map(_file, files)


def _resolve_pattern(pattern: Path) -> Iterator[Item]:
    parts = pattern.parts
    glob_start = next(i for i, part in enumerate(parts) if any(character in part for character in GLOB_CHARACTERS))
    base, rest = Path(*parts[:glob_start]), Path(*parts[glob_start:])
    if parts[-1] == "**":
        rest = rest / "*"
    try:
        if len(str(pattern)) > MAX_PATTERN:
            raise ValueError(f"it has {len(str(pattern))} characters")
        matches = sorted(base.glob(str(rest))) if base.is_dir() else []
    except (ValueError, OSError, RecursionError, re.error) as error:
        raise SourceError(
            f"{_printable(str(pattern))} is not a valid pattern: {error}.", fix="For example: 'shots/**/*.jpg'"
        ) from error
    files = [path for path in matches if _is_media(path)]
    if not files:
        found = f"{len(matches)} matches, none of them an image or video" if matches else "no match"
        raise SourceError(
            f"The pattern {_printable(str(pattern))} found nothing to read ({found}; looked in "
            f"{_printable(str(base.absolute()))}).",
            fix="Check the pattern, and quote it so that the shell does not expand it.",
        )
    yield from map(_file, files)


def _resolve_list(path: Path, *, on_error: OnError, skipped: list[Skipped]) -> Iterator[Item]:
    """Yield the items of a text file with one entry per line; blank lines and lines that start with # are ignored."""
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
            yield from _resolve_path_or_url(entry, folder=path.parent)
        except SourceError as error:
            message = f"{path}, line {number}: {error.message}"
            if on_error == "raise":
                raise SourceError(message, fix="Correct the list, or skip missing entries.") from error
            log.info("Skipped %s", message)
            skipped.append(Skipped(path=entry, reason=message))
