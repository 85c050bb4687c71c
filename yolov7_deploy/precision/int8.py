"""INT8 convolutions as Q/DQ pairs in the file, for TensorRT 8.5 to 11, or for ONNX Runtime and OpenVINO on CPUs.

For TensorRT, scales are float32 and zero points are 0, so every opset from 13 and every TensorRT accepts them.
Everything that is not INT8 computes in FP16, with explicit casts, because TensorRT 11 and TensorRT-RTX take the types
from the file. Tensors between an INT8 convolution and the next pair (the activation) are float32: TensorRT may fuse
the activation into the kernel of the convolution, where nothing is stored. FP16 scales, and FP16 in between, were tried
with TensorRT-RTX 1.7; they do not change the layers that it builds.

For CPUs, activations are asymmetric: the outputs of SiLU and LeakyReLU are hardly negative, so almost all 256 values
serve the positive side, which halves the rounding error. On x86 they are uint8, because the kernels multiply uint8
activations with int8 weights; OpenVINO 2026.4 computes convolutions of int8 activations wrongly after a Concat. Biases
are int32, and everything that is not INT8 is float32.
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
from yolov7_deploy.image import FloatArray
from yolov7_deploy.metadata import INNER_PAIR_PREFIX, Int8Metadata
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import Int8Options
from yolov7_deploy.precision.calibrate import Calibration, network_digest
from yolov7_deploy.precision.fp16 import Fp16Rewriter, check_valid, find_float32_nodes
from yolov7_deploy.precision.histogram import LEVELS, REDUCED_LEVELS, Histogram, choose_range
from yolov7_deploy.precision.int8_summary import Int8Summary, summarize_int8
from yolov7_deploy.precision.qdq_placement import QdqPlacement, float_nodes, place_qdq
from yolov7_deploy.precision.subgraph import Network, find_fp16_weight, node_inputs, with_initializers

logger = get_logger(__name__)

DoubleArray = npt.NDArray[np.float64]

_INT8, _BACK, _SCALE, _ZERO = "__int8", "__from_int8", "__scale", "__zero"  # suffixes of the names of new tensors
ZERO = "int8_zero"
STEPS = 255  # of an asymmetric range
_BIAS_LIMIT = 2**30  # of int32
_LISTED = 8  # layers listed in one note
_QUANTIZED_OPS = {"ConvInteger", "DequantizeLinear", "QLinearConv", "QuantizeLinear"}


def to_int8(
    model: OnnxModel,
    calibration: Calibration,
    options: Int8Options,
    rounded: Mapping[str, RoundedConvolution] | None = None,
) -> OnnxModel:
    """Return the model with INT8 convolutions; inputs, outputs, decoding and NMS stay float32.

    Weights have one scale per output channel. Activations have one range per tensor, and one for all tensors that a
    Concat, MaxPool or nearest Resize connects. The metadata lists what stayed float and why.

    Args:
        model: A float32 graph, exported by this package or not; it is not modified.
        calibration: Result of `calibrate` for this network.
        options: See `Int8Options`.
        rounded: Result of `round_weights`, for `options.rounding` other than `nearest`.

    Raises:
        ExportError: The model already has a lower precision, has no convolution to quantize, or has infinite values;
            the calibration belongs to another network, an excluded layer does not exist, or `rounded` does not fit
            `options.rounding`.

    Example:
        >>> model = OnnxModel.load("shapes.onnx")
        >>> int8 = to_int8(model, calibrate(model, open_calibration("images")), Int8Options(target="cpu"))
        >>> int8.metadata.precision
        'int8'
    """
    check_quantizable(model)
    if (options.rounding == "nearest") != (rounded is None):
        raise ExportError(
            f"Weights with rounding {options.rounding!r} {'need no' if rounded is not None else 'need'} round_weights.",
            fix="to_int8(model, calibration, options, round_weights(model, calibration, images, options)), with "
            "options = Int8Options(rounding='gptq')",
        )
    if not model.metadata.heads:  # it is unknown where decoding begins, and decoding needs float32
        options = replace(options, fallback="fp32")
    network = Network(model)
    check_same_network(network, calibration)
    placement = place_qdq(network, excluded_outputs(network, options.exclude), for_cpu=options.target != "tensorrt")
    if not placement.convolutions:
        reasons = "; ".join(dict.fromkeys(placement.float_convolutions.values())) or "the graph has none"
        raise ExportError(
            f"No convolution can be INT8: {reasons}.",
            fix="Only Conv nodes with constant weights are quantized; onnx-simplifier makes weights constant.",
        )
    ranges = tensor_ranges(network, placement, calibration, options)
    means = calibration.input_means if options.correct_bias else {}
    proto = insert_qdq(network, placement, ranges, means, options, rounded)
    if options.fallback == "fp16":
        proto = convert_rest_to_fp16(network, placement, proto, measured_amax(calibration))
    check_valid(proto)
    int8 = int8_metadata(proto, placement, options, images=calibration.images, images_sha256=calibration.images_sha256)
    return with_int8_metadata(model, proto, placement, int8, notes=calibration.notes)


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


def check_same_network(network: Network, calibration: Calibration) -> None:
    """Check that a calibration belongs to a network.

    Raises:
        ExportError: It belongs to another one.
    """
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


@dataclass(frozen=True, slots=True)
class QuantizedRange:
    """Integers that represent the values of a tensor: value = scale * (integer - zero).

    Attributes:
        scale: The step.
        zero: The integer of 0, with the type of the integers: int8 or uint8.
    """

    scale: np.float32
    zero: np.int8 | np.uint8

    @property
    def low(self) -> float:
        """The smallest value."""
        return float(self.scale) * (int(np.iinfo(self.zero.dtype).min) - int(self.zero))

    @property
    def high(self) -> float:
        """The largest value."""
        return float(self.scale) * (int(np.iinfo(self.zero.dtype).max) - int(self.zero))


def tensor_ranges(
    network: Network, placement: QdqPlacement, calibration: Calibration, options: Int8Options
) -> dict[str, QuantizedRange]:
    """Return the range of each tensor with a pair, chosen by `options.method`.

    The range of tensors that share a scale is chosen from all their values together.

    Raises:
        ExportError: There are infinite values or NaN.
    """
    ranges = {}
    for group in dict.fromkeys(placement.scale_groups.values()):
        histogram = Histogram.sum(calibration.histograms[name] for name in group)
        ranges[group] = (
            _symmetric(histogram, options) if options.target == "tensorrt" else _asymmetric(histogram, options)
        )
    found = {name: ranges[group] for name, group in placement.scale_groups.items()}
    for name, output in placement.inner_pairs.items():
        found[name] = _inner_range(network, name, found[output], calibration, options)
    return found


def _symmetric(histogram: Histogram, options: Int8Options) -> QuantizedRange:
    return QuantizedRange(np.float32(choose_range(histogram, options.method) / LEVELS), np.int8(0))


def _asymmetric(histogram: Histogram, options: Int8Options) -> QuantizedRange:
    """Return a range from the smallest value, or from the mirrored clip if that is larger, to the clip."""
    share = histogram.negative_amax / histogram.amax if histogram.amax else 0.0
    clip = choose_range(histogram, options.method, round(STEPS / (1 + share)))
    return _affine(-min(histogram.negative_amax, clip), clip, options.target)


def _affine(low: float, high: float, target: str) -> QuantizedRange:
    scale = np.float32((high - low) / STEPS)
    zero = round(-low / float(scale))
    return QuantizedRange(scale, np.uint8(zero) if target == "cpu" else np.int8(zero - 128))


def _inner_range(
    network: Network, name: str, output: QuantizedRange, calibration: Calibration, options: Int8Options
) -> QuantizedRange:
    """Return the range of a tensor before the output of its activation, which has the range `output`."""
    target = options.target
    if network.producers[name].op_type == "Sigmoid":
        return _affine(0.0, 1.0, target)
    activation, largest = network.consumers[name][0], calibration.output_amax[name]
    if activation.op_type == "LeakyRelu":
        slope = next((attribute.f for attribute in activation.attribute if attribute.name == "alpha"), 0.01)
        return _affine(max(output.low / slope, -largest) if slope > 0 else 0.0, output.high, target)
    return _affine(-min(options.silu_floor, largest), _inverse_silu(output.high), target)


def _inverse_silu(value: float) -> float:
    """Return the x >= 0 with x * sigmoid(x) = `value` >= 0, by Newton's method from above."""
    x = value + 1.0
    for _ in range(50):
        sigmoid = 1 / (1 + np.exp(-x))
        x -= (x * sigmoid - value) / (sigmoid * (1 + x * (1 - sigmoid)))
    return float(x)


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


