"""What INT8 costs layer by layer: the error of the head maps when one convolution alone is quantised."""

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
from yolov7_deploy.precision.int8 import spared_layers, tensor_scales
from yolov7_deploy.precision.int8_summary import count_int8
from yolov7_deploy.precision.ort_runner import NetworkRunner, network_input
from yolov7_deploy.precision.qdq_placement import place
from yolov7_deploy.precision.subgraph import Network
from yolov7_deploy.precision.weight_quantization import round_weight, shifted_by_rounding

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
FloatArray = npt.NDArray[np.float32]

MEMORY_BYTES = 1.6e9  # of tensors kept while layers are measured


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCost:
    """What one convolution in INT8 costs.

    Attributes:
        layer: Its name.
        error: Root mean squared difference of the raw head maps, in logits, weighted with the objectness of each cell,
            so that cells with objects count; in a foreign graph relative to the spread of the maps, unweighted.
        share: Part of all multiply-accumulates; `None` where shapes are open.
    """

    layer: str
    error: float
    share: float | None


def layer_costs(
    model: OnnxModel,
    calibration: Calibration,
    images: Sequence[Image],
    options: Int8Options,
    *,
    progress: Progress | None = None,
) -> tuple[LayerCost, ...]:
    """The cost of each convolution that can be INT8, the dearest first.

    Each is quantised alone, and only what it changes is computed again: half the network on average. The tensors that
    such parts begin with stay in memory, so only as many images are used as fit into `MEMORY_BYTES`, at least one.

    Args:
        model: A float32 graph.
        calibration: Of it.
        images: uint8 BGR; two rank layers well.
        options: Method, and what is spared already.
        progress: Called with layers done and in all.
    """
    start = time.perf_counter()
    network = Network(model)
    placement = place(network, spared_layers(network, options.spare))
    scales = tensor_scales(placement, calibration, options.method)
    parts = [_Part(network, layer, scales, calibration, options) for layer in placement.convolutions]
    references = _references(model, network, parts, images)
    shares = _shares(model.proto)
    costs = []
    for done, part in enumerate(parts, 1):
        runner = part.runner()
        errors = [
            head_error(found, {**found, **runner.run(found)}, network.heads, model.metadata) for found in references
        ]
        error = float(np.sqrt(np.mean(np.square(errors))))
        costs.append(LayerCost(layer=part.name, error=error, share=shares.get(part.name)))
        if progress:
            progress(done, len(parts))
    logger.info("cost of %d layers on %d images, %.1f s", len(costs), len(references), time.perf_counter() - start)
    return tuple(sorted(costs, key=lambda cost: -cost.error))


def _references(
    model: OnnxModel, network: Network, parts: Sequence[_Part], images: Sequence[Image]
) -> list[dict[str, FloatArray]]:
    """What float32 makes of each image: the head maps, and the tensors that parts begin with."""
    wanted = list(dict.fromkeys([*network.heads, *(name for part in parts for name in part.begins_with)]))
    whole = NetworkRunner(model.proto, network.nodes, wanted)
    found: list[dict[str, FloatArray]] = []
    for image in images:
        found.append(whole.run(network_input(image, model.metadata)))
        if (len(found) + 1) * sum(values.nbytes for values in found[0].values()) > MEMORY_BYTES:
            break
    return found


def head_error(
    reference: Mapping[str, FloatArray], other: Mapping[str, FloatArray], heads: Sequence[str], metadata: ModelMetadata
) -> float:
    """How far raw head maps are from those of float32; see `LayerCost.error`."""
    classes, differing, weights = len(metadata.class_names), 0.0, 0.0
    for name in heads:
        theirs, ours = reference[name].astype(np.float64), other[name].astype(np.float64)
        squares = np.square(ours - theirs)
        if metadata.heads and theirs.shape[1] % (5 + classes) == 0:
            rows = squares.reshape(len(theirs), -1, 5 + classes, theirs[0, 0].size)
            objectness = theirs.reshape(rows.shape)[:, :, 4]
            weight = 1 / (1 + np.exp(-objectness))
            differing += float((rows.mean(axis=2) * weight).sum())
            weights += float(weight.sum())
        else:
            differing += float(squares.sum() / max(theirs.var(), 1e-12))
            weights += squares.size
    return float(np.sqrt(differing / max(weights, 1e-12)))


class _Part:
    """One convolution in INT8, and the nodes behind it, whose values it changes."""

    def __init__(
        self,
        network: Network,
        layer: str,
        scales: Mapping[str, np.float32],
        calibration: Calibration,
        options: Int8Options,
    ) -> None:
        self._network, self._node = network, network.makers[layer]
        self._scale = scales[self._node.input[0]]
        self._means = calibration.means.get(self._node.input[0]) if options.correct_bias else None
        self._behind = list(self._changed())
        made = {name for node in (self._node, *self._behind) for name in node.output}
        read = {name for node in self._behind for name in node.input} | {self._node.input[0]}
        self._heads = [head for head in network.heads if head in made]
        self.name = self._node.name or layer
        self.begins_with = tuple(sorted((read - made - set(network.weights)) & network.floats))

    def _changed(self) -> Iterator[onnx.NodeProto]:
        changed = set(self._node.output)
        for node in self._network.nodes:
            if changed.intersection(node.input):
                changed.update(node.output)
                yield node

    def runner(self) -> NetworkRunner:
        """Gives the head maps that the layer reaches."""
        weights, node = self._network.weights, onnx.NodeProto()
        node.CopyFrom(self._node)
        rounded = round_weight(weights[node.input[1]])
        bias = weights[node.input[2]] if len(node.input) > 2 else np.zeros(len(rounded.scales), np.float32)
        if self._means is not None:
            bias = bias + shifted_by_rounding(weights[node.input[1]], rounded, self._means)
        stored = {
            "own__weight": rounded.floats,
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
            [*pair, node, *self._behind],
            self._heads,
            inputs=[helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.begins_with],
            weights=stored,
        )


def _shares(proto: onnx.ModelProto) -> dict[str, float]:
    costs = count_int8(proto).convolutions
    total = sum(cost.macs or 0 for cost in costs)
    return {cost.name: cost.macs / total for cost in costs if cost.macs is not None and total}
