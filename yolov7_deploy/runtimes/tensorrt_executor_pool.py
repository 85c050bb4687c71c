"""The executors of one engine: as many calls run at the same time as there are executors, others wait for a free one.

Two executors keep the GPU busy while a third thread writes its image and a fourth reads its results. More would use
memory and gain nothing. The lock is held only to acquire and release executors, never while the GPU works.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import DeviceError, ImageError, UsageError
from yolov7_deploy.runtimes.tensorrt_executor import TrtExecutor

logger = get_logger(__name__)

MAX_EXECUTORS = 4


class TrtExecutorPool:
    """A bounded pool; the first executor is created at once, the others when they are needed.

    Args:
        make: Creates an executor on the GPU of the calling thread.
        limit: Maximum number of executors.

    Raises:
        DeviceError: There is not enough memory for one executor.
    """

    def __init__(self, make: Callable[[], TrtExecutor], *, limit: int = MAX_EXECUTORS) -> None:
        self._make, self._limit = make, limit
        self._changed = threading.Condition()
        self._free = [make()]
        self._count = 1
        self._closed = False

    @property
    def limit(self) -> int:
        """Maximum number of executors; fewer than requested if memory ran out."""
        return self._limit

    @contextlib.contextmanager
    def acquire(self) -> Iterator[TrtExecutor]:
        """Reserve an executor until the end of the block.

        After an error other than a mistake of the caller, the state of the executor's work is unknown: it is closed,
        and a later call creates a new one.

        Raises:
            UsageError: The pool is closed.
            DeviceError: There is not enough memory for an executor, and no other one to wait for.
        """
        executor = self._take()
        try:
            yield executor
        except (ImageError, UsageError):
            self._give_back(executor)
            raise
        except BaseException:
            self._discard(executor)
            raise
        self._give_back(executor)

    def _take(self) -> TrtExecutor:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._free or self._count < self._limit)
                if self._closed:
                    raise UsageError("This engine is closed.", fix="Open a new Detector, or keep it open longer.")
                if self._free:
                    return self._free.pop()  # the one used last: its memory is in the caches
                self._count += 1
            try:
                return self._make()
            except DeviceError as error:
                self._forget(error)
            except BaseException:
                self._forget(None)
                raise

    def _forget(self, error: DeviceError | None) -> None:
        """Uncount an executor; if it could not be created, limit the pool to those that exist."""
        with self._changed:
            self._count -= 1
            self._changed.notify_all()
            if error is None:
                return
            if self._count == 0:
                raise error
            self._limit = self._count
        logger.warning("Concurrent calls are limited to %d: %s", self._count, error.message)

    def _give_back(self, executor: TrtExecutor) -> None:
        with self._changed:
            self._free.append(executor)
            self._changed.notify_all()

    def _discard(self, executor: TrtExecutor) -> None:
        try:
            executor.close()
        finally:
            self._forget(None)

    def close(self) -> None:
        """Wait for the running calls, then close all executors; calling it twice is fine."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._free) == self._count)
            executors, self._free, self._count = self._free, [], 0
        for executor in executors:
            executor.close()
