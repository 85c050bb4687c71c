"""Processes: how they end by a signal, how Python children start, temporary folders, and what `os.fork` inherits."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Protocol

from yolov7_deploy._atomic_file import private_folder
from yolov7_deploy.errors import DeviceError, UsageError

# SIGHUP does not exist on Windows.
ENDING_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

Handler = Callable[[int, FrameType | None], None]


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end.

    Attributes:
        number: Number of the signal; shells report 128 plus this number as exit code.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """The exit code of a program that ends for this reason: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.number


@contextlib.contextmanager
def handle_signals(handler: Handler) -> Iterator[None]:
    """Call a function for the signals that end a program, until the block ends.

    Ignored signals stay ignored, such as SIGHUP under `nohup`. Outside the main thread, which alone receives signals,
    nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    handled = [number for number in ENDING_SIGNALS if previous[number] is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in handled:
            before = previous[number]
            signal.signal(number, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def raise_interrupted() -> Iterator[None]:
    """Raise `Interrupted` at the first signal that ends a program, until the block ends.

    Later ones do not disturb the work that finishes the program, except Ctrl-C, which raises each time.
    """
    ending = False

    def interrupt(number: int, _: FrameType | None) -> None:
        nonlocal ending
        if not ending or number == signal.SIGINT:
            ending = True
            raise Interrupted(number)

    with handle_signals(interrupt):
        yield


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Defer signals that end a program to the end of the block, so that a result can be finished.

    Raises:
        Interrupted: A signal arrived in the block.
    """
    received: list[int] = []
    with handle_signals(lambda number, _: received.append(number)):
        yield
    if received:
        raise Interrupted(received[0])


@contextlib.contextmanager
def keep_signal_handlers() -> Iterator[None]:
    """Restore the handlers of the signals that end a program, which a library may replace inside the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            if handler is not None:  # a handler that is not of Python
                signal.signal(number, handler)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Have malloc keep freed memory of this process for later allocations; return whether it can.

    By default glibc maps a new block for every array of over 32 MiB and returns it when it is freed, so activations of
    a training step start as pages that the kernel first has to clear. Other C libraries do not have the setting.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


@contextlib.contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """Yield a new folder in the system's temporary folder, see `private_folder`; signals do not prevent its removal.

    Raises:
        UsageError: It cannot be created.
    """
    stack = contextlib.ExitStack()
    try:
        try:
            with deferred_signals():  # raises `Interrupted` after the folder was created
                folder = stack.enter_context(private_folder(Path(tempfile.gettempdir()), name))
        except OSError as error:
            raise UsageError(
                f"A temporary folder cannot be created: {error.strerror or error}.",
                fix="Set TMPDIR to a folder with free space.",
            ) from error
        yield folder
    finally:
        with deferred_signals():
            stack.close()


# By default `python -c` puts the working directory first on the module search path, so a file `json.py` in a folder
# with images would be executed. Only `sys` is imported before the path is set; it is built in, so no file can replace
# it.
_SET_PATH = "import sys; end = 2 + int(sys.argv[1]); sys.path[:] = sys.argv[2:end]; del sys.argv[1:end]\n"


def python_command(code: str, *arguments: str) -> list[str]:
    """Return the command that runs `code` in another Python process, with `arguments` in `sys.argv[1:]`.

    The process has the absolute entries of this process's module search path. So editable installs and `PYTHONPATH`
    have the same effect, and the working directory is searched only if this process has its absolute path. It ignores
    the environment variables of Python and the user's site folder (option `-I`).
    """
    path = [entry for entry in sys.path if isinstance(entry, str) and os.path.isabs(entry)]  # noqa: PTH117
    return [sys.executable, "-I", "-c", _SET_PATH + code, str(len(path)), *path, *arguments]


# Child processes of `os.fork` inherit the memory and the locks of their parent, but none of its threads. ONNX Runtime
# hangs in a child when it runs or frees an inherited session: both wait for threads that do not exist there. OpenMP,
# which PyTorch uses, hangs in the first loop that it divides among threads. CUDA refuses every call. Objects that own
# such things register here, and each child calls them before any other code of the child runs.
class Inherited(Protocol):
    """An object that owns threads, locks or GPU memory."""

    def after_fork(self) -> None:
        """Replace locks, and give up what this child process cannot use; no other thread is running."""
        ...


_inherited: weakref.WeakSet[Inherited] = weakref.WeakSet()


def call_after_fork(owner: Inherited) -> None:
    """Call `owner.after_fork()` in every child process of `os.fork`, as long as the object exists."""
    _inherited.add(owner)


def never_free(thing: object) -> None:
    """Keep an object until the process ends, and do not free it then either."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def gpu_fork_error(device: str) -> DeviceError:
    """Return the error for a GPU or NPU that was opened by the parent process."""
    return DeviceError(
        f"This model was opened on {device} before os.fork(), and cannot be used in a child process.",
        fix="Open the Detector in the child only, or start processes with multiprocessing.get_context('spawn').",
    )


def _after_fork() -> None:
    for owner in list(_inherited):
        owner.after_fork()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)