@dataclass(frozen=True, slots=True, eq=False)
class RoundedConvolution:
    """INT8 weights of a convolution, and the bias that belongs to them.

    Attributes:
        weight: The weights.
        bias: float32 [O].
    """

    weight: QuantizedWeight
    bias: FloatArray


def quantize_weight(weight: FloatArray, levels: int = LEVELS, min_scales: FloatArray | None = None) -> QuantizedWeight:
    """Round weights to INT8; the largest one of each output channel becomes `levels` or -`levels`.

    Clipping it for a smaller squared error was tried and gains nothing (`benchmarks/README.md`).

    Args:
        weight: [O, I, ...].
        levels: The largest integer.
        min_scales: Smallest scale of each output channel [O].
    """
    amax: FloatArray = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scales: FloatArray = np.where(amax > 0, amax, np.float32(1)) / np.float32(levels)
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    if min_scales is not None:
        scales = np.maximum(scales, min_scales)
    steps = np.rint(weight / _per_channel(scales, weight.ndim))
    return QuantizedWeight(np.clip(steps, -levels, levels).astype(np.int8), scales)


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


def integer_bias(bias: FloatArray, scales: FloatArray) -> npt.NDArray[np.int32]:
    """Return a bias [O] in steps of `scales` [O], those of the products of data and weights."""
    limit = np.iinfo(np.int32).max
    return np.clip(np.rint(bias / scales.astype(np.float64)), -limit, limit).astype(np.int32)


