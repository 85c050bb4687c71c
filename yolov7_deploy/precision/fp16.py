"""FP16 weights and activations in the network; inputs, decoding, NMS and outputs stay float32.

The types are written into the file, cast by cast: TensorRT 11 and TensorRT-RTX accept nothing else, and older TensorRT
(with its FP16 flag) and ONNX Runtime run the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import ExportError, UsageError
from yolov7_deploy.image import Image
from yolov7_deploy.onnx_export.nms import OP
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.precision.ort_runner import NetworkRunner, network_input
from yolov7_deploy.precision.subgraph import Network, Weight, captured_inputs, data_inputs, find_fp16_weight

logger = get_logger(__name__)

FP16_MAX = 65504.0
FP16_MIN_NORMAL = 2.0**-14  # smaller values lose bits; below 2**-25 they become 0
# Other images reach larger values than the measured ones, and partial sums of a convolution exceed its result.
MARGIN = 4
MAX_ACTIVATION = FP16_MAX / MARGIN
# If the largest value of a tensor is below this, a hundredth of it keeps at most 7 of 11 bits.
MIN_ACTIVATION = 2.0**-10
# Largest relative error (norm) of a rounded weight tensor. Ordinary rounding causes 2**-12 or less.
MAX_WEIGHT_ERROR = 2.0**-8
# The operations of YOLOv7, which all runtimes have in FP16. All others stay float32; for example the division of bytes
# by 255, which is exact only there.
FP16_OPS = frozenset({"Add", "Concat", "Conv", "LeakyRelu", "MaxPool", "Mul", "Resize", "Sigmoid", "Slice"})
_OPERATION = "is "  # prefix of the reason if an operation is not in FP16_OPS
_LISTED = 8  # nodes listed in one note
_PREFIX = "range__"


def to_fp16(model: OnnxModel, images: Sequence[Image]) -> OnnxModel:
    """Return the model with FP16 weights and activations; inputs, outputs, decoding and NMS stay float32.

    A node stays float32 if a weight, or a value that it reads or produces on one of the images, would overflow
    (above `MAX_ACTIVATION`, as FP16 ends at 65504) or underflow (a whole tensor below `MIN_ACTIVATION`). Notes in the
    metadata list these nodes and what rounding did to the weights.

    The NMS node of this package reads FP16 heads; its function body and its plugin convert them to float32.

    Args:
        model: A float32 graph written by `export_onnx`; it is not modified.
        images: uint8 BGR images on which activations are measured. Use images like those of the application;
            `MARGIN` covers what a few images do not show.

    Raises:
        UsageError: There are no images.
        ExportError: The model already has a lower precision, or was not exported by this package.

    Example:
        >>> fp16 = to_fp16(OnnxModel.load("shapes.onnx"), list(open_calibration("images", limit=2)))
        >>> fp16.save("shapes-fp16.onnx")
    """
    _check_convertible(model)
    network = Network(model)
    produced = [name for node in network.nodes for name in node.output if name in network.floats]
    ranges = activation_ranges(OnnxModel(network.proto, model.metadata), network.nodes, produced, images)
    reasons = find_float32_nodes(network, ranges)
    fp16 = {name for name in produced if network.producers[name].output[0] not in reasons}
    rewriter = Fp16Rewriter(network.proto, floats=network.floats, fp16=fp16, heads=model.metadata.heads)
    proto = rewriter.rewrite()
    check_valid(proto)
    notes = (
        *_node_notes(reasons, fp16),
        *_range_notes(ranges, len(images)),
        _weight_note([network.weights[name] for name in rewriter.weights]),
    )
    logger.info("%s", "; ".join(notes))
    return OnnxModel.of(proto, replace(model.metadata, precision="fp16", notes=(*model.metadata.notes, *notes)))


def _check_convertible(model: OnnxModel) -> None:
    metadata, graph = model.metadata, model.proto.graph
    fix = "Start from the float32 file:  y7 export --weights WEIGHTS.pt --fp16"
    if metadata.precision != "fp32":
        raise ExportError(f"The model is {metadata.precision} already.", fix=fix)
    produced = {name for node in graph.node for name in node.output}
    if not metadata.heads or not produced.issuperset(metadata.heads):
        missing = f"it has no {', '.join(metadata.heads)}" if metadata.heads else "its metadata names no head maps"
        raise ExportError(
            f"The graph was not exported by this package: {missing}, so it is unknown where decoding begins.", fix=fix
        )
    weight = find_fp16_weight(graph)
    if weight:
        raise ExportError(f"The metadata says fp32, but the weight {weight} is FP16 already.", fix=fix)


# --- activation ranges ------------------------------------------------------------------------------------------------


def activation_ranges(
    model: OnnxModel, network: Sequence[onnx.NodeProto], names: Sequence[str], images: Sequence[Image]
) -> dict[str, float]:
    """Return the largest absolute value of each tensor over all images.

    Two more nodes per tensor find the maximum inside the graph. A run returns one number per tensor and needs no more
    memory than the network; all activations of a 1280-pixel model would take gigabytes.

    Args:
        model: A float32 graph.
        network: The nodes to run, in execution order; those after the heads are not needed.
        names: float32 tensors that these nodes produce.
        images: uint8 BGR of any size.

    Raises:
        UsageError: There are no images.
    """
    if not images:
        raise UsageError("There is no image to measure activation ranges on.", fix="Add one:  --image FILE")
    runner = NetworkRunner(model.proto, [*network, *_max_nodes(names)], [_PREFIX + name for name in names])
    largest = np.zeros(len(names))
    for image in images:
        found = runner.run(network_input(image, model.metadata))
        largest = np.maximum(largest, [found[_PREFIX + name].item() for name in names])
    return dict(zip(names, largest.tolist(), strict=True))


def _max_nodes(names: Sequence[str]) -> list[onnx.NodeProto]:
    """Return nodes that compute max(|tensor|) for every name."""
    nodes = []
    for name in names:
        magnitude, largest = f"{_PREFIX}abs__{name}", _PREFIX + name
        nodes.append(helper.make_node("Abs", [name], [magnitude], name=magnitude))
        # Without axes it reduces all of them, in opset 13 as well as in 18, where axes became an input.
        nodes.append(helper.make_node("ReduceMax", [magnitude], [largest], name=largest, keepdims=0))
    return nodes


# --- nodes that stay float32 ------------------------------------------------------------------------------------------


def find_float32_nodes(network: Network, ranges: Mapping[str, float]) -> dict[str, str]:
    """Return the first output of each node that must stay float32, and the reason.

    Nodes without a float32 output are not included.

    Args:
        network: A float32 network.
        ranges: Largest magnitudes of the measured tensors.
    """
    fixed, weights = fixed_type_tensors(network.proto.graph), network.weights
    found = {}
    for node in network.nodes:
        if node.output[0] not in network.floats:
            continue
        has_fp16 = node.op_type in FP16_OPS and not fixed.intersection(node.output)
        reasons = [] if has_fp16 else [_OPERATION + node.op_type]
        for name in [*data_inputs(node), *node.output]:
            if name in ranges:
                reasons.append(_range_reason(ranges[name]))
            if name in weights:
                reasons.append(_weight_reason(weights[name]))
        reason = next(filter(None, reasons), "")
        if reason:
            found[node.output[0]] = reason
    return found


def _range_reason(largest: float) -> str:
    if not largest <= MAX_ACTIVATION:  # True for NaN
        return f"has values up to {largest:.3g}"
    return f"has no value above {largest:.3g}" if 0 < largest < MIN_ACTIVATION else ""


def _weight_reason(weight: Weight) -> str:
    largest = float(np.abs(weight).max(initial=0))
    if not largest <= FP16_MAX:
        return f"has weights up to {largest:.3g}"
    if weight.ndim < 2:  # a bias may underflow: what it is added to is much larger, or the ranges show it
        return ""
    error, norm = np.linalg.norm(weight - weight.astype(np.float16)), np.linalg.norm(weight)
    return f"has weights of at most {largest:.3g}" if error > MAX_WEIGHT_ERROR * norm else ""


# --- notes in the metadata --------------------------------------------------------------------------------------------


def _node_notes(reasons: Mapping[str, str], fp16: set[str]) -> list[str]:
    notes = [f"fp16: {len(fp16)} of {len(fp16) + len(reasons)} nodes before decoding are FP16"]
    operations = sorted({reason for reason in reasons.values() if reason.startswith(_OPERATION)})
    if operations:
        listed = ", ".join(operation.removeprefix(_OPERATION) for operation in operations)
        notes.append(f"float32, because the operation is not converted: {listed}")
    nodes = [f"{name} {reason}" for name, reason in reasons.items() if not reason.startswith(_OPERATION)]
    if nodes:
        more = f" and {len(nodes) - _LISTED} more" if len(nodes) > _LISTED else ""
        notes.append(f"float32, because of FP16 overflow or underflow: {'; '.join(nodes[:_LISTED])}{more}")
    return notes


def _range_notes(ranges: Mapping[str, float], images: int) -> list[str]:
    if not ranges:
        return []
    name = max(ranges, key=lambda name: ranges[name])
    plural = "s" if images > 1 else ""
    return [f"largest value on {images} image{plural}: {ranges[name]:.4g} ({name}), limit {MAX_ACTIVATION:g}"]


def _weight_note(weights: Sequence[Weight]) -> str:
    total = sum(weight.size for weight in weights)
    zeros = sum(int(np.count_nonzero(weight) - np.count_nonzero(weight.astype(np.float16))) for weight in weights)
    small = sum(int(((weight != 0) & (np.abs(weight) < FP16_MIN_NORMAL)).sum()) for weight in weights)
    return f"of {total} FP16 weights, {zeros} became 0 and {small - zeros} are subnormal"


_FP16, _FLOAT = "__half", "__float32"  # suffixes of the names of casts


def fixed_type_tensors(graph: onnx.GraphProto) -> set[str]:
    """Return the tensors that must stay float32: outputs of the graph, and what subgraphs read from outside."""
    return {output.name for output in graph.output} | {name for node in graph.node for name in captured_inputs(node)}


class Fp16Rewriter:
    """Convert weights and tensors of a graph to FP16 and insert the casts.

    Args:
        proto: The float32 graph; it is copied.
        floats: Its float32 tensors.
        fp16: Those of them that nodes will produce in FP16.
        heads: The raw head maps.

    Attributes:
        weights: New names of the weights that become FP16.
    """

    def __init__(self, proto: onnx.ModelProto, *, floats: set[str], fp16: set[str], heads: Sequence[str]) -> None:
        self._proto = onnx.ModelProto()
        self._proto.CopyFrom(proto)
        self._floats, self._fp16 = floats, fp16
        self._all_heads_fp16 = fp16.issuperset(heads)
        self.weights = self._fp16_weights()
        self._casts: dict[str, str] = {}
        self._nodes: list[onnx.NodeProto] = []

    def rewrite(self) -> onnx.ModelProto:
        """Return the rewritten graph; call it once."""
        graph = self._proto.graph
        for node in graph.node:
            if node.op_type != "Cast":  # accepts any type
                self._retype_inputs(node)
            self._nodes.append(node)
        del graph.node[:]
        graph.node.extend(self._nodes)
        self._convert_weights(graph)
        for value in graph.value_info:
            if value.name in self._fp16:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16
        return self._proto

    def _fp16_weights(self) -> dict[str, str]:
        """Return the new names of the weights that become FP16; unchanged if no consumer needs float32 as well."""
        graph = self._proto.graph
        read_as_fp16 = {name for node in graph.node if self._is_fp16(node) for name in data_inputs(node)}
        # Graph inputs, which callers may feed, and tensors that subgraphs read are float32.
        read_as_float = fixed_type_tensors(graph) | {entry.name for entry in graph.input}
        for node in graph.node:
            read_as_float.update(node.input[len(data_inputs(node)) :] if self._is_fp16(node) else node.input)
        weights = [tensor.name for tensor in graph.initializer if tensor.name in self._floats & read_as_fp16]
        return {name: f"{name}{_FP16}" if name in read_as_float else name for name in weights}

    def _is_fp16(self, node: onnx.NodeProto) -> bool:
        return node.output[0] in self._fp16

    def _retype_inputs(self, node: onnx.NodeProto) -> None:
        data = len(data_inputs(node)) if self._is_fp16(node) else 0
        for index, name in enumerate(node.input):
            if name not in self._floats:
                continue
            if index < data and name in self.weights:
                node.input[index] = self.weights[name]
            elif node.op_type == OP and self._all_heads_fp16 and name in self._fp16:
                continue  # the plugin accepts FP16 if all heads have it
            elif (index < data) != (name in self._fp16):
                node.input[index] = self._cast(name)

    def _cast(self, name: str) -> str:
        """Return the tensor in the other type; one cast, before the first consumer, serves all consumers."""
        if name not in self._casts:
            suffix, kind = (_FLOAT, TensorProto.FLOAT) if name in self._fp16 else (_FP16, TensorProto.FLOAT16)
            self._casts[name] = name + suffix
            self._nodes.append(helper.make_node("Cast", [name], [name + suffix], name=name + suffix, to=kind))
        return self._casts[name]

    def _convert_weights(self, graph: onnx.GraphProto) -> None:
        for tensor in list(graph.initializer):
            if tensor.name in self.weights:
                values = numpy_helper.to_array(tensor).astype(np.float16)
                converted = numpy_helper.from_array(values, self.weights[tensor.name])
                if converted.name == tensor.name:
                    tensor.CopyFrom(converted)
                else:
                    graph.initializer.append(converted)


def check_valid(proto: onnx.ModelProto) -> None:
    """Check a graph with ONNX's full checker: TensorRT requires that all types in the file are exact.

    Raises:
        ExportError: The graph is invalid.
    """
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        raise ExportError(
            f"The graph is not valid with its new types: {str(error).strip().splitlines()[0]}",
            fix="Export it again with this version:  y7 export --weights WEIGHTS.pt",
        ) from error
