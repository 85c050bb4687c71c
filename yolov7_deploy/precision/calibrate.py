"""Calibration: histograms, means and extremes of the values inside a network, from one pass over sample images.

All calibration methods start from the same `Calibration`, so trying another one needs no images.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from onnx import helper

from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import ExportError, UsageError
from yolov7_deploy.image import Image
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.precision.histogram import Histogram
from yolov7_deploy.precision.ort_runner import NetworkRunner, network_input
from yolov7_deploy.precision.qdq_placement import calibrated_tensors
from yolov7_deploy.precision.subgraph import Network

logger = get_logger(__name__)

Progress = Callable[[int, int], None]
DoubleArray = npt.NDArray[np.float64]

# Prefixes of the names of statistics that are computed inside the graph.
_INPUT_MEAN, _MAX, _MIN, _MEAN = "input_mean__", "max__", "min__", "mean__"
# The mean detects NaN, which ReduceMax and ReduceMin of ONNX Runtime ignore.
_OUTPUT_STATISTICS = {"ReduceMax": _MAX, "ReduceMin": _MIN, "ReduceMean": _MEAN}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Calibration:
    """Statistics of one pass over calibration images.

    Attributes:
        histograms: Histogram of every tensor that INT8 may have to represent.
        input_means: Mean of each channel [C] of the input of each convolution, by the name of that input.
        output_amax: Largest magnitude in the output of each convolution, before its activation.
        images: Number of images.
        network_sha256: Digest of nodes and weights before decoding.
        images_sha256: Digest of the letterboxed images, independent of their order.
        notes: Remarks for the user (skipped images, few images).
    """

    histograms: Mapping[str, Histogram]
    input_means: Mapping[str, DoubleArray]
    output_amax: Mapping[str, float]
    images: int
    network_sha256: str
    images_sha256: str
    notes: tuple[str, ...] = field(default=())


def calibrate(
    model: OnnxModel, images: Iterable[Image], *, count: int = 0, progress: Progress | None = None
) -> Calibration:
    """Run the network on every image and collect the statistics of its tensors.

    One image is in memory at a time, with the counted tensors of the network: 340 MB for YOLOv7 at 640.

    Args:
        model: A float32 graph.
        images: uint8 BGR of any size.
        count: Number of images, for `progress`; 0 if unknown.
        progress: Called with the number of finished images and `count`.

    Raises:
        UsageError: There are no images.
        ExportError: A tensor is infinite or NaN on one of them.

    Example:
        >>> calibrate(OnnxModel.load("shapes.onnx"), open_calibration("images", limit=2)).images
        2
    """
    start = time.perf_counter()
    network = Network(model)
    collector = _StatisticsCollector(network)
    digests = []
    for done, image in enumerate(images, 1):
        array = network_input(image, model.metadata)
        digests.append(image_digest(array))
        collector.add(array)
        if progress:
            progress(done, count)
    if not digests:
        raise UsageError("There is no image to calibrate on.", fix="Add images:  --calib FOLDER")
    seconds = time.perf_counter() - start
    logger.info("calibrated %d tensors on %d images, %.1f s", len(collector.histograms), len(digests), seconds)
    return Calibration(
        histograms=collector.histograms,
        input_means={name: total / len(digests) for name, total in collector.input_sums.items()},
        output_amax=collector.output_amax,
        images=len(digests),
        network_sha256=network_digest(network),
        images_sha256=images_digest(digests),
    )


class _StatisticsCollector:
    """Accumulate the statistics of a `Calibration` over images.

    Means and extremes are computed inside the graph, by one or two nodes each, so that a run returns only a few numbers
    for each tensor.
    """

    def __init__(self, network: Network) -> None:
        self._counted = calibrated_tensors(network)
        self._constants = {name: network.weights[name] for name in self._counted if name in network.weights}
        self._conv_inputs = list(dict.fromkeys(node.input[0] for node in network.convolutions))
        self._conv_outputs = [node.output[0] for node in network.convolutions]
        extra = [helper.make_node("GlobalAveragePool", [name], [_INPUT_MEAN + name]) for name in self._conv_inputs]
        for name in self._conv_outputs:
            for op, prefix in _OUTPUT_STATISTICS.items():
                extra.append(helper.make_node(op, [name], [prefix + name], keepdims=0))
        counted = [name for name in self._counted if name not in self._constants]
        names = [*counted, *(name for node in extra for name in node.output)]
        self._runner = NetworkRunner(network.proto, [*network.nodes, *extra], names)
        self._images = 0
        self.histograms: dict[str, Histogram] = {}
        self.input_sums: dict[str, DoubleArray] = {}
        self.output_amax: dict[str, float] = dict.fromkeys(self._conv_outputs, 0.0)

    def add(self, array: npt.NDArray[np.generic]) -> None:
        """Add one image, given as network input."""
        found = {**self._runner.run(array), **self._constants}
        self._images += 1
        for name in self._counted:
            histogram = Histogram.of(found.pop(name))
            self._check_finite(name, histogram.is_finite)
            before = self.histograms.get(name)
            self.histograms[name] = Histogram.sum([before, histogram]) if before else histogram
        for name in self._conv_inputs:
            means = found[_INPUT_MEAN + name].mean(axis=0, dtype=np.float64).reshape(-1)
            self.input_sums[name] = self.input_sums.get(name, 0) + means
        for name in self._conv_outputs:
            amax = max(float(found[_MAX + name]), -float(found[_MIN + name]))
            self._check_finite(name, math.isfinite(amax) and math.isfinite(found[_MEAN + name].item()))
            self.output_amax[name] = max(self.output_amax[name], amax)

    def _check_finite(self, name: str, is_finite: bool) -> None:
        if not is_finite:
            raise ExportError(
                f"On image {self._images}, {name} holds infinite values or NaN.",
                fix="Check the weights (y7 verify); leave the image out if it is unlike the others.",
            )


def image_digest(array: npt.NDArray[np.generic]) -> bytes:
    """Return the SHA-256 of an image, given as network input."""
    return hashlib.sha256(array.tobytes()).digest()


def images_digest(digests: Iterable[bytes]) -> str:
    """Return one SHA-256 for the digests of many images, independent of their order."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def network_digest(network: Network) -> str:
    """Return the SHA-256 of the nodes and weights before decoding; decoding and NMS do not affect it."""
    digest = hashlib.sha256()
    for node in network.nodes:
        digest.update(node.SerializeToString(deterministic=True))
    read = {name for node in network.nodes for name in node.input}
    for tensor in sorted(network.proto.graph.initializer, key=lambda tensor: tensor.name):
        if tensor.name in read:
            digest.update(tensor.SerializeToString(deterministic=True))
    return digest.hexdigest()
