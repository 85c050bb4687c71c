"""The calls of a Detector that are in progress, in any thread, and how they end when it is closed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import ParamSpec, TypeVar

from yolov7_deploy._process import call_after_fork
from yolov7_deploy.errors import UsageError

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class CallTracker:
    """Counts calls of the caller's threads, runs submitted ones in threads of its own, and waits for both.

    No lock is held while a callback of a future runs, so callbacks may call every method.

    Args:
        threads: Maximum number of threads for submitted calls; they are started when they are needed.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._is_closed = False
        self._reset()
        call_after_fork(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[int, int] = {}  # number of calls by thread
        self._closing: set[int] = set()  # threads that wait in `close`; others do not wait for their calls
        self._submitted: set[Future[object]] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._pool_threads: set[int] = set()

    def after_fork(self) -> None:
        """Forget the calls and the threads of the parent process."""
        self._reset()

    def check_open(self) -> None:
        """Raise `UsageError` after `close`."""
        if self._is_closed:
            raise UsageError("This Detector is closed.", fix="Open a new one, or keep it open longer.")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count a call of this thread until the end of the block.

        Raises:
            UsageError: Closed.
        """
        thread = threading.get_ident()
        with self._changed:
            self.check_open()
            self._running[thread] = self._running.get(thread, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                count = self._running.pop(thread, 1)
                if count > 1:
                    self._running[thread] = count - 1
                elif self._is_closed:
                    self._changed.notify_all()

    def submit(
        self, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> Future[_Result]:
        """Call a function in a thread of the pool, also if `close` is called before it ends.

        Raises:
            UsageError: Closed, or Python cannot start a thread, because it exits or the system allows no more.
        """
        with self._changed:
            self.check_open()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(
                    self._threads, thread_name_prefix="yolov7-deploy", initializer=self._add_pool_thread
                )
            try:
                future = self._pool.submit(function, *args, **kwargs)
            except RuntimeError as error:
                raise UsageError(f"Nothing can be submitted any more: {error}.", fix="Call the Detector.") from error
            self._submitted.add(future)  # type: ignore[arg-type]
        future.add_done_callback(self._submitted.discard)
        return future

    def _add_pool_thread(self) -> None:
        self._pool_threads.add(threading.get_ident())

    def close(self) -> bool:
        """Refuse further calls, cancel submitted calls that have not started, and wait for all others.

        A call does not wait for itself if it, or a callback of its future, calls this. Calling it twice is fine.

        Returns:
            True if no call is running any more; False in the callback of a call that an outer `close` of this thread
            has just cancelled.
        """
        thread = threading.get_ident()
        with self._changed:
            self._is_closed = True
            if thread in self._closing:
                return False
            self._closing.add(thread)
            self._changed.notify_all()
            submitted = list(self._submitted)
        try:
            for future in submitted:
                future.cancel()  # not through the pool, which would run callbacks under its lock
            wait([future for future in submitted if future.running()])
            with self._changed:
                self._changed.wait_for(lambda: not self._running.keys() - self._closing)
        finally:
            self._closing.discard(thread)
        if self._pool is not None:
            self._pool.shutdown(wait=thread not in self._pool_threads)
        return True
