"""Access to what the operating system reports about its hardware: files, commands, and periodic readings.

Functions take a `root` folder, so a recorded tree of files can represent a machine. A file or a command that is missing
gives an empty result; nothing here raises.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path("/")
COMMAND_TIMEOUT_S = 20.0
# A GPU that fell off the bus can block a driver call for minutes; the measured program does not wait that long.
STOP_TIMEOUT_S = 2.0

CommandRunner = Callable[[Sequence[str]], str | None]


def run_command(command: Sequence[str]) -> str | None:
    """Return the standard output of a command; `None` where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, errors="replace", timeout=COMMAND_TIMEOUT_S, check=True
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout


def read_text(path: Path) -> str:
    """Return the text of a file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_word(path: Path) -> str:
    """Return the text of a file without surrounding white space; empty where it cannot be read."""
    return read_text(path).strip()


def read_number(path: Path) -> int | None:
    """Return the integer in a kernel file; `None` where there is no integer or the sensor does not answer."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


class PeriodicSampler:
    """Calls `take_sample` on entry, then every `period_s` seconds in a thread, and once more on exit.

    The thread ends with the `with` block, however that ends, and with the process. `take_sample` handles its own
    errors; an unexpected exception is raised where the block ends. The sampler can be entered again.
    """

    def __init__(self, take_sample: Callable[[], None], *, period_s: float) -> None:
        self._take_sample, self._period_s = take_sample, period_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> PeriodicSampler:
        self._stop, self._failure = threading.Event(), None
        self._take_sample()
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
        self._take_sample()

    def _run(self) -> None:
        stop = self._stop  # a call that hangs may outlive its block; the next block has another event
        while not stop.wait(self._period_s):
            try:
                self._take_sample()
            except BaseException as error:  # noqa: BLE001 - raised again in __exit__, else the interpreter prints it
                self._failure = error
                return
