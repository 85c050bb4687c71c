"""INT8 ranges as a TensorRT calibration cache, for the DLA of a Jetson, which takes no Q/DQ pairs.

The cache goes with the float32 file:
trtexec --onnx=F.onnx --int8 --fp16 --calib=F.cache --useDLACore=0 --allowGPUFallback
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

import onnx

from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.precision.calibrate import Calibration
from yolov7_deploy.precision.histogram import LEVELS, clip_of
from yolov7_deploy.precision.int8 import tensor_scales
from yolov7_deploy.precision.qdq_placement import is_passing, passed, place
from yolov7_deploy.precision.subgraph import Network

# What TensorRT 8.6.1 writes. When a cache is read, the number is not compared, but the kind of calibrator is: this one
# is the only one that a DLA takes.
HEADER = "TRT-8601-EntropyCalibration2"
_SIGMOID_SCALE = 1 / LEVELS  # its results end at 1


def trt_calibration_cache(model: OnnxModel, calibration: Calibration, method: str) -> str:
    """The text of the cache: a scale for every tensor in front of decoding, a line each.

    Implicit quantisation wants one for every tensor, also inside activations. What a convolution makes has the scale of
    its activation's result, beyond which the activation gives nothing new on the positive side and next to nothing on
    the negative; a sigmoid ends at 1. Tensors that share a scale in the INT8 file share it here.

    Args:
        model: The float32 graph that TensorRT will get.
        calibration: Of it.
        method: How ranges are chosen.

    Raises:
        ExportError: Values are infinite or no numbers.
    """
    network = Network(model)
    placement = place(network, {})
    scales = {name: float(scale) for name, scale in tensor_scales(placement, calibration, method).items()}
    known = scales | {source: scales[name] for name, group in placement.groups.items() for source in group}
    for name, histogram in calibration.histograms.items():
        if name not in known:  # read by heads only
            known[name] = clip_of(histogram, method) / LEVELS
    lines = [f"{name}: {_hexadecimal(scale)}" for name, scale in _every(network, known, calibration)]
    return "\n".join([HEADER, *lines, ""])


def _every(network: Network, known: Mapping[str, float], calibration: Calibration) -> Iterator[tuple[str, float]]:
    """Name and scale of the input and of each tensor, in the order they are made."""
    found = dict(known)
    for node in reversed(network.nodes):
        scale = _from_readers(network, node, found)
        for name in node.output:
            if name in network.floats and name not in found and scale is not None:
                found[name] = scale
    for name, largest in calibration.largest.items():
        found.setdefault(name, max(largest, 1e-6) / LEVELS)  # heads: nothing clipped
    for node in network.nodes:
        if is_passing(node) and all(name in found for name in passed(node)):
            for name in node.output:
                found.setdefault(name, max(found[given] for given in passed(node)))
    order = [entry.name for entry in network.proto.graph.input] + list(network.makers)
    yield from ((name, found[name]) for name in order if name in found)


def _from_readers(network: Network, node: onnx.NodeProto, found: Mapping[str, float]) -> float | None:
    if node.op_type == "Sigmoid":
        return _SIGMOID_SCALE
    for name in node.output:
        for reader in network.readers.get(name, []):
            follows = reader.op_type in ("Gather", "LeakyRelu", "Mul", "Relu") or is_passing(reader)
            if follows and reader.output[0] in found:
                return found[reader.output[0]]
            if reader.op_type == "Div" and reader.output[0] in found and reader.input[1] in network.weights:
                return found[reader.output[0]] * float(abs(network.weights[reader.input[1]]).max())  # bytes to 0..1
    return None


def _hexadecimal(scale: float) -> str:
    """The bits of a float32, as TensorRT writes them."""
    return struct.pack(">f", scale).hex()
