"""How large the values inside a graph get on real pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from yolov7_deploy.errors import UsageError
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.image import Image, fit_letterbox, to_network_input

_PREFIX = "range__"
_ERRORS_ONLY = 3


def activation_ranges(
    model: OnnxModel, network: Sequence[onnx.NodeProto], names: Sequence[str], pictures: Sequence[Image]
) -> dict[str, float]:
    """The largest absolute value that each tensor takes on any of the pictures.

    The largest value is found inside the graph, by two more nodes a tensor, so a run gives one number a tensor and
    needs no more memory than the network itself: all activations of a 1280-pixel model would be gigabytes.

    Args:
        model: A float32 graph.
        network: Its nodes to run, in order; those behind the head are not needed.
        names: float32 tensors that these nodes make.
        pictures: uint8 BGR of any size.

    Raises:
        UsageError: There is no picture.
    """
    if not pictures:
        raise UsageError("There is no picture to measure activation ranges on.", fix="Give some:  --picture FILE")
    session = _session(_probe(model.proto, network, names))
    entry = session.get_inputs()[0].name
    worst = np.zeros(len(names))
    for picture in pictures:
        placed = fit_letterbox((picture.shape[0], picture.shape[1]), model.info.default_hw)
        batch = [placed.apply(picture)] * (model.info.batch or 1)
        fed = np.stack(batch) if model.info.input_kind == "uint8" else to_network_input(batch)
        found = session.run([_PREFIX + name for name in names], {entry: fed})
        worst = np.maximum(worst, [value.item() for value in found])
    return dict(zip(names, worst.tolist(), strict=True))


def _probe(proto: onnx.ModelProto, network: Sequence[onnx.NodeProto], names: Sequence[str]) -> onnx.ModelProto:
    """The network alone, giving max(|tensor|) for every name."""
    needed = {name for node in network for name in node.input}
    nodes, outputs = list(network), []
    for name in names:
        magnitude, largest = f"{_PREFIX}abs__{name}", _PREFIX + name
        nodes.append(helper.make_node("Abs", [name], [magnitude], name=magnitude))
        # Without axes it reduces all of them, in the form of opset 13 as in that of 18.
        nodes.append(helper.make_node("ReduceMax", [magnitude], [largest], name=largest, keepdims=0))
        outputs.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
    graph = helper.make_graph(
        nodes,
        "ranges",
        [entry for entry in proto.graph.input if entry.name in needed],
        outputs,
        initializer=[weight for weight in proto.graph.initializer if weight.name in needed],
    )
    opsets = [entry for entry in proto.opset_import if not entry.domain]
    return helper.make_model(graph, opset_imports=opsets, ir_version=proto.ir_version)


def _session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
