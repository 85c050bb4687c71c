"""Sensitivity of each layer to INT8: the error of the head maps if this convolution alone is quantized."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.image import Image
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import Int8Options
from yolov7_deploy.precision.calibrate import Calibration
from yolov7_deploy.precision.int8 import bias_correction, excluded_outputs, quantize_weight, tensor_scales
from yolov7_deploy.precision.int8_summary import summarize_int8
from yolov7_deploy.precision.ort_runner import NetworkRunner, network_input
from yolov7_deploy.precision.qdq_placement import place_qdq
from yolov7_deploy.precision.subgraph import Network

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
FloatArray = npt.NDArray[np.float32]

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
    placement = place_qdq(network, excluded_outputs(network, options.exclude))
    scales = tensor_scales(placement, calibration, options.method)
    layers = [_QuantizedLayer(network, output, scales, calibration, options) for output in placement.convolutions]
    references = _run_float32(model, network, layers, images)
    shares = _shares(model.proto)
    sensitivities = []
    for done, layer in enumerate(layers, 1):
        runner = layer.runner()
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


def _run_float32(
    model: OnnxModel, network: Network, layers: Sequence[_QuantizedLayer], images: Sequence[Image]
) -> list[dict[str, FloatArray]]:
    """Return for each image the float32 head maps, and the tensors that the runners of the layers read."""
    names = list(dict.fromkeys([*network.heads, *(name for layer in layers for name in layer.inputs)]))
    runner = NetworkRunner(model.proto, network.nodes, names)
    references: list[dict[str, FloatArray]] = []
    for image in images:
        references.append(runner.run(network_input(image, model.metadata)))
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
        inputs: float32 tensors that these nodes read and do not compute.
    """

    def __init__(
        self,
        network: Network,
        output: str,
        scales: Mapping[str, np.float32],
        calibration: Calibration,
        options: Int8Options,
    ) -> None:
        self._network, self._node = network, network.producers[output]
        data = self._node.input[0]
        self._scale = scales[data]
        self._input_means = calibration.input_means.get(data) if options.correct_bias else None
        self._affected = list(self._affected_nodes())
        computed = {name for node in (self._node, *self._affected) for name in node.output}
        read = {name for node in self._affected for name in node.input} | {data}
        self._heads = [head for head in network.heads if head in computed]
        self.name = self._node.name or output
        self.inputs = tuple(sorted((read - computed - set(network.weights)) & network.floats))

    def _affected_nodes(self) -> Iterator[onnx.NodeProto]:
        affected = set(self._node.output)
        for node in self._network.nodes:
            if affected.intersection(node.input):
                affected.update(node.output)
                yield node

    def runner(self) -> NetworkRunner:
        """Return a runner that computes the affected head maps."""
        weights, node = self._network.weights, onnx.NodeProto()
        node.CopyFrom(self._node)
        quantized = quantize_weight(weights[node.input[1]])
        bias = weights[node.input[2]] if len(node.input) > 2 else np.zeros(len(quantized.scales), np.float32)
        if self._input_means is not None:
            bias = bias + bias_correction(weights[node.input[1]], quantized, self._input_means)
        constants = {
            "own__weight": quantized.dequantized,
            "own__bias": bias,
            "own__scale": np.array(self._scale),
            "own__zero": np.zeros((), np.int8),
        }
        pair = [
            helper.make_node("QuantizeLinear", [node.input[0], "own__scale", "own__zero"], ["own__int8"]),
            helper.make_node("DequantizeLinear", ["own__int8", "own__scale", "own__zero"], ["own__data"]),
        ]
        node.input[:] = ["own__data", "own__weight", "own__bias"]
        return NetworkRunner(
            self._network.proto,
            [*pair, node, *self._affected],
            self._heads,
            inputs=[helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.inputs],
            weights=constants,
        )


def _shares(proto: onnx.ModelProto) -> dict[str, float]:
    """Return the fraction of all multiply-accumulates by convolution."""
    convolutions = summarize_int8(proto).convolutions
    total = sum(convolution.macs or 0 for convolution in convolutions)
    return {c.name: c.macs / total for c in convolutions if c.macs is not None and total}
