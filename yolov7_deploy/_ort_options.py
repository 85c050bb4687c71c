"""ONNX Runtime in this package: the session options of all its users, and the end of forked child processes."""

from __future__ import annotations

import ctypes
import os
import sys

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from yolov7_deploy.hardware.system import has_vnni

_ERRORS_ONLY = 3
_MAX_REASON = 500  # characters
# ONNX Runtime's own exceptions, and what its Python binding raises for names that are not UTF-8 and for unknown errors.
ORT_ERRORS: tuple[type[Exception], ...] = (
    *(value for value in vars(ort_state).values() if isinstance(value, type) and issubclass(value, Exception)),
    UnicodeDecodeError,
    RuntimeError,
)


onnxruntime.disable_telemetry_events()  # if it was imported before this package, which otherwise prevents telemetry


def base_session_options(*, exact_int8: bool | None = None) -> onnxruntime.SessionOptions:
    """Return session options that log errors only and compute INT8 without saturation, unless `exact_int8` is False.

    On x86 CPUs without VNNI, the INT8 kernels of ONNX Runtime add pairs of products in 16 bits, which saturates: an
    output can be off by more than a tenth of its standard deviation. `session.x64quantprecision` selects kernels that
    do not saturate. On a CPU with VNNI, where nothing saturates, those kernels would take more than twice the time;
    `None` selects them only where they are needed. Float graphs ignore the setting.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY  # it warns about every input with a default, such as our thresholds
    if has_vnni() is not True if exact_int8 is None else exact_int8:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def has_cuda_provider() -> bool:
    """Return True if this ONNX Runtime can run networks on NVIDIA GPUs."""
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _end_without_destructors() -> None:
    """Let a child process of `os.fork` end without the C++ destructors of ONNX Runtime.

    They wait for threads of the parent, for ever: since version 1.29 a thread exists as soon as ONNX Runtime is
    imported. Python's own exit handlers run before this, and the exit status is kept. `on_exit` is part of glibc.
    """
    libc = ctypes.CDLL(None)
    libc.on_exit(libc._exit, None)
    libc.__cxa_atexit(libc.fflush, None, None)  # the last registered function runs first


if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "on_exit"):
    os.register_at_fork(after_in_child=_end_without_destructors)


def ort_reason(error: Exception) -> str:
    """Return the first line of an error, shortened: ONNX Runtime quotes names of the file."""
    if isinstance(error, UnicodeDecodeError):
        return "a name or text in it is not UTF-8."
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= _MAX_REASON else f"{lines[0][:_MAX_REASON]}..."
