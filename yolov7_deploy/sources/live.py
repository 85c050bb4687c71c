"""The newest frame of a camera or stream: a thread reads as fast as frames arrive and keeps only the last one.

Without it a slow consumer works through a growing buffer and falls further behind with every frame.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

import cv2
import numpy as np

from yolov7_deploy.errors import SourceError
from yolov7_deploy.image import Image
from yolov7_deploy.sources.video import NETWORK_TIMEOUT_MS, OpenCapture, hide_password, open_capture

log = logging.getLogger(__name__)

POLL_S = 0.2  # waits are cut into pieces of this, so that Ctrl-C is answered on every platform


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LiveFrame:
    """A frame uint8 BGR [H, W, 3], its number in the stream, its capture time (`time.time()`), the stream's rate."""

    image: Image
    number: int
    captured_s: float
    fps: float


class LiveReader:
    """Reads one camera or stream in a thread, from construction until `close`.

    Args:
        address: Camera number or stream address.
        open_capture: Opens it; tests pass a stand-in.
        reconnects: How often in a row a lost stream is opened again before giving up. One that never opened is not
            tried again: its address is more likely wrong than its network slow.
        wait_s: Pause before the first reconnection; each further one is twice as long.
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
        self._fresh: LiveFrame | None = None
        self._dropped = 0
        self._failure = ""
        self._ended = False
        self._count = 0
        self._thread = threading.Thread(target=self._run, name=f"y7-live-{address}", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Frames that were replaced by a newer one before anybody took them."""
        with self._changed:
            return self._dropped

    def take(self, *, timeout_s: float | None = None) -> LiveFrame | None:
        """The newest frame that was not taken yet, waiting for one; `None` after `timeout_s` or after `close`.

        Raises:
            SourceError: The stream could not be opened, or was lost and did not come back.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self._fresh is None and not self._ended:
                left = POLL_S if deadline is None else min(POLL_S, deadline - time.monotonic())
                if left <= 0:
                    return None
                self._changed.wait(left)
            fresh, self._fresh = self._fresh, None
        if fresh is None and not self._stop.is_set():
            raise SourceError(
                self._failure or f"The reader of {_shown(self.address)} stopped unexpectedly.",
                fix="Check the address with:  ffplay ADDRESS   (a camera may be in use by another program)",
            )
        return fresh

    def stop(self) -> None:
        """Tells the thread to end after the frame it waits for."""
        self._stop.set()

    def close(self) -> None:
        """Stops the thread; waits for it as long as one network read may take. Calling it twice is fine."""
        self.stop()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=NETWORK_TIMEOUT_MS / 1000 + 1)

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
                    self._failure = f"{_shown(self.address)} could not be opened, or gave no image."
                    return
                if failures > self._reconnects:
                    self._failure = (
                        f"{_shown(self.address)} was lost after {self._count} frames and did not come back "
                        f"in {self._reconnects} attempts."
                    )
                    return
                log.warning("%s was lost; connection attempt %d", _shown(self.address), failures)
                self._stop.wait(self._wait_s * 2 ** (failures - 1))
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _read_until_lost(self) -> None:
        capture = self._open(self.address)
        try:
            if not capture.isOpened():
                return
            fps = capture.get(cv2.CAP_PROP_FPS)
            while not self._stop.is_set():
                ok, image = capture.read()
                if not ok or image is None:
                    return
                self._offer(image.astype(np.uint8, copy=False), fps)
        except cv2.error as error:
            log.warning("OpenCV failed on %s: %s", _shown(self.address), error)
        finally:
            capture.release()

    def _offer(self, image: Image, fps: float) -> None:
        with self._changed:
            self._dropped += self._fresh is not None
            self._fresh = LiveFrame(image=image, number=self._count, captured_s=time.time(), fps=fps)
            self._count += 1
            self._changed.notify_all()


def _shown(address: str | int) -> str:
    return f"Camera {address}" if isinstance(address, int) else hide_password(address)
