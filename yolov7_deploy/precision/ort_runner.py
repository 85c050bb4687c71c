"""Run a part of a graph in ONNX Runtime and read its intermediate tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from yolov7_deploy._ort_options import ORT_ERRORS, base_session_options, find_damage, ort_reason
from yolov7_deploy.errors import ExportError
from yolov7_deploy.image import FloatArray, Image, fit_letterbox, to_network_input
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.precision.subgraph import is_custom, node_inputs

AnyArray = npt.NDArray[np.generic]

_MAX_LISTED = 200  # characters


def network_input(image: Image, metadata: ModelMetadata) -> AnyArray:
    """Return the letterboxed image as network input, repeated to the model's fixed batch size."""
    letterbox = fit_letterbox((image.shape[0], image.shape[1]), metadata.default_hw)
    batch = [letterbox.apply(image)] * (metadata.batch or 1)
    return np.stack(batch) if metadata.input_kind == "uint8" else to_network_input(batch)


class NetworkRunner:
    """An ONNX Runtime session (CPU) of some nodes of a graph.

    Args:
        proto: The graph that has the inputs and the weights.
        nodes: The nodes to run, in execution order.
        names: Tensors to return: outputs or inputs of these nodes.
        inputs: Tensors that the nodes read and that are fed; the inputs of the graph by default.
        weights: Constants to add to those of the graph.

    Raises:
        ExportError: ONNX Runtime cannot run the nodes; the message names the custom operators among them.
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
        needed = {name for node in nodes for name in node_inputs(node)}
        initializers = [tensor for tensor in proto.graph.initializer if tensor.name in needed]
        initializers += [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
        constant = {tensor.name for tensor in initializers}
        fed = [entry for entry in (inputs or proto.graph.input) if entry.name in needed - constant]
        produced = {name for node in nodes for name in node.output}
        self.inputs = tuple(entry.name for entry in fed)
        self._fed_names = [name for name in names if name not in produced]
        self._output_names = [name for name in names if name in produced]
        outputs = [onnx.ValueInfoProto(name=name) for name in self._output_names]
        graph = helper.make_graph(nodes, "network", fed, outputs, initializer=initializers)
        self._custom = sorted({f"{node.op_type} of {node.domain!r}" for node in nodes if is_custom(node)})
        # Names of domains as in the graph; ONNX Runtime refuses a domain of which it knows nothing.
        domains = {node.domain for node in nodes} | {""}
        opsets = [entry for entry in proto.opset_import if entry.domain in domains]
        functions = proto.functions if self._custom else []
        if functions:
            opsets = list(proto.opset_import)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=proto.ir_version, functions=functions)
        data = model.SerializeToString()
        if damage := find_damage(data):
            raise ExportError(f"The graph is damaged: {damage}.", fix="Export the file again.")
        try:
            self._session = onnxruntime.InferenceSession(
                data, base_session_options(), providers=["CPUExecutionProvider"]
            )
        except ORT_ERRORS as error:
            raise self._error(error) from error

    def run(self, feeds: Mapping[str, AnyArray] | AnyArray) -> dict[str, FloatArray]:
        """Return the tensors by name.

        Args:
            feeds: Input tensors by name, or one array if there is only one input.
        """
        feeds = feeds if isinstance(feeds, Mapping) else {self.inputs[0]: feeds}
        found: dict[str, Any] = {name: feeds[name] for name in self._fed_names}
        if self._output_names:  # ONNX Runtime raises an error for an empty list
            try:
                values = self._session.run(self._output_names, {name: feeds[name] for name in self.inputs})
            except ORT_ERRORS as error:
                raise self._error(error) from error
            found.update(zip(self._output_names, values, strict=True))
        return found

    def _error(self, error: Exception) -> ExportError:
        custom = f", which has custom operators ({', '.join(self._custom)[:_MAX_LISTED]})" if self._custom else ""
        return ExportError(
            f"ONNX Runtime cannot run the network before its last convolutions{custom}: {ort_reason(error)}",
            fix="Activation ranges are measured in ONNX Runtime: export the network with standard ONNX operators."
            if custom
            else "Check the file, or export it again:  y7 export --weights WEIGHTS.pt",
        )
