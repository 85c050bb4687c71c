"""Videos through OpenCV: opening files, cameras and streams, reading a file or an address, writing an mp4."""

from __future__ import annotations

import logging
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from yolov7_deploy._atomic_file import unfinished_name
from yolov7_deploy.errors import ImageError, SourceError
from yolov7_deploy.image import Image, decode_image

log = logging.getLogger(__name__)

NETWORK_TIMEOUT_MS = 10_000  # FFmpeg's own limit is 30 s, too long to notice a dead camera
DOWNLOAD_TIMEOUT_S = 20
CREDIBLE_FPS = (1, 240)  # streams often report 0, or the 90 000 ticks of their clock
DEFAULT_FPS = 25.0
# The highest levels of H.265 and AV1 end at 36 megapixels; decoders hold a dozen frames.
MAX_FRAME_PIXELS = 2**26


class Capture(Protocol):
    """What is used of `cv2.VideoCapture`."""

    def isOpened(self) -> bool:  # noqa: N802 (OpenCV's name)
        """Whether frames can be read."""
        ...

    def read(self) -> tuple[bool, npt.NDArray[np.generic] | None]:
        """The next frame, or False where there is none."""
        ...

    def get(self, propId: int, /) -> float:  # noqa: N803 (OpenCV's name)
        """A property by its `cv2.CAP_PROP_...` number, 0 where unknown."""
        ...

    def release(self) -> None:
        """Closes it."""
        ...


OpenCapture = Callable[[str | int], Capture]


