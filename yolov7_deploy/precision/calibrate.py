"""What the values inside a network are like on sample images: histograms, means and extremes, from one pass.

Every way of choosing INT8 ranges starts from the same `Calibration`, so trying another one needs no image again.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from onnx import helper

from yolov7_deploy.errors import ExportError, UsageError
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.image import Image
from yolov7_deploy.precision.histogram import Histogram
from yolov7_deploy.precision.ort_runner import NetworkRunner, network_input
from yolov7_deploy.precision.qdq_placement import measured_tensors
from yolov7_deploy.precision.subgraph import Network

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
DoubleArray = npt.NDArray[np.float64]

# In front of the names of what is found inside the graph.
_MEAN, _MOST, _LEAST, _AVERAGE = "mean__", "most__", "least__", "average__"
# The last of them because extremes in ONNX Runtime pass over what is no number, and a mean does not.
_OF_RESULTS = {"ReduceMax": _MOST, "ReduceMin": _LEAST, "ReduceMean": _AVERAGE}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Calibration:
    """What one pass over sample images tells.

    Attributes:
        histograms: Of every tensor whose values INT8 may have to hold.
        means: Of what each convolution reads, per channel [C].
        largest: Largest magnitude of what each convolution makes, before its activation.
        images: How many were measured on.
        network_sha256: Of nodes and weights in front of decoding.
        images_sha256: Of the images as placed in the network's input, in any order.
        notes: What a reader should know (skipped images, few images).
    """

    histograms: Mapping[str, Histogram]
    means: Mapping[str, DoubleArray]
    largest: Mapping[str, float]
    images: int
    network_sha256: str
    images_sha256: str
    notes: tuple[str, ...] = field(default=())


def calibrate(
    model: OnnxModel, images: Iterable[Image], *, count: int = 0, progress: Progress | None = None
) -> Calibration:
    """Runs the network on every image and counts what its tensors hold.

    One image is in memory at a time, with the tensors of the network that are counted: 340 MB for YOLOv7 at 640.

    Args:
        model: A float32 graph.
        images: uint8 BGR of any size.
        count: How many there are, for `progress`; 0 where nobody knows.
        progress: Called with images done and in all.

    Raises:
        UsageError: There is no image.
        ExportError: A tensor is infinite or no number on one of them.
    """
    start = time.perf_counter()
    network = Network(model)
    counter = _Counter(model, network)
    digests = []
    for done, image in enumerate(images, 1):
        fed = network_input(image, model.metadata)
        digests.append(image_digest(fed))
        counter.add(fed)
        if progress:
            progress(done, count)
    if not digests:
        raise UsageError("There is no image to calibrate on.", fix="Give some:  --calib FOLDER")
    seconds = time.perf_counter() - start
    logger.info("calibrated %d tensors on %d images, %.1f s", len(counter.histograms), len(digests), seconds)
    return Calibration(
        histograms=counter.histograms,
        means={name: total / len(digests) for name, total in counter.sums.items()},
        largest=counter.largest,
        images=len(digests),
        network_sha256=network_digest(network),
        images_sha256=images_digest(digests),
    )


class _Counter:
    """Sums over images of what a `Calibration` holds.

    Means and extremes are found inside the graph, by a node or two each, and come out as a few numbers.
    """

    def __init__(self, model: OnnxModel, network: Network) -> None:
        self._counted = measured_tensors(network)
        self._constants = {name: network.weights[name] for name in self._counted if name in network.weights}
        self._read = list(dict.fromkeys(node.input[0] for node in network.convolutions))
        self._made = [node.output[0] for node in network.convolutions]
        extra = [helper.make_node("GlobalAveragePool", [name], [f"{_MEAN}{name}"]) for name in self._read]
        for name in self._made:
            extra += [helper.make_node(op, [name], [prefix + name], keepdims=0) for op, prefix in _OF_RESULTS.items()]
        counted = [name for name in self._counted if name not in self._constants]
        names = [*counted, *(name for node in extra for name in node.output)]
        self._runner = NetworkRunner(model.proto, [*network.nodes, *extra], names)
        self._images = 0
        self.histograms: dict[str, Histogram] = {}
        self.sums: dict[str, DoubleArray] = {}
        self.largest: dict[str, float] = dict.fromkeys(self._made, 0.0)

    def add(self, fed: npt.NDArray[np.generic]) -> None:
        """Counts one more image."""
        found = {**self._runner.run(fed), **self._constants}
        self._images += 1
        for name in self._counted:
            histogram = Histogram.of(found.pop(name))
            self._check(name, histogram.is_finite)
            before = self.histograms.get(name)
            self.histograms[name] = Histogram.sum([before, histogram]) if before else histogram
        for name in self._read:
            means = found[f"{_MEAN}{name}"].mean(axis=0, dtype=np.float64).reshape(-1)
            self.sums[name] = self.sums.get(name, 0) + means
        for name in self._made:
            reach = max(float(found[f"{_MOST}{name}"]), -float(found[f"{_LEAST}{name}"]))
            self._check(name, math.isfinite(reach) and math.isfinite(found[f"{_AVERAGE}{name}"].item()))
            self.largest[name] = max(self.largest[name], reach)

    def _check(self, name: str, is_finite: bool) -> None:
        if not is_finite:
            raise ExportError(
                f"On image {self._images}, {name} holds values that are infinite or no numbers.",
                fix="Check the weights (y7 verify); leave the image out if it is unlike the others.",
            )


def image_digest(fed: npt.NDArray[np.generic]) -> bytes:
    """SHA-256 of an image as the network takes it."""
    return hashlib.sha256(fed.tobytes()).digest()


def images_digest(digests: Iterable[bytes]) -> str:
    """SHA-256 of images in any order, from that of each."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def network_digest(network: Network) -> str:
    """SHA-256 of the nodes and weights in front of decoding; what stands behind does not matter."""
    digest = hashlib.sha256()
    for node in network.nodes:
        digest.update(node.SerializeToString(deterministic=True))
    read = {name for node in network.nodes for name in node.input}
    for tensor in sorted(network.proto.graph.initializer, key=lambda tensor: tensor.name):
        if tensor.name in read:
            digest.update(tensor.SerializeToString(deterministic=True))
    return digest.hexdigest()
