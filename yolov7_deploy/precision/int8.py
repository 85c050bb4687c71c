"""INT8 convolutions as Q/DQ pairs in the file, which every runtime accepts: TensorRT 8.5 to 11, RTX, ONNX Runtime.

Scales are float32 and zero points are 0, so every opset from 13 and every TensorRT accepts them. Everything that is not
INT8 computes in FP16, with explicit casts, because TensorRT 11 and TensorRT-RTX take the types from the file. Tensors
between an INT8 convolution and the next pair (the activation) are float32: TensorRT may fuse the activation into the
kernel of the convolution, where nothing is stored. FP16 scales, and FP16 in between, were tried with TensorRT-RTX 1.7;
they do not change the layers that it builds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import ExportError
from yolov7_deploy.metadata import Int8Metadata, ModelMetadata
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import Int8Options
from yolov7_deploy.precision.calibrate import Calibration, network_digest
from yolov7_deploy.precision.fp16 import Fp16Rewriter, check_valid, find_float32_nodes
from yolov7_deploy.precision.histogram import LEVELS, Histogram, choose_range
from yolov7_deploy.precision.int8_summary import Int8Summary, summarize_int8
from yolov7_deploy.precision.qdq_placement import QdqPlacement, float_nodes, place_qdq
from yolov7_deploy.precision.subgraph import Network, find_fp16_weight, node_inputs, with_initializers

logger = get_logger(__name__)

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

_INT8, _BACK, _SCALE, _ZERO = "__int8", "__from_int8", "__scale", "__zero"  # suffixes of the names of new tensors
ZERO = "int8_zero"
_LISTED = 8  # layers listed in one note
_QUANTIZED_OPS = {"ConvInteger", "DequantizeLinear", "QLinearConv", "QuantizeLinear"}


def to_int8(model: OnnxModel, calibration: Calibration, options: Int8Options) -> OnnxModel:
    """Return the model with INT8 convolutions; inputs, outputs, decoding and NMS stay float32.

    Weights have one scale per output channel. Activations have one scale per tensor, and one for all tensors that a
    Concat, MaxPool or nearest Resize connects. The metadata lists what stayed float and why.

    Args:
        model: A float32 graph, exported by this package or not; it is not modified.
        calibration: Result of `calibrate` for this network.
        options: See `Int8Options`.

    Raises:
        ExportError: The model already has a lower precision, has no convolution to quantize, or has infinite values;
            the calibration belongs to another network, or an excluded layer does not exist.
    """
    check_quantizable(model)
    if not model.metadata.heads:  # it is unknown where decoding begins, and decoding needs float32
        options = replace(options, fallback="fp32")
    network = Network(model)
    _check_calibration(network, calibration)
    placement = place_qdq(network, excluded_outputs(network, options.exclude))
    if not placement.convolutions:
        reasons = "; ".join(dict.fromkeys(placement.float_convolutions.values())) or "the graph has none"
        raise ExportError(
            f"No convolution can be INT8: {reasons}.",
            fix="Only Conv nodes with constant weights are quantized; onnx-simplifier makes weights constant.",
        )
    scales = tensor_scales(placement, calibration, options.method)
    proto = insert_qdq(network, placement, scales, calibration.input_means if options.correct_bias else {})
    if options.fallback == "fp16":
        proto = _convert_rest_to_fp16(network, placement, proto, calibration)
    check_valid(proto)
    return OnnxModel.of(proto, _metadata(model, proto, placement, calibration, options))


def check_quantizable(model: OnnxModel) -> None:
    """Check that a graph is float32.

    Raises:
        ExportError: It is INT8 or FP16 already.
    """
    fix = "Start from the float32 file:  y7 export --weights WEIGHTS.pt --int8 --calib FOLDER"
    found = next((node for node in model.proto.graph.node if node.op_type in _QUANTIZED_OPS), None)
    if found is not None:
        raise ExportError(f"The graph is quantized already: it has a {found.op_type} ({found.name}).", fix=fix)
    weight = find_fp16_weight(with_initializers(model.proto).graph)
    if model.metadata.precision != "fp32" or weight:
        precision = f"FP16 (weight {weight})" if weight else model.metadata.precision
        raise ExportError(
            f"The model is {precision} already; activation ranges are measured, and weights rounded, in float32.",
            fix=fix,
        )


def _check_calibration(network: Network, calibration: Calibration) -> None:
    if calibration.network_sha256 != network_digest(network):
        raise ExportError(
            "The calibration belongs to another network: nodes or weights differ.",
            fix="Calibrate this one:  y7 quantize --weights FILE.onnx --calib FOLDER",
        )


def excluded_outputs(network: Network, reasons: Mapping[str, str]) -> dict[str, str]:
    """Return the output of each convolution to exclude from INT8, and the reason.

    Args:
        network: The network.
        reasons: Names (or outputs) of convolutions, and why they are excluded.

    Raises:
        ExportError: There is no such convolution; the message lists some that exist.
    """
    known = {node.output[0]: node.output[0] for node in network.convolutions}
    known |= {node.name: node.output[0] for node in network.convolutions if node.name}
    for name in reasons:
        if name not in known:
            listed = ", ".join(sorted(known)[:_LISTED])
            raise ExportError(f"There is no convolution {name!r} to exclude.", fix=f"Existing ones: {listed}, ...")
    return {known[name]: reason for name, reason in reasons.items()}


def tensor_scales(placement: QdqPlacement, calibration: Calibration, method: str) -> dict[str, np.float32]:
    """Return the scale of each tensor with a pair: its activation range, chosen by `method`, divided by 127.

    The range of tensors that share a scale is chosen from all their values together.

    Raises:
        ExportError: There are infinite values or NaN.
    """
    ranges = {
        group: choose_range(Histogram.sum(calibration.histograms[name] for name in group), method)
        for group in dict.fromkeys(placement.scale_groups.values())
    }
    return {name: np.float32(ranges[group] / LEVELS) for name, group in placement.scale_groups.items()}


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """INT8 weights of a convolution.

    Attributes:
        values: int8 [O, ...].
        scales: float32 [O], one per output channel.
    """

    values: npt.NDArray[np.int8]
    scales: FloatArray

    @property
    def dequantized(self) -> FloatArray:
        """The float32 weights that the INT8 values represent."""
        floats: FloatArray = self.values * _per_channel(self.scales, self.values.ndim)
        return floats


def quantize_weight(weight: FloatArray) -> QuantizedWeight:
    """Round weights to INT8; the largest one of each output channel becomes 127 or -127.

    Clipping it for a smaller squared error was tried and gains nothing (`benchmarks/README.md`).

    Args:
        weight: [O, I, ...].
    """
    amax: FloatArray = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scales: FloatArray = np.where(amax > 0, amax, np.float32(1)) / np.float32(LEVELS)
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    steps = np.rint(weight / _per_channel(scales, weight.ndim))
    return QuantizedWeight(np.clip(steps, -LEVELS, LEVELS).astype(np.int8), scales)


def bias_correction(weight: FloatArray, quantized: QuantizedWeight, input_means: DoubleArray) -> FloatArray:
    """Return the error that rounding causes in the mean of each output channel [O]; add it to the bias.

    Except at the border, the mean output of a convolution is the sum of its weights times the means of their input
    channels (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section
    4.2).

    Args:
        weight: [O, I / groups, ...].
        quantized: The same weights, rounded.
        input_means: Means of the input channels [I].
    """
    error = (weight - quantized.dequantized).reshape(*weight.shape[:2], -1).sum(axis=2, dtype=np.float64)
    groups = len(input_means) // weight.shape[1]
    inputs = input_means.reshape(groups, weight.shape[1])
    shift: DoubleArray = np.einsum("goi,gi->go", error.reshape(groups, -1, weight.shape[1]), inputs)
    return shift.reshape(-1).astype(np.float32)


def _per_channel(scales: FloatArray, ndim: int) -> FloatArray:
    return scales.reshape(-1, *[1] * (ndim - 1))


# --- writing the graph ------------------------------------------------------------------------------------------------


def insert_qdq(
    network: Network,
    placement: QdqPlacement,
    scales: Mapping[str, np.float32],
    input_means: Mapping[str, DoubleArray],
) -> onnx.ModelProto:
    """Return a copy of the graph with Q/DQ pairs and INT8 weights; everything else stays float32.

    Args:
        network: The network of the graph.
        placement: Where the pairs go.
        scales: Scale of each tensor with a pair.
        input_means: Channel means of the inputs of convolutions, for bias correction; empty for no correction.
    """
    return _QdqWriter(network, placement, scales, input_means).write()


class _QdqWriter:
    def __init__(
        self,
        network: Network,
        placement: QdqPlacement,
        scales: Mapping[str, np.float32],
        input_means: Mapping[str, DoubleArray],
    ) -> None:
        self._network, self._placement, self._scales, self._input_means = network, placement, scales, input_means
        self._quantized_inputs: dict[str, set[str]] = {}
        for name, consumers in placement.pairs.items():
            for consumer in consumers:
                self._quantized_inputs.setdefault(consumer, set()).add(name)
        self._convolutions = set(placement.convolutions)
        self._weights: dict[str, QuantizedWeight] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._has_pair: set[str] = set()

    def write(self) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(self._network.proto)
        self._add_initializer(ZERO, np.zeros((), dtype=np.int8))
        for node in proto.graph.node:
            quantized = self._quantized_inputs.get(node.output[0], set())
            for index, name in enumerate(node.input):
                if name in quantized:
                    node.input[index] = self._pair(name)
            if node.output[0] in self._convolutions:
                self._quantize_convolution(node)
            self._nodes.append(node)
        nodes = list(self._nodes)
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        self._replace_initializers(proto.graph)
        return proto

    def _pair(self, name: str) -> str:
        """Return the output of the tensor's pair, which is inserted before the first consumer."""
        if name not in self._has_pair:
            self._has_pair.add(name)
            group = self._placement.scale_groups[name]
            scale = self._add_initializer(group[0] + _SCALE, np.array(self._scales[name]))
            self._add_node("QuantizeLinear", [name, scale, ZERO], name + _INT8)
            self._add_node("DequantizeLinear", [name + _INT8, scale, ZERO], name + _BACK)
        return name + _BACK

    def _quantize_convolution(self, node: onnx.NodeProto) -> None:
        weight = node.input[1]
        data = self._network.producers[node.output[0]].input[0]  # the name before its pair was inserted
        if weight not in self._weights:
            quantized = self._weights[weight] = quantize_weight(self._network.weights[weight])
            inputs = [
                self._add_initializer(weight + _INT8, quantized.values),
                self._add_initializer(weight + _SCALE, quantized.scales),
                self._add_initializer(weight + _ZERO, np.zeros(len(quantized.scales), dtype=np.int8)),
            ]
            back = weight + _BACK
            self._nodes.append(helper.make_node("DequantizeLinear", inputs, [back], name=back, axis=0))
        node.input[1] = weight + _BACK
        means = self._input_means.get(data)
        has_bias = len(node.input) > 2 and bool(node.input[2])
        if means is not None and (not has_bias or node.input[2] in self._network.weights):
            shift = bias_correction(self._network.weights[weight], self._weights[weight], means)
            bias = self._network.weights[node.input[2]] if has_bias else np.float32(0)
            corrected = self._add_initializer(f"{node.output[0]}__bias", (bias + shift).astype(np.float32))
            node.input[:] = [*node.input[:2], corrected]

    def _add_node(self, op: str, inputs: Sequence[str], output: str) -> None:
        self._nodes.append(helper.make_node(op, inputs, [output], name=output))

    def _add_initializer(self, name: str, value: npt.NDArray[np.generic]) -> str:
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _replace_initializers(self, graph: onnx.GraphProto) -> None:
        """Add the new initializers and drop those that are no longer used."""
        used = {name for node in graph.node for name in node_inputs(node)} | {output.name for output in graph.output}
        used.update(entry.name for entry in graph.input)
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *self._initializers.values()])


