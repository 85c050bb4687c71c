"""INT8 scales as a TensorRT calibration cache, for the DLA of a Jetson, which does not support Q/DQ pairs.

The cache is used with the float32 file:
trtexec --onnx=F.onnx --int8 --fp16 --calib=F.cache --useDLACore=0 --allowGPUFallback
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

import onnx

from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.precision.calibrate import Calibration
from yolov7_deploy.precision.histogram import LEVELS, choose_range
from yolov7_deploy.precision.int8 import tensor_scales
from yolov7_deploy.precision.qdq_placement import is_pass_through, pass_through_inputs, place_qdq
from yolov7_deploy.precision.subgraph import Network

# As TensorRT 8.6.1 writes it. When TensorRT reads a cache, it ignores the version but compares the type of the
# calibrator; this is the only type that DLA supports.
HEADER = "TRT-8601-EntropyCalibration2"
_SIGMOID_SCALE = 1 / LEVELS  # a sigmoid is at most 1


def trt_calibration_cache(model: OnnxModel, calibration: Calibration, method: str) -> str:
    """Return the text of the cache: one line with the scale of each tensor before decoding.

    Implicit quantization needs a scale for every tensor, including those inside activations. The output of a
    convolution gets the scale of its activation's output: larger positive values are clipped anyway, and on negative
    ones the activation is almost 0. Sigmoids end at 1. Tensors that share a scale in the INT8 file share it here.

    Args:
        model: The float32 graph that TensorRT will parse.
        calibration: Calibration of this graph.
        method: Calibration method; see `Int8Options`.

    Raises:
        ExportError: There are infinite values or NaN.
    """
    network = Network(model)
    placement = place_qdq(network, {})
    scales = {name: float(scale) for name, scale in tensor_scales(placement, calibration, method).items()}
    known = scales | {source: scales[name] for name, group in placement.scale_groups.items() for source in group}
    for name, histogram in calibration.histograms.items():
        if name not in known:  # read by heads only
            known[name] = choose_range(histogram, method) / LEVELS
    lines = [f"{name}: {_hex_float(scale)}" for name, scale in _all_scales(network, known, calibration)]
    return "\n".join([HEADER, *lines, ""])


def _all_scales(network: Network, known: Mapping[str, float], calibration: Calibration) -> Iterator[tuple[str, float]]:
    """Yield name and scale of the input and of each tensor, in execution order."""
    scales = dict(known)
    for node in reversed(network.nodes):
        scale = _scale_from_consumers(network, node, scales)
        for name in node.output:
            if name in network.floats and name not in scales and scale is not None:
                scales[name] = scale
    for name, amax in calibration.output_amax.items():
        scales.setdefault(name, max(amax, 1e-6) / LEVELS)  # heads: nothing is clipped
    for node in network.nodes:
        if is_pass_through(node) and all(name in scales for name in pass_through_inputs(node)):
            for name in node.output:
                scales.setdefault(name, max(scales[source] for source in pass_through_inputs(node)))
    order = [entry.name for entry in network.proto.graph.input] + list(network.producers)
    yield from ((name, scales[name]) for name in order if name in scales)


def _scale_from_consumers(network: Network, node: onnx.NodeProto, scales: Mapping[str, float]) -> float | None:
    if node.op_type == "Sigmoid":
        return _SIGMOID_SCALE
    for name in node.output:
        for consumer in network.consumers.get(name, []):
            keeps_scale = consumer.op_type in ("Gather", "LeakyRelu", "Mul", "Relu") or is_pass_through(consumer)
            if keeps_scale and consumer.output[0] in scales:
                return scales[consumer.output[0]]
            is_scaling = consumer.op_type == "Div" and consumer.input[1] in network.weights  # bytes to 0..1
            if is_scaling and consumer.output[0] in scales:
                return scales[consumer.output[0]] * float(abs(network.weights[consumer.input[1]]).max())
    return None


def _hex_float(scale: float) -> str:
    """Return the bits of a float32 as TensorRT writes them."""
    return struct.pack(">f", scale).hex()
