"""ONNX Runtime in this package: the session options of all its users, and the end of forked child processes."""

from __future__ import annotations

import ctypes
import os
import sys

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from yolov7_deploy import _protobuf as pb
from yolov7_deploy.hardware.system import has_vnni

_ERRORS_ONLY = 3
_MAX_REASON = 500  # characters
# Message: field of onnx.proto.
_MODEL_GRAPH, _MODEL_FUNCTION, _GRAPH_NODE, _FUNCTION_NODE = 7, 25, 1, 7
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 6, 11
# Operators of any number of inputs, none of which may be left out.
_VARIADIC = {"Max", "Mean", "Min", "Sum"}
_MAX_DEPTH = 32  # of graphs inside nodes
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


def find_missing_input(data: bytes | memoryview) -> str:
    """Return the name and operator of a node without an input that it needs; empty if there is none.

    ONNX Runtime 1.32 checks this for most operators. Those with any number of inputs crash the process.

    Args:
        data: Content of an ONNX file. Of one that is damaged in another way, only the readable part is checked.
    """
    try:
        for number, value, _ in pb.iterate_fields(memoryview(data)):
            nodes = {_MODEL_GRAPH: _GRAPH_NODE, _MODEL_FUNCTION: _FUNCTION_NODE}.get(number)
            missing = _missing_in_graph(pb.as_bytes(value), nodes, _MAX_DEPTH) if nodes else ""
            if missing:
                return missing
    except (ValueError, IndexError):
        pass
    return ""


def _missing_in_graph(graph: memoryview, node_field: int, depth: int) -> str:
    for number, value, _ in pb.iterate_fields(graph):
        if number != node_field:
            continue
        node = pb.parse_message(pb.as_bytes(value))
        op = pb.text(node, _NODE_OP)
        if op in _VARIADIC and any(len(pb.as_bytes(name)) == 0 for name in node.get(_NODE_INPUT, [])):
            return f"{pb.text(node, _NODE_NAME) or pb.text(node, _NODE_OUTPUT)} ({op})"
        for attribute in node.get(_NODE_ATTRIBUTE, []) if depth else []:
            fields = pb.parse_message(pb.as_bytes(attribute))
            for inner in (*fields.get(_ATTRIBUTE_GRAPH, []), *fields.get(_ATTRIBUTE_GRAPHS, [])):
                missing = _missing_in_graph(pb.as_bytes(inner), _GRAPH_NODE, depth - 1)
                if missing:
                    return missing
    return ""
