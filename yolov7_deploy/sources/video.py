"""Video input and output with OpenCV: files, cameras, streams, images from URLs, mp4 files, and a window."""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import socket
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from yolov7_deploy._atomic_file import PartialFile
from yolov7_deploy._bounded_read import open_file
from yolov7_deploy._download import download, probe
from yolov7_deploy._process import temporary_folder
from yolov7_deploy._text import get_logger, hide_credentials, is_unicode
from yolov7_deploy.errors import ImageError, SourceError, UsageError
from yolov7_deploy.image import Image, decode_image

log = get_logger(__name__)

NETWORK_TIMEOUT_MS = 10_000  # FFmpeg's default of 30 s is too long to notice a dead camera
FILE_TIMEOUT_MS = 10_000  # FFmpeg searches the whole file for a frame, and a sparse one can have terabytes
DOWNLOAD_TIMEOUT_S = 60  # of one image, from the name of the server to the last byte
MAX_DOWNLOAD_BYTES = 2**27  # of one image; the largest photos have about 100 MB
DEFAULT_PORTS = {"rtsp": 554, "rtsps": 322, "rtmp": 1935, "rtmps": 443}  # IANA; RTMP as in FFmpeg
PLAUSIBLE_FPS = (0.1, 1000.0)
DEFAULT_FPS = 25.0
# The highest levels of H.265 and AV1 end at 36 megapixels; decoders hold a dozen frames.
MAX_FRAME_PIXELS = 2**26
_PLAYLIST_START = b"ffconcat version"


class Capture(Protocol):
    """The methods of `cv2.VideoCapture` that are used here."""

    def isOpened(self) -> bool:  # noqa: N802 (OpenCV's name)
        """Return whether frames can be read."""
        ...

    def read(self) -> tuple[bool, npt.NDArray[np.generic] | None]:
        """Return True and the next frame, or False and `None` at the end."""
        ...

    def get(self, propId: int, /) -> float:  # noqa: N803 (OpenCV's name)
        """Return a property by its `cv2.CAP_PROP_...` number, 0 if unknown."""
        ...

    def release(self) -> None:
        """Close the capture."""
        ...


OpenCapture = Callable[[str | int], Capture]


def open_capture(address: str | int) -> Capture:
    """Open a camera number, stream URL or video file with OpenCV; the network and files have a timeout.

    Raises:
        SourceError: It is a playlist of FFmpeg, which opens the files that it names: a named pipe blocks for ever.
    """
    capture: Capture
    if isinstance(address, str) and "://" in address:
        capture = cv2.VideoCapture(address, cv2.CAP_FFMPEG, _timeouts(NETWORK_TIMEOUT_MS))
    elif isinstance(address, int):
        camera = cv2.VideoCapture(address)
        camera.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # so that the driver does not queue old frames
        capture = camera
    else:
        _refuse_playlist(address)
        with opencv_name(address) as name:
            capture = cv2.VideoCapture(name, cv2.CAP_ANY, _timeouts(FILE_TIMEOUT_MS))
    return capture


def _refuse_playlist(path: str) -> None:
    with contextlib.suppress(OSError), open_file(path, max_bytes=sys.maxsize) as file:
        if file.read(len(_PLAYLIST_START)) == _PLAYLIST_START:
            raise SourceError(
                f"{path} is not a video but a playlist for FFmpeg's concat.",
                fix="List the videos in a text file, one path per line:  --source list.txt",
            )


def _timeouts(milliseconds: int) -> list[int]:
    return [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, milliseconds, cv2.CAP_PROP_READ_TIMEOUT_MSEC, milliseconds]


@contextlib.contextmanager
def opencv_name(path: str) -> Iterator[str]:
    """Yield a name for a file until OpenCV has opened it: a link if the path is not valid Unicode.

    OpenCV crashes for such names, which files from other systems have.
    """
    if is_unicode(path):
        yield path
        return
    suffix = Path(path).suffix
    with temporary_folder("y7-link") as folder:
        link = folder / f"file{suffix if is_unicode(suffix) else ''}"
        link.symlink_to(Path(path).absolute())
        yield str(link)


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """Header of a video file: frames per second and frame count (0 if unknown), height and width."""

    fps: float
    frames: int
    hw: tuple[int, int]


