"""Intermediate outputs of an ONNX file: its raw head maps and decoded output for one canvas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from yolov7_deploy._ort_options import base_session_options
from yolov7_deploy.export.nms import EFFICIENT_OP
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.image import FloatArray, Image, to_network_input
from yolov7_deploy.metadata import RAW_OUTPUT
from yolov7_deploy.runtimes.base import IntermediateOutputs


class OnnxProbe:
    """Runs a copy of an exported ONNX file that has intermediate tensors as additional outputs.

    Args:
        path: The file; it is not changed.

    Raises:
        LoadError: The file is not ONNX, or was not written by this package.
    """

    def __init__(self, path: Path) -> None:
        model = OnnxModel.load(path)
        self._metadata = model.metadata
        graph = model.proto.graph
        self._nms_inputs = [list(node.input) for node in graph.node if node.op_type == EFFICIENT_OP]
        added = [*self._metadata.heads, *(name for names in self._nms_inputs for name in names)]
        known = {output.name for output in graph.output}
        # Without a type, because maps are FP16 in some files.
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in added if name not in known)
        self._outputs = [*added, *([RAW_OUTPUT] if RAW_OUTPUT in known else [])]
        options = base_session_options()
        self._session = onnxruntime.InferenceSession(
            model.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def stages(self, canvas: Image) -> IntermediateOutputs:
        """Return the intermediate outputs for one canvas; decoding that is part of an NMS op has none."""
        batch = [canvas] * (self._metadata.batch or 1)
        array = np.stack(batch) if self._metadata.input_kind == "uint8" else to_network_input(batch)
        results = dict(zip(self._outputs, self._session.run(self._outputs, {self._input: array}), strict=True))
        decoded: FloatArray | None = None
        if RAW_OUTPUT in results:
            decoded = results[RAW_OUTPUT][0]
        for boxes, scores in self._nms_inputs:
            # EfficientNMS reads the product of objectness and class score, so the objectness is 1 here.
            ones = np.ones((results[boxes].shape[1], 1), dtype=np.float32)
            decoded = np.concatenate([results[boxes][0], ones, results[scores][0]], axis=1)
        heads = [results[name][0].astype(np.float32) for name in self._metadata.heads]
        return IntermediateOutputs(heads=heads, decoded=decoded)