def _per_channel(scales: FloatArray, ndim: int) -> FloatArray:
    return scales.reshape(-1, *[1] * (ndim - 1))


# --- writing the graph ------------------------------------------------------------------------------------------------


def insert_qdq(
    network: Network,
    placement: QdqPlacement,
    ranges: Mapping[str, QuantizedRange],
    input_means: Mapping[str, DoubleArray],
    options: Int8Options,
    rounded: Mapping[str, RoundedConvolution] | None = None,
) -> onnx.ModelProto:
    """Return a copy of the graph with Q/DQ pairs and INT8 weights; everything else stays float32.

    Args:
        network: The network of the graph.
        placement: Where the pairs go.
        ranges: Range of each tensor with a pair.
        input_means: Channel means of the inputs of convolutions, for bias correction; empty for no correction.
        options: Those with which placement and ranges were made.
        rounded: INT8 weights and biases of convolutions, by their outputs; others are rounded to the nearest step.
    """
    return _QdqWriter(network, placement, ranges, input_means, options, rounded or {}).write()


class _QdqWriter:
    def __init__(
        self,
        network: Network,
        placement: QdqPlacement,
        ranges: Mapping[str, QuantizedRange],
        input_means: Mapping[str, DoubleArray],
        options: Int8Options,
        rounded: Mapping[str, RoundedConvolution],
    ) -> None:
        self._network, self._placement, self._ranges, self._input_means = network, placement, ranges, input_means
        self._rounded = rounded
        self._options, self._for_cpu = options, options.target != "tensorrt"
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
        for node in proto.graph.node:
            quantized = self._quantized_inputs.get(node.output[0], set())
            for index, name in enumerate(node.input):
                if name in quantized:
                    node.input[index] = self._pair(name)
            if node.output[0] in self._convolutions:
                self._quantize_convolution(node)
            self._nodes.append(node)
        del proto.graph.node[:]
        proto.graph.node.extend(self._nodes)
        self._replace_initializers(proto.graph)
        return proto

    def _pair(self, name: str) -> str:
        """Return the output of the tensor's pair, which is inserted before the first consumer."""
        if name not in self._has_pair:
            self._has_pair.add(name)
            inner = name in self._placement.inner_pairs
            group = name if inner else self._placement.scale_groups[name][0]
            values = self._ranges[name]
            scale = self._add_initializer(group + _SCALE, np.array(values.scale))
            is_symmetric = values.zero.dtype == np.int8 and values.zero == 0
            zero = self._add_initializer(ZERO if is_symmetric else group + _ZERO, np.array(values.zero))
            prefix = INNER_PAIR_PREFIX if inner else ""
            self._add_node("QuantizeLinear", [name, scale, zero], name + _INT8, prefix)
            self._add_node("DequantizeLinear", [name + _INT8, scale, zero], name + _BACK, prefix)
        return name + _BACK

    def _quantize_convolution(self, node: onnx.NodeProto) -> None:
        weight, rounded = node.input[1], self._rounded.get(node.output[0])
        data = self._network.producers[node.output[0]].input[0]  # the name before its pair was inserted
        bias, is_constant = np.float32(0), True
        if len(node.input) > 2 and node.input[2]:
            is_constant = node.input[2] in self._network.weights
            bias = self._network.weights.get(node.input[2], bias)
        quantized = self._weights.get(weight) or self._add_weight(
            weight, self._quantize_weight(weight, data, bias) if rounded is None else rounded.weight
        )
        node.input[1] = weight + _BACK
        means = self._input_means.get(data)
        if not is_constant or (rounded is None and means is None and not self._for_cpu):
            return
        if rounded is not None:
            bias = rounded.bias
        elif means is not None:
            bias = bias + bias_correction(self._network.weights[weight], quantized, means)
        name = f"{node.output[0]}__bias"
        bias = np.broadcast_to(bias, quantized.scales.shape).astype(np.float32)
        if self._for_cpu:
            self._add_integer_bias(name, bias, quantized.scales * self._ranges[data].scale)
        else:
            self._add_initializer(name, bias)
        node.input[:] = [*node.input[:2], name]

    def _quantize_weight(self, weight: str, data: str, bias: FloatArray | np.float32) -> QuantizedWeight:
        """Round to the nearest step; CPUs need scales for which the bias fits into int32."""
        levels = REDUCED_LEVELS if self._options.reduce_range else LEVELS
        smallest = np.abs(bias) / (self._ranges[data].scale * np.float32(_BIAS_LIMIT)) if self._for_cpu else None
        return quantize_weight(self._network.weights[weight], levels, smallest)

    def _add_weight(self, weight: str, quantized: QuantizedWeight) -> QuantizedWeight:
        """Add the INT8 weights and their DequantizeLinear."""
        self._weights[weight] = quantized
        inputs = [
            self._add_initializer(weight + _INT8, quantized.values),
            self._add_initializer(weight + _SCALE, quantized.scales),
            self._add_initializer(weight + _ZERO, np.zeros(len(quantized.scales), dtype=np.int8)),
        ]
        back = weight + _BACK
        self._nodes.append(helper.make_node("DequantizeLinear", inputs, [back], name=back, axis=0))
        return quantized

    def _add_integer_bias(self, name: str, bias: FloatArray, scales: FloatArray) -> None:
        """Add an int32 bias and its DequantizeLinear, whose scales are those of the products of data and weights."""
        inputs = [
            self._add_initializer(name + _INT8, integer_bias(bias, scales)),
            self._add_initializer(name + _SCALE, scales.astype(np.float32)),
            self._add_initializer(name + _ZERO, np.zeros(len(scales), dtype=np.int32)),
        ]
        self._nodes.append(helper.make_node("DequantizeLinear", inputs, [name], name=name, axis=0))

    def _add_node(self, op: str, inputs: Sequence[str], output: str, prefix: str = "") -> None:
        self._nodes.append(helper.make_node(op, inputs, [output], name=prefix + output))

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


