"""Child processes of `os.fork`: they inherit the memory and the locks of their parent, but none of its threads.

ONNX Runtime hangs in a child when it runs or frees an inherited session: both wait for threads that do not exist there.
OpenMP, which PyTorch uses, hangs in the first loop that it divides among threads. CUDA refuses every call. Objects that
own such things register here, and each child calls them before any other code of the child runs.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from typing import Protocol

from yolov7_deploy.errors import DeviceError


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
    """Return the error for a GPU that was opened by the parent process."""
    return DeviceError(
        f"This model was opened on {device} before os.fork(), and CUDA cannot be used in a child process then.",
        fix="Open the Detector in the child only, or start processes with multiprocessing.get_context('spawn').",
    )


def _after_fork() -> None:
    for owner in list(_inherited):
        owner.after_fork()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)
