"""Live cameras and streams: a thread reads frames as fast as they arrive and keeps only the newest one.

Otherwise a slow consumer would read from a growing buffer, with a delay that increases with every frame.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
MAX_WAIT_S = 30.0  # between two attempts to open a stream
REPORTED_ATTEMPTS = 5  # later ones in a row are logged as information only
_MAX_DOUBLINGS = 16

StreamState = Literal["connecting", "running", "lost", "ended"]
OnState = Callable[[StreamState, str], None]  # called with a state and the reason


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LiveFrame:
    """A frame of a stream.

    Attributes:
        image: uint8 BGR [H, W, 3].
        number: Number of the frame in the stream, from 0.
        captured_s: Capture time in seconds since 1970; changes of the system clock during the stream have no effect.
        monotonic_s: The same time on the clock of `time.monotonic`.
        fps: Frames per second that the stream reports.
    """

    image: Image
    number: int
    captured_s: float
    monotonic_s: float
    fps: float


class LiveReader:
    """Reads one camera or stream in a thread, from construction until `close`.

    Args:
        address: Camera number or stream URL.
        open_capture: Function that opens it.
        reconnects: Number of consecutive attempts to reopen a lost stream. A stream that never opened is not tried
            again: a wrong URL is more likely than a slow network. `None` tries both for as long as the reader is open.
        wait_s: Seconds before the first attempt; doubled for each further one, up to `MAX_WAIT_S`.
        changed: Condition that is notified of each frame, which several readers may share; `None` creates one.
        on_state: Called in the thread of the reader when the state changes.
    """

    def __init__(
        self,
        address: str | int,
        *,
        open_capture: OpenCapture = open_capture,
        reconnects: int | None = 5,
        wait_s: float = 1.0,
        changed: threading.Condition | None = None,
        on_state: OnState | None = None,
    ) -> None:
        self.address = address
        self._open = open_capture
        self._reconnects = reconnects
        self._wait_s = wait_s
        self._on_state = on_state
        self._changed = changed or threading.Condition()
        self._stop = threading.Event()
        self._newest: LiveFrame | None = None
        self._dropped = 0
        self._failure = ""
        self._ended = False
        self._count = 0
        self._state: StreamState = "connecting"
        self._connections = 0
        self._failures = 0
        self._clock_offset_s = time.time() - time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"y7-live-{_label(address)}", daemon=True)
        self._thread.start()

    @property
    def state(self) -> StreamState:
        """The state: `connecting` before the first attempt to open it has ended, `running`, or `lost`."""
        return self._state

    @property
    def received(self) -> int:
        """Number of frames that were read."""
        return self._count

    @property
    def connections(self) -> int:
        """Number of times that the stream was opened and sent a frame."""
        return self._connections

    @property
    def failures(self) -> int:
        """Number of consecutive attempts that failed, since the last frame; the loss of a connection is the first."""
        return self._failures

    @property
    def failure(self) -> str:
        """Why the stream is lost; empty while it is not."""
        return self._failure

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
            raise self.error()
        return newest

    @property
    def is_ready(self) -> bool:
        """True if there is a frame that was not taken."""
        return self._newest is not None

    def poll(self) -> LiveFrame | None:
        """Return the newest frame if it is a new one, without waiting."""
        with self._changed:
            newest, self._newest = self._newest, None
        return newest

    def error(self) -> SourceError:
        """Return the error for a stream that is lost."""
        return SourceError(
            self._failure or f"The reader of {_label(self.address)} stopped unexpectedly.",
            fix="Is it connected, and not in use by another program? Cameras of this machine:  ls /dev/video*"
            if isinstance(self.address, int)
            else "Check the URL with:  ffplay URL",
        )

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
            while not self._stop.is_set():
                before = self._count
                self._read_until_lost()
                if self._stop.is_set():
                    return
                self._failures = 1 if self._count > before else self._failures + 1
                self._failure = self._describe_failure()
                self._set_state("lost", self._failure)
                with self._changed:
                    self._changed.notify_all()
                if self._reconnects is not None and (self._count == 0 or self._failures > self._reconnects):
                    return
                self._wait()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _describe_failure(self) -> str:
        if self._count == 0:
            return f"{_label(self.address)} could not be opened, or sent no frame."
        attempts = self._failures - 1
        tried = f" and could not be reopened in {attempts} attempts" if attempts else ""
        return f"{_label(self.address)} was lost after {self._count} frames{tried}."

    def _wait(self) -> None:
        """Wait before the next attempt to open the stream."""
        wait_s = min(self._wait_s * 2 ** min(self._failures - 1, _MAX_DOUBLINGS), MAX_WAIT_S)
        level = logging.WARNING if self._failures <= REPORTED_ATTEMPTS else logging.INFO
        what = "was lost" if self._count else "could not be opened"
        log.log(level, "%s %s; connection attempt %d in %.3g s", _label(self.address), what, self._failures, wait_s)
        self._stop.wait(wait_s)

    def _set_state(self, state: StreamState, reason: str = "") -> None:
        if state == self._state:
            return
        self._state = state
        if self._on_state is not None:
            self._on_state(state, reason)

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
        if self._state != "running":
            self._connections += 1
            self._failures, self._failure = 0, ""
            self._set_state("running")
        with self._changed:
            self._dropped += self._newest is not None
            now_s = time.monotonic()
            self._newest = LiveFrame(
                image=image,
                number=self._count,
                captured_s=self._clock_offset_s + now_s,
                monotonic_s=now_s,
                fps=fps,
            )
            self._count += 1
            self._changed.notify_all()


def _label(address: str | int) -> str:
    return f"Camera {address}" if isinstance(address, int) else hide_credentials(address)
