"""How large the values inside a graph get on real images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from yolov7_deploy.errors import UsageError
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.image import Image
from yolov7_deploy.precision.ort_runner import NetworkRunner, network_input

_PREFIX = "range__"


def activation_ranges(
    model: OnnxModel, network: Sequence[onnx.NodeProto], names: Sequence[str], images: Sequence[Image]
) -> dict[str, float]:
    """The largest absolute value that each tensor takes on any of the images.

    The largest value is found inside the graph, by two more nodes a tensor, so a run gives one number a tensor and
    needs no more memory than the network itself: all activations of a 1280-pixel model would be gigabytes.

    Args:
        model: A float32 graph.
        network: Its nodes to run, in order; those behind the head are not needed.
        names: float32 tensors that these nodes make.
        images: uint8 BGR of any size.

    Raises:
        UsageError: There is no image.
    """
    if not images:
        raise UsageError("There is no image to measure activation ranges on.", fix="Give some:  --image FILE")
    runner = NetworkRunner(model.proto, [*network, *_probes(names)], [_PREFIX + name for name in names])
    worst = np.zeros(len(names))
    for image in images:
        found = runner.run(network_input(image, model.metadata))
        worst = np.maximum(worst, [found[_PREFIX + name].item() for name in names])
    return dict(zip(names, worst.tolist(), strict=True))


def _probes(names: Sequence[str]) -> list[onnx.NodeProto]:
    """Nodes that give max(|tensor|) for every name."""
    nodes = []
    for name in names:
        magnitude, largest = f"{_PREFIX}abs__{name}", _PREFIX + name
        nodes.append(helper.make_node("Abs", [name], [magnitude], name=magnitude))
        # Without axes it reduces all of them, in the form of opset 13 as in that of 18.
        nodes.append(helper.make_node("ReduceMax", [magnitude], [largest], name=largest, keepdims=0))
    return nodes