def _convert_rest_to_fp16(
    network: Network, placement: QdqPlacement, quantized: onnx.ModelProto, calibration: Calibration
) -> onnx.ModelProto:
    """Convert everything outside INT8 computation to FP16; nodes whose values would overflow stay float32."""
    ranges = {name: histogram.amax for name, histogram in calibration.histograms.items()}
    ranges.update(calibration.output_amax)
    float32_nodes = find_float32_nodes(network, ranges)
    fp16 = {
        name
        for node in float_nodes(network, placement)
        if node.output[0] not in float32_nodes
        for name in node.output
        if name in network.floats
    }
    floats = network.floats | {name + _BACK for name in placement.pairs}
    return Fp16Rewriter(quantized, floats=floats, fp16=fp16, heads=network.heads).rewrite()


# --- metadata ---------------------------------------------------------------------------------------------------------


def _metadata(
    model: OnnxModel, proto: onnx.ModelProto, placement: QdqPlacement, calibration: Calibration, options: Int8Options
) -> ModelMetadata:
    summary = summarize_int8(proto)
    names = {node.output[0]: node.name or node.output[0] for node in proto.graph.node if node.op_type == "Conv"}
    int8 = Int8Metadata(
        method=options.method,
        images=calibration.images,
        images_sha256=calibration.images_sha256,
        fallback=options.fallback,
        convolutions=len(summary.convolutions),
        int8_convolutions=summary.int8_convolutions,
        share=summary.share,
        float_layers=tuple((names[output], reason) for output, reason in placement.float_convolutions.items()),
    )
    notes = (*model.metadata.notes, *_notes(int8, summary, placement.float_islands), *calibration.notes)
    logger.info("%s", "; ".join(notes))
    return replace(model.metadata, precision="int8", int8=int8, notes=notes)


def _notes(int8: Int8Metadata, summary: Int8Summary, islands: Mapping[str, str]) -> Iterator[str]:
    share = "" if int8.share is None else f", {int8.share:.1%} of all multiply-accumulates"
    yield f"int8: {int8.int8_convolutions} of {int8.convolutions} convolutions{share}; the rest is {int8.fallback}"
    yield (
        f"activation ranges of {sum(summary.pairs.values())} tensors in {summary.scales} scales, by {int8.method} on "
        f"{int8.images} image{'s' * (int8.images != 1)}"
    )
    for reason in dict.fromkeys(reason for _, reason in int8.float_layers):
        layers = [layer for layer, why in int8.float_layers if why == reason]
        yield f"{int8.fallback}: {_list_some(layers)} ({reason})"
    if islands:
        yield f"float between INT8 convolutions: {_list_some([f'{op} ({name})' for name, op in islands.items()])}"


def _list_some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
