"""Resolution of a source: the images, videos, cameras and streams that a path, pattern, list or URL refers to."""

from __future__ import annotations

import http.client
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np

from yolov7_deploy._download import ascii_address, probe
from yolov7_deploy._text import expand_user, get_logger, hide_credentials, is_unicode, similar_file
from yolov7_deploy.errors import SourceError, UsageError
from yolov7_deploy.hub import MODEL_SUFFIXES
from yolov7_deploy.image import IMAGE_SUFFIXES, ImageBytes, is_pil_image
from yolov7_deploy.sources.files import (
    GLOB_CHARACTERS,
    Skipped,
    expand_pattern,
    has_files_below,
    list_folder,
    locate,
    path_exists,
    read_list,
    summarize_left_out,
)
from yolov7_deploy.sources.video import opencv_name

log = get_logger(__name__)

VIDEO_SUFFIXES = (
    *(".264", ".265", ".3gp", ".asf", ".avi", ".flv", ".gif", ".h264", ".h265", ".hevc", ".m2ts", ".m4v", ".mjpeg"),
    *(".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
MOTION_JPEG_SUFFIXES = (".mjpg", ".mjpeg")
# Of JPEG, PNG, GIF, TIFF and AVIF, for servers that do not know media types.
IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x20ftypavif")
PROBE_TIMEOUT_S = 10.0
STREAM_SCHEMES = ("http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "tcp", "udp", "srt")
MEDIA_SUFFIXES = frozenset((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
LIST_SUFFIX = ".txt"
MAX_CAMERA_DIGITS = 4
MAX_MESSAGE_CHARACTERS = 200  # characters of a path or address in a message
MAX_ADDRESS = 2**13  # characters of a path or URL; hiding the credentials of longer ones would take seconds
MAX_SUBFOLDERS = 1000  # in which images are looked for, to suggest a pattern
MAX_PATTERN = 4096  # characters, the limit of paths; matching takes quadratic time

OnError = Literal["raise", "skip"]
Kind = Literal["image", "video", "live", "array", "http"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Item:
    """One item of a source.

    Attributes:
        kind: `image`, `video` (a file), `live` (a camera or stream), `array` (also a PIL image, or bytes of a file), or
            `http` (an address that `identify` asks the server about).
        address: Path, URL, camera number or array, depending on `kind`.
        label: The address for messages and `Frame.path`, without password; empty for arrays.
    """

    kind: Kind
    address: Any
    label: str


def check_on_error(on_error: object) -> None:
    """Check the value of an argument `on_error`.

    Raises:
        UsageError: It is neither `raise` nor `skip`.
    """
    if on_error not in get_args(OnError):
        raise UsageError(f"on_error must be 'raise' or 'skip', not {on_error!r}.", fix="on_error='skip'")


def resolve(
    source: object,
    *,
    folder: Path | None,
    on_error: OnError,
    skipped: list[Skipped],
    left_out: list[Skipped],
    ask_servers: bool = True,
) -> Iterator[Item]:
    """Yield the items of a source, in order.

    Args:
        source: See `open_source`.
        folder: Folder of the text list that has this entry, `None` outside lists.
        on_error: `raise` or `skip` invalid lines of a list.
        skipped: Skipped lines are appended to it.
        left_out: What folders and patterns have besides images and videos is appended to it.
        ask_servers: Ask servers what HTTP addresses are whose suffix does not show it; each may take `PROBE_TIMEOUT_S`.
            Otherwise these items are of the kind `http`.

    Raises:
        SourceError: A file does not exist, or a folder, pattern or list has nothing to read.
        UsageError: The type of `source` is not supported.
    """
    if isinstance(source, np.ndarray):
        arrays = source if source.ndim == 4 else [source]
        yield from (Item(kind="array", address=array, label="") for array in arrays)
    elif is_pil_image(source) or isinstance(source, ImageBytes):
        yield Item(kind="array", address=source, label="")
    elif isinstance(source, int) and not isinstance(source, bool):
        yield _camera(source)
    elif isinstance(source, str | Path):
        text = str(source).strip()
        if text.lower().endswith(LIST_SUFFIX) and "://" not in text and folder is None:
            yield from _resolve_list(
                expand_user(text), on_error=on_error, skipped=skipped, left_out=left_out, ask_servers=ask_servers
            )
        else:
            yield from _resolve_path_or_url(text, folder=folder, left_out=left_out, ask_servers=ask_servers)
    elif isinstance(source, Sequence):
        for one in source:
            yield from resolve(
                one, folder=folder, on_error=on_error, skipped=skipped, left_out=left_out, ask_servers=ask_servers
            )
    elif isinstance(source, Iterator) and not hasattr(source, "read"):
        raise UsageError(
            f"A source cannot be a {type(source).__name__}, which has no length.",
            fix="Pass a list, or use detector.stream(...), which reads one item after the other.",
        )
    else:
        raise UsageError(
            f"A source cannot be of type {type(source).__name__}.",
            fix="Pass a path, a camera number, a URL, a PIL image, the bytes of a file, or uint8 arrays.",
        )


def _camera(number: int) -> Item:
    return Item(kind="live", address=number, label=f"camera {number}")


def _resolve_path_or_url(
    text: str, *, folder: Path | None, left_out: list[Skipped], ask_servers: bool
) -> Iterator[Item]:
    """Yield the items of a path, pattern, URL or camera number.

    Relative paths of a list in `folder` are looked for there first, then in the working directory.
    """
    if not text.strip():  # the working directory would be found
        raise SourceError(
            "The source is empty.", fix="Name it:  --source street.jpg   A variable in its place is not set."
        )
    if len(text) > MAX_ADDRESS:
        raise SourceError(f"A path or URL of {len(text)} characters does not exist.", fix="Check the path.")
    if text.isascii() and text.isdigit() and len(text) <= MAX_CAMERA_DIGITS:
        yield _camera(int(text))
        return
    scheme, separator, _ = text.partition("://")
    if separator:
        item = _url(text, scheme.lower())
        yield identify(item) if ask_servers else item
        return
    path = expand_user(text)
    if folder is not None:
        path = locate(text, (folder, Path())) or folder / path
    if not path_exists(path):
        if not any(character in text for character in GLOB_CHARACTERS):
            shown = hide_credentials(text)
            looked = f" (looked for {_printable(str(path.absolute()))})" if shown == text else ""
            similar = similar_file(path)
            fix = "Check the path." if similar is None else f"Did you mean {_printable(str(similar))}?"
            raise SourceError(f"{_printable(shown)} does not exist{looked}.", fix=fix)
        yield from _resolve_pattern(path, left_out)
    elif path.is_dir():
        yield from _resolve_folder(path, left_out)
    else:
        yield _file(path)


def _printable(text: str) -> str:
    """Return a text of the user for a message: printable and at most a few lines long."""
    cut = text if len(text) <= MAX_MESSAGE_CHARACTERS else f"{text[:MAX_MESSAGE_CHARACTERS]}..."
    return cut if cut.isprintable() else ascii(cut)


def _url(text: str, scheme: str) -> Item:
    if scheme not in STREAM_SCHEMES:
        raise SourceError(
            f"{_printable(hide_credentials(text))} is not a URL of a supported scheme.",
            fix=f"One of: {', '.join(STREAM_SCHEMES)}",
        )
    if not is_unicode(text):
        raise SourceError(f"{_printable(hide_credentials(text))} is not a valid URL.", fix="Encode it with %XX.")
    try:
        suffix = Path(urllib.parse.urlsplit(ascii_address(text)).path).suffix.lower()
    except ValueError as error:
        raise SourceError(
            f"{_printable(hide_credentials(text))} is not a valid URL: {hide_credentials(str(error))}.",
            fix="Correct it.",
        ) from error
    if scheme in ("http", "https"):
        return Item(kind=_kind_by_suffix(suffix), address=ascii_address(text), label=hide_credentials(text))
    return Item(kind="live", address=text, label=hide_credentials(text))


def _kind_by_suffix(suffix: str) -> Kind:
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in MOTION_JPEG_SUFFIXES:
        return "live"
    return "video" if _is_video(suffix) else "http"


def identify(item: Item) -> Item:
    """Return an item of the kind `http` with the kind that the answer of the server shows, and others unchanged.

    Raises:
        SourceError: It is a web page.
    """
    return replace(item, kind=_ask_server(item)) if item.kind == "http" else item


def _ask_server(item: Item) -> Kind:
    try:
        answer = probe(item.address, timeout_s=PROBE_TIMEOUT_S)
    except (OSError, http.client.HTTPException, ValueError):
        return "live"  # the reader of the stream tries again, and reports the error
    if answer.media_type == "text/html":
        raise SourceError(
            f"{_printable(item.label)} is a web page, not an image, video or stream.",
            fix="Pass the address of the image or stream that the page shows.",
        )
    if answer.media_type.startswith("image/") or answer.head.startswith(IMAGE_SIGNATURES):
        return "image"
    return "video" if answer.media_type.startswith("video/") and answer.length else "live"


def _is_video(suffix: str) -> bool:
    return suffix.lower() in VIDEO_SUFFIXES


def _file(path: Path) -> Item:
    if not path.is_file():  # reading a pipe or device could block
        raise SourceError(f"{path} is not a file.", fix="Pass an image, video, folder, camera number or URL.")
    if _is_video(path.suffix):
        return Item(kind="video", address=str(path), label=str(path))
    with opencv_name(str(path)) as name:
        is_image = path.suffix.lower() in IMAGE_SUFFIXES or cv2.haveImageReader(name)
    if path.suffix.lower() in MODEL_SUFFIXES:
        raise SourceError(f"{path} is a model file, not an image.", fix=f"Pass it as --weights:  --weights {path}")
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        raise SourceError(
            f"{path} describes a dataset; it is not an image.",
            fix="Pass the folder of its images:  --source FOLDER   To measure AP on it:  --data " + str(path),
        )
    if not is_image:
        raise SourceError(
            f"{path} is neither an image nor a video by its suffix.",
            fix=f"Images: {' '.join(IMAGE_SUFFIXES)}   videos: {' '.join(VIDEO_SUFFIXES)}   lists: {LIST_SUFFIX}",
        )
    return Item(kind="image", address=str(path), label=str(path))


def _resolve_folder(folder: Path, left_out: list[Skipped]) -> Iterator[Item]:
    found = list_folder(folder, suffixes=MEDIA_SUFFIXES, recursive=False)
    if not found.files:
        deeper = has_files_below(folder, suffixes=MEDIA_SUFFIXES, max_folders=MAX_SUBFOLDERS)
        others = f", only {summarize_left_out(found.left_out, folder=folder)}" if found.left_out else ""
        raise SourceError(
            f"The folder {folder} has no image and no video in it{others}.",
            fix=f"To include subfolders:  --source '{folder}/**/*'"
            if deeper
            else f"Supported are {' '.join(IMAGE_SUFFIXES)} and videos.",
        )
    left_out += found.left_out
    yield from map(_file, found.files)


def _resolve_pattern(pattern: Path, left_out: list[Skipped]) -> Iterator[Item]:
    parts = pattern.parts
    glob_start = next(i for i, part in enumerate(parts) if any(character in part for character in GLOB_CHARACTERS))
    base = Path(*parts[:glob_start])
    try:
        if len(str(pattern)) > MAX_PATTERN:
            raise ValueError(f"it has {len(str(pattern))} characters")
        found = expand_pattern(base, parts[glob_start:], suffixes=MEDIA_SUFFIXES)
    except (ValueError, OSError, RecursionError, re.error) as error:
        raise SourceError(
            f"{_printable(str(pattern))} is not a valid pattern: {error}.", fix="For example: 'shots/**/*.jpg'"
        ) from error
    if not found.files:
        others = f", only {summarize_left_out(found.left_out)}" if found.left_out else ""
        raise SourceError(
            f"The pattern {_printable(str(pattern))} found nothing to read{others} (looked in "
            f"{_printable(str(base.absolute()))}).",
            fix="Check the pattern, and quote it so that the shell does not expand it.",
        )
    left_out += found.left_out
    yield from map(_file, found.files)


def _resolve_list(
    path: Path, *, on_error: OnError, skipped: list[Skipped], left_out: list[Skipped], ask_servers: bool
) -> Iterator[Item]:
    """Yield the items of a text file with one entry per line; blank lines and lines that start with # are ignored."""
    try:
        entries = read_list(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}.", fix="Check the path.") from error
    except UnicodeError as error:
        raise SourceError(f"{path} is not UTF-8 text ({error}).", fix="Save the list as UTF-8.") from error
    for number, entry in entries:
        try:
            yield from _resolve_path_or_url(entry, folder=path.parent, left_out=left_out, ask_servers=ask_servers)
        except SourceError as error:
            message = f"{path}, line {number}: {error.message}"
            if on_error == "raise":
                raise SourceError(message, fix="Correct the list, or skip missing entries.") from error
            log.info("Skipped %s", message)
            shown = hide_credentials(entry) if len(entry) <= MAX_ADDRESS else f"{path}, line {number}"
            skipped.append(Skipped(path=shown, reason=message))
