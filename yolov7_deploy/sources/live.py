"""Live cameras and streams: a thread reads frames as fast as they arrive and keeps only the newest one.

Otherwise a slow consumer would read from a growing buffer, with a delay that increases with every frame.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import cv2
import numpy as np

from yolov7_deploy._text import get_logger, hide_credentials
from yolov7_deploy.errors import SourceError
from yolov7_deploy.image import Image
from yolov7_deploy.sources.video import Capture, OpenCapture, open_capture

log = get_logger(__name__)

POLL_S = 0.2  # longest single wait, so that Ctrl-C works on every platform
# `docker stop` waits ten seconds for everything; a thread that waits for the network ends with the process.
CLOSE_TIMEOUT_S = 3.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LiveFrame:
    """A frame of a stream.

    Attributes:
        image: uint8 BGR [H, W, 3].
        number: Number of the frame in the stream, from 0.
        captured_s: Capture time in seconds since 1970; changes of the system clock during the stream have no effect.
        fps: Frames per second that the stream reports.
    """

    image: Image
    number: int
    captured_s: float
    fps: float


class LiveReader:
    """Reads one camera or stream in a thread, from construction until `close`.

    Args:
        address: Camera number or stream URL.
        open_capture: Function that opens it.
        reconnects: Number of consecutive attempts to reopen a lost stream. A stream that never opened is not tried
            again: a wrong URL is more likely than a slow network.
        wait_s: Seconds before the first attempt; doubled for each further one.
    """

    def __init__(
        self, address: str | int, *, open_capture: OpenCapture = open_capture, reconnects: int = 5, wait_s: float = 1.0
    ) -> None:
        self.address = address
        self._open = open_capture
        self._reconnects = reconnects
        self._wait_s = wait_s
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._newest: LiveFrame | None = None
        self._dropped = 0
        self._failure = ""
        self._ended = False
        self._count = 0
        self._clock_offset_s = time.time() - time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"y7-live-{_label(address)}", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Number of frames that were replaced by a newer one before `take` returned them."""
        with self._changed:
            return self._dropped

    def take(self, *, timeout_s: float | None = None) -> LiveFrame | None:
        """Wait for a new frame and return the newest one; return `None` after `timeout_s` or after `close`.

        Raises:
            SourceError: The stream could not be opened, or was lost and could not be reopened.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self._newest is None and not self._ended:
                left = POLL_S if deadline is None else min(POLL_S, deadline - time.monotonic())
                if left <= 0:
                    return None
                self._changed.wait(left)
            newest, self._newest = self._newest, None
        if newest is None and not self._stop.is_set():
            raise SourceError(
                self._failure or f"The reader of {_label(self.address)} stopped unexpectedly.",
                fix="Is it connected, and not in use by another program? Cameras of this machine:  ls /dev/video*"
                if isinstance(self.address, int)
                else "Check the URL with:  ffplay URL",
            )
        return newest

    def stop(self) -> None:
        """Request the thread to end after the current frame, without waiting for it."""
        self._stop.set()

    def close(self, *, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Stop the thread and wait for it; if it waits for the network, it ends later. It can be called repeatedly."""
        self.stop()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=timeout_s)

    def _run(self) -> None:
        try:
            failures = 0
            while not self._stop.is_set():
                before = self._count
                self._read_until_lost()
                if self._stop.is_set():
                    return
                failures = 1 if self._count > before else failures + 1
                if self._count == 0:
                    self._failure = f"{_label(self.address)} could not be opened, or sent no frame."
                    return
                if failures > self._reconnects:
                    self._failure = (
                        f"{_label(self.address)} was lost after {self._count} frames and could not be "
                        f"reopened in {self._reconnects} attempts."
                    )
                    return
                log.warning("%s was lost; connection attempt %d", _label(self.address), failures)
                self._stop.wait(self._wait_s * 2 ** (failures - 1))
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _read_until_lost(self) -> None:
        try:
            self._read_frames(self._open(self.address))
        except cv2.error as error:
            log.warning("OpenCV failed on %s: %s", _label(self.address), error)

    def _read_frames(self, capture: Capture) -> None:
        try:
            if not capture.isOpened():
                return
            fps = capture.get(cv2.CAP_PROP_FPS)
            while not self._stop.is_set():
                ok, image = capture.read()
                if not ok or image is None:
                    return
                self._set_newest(image.astype(np.uint8, copy=False), fps)
        finally:
            capture.release()

    def _set_newest(self, image: Image, fps: float) -> None:
        with self._changed:
            self._dropped += self._newest is not None
            captured_s = self._clock_offset_s + time.monotonic()
            self._newest = LiveFrame(image=image, number=self._count, captured_s=captured_s, fps=fps)
            self._count += 1
            self._changed.notify_all()


def _label(address: str | int) -> str:
    return f"Camera {address}" if isinstance(address, int) else hide_credentials(address)
