"""Readings at a steady pace beside the work that is measured."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

# A lost GPU can keep a call of its driver for minutes; nobody waits that long for a reading.
STOP_TIMEOUT_S = 2.0


class Sampler:
    """Calls `take` when it is entered, every `period_s` in a thread, and once more when it is left.

    The thread ends with the `with` block however that ends, and with the process. `take` answers for its own errors;
    what it raises all the same is raised again where the block ends. May be entered again when it was left.
    """

    def __init__(self, take: Callable[[], None], *, period_s: float) -> None:
        self._take, self._period_s = take, period_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Sampler:
        self._stop, self._failure = threading.Event(), None
        self._take()
        self._thread = threading.Thread(target=self._run, name="y7-sampler", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        thread = self._thread
        if thread is None:
            return
        thread.join(STOP_TIMEOUT_S)
        if error is not None or thread.is_alive():
            return
        if self._failure is not None:
            raise self._failure
        self._take()

    def _run(self) -> None:
        stop = self._stop  # that of this round, should another begin while a call hangs
        while not stop.wait(self._period_s):
            try:
                self._take()
            except BaseException as error:  # noqa: BLE001 - or the interpreter prints it; raised again in __exit__
                self._failure = error
                return


def read_number(path: Path) -> int | None:
    """The integer in a file of the kernel; `None` where there is none, or where its sensor does not answer."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def read_word(path: Path) -> str:
    """The text of such a file without spaces around it, and nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