class VideoFile:
    """An open video file, a context manager that closes it.

    Raises:
        SourceError: OpenCV cannot open it, or its frames have more than `MAX_FRAME_PIXELS` pixels.
    """

    def __init__(self, path: str, *, opener: OpenCapture = open_capture) -> None:
        self.path = hide_credentials(path)
        self._capture = opener(path)
        if not self._capture.isOpened():
            self.close()
            raise SourceError(
                f"{self.path} is not a video that OpenCV can open: it is missing, empty, truncated, or has an "
                "unsupported codec.",
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
                f"{self.path} declares frames of {height}x{width} pixels (height x width), more than "
                f"{MAX_FRAME_PIXELS // 10**6} million.",
                fix="Copy the video again, or resize it:  ffmpeg -i INPUT -vf scale=1920:-2 OUTPUT.mp4",
            )

    def read(self) -> Iterator[tuple[Image, float]]:
        """Yield each frame, uint8 BGR [H, W, 3], and its time in seconds from the start.

        Raises:
            SourceError: Decoding fails, or there is no frame. A video that is truncated later ends with a warning.
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
            raise SourceError(f"{self.path} has no frame that can be decoded.", fix="Copy the video again.")
        if count < self.info.frames:
            log.warning(
                "%s ended after %d of the %d frames that its header declares", self.path, count, self.info.frames
            )

    def _number(self, what: int) -> float:
        value = self._capture.get(what)
        return value if math.isfinite(value) and value > 0 else 0.0

    def close(self) -> None:
        """Close the file. It can be called repeatedly."""
        self._capture.release()

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class VideoWriter:
    """Writes an mp4 file, which gets its name only when it is finished.

    Args:
        path: Path of the file; missing folders are created.
        fps: Frames per second; an implausible value is replaced by 25.
        hw: Height and width of every frame. MPEG-4 needs even sizes: OpenCV crops the last row or column of odd ones.

    Raises:
        SourceError: The folder is not writable, or this OpenCV has no MPEG-4 encoder.
    """

    def __init__(self, path: Path, *, fps: float, hw: tuple[int, int]) -> None:
        self.path = path
        self.hw = hw
        self._rate = fps if PLAUSIBLE_FPS[0] <= fps <= PLAUSIBLE_FPS[1] else DEFAULT_FPS
        self._frames = 0
        self._start_s: float | None = None
        self._newest: Image | None = None
        try:
            self._file = PartialFile(path)
        except OSError as error:
            reason = error.strerror or error
            raise SourceError(f"{path} cannot be created: {reason}.", fix="Choose another folder.") from error
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        with opencv_name(str(self._file.temporary)) as name:
            self._writer = cv2.VideoWriter(name, codec, self._rate, (hw[1], hw[0]))
        if not self._writer.isOpened():
            self.discard()
            raise SourceError(
                f"{path} cannot be written: the disk is full, or this OpenCV has no mp4v encoder.",
                fix="Use --nosave with --save-txt or --json, or install opencv-python-headless from PyPI.",
            )

    @property
    def end_s(self) -> float:
        """Time at which the last frame of `write_at` ends, on the clock of its `timestamp_s`."""
        return (self._start_s or 0.0) + self._frames / self._rate

    def write(self, image_bgr: Image) -> None:
        """Append a frame, uint8 BGR [H, W, 3] of the size `hw`."""
        assert image_bgr.shape[:2] == self.hw, "OpenCV silently drops frames of another size"
        self._writer.write(image_bgr)
        self._frames += 1

    def write_at(self, image_bgr: Image, timestamp_s: float) -> None:
        """Append a frame that is shown at its capture time, so that the video plays at the true speed.

        The frame rate of a file is constant: the previous frame is repeated until the new one starts. Of several
        frames within one period of the frame rate, the first is written.
        """
        if self._start_s is None:
            self._start_s = timestamp_s
        position = round((timestamp_s - self._start_s) * self._rate)
        while self._newest is not None and self._frames < position:
            self.write(self._newest)
        if position >= self._frames:
            self.write(image_bgr)
        self._newest = image_bgr

    def finish(self) -> Path:
        """Close the file, check that all frames can be read back, rename it to its final name, and return that.

        Raises:
            SourceError: Frames are missing, because the disk was full. The file has those before, if there are any.
        """
        self._writer.release()
        readable = count_readable_frames(self._file.temporary, expected=self._frames)
        try:
            if readable or not self._frames:
                self._file.commit()
        except OSError as error:
            raise SourceError(f"{self.path} cannot be written: {error}.", fix="Is the disk full?") from error
        finally:
            self._file.discard()
        if readable < self._frames:
            kept = f"The file has the first {readable}." if readable else "Nothing was saved."
            raise SourceError(
                f"{self.path}: only {readable} of {self._frames} frames could be written. {kept}",
                fix="Free some space on the disk, or choose another folder:  --save-dir ANOTHER",
            )
        return self.path

    def discard(self) -> None:
        """Close and remove the temporary file."""
        self._writer.release()
        self._file.discard()


def count_readable_frames(path: Path, *, expected: int) -> int:
    """Return how many frames of a video can be read; decodes only the last one if there are as many as expected."""
    with opencv_name(str(path)) as name:
        capture = cv2.VideoCapture(name)
    try:
        if expected > 0 and round(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == expected:
            capture.set(cv2.CAP_PROP_POS_FRAMES, expected - 1)
            if capture.read()[0]:
                return expected
            capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
        count = 0
        while capture.grab():
            count += 1
        return count
    except cv2.error:
        return 0
    finally:
        capture.release()


def download_image(address: str) -> Image:
    """Download an image and return it as uint8 BGR [H, W, 3].

    Raises:
        ImageError: It cannot be downloaded, or is not an image.
    """
    try:
        blocks = [block for block, _ in download(address, max_bytes=MAX_DOWNLOAD_BYTES, timeout_s=DOWNLOAD_TIMEOUT_S)]
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(
            f"{hide_credentials(address)} cannot be downloaded: {hide_credentials(reason)}.",
            fix="Check the URL and the network.",
        ) from error
    data = np.frombuffer(b"".join(blocks), dtype=np.uint8)
    return decode_image(data, name=hide_credentials(address))


ESCAPE = 27
POLL_MS = 50


class Window:
    """One OpenCV window, a context manager that closes it.

    Raises:
        UsageError: There is no display, or this OpenCV was built without GUI support.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        # Checked first: without a display, GUI libraries end the whole process.
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise UsageError("There is no display to show images on.", fix="Save them instead:  --save-dir results")
        try:
            cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
        except cv2.error as error:
            raise UsageError(
                "This OpenCV was built without GUI support (opencv-python-headless).",
                fix="pip uninstall opencv-python-headless; pip install opencv-python   (or use --save-dir results)",
            ) from error

    def show(self, image_bgr: Image, *, wait: bool) -> bool:
        """Show the image, with `wait` until a key is pressed; return False if the user quits (q, Esc, close button)."""
        cv2.imshow(self._title, image_bgr)
        while True:
            key = cv2.waitKey(POLL_MS if wait else 1)
            if key in (ESCAPE, ord("q")) or cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) < 1:
                return False
            if key >= 0 or not wait:
                return True

    def __enter__(self) -> Window:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(cv2.error):  # the user has closed it
            cv2.destroyWindow(self._title)


