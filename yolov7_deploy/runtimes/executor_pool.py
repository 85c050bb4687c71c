"""The slots of one engine: as many calls run at once as there are slots, the others wait for a free one.

Two keep the GPU busy while a third thread writes its image and a fourth reads its results; more take memory and win
nothing. The lock is held to take and to give back, never while the GPU works.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from yolov7_deploy.errors import DeviceError, ImageError, UsageError
from yolov7_deploy.runtimes.tensorrt_executor import TrtExecutor

logger = logging.getLogger(__name__)

MOST_SLOTS = 4


class TrtExecutorPool:
    """A bounded pool; the first slot is made at once.

    Args:
        make: Makes a slot on the GPU of the calling thread.
        most: Slots at once.

    Raises:
        DeviceError: There is no memory for even one.
    """

    def __init__(self, make: Callable[[], TrtExecutor], *, most: int = MOST_SLOTS) -> None:
        self._make, self._most = make, most
        self._changed = threading.Condition()
        self._free = [make()]
        self._made = 1
        self._closed = False

    @property
    def most(self) -> int:
        """Slots at once; fewer than asked for where memory ended."""
        return self._most

    @contextlib.contextmanager
    def slot(self) -> Iterator[TrtExecutor]:
        """A slot of one's own until the end of the block.

        Whatever ends the block but an error of the caller's leaves a slot whose work nobody knows: it is closed, and
        the next caller gets a new one.

        Raises:
            UsageError: The pool is closed.
            DeviceError: There is no memory for a slot, and there is none to wait for.
        """
        slot = self._taken()
        try:
            yield slot
        except (ImageError, UsageError):
            self._give_back(slot)
            raise
        except BaseException:
            self._discard(slot)
            raise
        self._give_back(slot)

    def _taken(self) -> TrtExecutor:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._free or self._made < self._most)
                if self._closed:
                    raise UsageError("This engine is closed.", fix="Open a new Detector, or keep it open longer.")
                if self._free:
                    return self._free.pop()  # the last one used: its memory is warm
                self._made += 1
            try:
                return self._make()
            except DeviceError as error:
                self._forget(error)
            except BaseException:
                self._forget(None)
                raise

    def _forget(self, error: DeviceError | None) -> None:
        """A slot that could not be made is not counted; where others exist, they are all there will be."""
        with self._changed:
            self._made -= 1
            self._changed.notify_all()
            if error is None:
                return
            if self._made == 0:
                raise error
            self._most = self._made
        logger.warning("%d calls run at once, others wait: %s", self._made, error.message)

    def _give_back(self, slot: TrtExecutor) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def _discard(self, slot: TrtExecutor) -> None:
        try:
            slot.close()
        finally:
            self._forget(None)

    def close(self) -> None:
        """Waits for those inside, then closes every slot; a second time does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._free) == self._made)
            slots, self._free, self._made = self._free, [], 0
        for slot in slots:
            slot.close()