def measured_amax(calibration: Calibration) -> dict[str, float]:
    """Return the largest magnitude of each tensor that was measured."""
    return {name: histogram.amax for name, histogram in calibration.histograms.items()} | dict(calibration.output_amax)


def convert_rest_to_fp16(
    network: Network, placement: QdqPlacement, quantized: onnx.ModelProto, amax: Mapping[str, float]
) -> onnx.ModelProto:
    """Convert everything outside INT8 computation to FP16; nodes whose values would overflow stay float32.

    Args:
        network: The float32 network.
        placement: Its Q/DQ pairs.
        quantized: Its graph with these pairs.
        amax: Largest magnitudes of the measured tensors.
    """
    float32_nodes = find_float32_nodes(network, amax)
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


def int8_metadata(
    proto: onnx.ModelProto, placement: QdqPlacement, options: Int8Options, *, images: int, images_sha256: str
) -> Int8Metadata:
    """Return the record of a quantization; `images` and `images_sha256` are those of the calibration."""
    summary = summarize_int8(proto)
    names = {node.output[0]: node.name or node.output[0] for node in proto.graph.node if node.op_type == "Conv"}
    return Int8Metadata(
        target=options.target,
        reduce_range=bool(options.reduce_range),
        method=options.method,
        rounding=options.rounding,
        images=images,
        images_sha256=images_sha256,
        fallback=options.fallback,
        convolutions=len(summary.convolutions),
        int8_convolutions=summary.int8_convolutions,
        share=summary.share,
        float_layers=tuple((names[output], reason) for output, reason in placement.float_convolutions.items()),
    )


