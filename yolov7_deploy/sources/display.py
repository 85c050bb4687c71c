"""A window that shows images; it needs a display and an OpenCV that was built with GUI support."""

from __future__ import annotations

import os
import sys
from types import TracebackType

import cv2

from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import Image

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
        cv2.destroyAllWindows()
