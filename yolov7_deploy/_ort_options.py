"""The shared use of ONNX Runtime: session options, files that would crash it, and the end of forked child processes."""

from __future__ import annotations

import ctypes
import os
import struct
import sys

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from yolov7_deploy import _protobuf as pb
from yolov7_deploy._text import shorten
from yolov7_deploy.hardware.system import has_vnni

_ERRORS_ONLY = 3
# Numbers of fields in the messages of onnx.proto.
_MODEL_GRAPH, _MODEL_FUNCTION, _GRAPH_NODE, _FUNCTION_NODE = 7, 25, 1, 7
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_GRAPH_INITIALIZER, _ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 5, 5, 6, 11
_TENSOR_TYPE, _TENSOR_INT64, _TENSOR_NAME, _TENSOR_RAW = 2, 7, 8, 9
_INT64 = 7
# These operators take any number of inputs, none of which may be omitted.
_VARIADIC = {"Max", "Mean", "Min", "Sum"}
# The last input of these operators is a shape, or a number of repetitions for each axis.
_WITH_SHAPE = {"ConstantOfShape", "Expand", "Reshape", "Tile"}
_MAX_SHAPE_BYTES = 4096
_MAX_SIDE = 2**40
_MAX_DEPTH = 32  # levels of graphs inside nodes
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
    return shorten(lines[0])


def find_damage(data: bytes | memoryview) -> str:
    """Return what in an ONNX file would crash ONNX Runtime, and with it the process; empty if nothing is known.

    ONNX Runtime 1.32 checks the inputs of most operators, but not of those with any number of inputs. It computes with
    the sizes in a shape without checking them.

    Args:
        data: Content of an ONNX file. Of one that is damaged in another way, only the readable part is checked.
    """
    try:
        for number, value, _ in pb.iterate_fields(memoryview(data)):
            node_field = {_MODEL_GRAPH: _GRAPH_NODE, _MODEL_FUNCTION: _FUNCTION_NODE}.get(number)
            damage = _graph_damage(pb.as_bytes(value), node_field, frozenset(), _MAX_DEPTH) if node_field else ""
            if damage:
                return damage
    except (ValueError, IndexError):
        pass
    return ""


def _graph_damage(graph: memoryview, node_field: int, impossible: frozenset[str], depth: int) -> str:
    """Check a graph or function; `impossible` are the constants around it that are no shapes."""
    tensors: list[tuple[str, memoryview]] = []
    nodes: list[dict[int, list[pb.Value]]] = []
    for number, value, _ in pb.iterate_fields(graph):
        if number == node_field:
            node = pb.parse_message(pb.as_bytes(value))
            nodes.append(node)
            if pb.text(node, _NODE_OP) == "Constant":
                constants = _attributes(node, (_ATTRIBUTE_TENSOR,))
                tensors += [(pb.text(node, _NODE_OUTPUT), one) for one in constants if len(one) < _MAX_SHAPE_BYTES]
        elif number == _GRAPH_INITIALIZER and node_field == _GRAPH_NODE and len(pb.as_bytes(value)) < _MAX_SHAPE_BYTES:
            tensors.append(("", pb.as_bytes(value)))
    impossible |= {name for tensor in tensors if (name := _impossible_shape(*tensor))}
    for node in nodes:
        op, inputs = pb.text(node, _NODE_OP), [pb.decode(name) for name in node.get(_NODE_INPUT, [])]
        name = f"{pb.text(node, _NODE_NAME) or pb.text(node, _NODE_OUTPUT)} ({op})"
        if op in _VARIADIC and "" in inputs:
            return f"an input of {name} is missing"
        if op in _WITH_SHAPE and impossible.intersection(inputs[-1:]):
            return f"{name} has a shape that no tensor has"
        for inner in _attributes(node, (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS)) if depth else ():
            damage = _graph_damage(inner, _GRAPH_NODE, impossible, depth - 1)
            if damage:
                return damage
    return ""


def _attributes(node: dict[int, list[pb.Value]], kinds: tuple[int, ...]) -> list[memoryview]:
    """Return the values of some kinds in the attributes of a node."""
    attributes = (pb.iterate_fields(pb.as_bytes(attribute)) for attribute in node.get(_NODE_ATTRIBUTE, []))
    return [pb.as_bytes(value) for fields in attributes for number, value, _ in fields if number in kinds]


def _impossible_shape(name: str, data: memoryview) -> str:
    """Return the name of an int64 tensor, by default its own, with a value that is not a size, 0 or -1."""
    tensor = pb.parse_message(data)
    if pb.integer(tensor, _TENSOR_TYPE) != _INT64:
        return ""
    values: list[int] = []
    for value in tensor.get(_TENSOR_INT64, []):
        values += [value] if isinstance(value, int) else pb.packed(value)
    for value in tensor.get(_TENSOR_RAW, []):
        raw = pb.as_bytes(value)
        values += struct.unpack(f"<{len(raw) // 8}q", raw[: len(raw) // 8 * 8])
    is_shape = all(-1 <= value <= _MAX_SIDE for value in values)
    return "" if is_shape else name or pb.text(tensor, _TENSOR_NAME)