def with_int8_metadata(
    model: OnnxModel, proto: onnx.ModelProto, placement: QdqPlacement, int8: Int8Metadata, *, notes: Sequence[str]
) -> OnnxModel:
    """Return the INT8 graph of a float32 model with its metadata; `notes` follow those about the quantization."""
    notes = (*model.metadata.notes, *_notes(int8, summarize_int8(proto), placement.float_islands), *notes)
    logger.info("%s", "; ".join(notes))
    return OnnxModel.of(proto, replace(model.metadata, precision="int8", int8=int8, notes=notes))


def _notes(int8: Int8Metadata, summary: Int8Summary, islands: Mapping[str, str]) -> Iterator[str]:
    share = "" if int8.share is None else f", {int8.share:.1%} of all multiply-accumulates"
    yield f"int8: {int8.int8_convolutions} of {int8.convolutions} convolutions{share}; the rest is {int8.fallback}"
    yield (
        f"activation ranges of {sum(summary.pairs.values())} tensors in {summary.scales} scales, by {int8.method} on "
        f"{int8.images} image{'s' * (int8.images != 1)}"
    )
    if int8.rounding != "nearest":
        yield f"weights rounded by {int8.rounding}"
    for reason in dict.fromkeys(reason for _, reason in int8.float_layers):
        layers = [layer for layer, why in int8.float_layers if why == reason]
        yield f"{int8.fallback}: {_list_some(layers)} ({reason})"
    if islands:
        yield f"float between INT8 convolutions: {_list_some([f'{op} ({name})' for name, op in islands.items()])}"


def _list_some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
