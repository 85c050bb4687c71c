"""Both ends of quantization-aware training: a network that starts from calibrated ranges, and the INT8 file.

At the start, the network computes what the INT8 file of calibration alone computes, with its corrected biases. At the
end, the INT8 file gets the learned ranges, and no calibration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from yolov7_deploy.checkpoint.quantization import TrainedQuantization, TrainedRange
from yolov7_deploy.errors import ExportError
from yolov7_deploy.model.yolov7 import Yolov7
from yolov7_deploy.onnx_export.onnx_model import INPUT_NAME, OnnxModel
from yolov7_deploy.options import Int8Options
from yolov7_deploy.precision.calibrate import Calibration
from yolov7_deploy.precision.fake_quantize import FakeQuantizedYolov7, split_state
from yolov7_deploy.precision.fp16 import check_valid
from yolov7_deploy.precision.histogram import LEVELS, REDUCED_LEVELS
from yolov7_deploy.precision.int8 import (
    QuantizedRange,
    bias_correction,
    check_quantizable,
    check_same_network,
    convert_rest_to_fp16,
    insert_qdq,
    int8_metadata,
    measured_amax,
    quantize_weight,
    tensor_ranges,
    with_int8_metadata,
)
from yolov7_deploy.precision.qdq_placement import QdqPlacement, place_qdq
from yolov7_deploy.precision.subgraph import Network

METHOD = "qat"  # of the activation ranges, in the metadata
_SCALED_INPUT = "scaled"  # the tensor that the network reads in files with uint8 images


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CalibratedNetwork:
    """A network at the start of quantization-aware training, and the quantization that it has."""

    model: FakeQuantizedYolov7
    quantization: TrainedQuantization


def calibrated_network(
    model: Yolov7, exported: OnnxModel, calibration: Calibration, options: Int8Options
) -> CalibratedNetwork:
    """Return a network that computes what the INT8 file of a calibration computes.

    Args:
        model: A fused network; it is not modified.
        exported: The same network as ONNX.
        calibration: Calibration of `exported`.
        options: Target, method and range of the weights; no layer is excluded.

    Raises:
        ExportError: The calibration belongs to another network, or has infinite values.
    """
    network = Network(exported)
    check_same_network(network, calibration)
    result = FakeQuantizedYolov7(model, target=options.target, reduce_range=bool(options.reduce_range))
    placement = place_qdq(network, {}, for_cpu=options.target != "tensorrt")
    ranges = tensor_ranges(network, placement, calibration, options)
    result.load_ranges(
        TrainedRange(tensor=name, scale=float(one.scale), zero=int(one.zero))
        for name, one in _ranges_of_pairs(result.placement, ranges)
    )
    if options.correct_bias:
        _correct_biases(result, network, calibration)
    _, stored = split_state(result.state_dict(), result.placement)
    quantization = TrainedQuantization(
        target=options.target,
        reduce_range=bool(options.reduce_range),
        ranges=stored,
        amax=tuple(measured_amax(calibration).items()),
        method=options.method,
        images=calibration.images,
        images_sha256=calibration.images_sha256,
    )
    return CalibratedNetwork(model=result, quantization=quantization)


@torch.no_grad()
def _correct_biases(model: FakeQuantizedYolov7, network: Network, calibration: Calibration) -> None:
    levels = REDUCED_LEVELS if model.reduce_range else LEVELS
    for output in model.placement.convolutions:
        node = network.producers[output]
        weight = network.weights[node.input[1]]
        means = calibration.input_means[node.input[0]]
        correction = bias_correction(weight, quantize_weight(weight, levels), means)
        model.get_parameter(node.input[2]).add_(torch.from_numpy(correction))


def to_trained_int8(model: OnnxModel, quantization: TrainedQuantization) -> OnnxModel:
    """Return the INT8 graph of weights that were trained for INT8, with their learned ranges.

    Args:
        model: The float32 graph of these weights, of any size and batch; it is not modified.
        quantization: The quantization in their file.

    Raises:
        ExportError: The graph has a lower precision already, or is of another network.
    """
    check_quantizable(model)
    options = Int8Options(target=quantization.target, reduce_range=quantization.reduce_range)
    network = Network(model)
    placement = place_qdq(network, {}, for_cpu=options.target != "tensorrt")
    kind = np.uint8 if options.target == "cpu" else np.int8
    stored = {one.tensor: QuantizedRange(np.float32(one.scale), kind(one.zero)) for one in quantization.ranges}
    ranges = dict(_ranges_of_pairs(placement, stored))
    proto = insert_qdq(network, placement, ranges, {}, options)
    if options.fallback == "fp16":
        proto = convert_rest_to_fp16(network, placement, proto, dict(quantization.amax))
    check_valid(proto)
    int8 = int8_metadata(
        proto, placement, options, images=quantization.images, images_sha256=quantization.images_sha256
    )
    note = f"trained for INT8 from ranges by {quantization.method}"
    return with_int8_metadata(model, proto, placement, replace(int8, method=METHOD), notes=[note])


def _ranges_of_pairs(
    placement: QdqPlacement, stored: Mapping[str, QuantizedRange]
) -> Iterator[tuple[str, QuantizedRange]]:
    """Yield each tensor with a pair and its range.

    Names of tensors that only pass values through depend on the simplification of the graph, so they get the range of
    their scale group.
    """
    known = {**stored, _SCALED_INPUT: stored[INPUT_NAME]} if INPUT_NAME in stored else dict(stored)
    of_group = {group: known[name] for name, group in placement.scale_groups.items() if name in known}
    for name in placement.pairs:
        found = known.get(name) if name in placement.inner_pairs else of_group.get(placement.scale_groups[name])
        if found is None:
            raise ExportError(
                f"The weights were trained for INT8 without a range for {name}: the graph is of another network.",
                fix="Export it from the same weights:  y7 export --int8 --weights FILE.safetensors",
            )
        yield name, found
