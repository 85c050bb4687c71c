"""Runs the network of a graph in ONNX Runtime and gives chosen tensors of its inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from yolov7_deploy.image import Image, fit_letterbox, to_network_input
from yolov7_deploy.metadata import ModelMetadata

FloatArray = npt.NDArray[np.float32]
AnyArray = npt.NDArray[np.generic]

_ERRORS_ONLY = 3


def network_input(image: Image, metadata: ModelMetadata) -> AnyArray:
    """An image as a model takes it, as often as its fixed batch wants it."""
    placed = fit_letterbox((image.shape[0], image.shape[1]), metadata.default_hw)
    batch = [placed.apply(image)] * (metadata.batch or 1)
    return np.stack(batch) if metadata.input_kind == "uint8" else to_network_input(batch)


class NetworkRunner:
    """Some nodes of a graph, ready to run.

    Args:
        proto: The graph, for its inputs and weights.
        nodes: In an order that can run; those behind what is wanted are not needed.
        names: Tensors that these nodes make, or read from outside.
        inputs: Tensors that the nodes read from outside; the inputs of the graph where left out.
        weights: More constants than the graph has.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        nodes: Sequence[onnx.NodeProto],
        names: Sequence[str],
        *,
        inputs: Sequence[onnx.ValueInfoProto] | None = None,
        weights: Mapping[str, AnyArray] | None = None,
    ) -> None:
        needed = {name for node in nodes for name in node.input}
        stored = [tensor for tensor in proto.graph.initializer if tensor.name in needed]
        stored += [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
        constant = {tensor.name for tensor in stored}
        given = [entry for entry in (inputs or proto.graph.input) if entry.name in needed - constant]
        made = {name for node in nodes for name in node.output}
        self.inputs = tuple(entry.name for entry in given)
        self._passed = [name for name in names if name not in made]
        self._names = [name for name in names if name in made]
        outputs = [onnx.ValueInfoProto(name=name) for name in self._names]
        graph = helper.make_graph(nodes, "network", given, outputs, initializer=stored)
        opsets = [entry for entry in proto.opset_import if not entry.domain]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=proto.ir_version)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, fed: Mapping[str, AnyArray] | AnyArray) -> dict[str, FloatArray]:
        """The tensors by name; an array alone is the only input."""
        feeds = fed if isinstance(fed, Mapping) else {self.inputs[0]: fed}
        # ONNX Runtime takes no names for an error.
        found = self._session.run(self._names, {name: feeds[name] for name in self.inputs}) if self._names else []
        return {**{name: feeds[name] for name in self._passed}, **dict(zip(self._names, found, strict=True))}