# --- servers of streams -----------------------------------------------------------------------------------------------


class AnsweredCapture:
    """Opens the stream of a camera after its server has answered; one object per camera.

    OpenCV opens one stream of FFmpeg after the other, under a lock of the whole process that it also needs to create a
    video (github.com/opencv/opencv/issues/17057, pull request 9006). A camera that does not answer would hold it for
    the timeout of ten seconds, at each attempt, and delay all others. So its server is asked first, without that lock.

    The request is a connection of its own. A camera that serves one client may still be busy with it when OpenCV
    connects; then the next attempt asks nothing.
    """

    def __init__(self) -> None:
        self._is_known = False

    def __call__(self, address: str | int) -> Capture:
        """Return the opened capture, or a closed one."""
        if not self._is_known and not server_answers(address):
            return cv2.VideoCapture()
        capture = open_capture(address)
        self._is_known = not self._is_known and not capture.isOpened()
        return capture


def server_answers(address: str | int, *, timeout_s: float = NETWORK_TIMEOUT_MS / 1000) -> bool:
    """Return whether a server sends anything, even an error; True where this cannot be asked.

    HTTP servers are asked for the stream itself, RTSP servers for their options (RFC 2326, 10.1), which need no
    password. Of others, only the connection is tried. Cameras of this machine and addresses of UDP are not asked.
    """
    scheme = address.partition("://")[0].lower() if isinstance(address, str) else ""
    if isinstance(address, str) and scheme in ("http", "https"):
        return _http_answers(address, timeout_s)
    if isinstance(address, str) and scheme in (*DEFAULT_PORTS, "tcp"):
        return _tcp_answers(address, scheme, timeout_s)
    return True


def _http_answers(address: str, timeout_s: float) -> bool:
    try:
        probe(address, timeout_s=timeout_s)
    except (http.client.HTTPException, ValueError):
        return True  # FFmpeg may understand the answer
    except OSError as error:
        return hasattr(error, "code")  # an HTTP status
    return True


def _tcp_answers(address: str, scheme: str, timeout_s: float) -> bool:
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = parts.hostname or "", parts.port or DEFAULT_PORTS.get(scheme, 0)
        location = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    except ValueError:
        return True
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            if scheme == "rtsp":
                connection.sendall(f"OPTIONS {location} RTSP/1.0\r\nCSeq: 1\r\n\r\n".encode())
                connection.recv(64)  # the end of the connection is an answer, too
    except ConnectionResetError:
        return True
    except OSError:
        return False
    return True