def open_capture(address: str | int) -> Capture:
    """OpenCV's capture of a camera number, stream address or video file; network waits are limited."""
    capture: Capture
    if isinstance(address, str) and "://" in address:
        limits = [
            cv2.CAP_PROP_OPEN_TIMEOUT_MSEC,
            NETWORK_TIMEOUT_MS,
            cv2.CAP_PROP_READ_TIMEOUT_MSEC,
            NETWORK_TIMEOUT_MS,
        ]
        capture = cv2.VideoCapture(address, cv2.CAP_FFMPEG, limits)
    elif isinstance(address, int):
        camera = cv2.VideoCapture(address)
        camera.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the driver must not queue old frames either
        capture = camera
    else:
        capture = cv2.VideoCapture(address)
    return capture


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What a video file says about itself: frames per second and frame count (0 where unknown), height and width."""

    fps: float
    frames: int
    hw: tuple[int, int]


class VideoFile:
    """A video file that did open; a context manager.

    Raises:
        SourceError: OpenCV cannot open it, or it announces frames beyond `MAX_FRAME_PIXELS`.
    """

    def __init__(self, path: str, *, opener: OpenCapture = open_capture) -> None:
        self.path = hide_password(path)
        self._capture = opener(path)
        if not self._capture.isOpened():
            self.close()
            raise SourceError(
                f"{self.path} is not a video that OpenCV can open (absent, empty, cut off, or of a codec it does "
                "not have).",
                fix="Convert it:  ffmpeg -i INPUT -c:v libx264 OUTPUT.mp4",
            )
        self.info = VideoInfo(
            fps=self._number(cv2.CAP_PROP_FPS),
            frames=round(self._number(cv2.CAP_PROP_FRAME_COUNT)),
            hw=(round(self._number(cv2.CAP_PROP_FRAME_HEIGHT)), round(self._number(cv2.CAP_PROP_FRAME_WIDTH))),
        )
        height, width = self.info.hw
        if height * width > MAX_FRAME_PIXELS:
            self.close()
            raise SourceError(
                f"{self.path} announces frames of {width} x {height} pixels, more than "
                f"{MAX_FRAME_PIXELS // 10**6} million.",
                fix="Copy the video again, or scale it down:  ffmpeg -i INPUT -vf scale=1920:-2 OUTPUT.mp4",
            )

    def read(self) -> Iterator[tuple[Image, float]]:
        """Each frame uint8 BGR [H, W, 3] with its seconds from the start.

        Raises:
            SourceError: Not even the first frame can be decoded. A video that is cut off later ends with a warning.
        """
        count = 0
        while True:
            try:
                ok, image = self._capture.read()
            except cv2.error as error:
                reason = str(error).strip().splitlines()[-1]
                raise SourceError(f"{self.path} cannot be decoded: {reason}", fix="Copy the video again.") from error
            if not ok or image is None:
                break
            seconds = self._number(cv2.CAP_PROP_POS_MSEC) / 1000
            if not seconds and self.info.fps:
                seconds = count / self.info.fps
            yield image.astype(np.uint8, copy=False), seconds
            count += 1
        if count == 0:
            raise SourceError(f"{self.path} opened, but no frame of it can be decoded.", fix="Copy the video again.")
        if count < self.info.frames:
            log.warning("%s ended after %d of the %d frames its header announces", self.path, count, self.info.frames)

    def _number(self, what: int) -> float:
        value = self._capture.get(what)
        return value if math.isfinite(value) and value > 0 else 0.0

    def close(self) -> None:
        """Frees the file; calling it twice is fine."""
        self._capture.release()

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class VideoWriter:
    """An mp4 file that gets its name only when it is finished.

    Args:
        path: Where it will be; folders are made.
        fps: Frames per second; 25 where the source does not say anything credible.
        hw: Height and width of every frame. MPEG-4 has even sides: OpenCV cuts the last row or column of odd ones.

    Raises:
        SourceError: The folder cannot be written, or this OpenCV has no MPEG-4 encoder.
    """

    def __init__(self, path: Path, *, fps: float, hw: tuple[int, int]) -> None:
        self.path = path
        self.hw = hw
        self._temporary = unfinished_name(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SourceError(f"{path.parent} cannot be made: {error}.", fix="Choose another folder.") from error
        rate = fps if CREDIBLE_FPS[0] <= fps <= CREDIBLE_FPS[1] else DEFAULT_FPS
        self._writer = cv2.VideoWriter(str(self._temporary), cv2.VideoWriter.fourcc(*"mp4v"), rate, (hw[1], hw[0]))
        if not self._writer.isOpened():
            self.discard()
            raise SourceError(
                f"{path} cannot be written: this OpenCV has no mp4v encoder, or the folder is read-only.",
                fix="Use --nosave with --save-txt or --json, or install opencv-python-headless from PyPI.",
            )

    def write(self, image_bgr: Image) -> None:
        """Adds a frame uint8 BGR of the size given at the start."""
        assert image_bgr.shape[:2] == self.hw, "OpenCV silently leaves out frames of another size"
        self._writer.write(image_bgr)

    def finish(self) -> Path:
        """Closes the file and gives it its name.

        Raises:
            SourceError: Nothing arrived on the disk.
        """
        self._writer.release()
        try:
            self._temporary.replace(self.path)
        except OSError as error:
            self.discard()
            raise SourceError(f"{self.path} cannot be written: {error}.", fix="Is the disk full?") from error
        return self.path

    def discard(self) -> None:
        """Closes and removes the unfinished file."""
        self._writer.release()
        self._temporary.unlink(missing_ok=True)


def download_image(address: str) -> Image:
    """The image behind an http address as uint8 BGR [H, W, 3].

    Raises:
        ImageError: It cannot be downloaded, or is not an image.
    """
    try:
        with urllib.request.urlopen(address, timeout=DOWNLOAD_TIMEOUT_S) as answer:
            data = np.frombuffer(answer.read(), dtype=np.uint8)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ImageError(
            f"{hide_password(address)} cannot be downloaded: {error}.", fix="Check the address and the network."
        ) from error
    return decode_image(data, name=hide_password(address))


def hide_password(address: str) -> str:
    """The address as it may be printed: `rtsp://user:***@host/...`."""
    scheme, separator, rest = address.partition("://")
    login, at, place = rest.rpartition("@")
    if not at or "/" in login:
        return address
    return f"{scheme}{separator}{login.partition(':')[0]}:***@{place}"
