"""Sensitivity of each layer to INT8: the error of the head maps if this convolution alone is quantized."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from yolov7_deploy._text import get_logger
from yolov7_deploy.image import FloatArray, Image
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import Int8Options
from yolov7_deploy.precision.calibrate import Calibration
from yolov7_deploy.precision.histogram import LEVELS, REDUCED_LEVELS
from yolov7_deploy.precision.int8 import (
    QuantizedRange,
    bias_correction,
    excluded_outputs,
    quantize_weight,
    tensor_ranges,
    to_int8,
)
from yolov7_deploy.precision.int8_summary import summarize_int8
from yolov7_deploy.precision.ort_runner import NetworkRunner, network_input
from yolov7_deploy.precision.qdq_placement import place_qdq
from yolov7_deploy.precision.subgraph import Network, node_inputs

logger = get_logger(__name__)

Progress = Callable[[int, int], None]

FLOOR_IMAGES = 8  # for `choose_silu_floor`; one unusual image must not decide
SILU_FLOORS = (4.0, 4.5, 5.5, 9.0)
MEMORY_BYTES = 1.6e9  # limit for the float32 tensors that stay in memory


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSensitivity:
    """Sensitivity of one convolution to INT8.

    Attributes:
        layer: Name of the convolution.
        error: Root mean square error of the raw head maps, in logits, weighted with the objectness of each cell, so
            that cells with objects dominate. In third-party graphs unweighted, and relative to the standard deviation
            of the maps.
        share: Fraction of all multiply-accumulates; `None` for dynamic shapes.
    """

    layer: str
    error: float
    share: float | None


def layer_sensitivities(
    model: OnnxModel,
    calibration: Calibration,
    images: Sequence[Image],
    options: Int8Options,
    *,
    progress: Progress | None = None,
) -> tuple[LayerSensitivity, ...]:
    """Return the sensitivity of each convolution that can be INT8, the most sensitive first.

    Each convolution is quantized alone, and only the nodes after it run again: half the network on average. The float32
    tensors that these nodes read stay in memory, so only as many images are used as fit into `MEMORY_BYTES`, at least
    one.

    Args:
        model: A float32 graph.
        calibration: Calibration of this graph.
        images: uint8 BGR; two are enough for a good ranking.
        options: Calibration method, and the layers that are excluded already.
        progress: Called with the number of finished layers and of all layers.
    """
    start = time.perf_counter()
    network = Network(model)
    placement = place_qdq(network, excluded_outputs(network, options.exclude), for_cpu=options.target != "tensorrt")
    ranges = tensor_ranges(network, placement, calibration, options)
    layers = [_QuantizedLayer(network, output, ranges, calibration, options) for output in placement.convolutions]
    references = _run_float32(model.metadata, network, layers, images)
    shares = _shares(model.proto)
    sensitivities = []
    for done, layer in enumerate(layers, 1):
        runner = layer.runner(references[0])
        errors = [
            head_error(tensors, {**tensors, **runner.run(tensors)}, network.heads, model.metadata)
            for tensors in references
        ]
        error = float(np.sqrt(np.mean(np.square(errors))))
        sensitivities.append(LayerSensitivity(layer=layer.name, error=error, share=shares.get(layer.name)))
        if progress:
            progress(done, len(layers))
    seconds = time.perf_counter() - start
    logger.info("sensitivity of %d layers on %d images, %.1f s", len(layers), len(references), seconds)
    return tuple(sorted(sensitivities, key=lambda sensitivity: -sensitivity.error))


def choose_silu_floor(
    model: OnnxModel, calibration: Calibration, images: Sequence[Image], options: Int8Options
) -> Int8Options:
    """Return the options with the floor of `SILU_FLOORS` that gives the smallest error of the head maps.

    For CPUs, the input of every SiLU has a Q/DQ pair. Which rounding errors it causes, and whether they add up through
    the network, depends on how its steps meet those of the output, which only a measurement shows: in the largest head
    map of the official yolov7, neighbouring floors can differ by a factor of two (`benchmarks/README.md`).

    Args:
        model: A float32 graph.
        calibration: Calibration of this graph.
        images: uint8 BGR; `FLOOR_IMAGES` are enough.
        options: Those of the quantization. Returned unchanged if the graph has no such pairs.
    """
    network = Network(model)
    placement = place_qdq(network, excluded_outputs(network, options.exclude), for_cpu=options.target != "tensorrt")
    if not any(network.producers[name].op_type == "Sigmoid" for name in placement.inner_pairs):
        return options
    inputs = [network_input(image, model.metadata) for image in images]
    float32 = NetworkRunner(network.proto, network.nodes, network.heads)
    references = [float32.run(array) for array in inputs]
    errors = {}
    for floor in SILU_FLOORS:
        trial = replace(options, silu_floor=floor, rounding="nearest")
        quantized = Network(to_int8(model, calibration, trial))
        runner = NetworkRunner(quantized.proto, quantized.nodes, network.heads)
        found = [
            head_error(reference, runner.run(array), network.heads, model.metadata)
            for reference, array in zip(references, inputs, strict=True)
        ]
        errors[floor] = float(np.sqrt(np.mean(np.square(found))))
    logger.info("error of the head maps by floor of SiLU: %s", errors)
    return replace(options, silu_floor=min(errors, key=lambda floor: errors[floor]))


def _run_float32(
    metadata: ModelMetadata, network: Network, layers: Sequence[_QuantizedLayer], images: Sequence[Image]
) -> list[dict[str, FloatArray]]:
    """Return for each image the float32 head maps, and the tensors that the runners of the layers read."""
    names = list(dict.fromkeys([*network.heads, *(name for layer in layers for name in layer.inputs)]))
    runner = NetworkRunner(network.proto, network.nodes, names)
    references: list[dict[str, FloatArray]] = []
    for image in images:
        references.append(runner.run(network_input(image, metadata)))
        if (len(references) + 1) * sum(values.nbytes for values in references[0].values()) > MEMORY_BYTES:
            break
    return references


def head_error(
    reference: Mapping[str, FloatArray], other: Mapping[str, FloatArray], heads: Sequence[str], metadata: ModelMetadata
) -> float:
    """Return the error of raw head maps against those of float32; see `LayerSensitivity.error`."""
    classes, total, weights = len(metadata.class_names), 0.0, 0.0
    for name in heads:
        expected, actual = reference[name].astype(np.float64), other[name].astype(np.float64)
        squares = np.square(actual - expected)
        if metadata.heads and expected.shape[1] % (5 + classes) == 0:
            rows = squares.reshape(len(expected), -1, 5 + classes, expected[0, 0].size)
            objectness = expected.reshape(rows.shape)[:, :, 4]
            weight = 1 / (1 + np.exp(-objectness))
            total += float((rows.mean(axis=2) * weight).sum())
            weights += float(weight.sum())
        else:
            total += float(squares.sum() / max(expected.var(), 1e-12))
            weights += squares.size
    return float(np.sqrt(total / max(weights, 1e-12)))


class _QuantizedLayer:
    """One convolution in INT8 and the nodes that its result affects.

    Attributes:
        name: Name of the convolution.
        inputs: Tensors that these nodes read and do not compute; constants are not among them.
    """

    def __init__(
        self,
        network: Network,
        output: str,
        ranges: Mapping[str, QuantizedRange],
        calibration: Calibration,
        options: Int8Options,
    ) -> None:
        self._network, self._node = network, network.producers[output]
        data = self._node.input[0]
        self._range = ranges[data]
        self._levels = REDUCED_LEVELS if options.reduce_range else LEVELS
        self._input_means = calibration.input_means.get(data) if options.correct_bias else None
        self._affected = list(self._affected_nodes())
        computed = {name for node in (self._node, *self._affected) for name in node.output}
        read = {name for node in (self._node, *self._affected) for name in node_inputs(node)} - {self._node.input[1]}
        self._heads = [head for head in network.heads if head in computed]
        self.name = self._node.name or output
        given = {entry.name for entry in network.proto.graph.input} - network.initializers
        self.inputs = tuple(sorted((read - computed) & (given | set(network.producers))))

    def _affected_nodes(self) -> Iterator[onnx.NodeProto]:
        affected = set(self._node.output)
        for node in self._network.nodes:
            if affected.intersection(node_inputs(node)):
                affected.update(node.output)
                yield node

    def runner(self, tensors: Mapping[str, npt.NDArray[np.generic]]) -> NetworkRunner:
        """Return a runner that computes the affected head maps; `tensors` has arrays of the types of the inputs."""
        node = onnx.NodeProto()
        node.CopyFrom(self._node)
        weight = self._network.weights[node.input[1]]
        quantized = quantize_weight(weight, self._levels)
        constants = {
            "own__weight": quantized.dequantized,
            "own__scale": np.array(self._range.scale),
            "own__zero": np.array(self._range.zero),
        }
        bias = self._bias(node)
        if bias is not None:
            if self._input_means is not None:
                bias = bias + bias_correction(weight, quantized, self._input_means)
            constants["own__bias"] = bias
        pair = [
            helper.make_node("QuantizeLinear", [node.input[0], "own__scale", "own__zero"], ["own__int8"]),
            helper.make_node("DequantizeLinear", ["own__int8", "own__scale", "own__zero"], ["own__data"]),
        ]
        node.input[:] = ["own__data", "own__weight", node.input[2] if bias is None else "own__bias"]
        types = {name: helper.np_dtype_to_tensor_dtype(tensors[name].dtype) for name in self.inputs}
        return NetworkRunner(
            self._network.proto,
            [*pair, node, *self._affected],
            self._heads,
            inputs=[helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()],
            weights=constants,
        )

    def _bias(self, node: onnx.NodeProto) -> FloatArray | None:
        """Return the bias of the convolution, zeros without one; `None` if the network computes it."""
        if len(node.input) < 3 or not node.input[2]:
            return np.zeros(len(self._network.weights[node.input[1]]), np.float32)
        return self._network.weights.get(node.input[2])


def _shares(proto: onnx.ModelProto) -> dict[str, float]:
    """Return the fraction of all multiply-accumulates by convolution."""
    convolutions = summarize_int8(proto).convolutions
    total = sum(convolution.macs or 0 for convolution in convolutions)
    return {c.name: c.macs / total for c in convolutions if c.macs is not None and total}
